"""compare: models ranked by the evidence of held-out cells, with paired differences and their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.analysis.evidence.densities import is_density
from pyro_scvi.analysis.evidence.evidence import evidence
from pyro_scvi.analysis.evidence.leave_one_out import WHY_NOT_CELLS
from pyro_scvi.analysis.evidence.left_out import entries_of_density
from pyro_scvi.analysis.evidence.totals import is_conditional
from pyro_scvi.analysis.label_effects import dependence
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.model import SCVI
from pyro_scvi.training.fitted import Fit
from pyro_scvi.utils.checks import require_at_least, switches_checked


@switches_checked
def compare(
    fits: Mapping[str, Fit | Sequence[Fit]],
    cells: Cells,
    *,
    samples: int = 1000,
    global_draws: int | None = None,
    pointwise: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Compare models by the evidence of held-out cells.

    .. math:: difference_m = \frac1N \sum_n [\log p_m(x_n) - \log p_{best}(x_n)], \qquad
        difference\_se_m = \frac{1}{\sqrt N}\, sd_n [\log p_m(x_n) - \log p_{best}(x_n)]

    Parameters
    ----------
    fits
        Name -> a fit, or several fits of the same model with other seeds: a difference between models means little
        unless it is larger than what a refit changes.
    cells
        Cells that no fit has seen.
    samples, seed, progress
        As in ``evidence``; every fit is scored with the same draws and seed.
    global_draws
        As in ``evidence``, for the fits whose models have global latents.

    pointwise
        Whether to keep log p(x) of every cell, as the table cells x models ``.attrs["pointwise"]``, for
        :func:`stacking_weights`.

    Returns
    -------
    DataFrame by model, best first
        ``log_evidence`` (nats per cell, mean over cells and refits) and its ``se`` over cells, ``difference`` from the
        best model, paired by cell, with ``difference_se``, ``refit_sd`` (spread of the mean over refits, NaN for one),
        ``bound_gap`` (evidence minus the guide's bound), median ``ess``, ``khat_bad`` (share of cells above 0.7),
        ``parameters``, ``seconds`` of training, ``fits``. ``.attrs["quantity"]`` says what is compared: "log p(x)", or
        "log p(x | cell_type)" if the cells have labels and every model depends on them. ``.attrs["global_latents"]``
        says, for each model that has any, whether they are at their medians or averaged over draws.

    Raises
    ------
    ModelError
        If no fit is given, if the evidence of only some is conditional on the total or a density, if their densities
        are of different entries of x, if a prior is
        improper, if the cells have labels and only some of the models depend on them, or for log likelihoods or
        leave-one-out results in place of fits: leave-one-cell-out from log p(x_n | z_n) is invalid here. Single entries
        may be left out: ``ps.leave_one_out``.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> other = ps.fit(ps.SCVI(20, 2, prior=ps.priors.StudentT(2)), train, epochs=5, progress=False)
    >>> table = ps.compare({"normal": fit, "student-t": other}, test.take(range(4)), samples=100)
    >>> sorted(table.index), float(table.difference.iloc[0])
    (['normal', 'student-t'], 0.0)
    """
    listed = _listed(fits)
    if global_draws is not None:
        require_at_least(1, global_draws=global_draws)
    _require_one_kind(listed)
    given = _given(listed, cells)
    _require_same_entries(listed, cells)
    options: dict[str, Any] = {"samples": samples, "seed": seed, "progress": progress}
    tables = {name: [_evidence(fit, cells, global_draws, options) for fit in of] for name, of in listed.items()}
    means = {name: np.mean([t.log_evidence for t in of], 0) for name, of in tables.items()}
    by_cell = pd.DataFrame(means, pd.Index(cells.cell_names, name="cell"))
    order = by_cell.mean().sort_values(ascending=False).index
    gaps = by_cell.sub(by_cell[order[0]], axis=0)
    rows = [_row(listed[name], tables[name], by_cell[name], gaps[name]) for name in order]
    table = pd.DataFrame(rows, index=pd.Index(order, name="model"))
    table.attrs["quantity"] = f"log p(x | {given})" if given else "log p(x)"
    table.attrs["global_latents"] = {
        name: "at their medians" if global_draws is None else f"averaged over {global_draws} draws"
        for name, of in listed.items()
        if any(fit.guide.weights.supports for fit in of)
    }
    if pointwise:
        table.attrs["pointwise"] = ByCell(by_cell[list(order)])
    return table


class ByCell(pd.DataFrame):
    """A table that may be among another's ``attrs``.

    pandas copies these, and takes the comparison of two of them for true or false, when it prints or joins tables.
    """

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> ByCell:
        return self

    def __eq__(self, other: object) -> bool:  # type: ignore[override]
        return self is other


def _evidence(fit: Fit, cells: Cells, global_draws: int | None, options: dict[str, Any]) -> pd.DataFrame:
    """Averaged over draws of the global latents if it is asked for and there are any."""
    return evidence(fit, cells, global_draws=global_draws if fit.guide.weights.supports else None, **options)


def _given(listed: dict[str, list[Fit]], cells: Cells) -> str | None:
    """The column of labels that evidence of these cells is given; refuses fits that disagree on it."""
    name = cells.schema.labels if isinstance(cells, Cells) else None
    if name is None or not (cells.gamma.codes(name) >= 0).any():
        return None
    labelled = cells.take(np.flatnonzero(cells.gamma.codes(name) >= 0))
    depends = {
        key: any(dependence(fit, labelled, cells.columns[name]).sites for fit in of) for key, of in listed.items()
    }
    if len(set(depends.values())) > 1:
        first, second = ([key for key in depends if depends[key] is one] for one in (True, False))
        raise ModelError(
            f"for cells with a label the evidence of {first} is log p(x | {name}), and that of {second} is log p(x). "
            f"These cannot be compared: pass cells.without({name!r})"
        )
    return name if all(depends.values()) else None


def _listed(fits: Mapping[str, Any]) -> dict[str, list[Fit]]:
    if not isinstance(fits, Mapping):
        raise ModelError(f'compare takes fits by name, as in {{"normal": fit}}, got {type(fits).__name__}')
    listed = {name: list(value) if isinstance(value, Sequence) else [value] for name, value in fits.items()}
    if not any(listed.values()):
        raise ModelError("compare needs at least one fit by name")
    for name, values in listed.items():
        if not values:
            raise ModelError(f"compare got no fit for {name!r}")
        for value in values:
            if not isinstance(value, Fit):
                raise ModelError(f"compare takes fits, got {type(value).__name__} for {name!r}; {WHY_NOT_CELLS}")
    return listed


def _require_one_kind(listed: dict[str, list[Fit]]) -> None:
    if of_one_kind := _those_alone(listed, is_density):
        raise ModelError(
            f"{of_one_kind} give x a continuous distribution: their evidence is a density, which cannot be compared "
            "with probabilities of counts. Take a distribution of counts, or compare them with each other only"
        )
    if of_one_kind := _those_alone(listed, is_conditional):
        raise ModelError(
            f"{of_one_kind} have an ObservedLibrary: their evidence is "
            "that of the counts given the total, which cannot be compared with the evidence of whole cells. Take "
            "LatentLibrary, or compare them with each other only"
        )


def _require_same_entries(listed: dict[str, list[Fit]], cells: Cells) -> None:
    kept = {name: [entries_of_density(fit, cells) for fit in of] for name, of in listed.items()}
    first = next(iter(kept.values()))[0]
    if not all(np.array_equal(each, first) for of in kept.values() for each in of):
        shares = ", ".join(f"{np.mean(of):.0%} of {name!r}" for name, of in kept.items())
        raise ModelError(
            f"the models leave different entries of x out of their densities, by observe(mask=) ({shares} are kept), "
            "so their evidence is of different counts. Leave the same entries out in all of them"
        )


def _those_alone(listed: dict[str, list[Fit]], is_so: Callable[[SCVI], bool]) -> list[str]:
    """The names of the models of which something is so, if it is not so of all."""
    told = {name: [is_so(fit.model) for fit in of] for name, of in listed.items()}
    return [] if all(map(all, told.values())) else [name for name, of in told.items() if any(of)]


def _row(fits: list[Fit], tables: list[pd.DataFrame], values: pd.Series, gap: pd.Series) -> dict[str, Any]:
    pooled = pd.concat(tables)
    means = [table.log_evidence.mean() for table in tables]
    return {
        "log_evidence": values.mean(),
        "se": values.sem(),
        "difference": gap.mean(),
        "difference_se": gap.sem(),
        "refit_sd": np.std(means, ddof=1) if len(means) > 1 else np.nan,
        "bound_gap": (pooled.log_evidence - pooled.amortized_bound).mean(),
        "ess": pooled.ess.median(),
        "khat_bad": (~(pooled.khat <= KHAT_LIMIT)).mean(),
        "parameters": sum(p.numel() for p in fits[0].model.parameters()),
        "seconds": float(
            np.mean([fit.history["seconds"].sum() if "seconds" in fit.history else np.nan for fit in fits])
        ),
        "fits": len(fits),
    }
