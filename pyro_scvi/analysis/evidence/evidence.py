"""Evidence log p(x) of every cell, with standard error, effective sample size and Pareto k-hat."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.analysis.evidence.annealed import annealed_weights
from pyro_scvi.analysis.evidence.densities import DENSITY, warn_if_density
from pyro_scvi.analysis.evidence.totals import CONDITIONAL, total_term, warn_if_conditional
from pyro_scvi.analysis.global_averages import at_draws, seeds_of
from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import Joint, log_joint
from pyro_scvi.inference.compiled import RecordedJoint
from pyro_scvi.inference.evaluation import bound_terms, evaluating
from pyro_scvi.inference.importance import KHAT_LIMIT, SamplingBudget, evidence_of
from pyro_scvi.inference.proposals import weighted
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.checks import require_at_least, switches_checked, warn
from pyro_scvi.utils.precision import in_float64
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

CELLS_FOR_A_CHECK, MOST_CHECKED = 200, 2  # one of so many cells is annealed, and at most two of a call
SEVERAL_FOR_A_CHECK = 20  # and one of so many with several modes, at least one and at most two
CHAINS, TEMPERATURES = 64, 60  # of that: a few per cent of the time
COLUMNS = ("log_evidence", "se", "ess", "khat", "amortized_bound")


@switches_checked
def evidence(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 1000,
    global_draws: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    steps: int = 100,
    rounds: int = 3,
    compiled: bool = False,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Log marginal likelihood of every cell, by importance sampling.

    The proposal is corrected for each cell.

    .. math:: \log p(x_n) = \log \int p(x_n | z, l)\, p(z)\, p(l)\, dz\, dl

    The guide only starts the proposal. For each cell a normal with a full covariance is fitted to the posterior by
    Newton steps on its bound, or by gradient steps where these stay long, and a Student-t is put in its place. Its
    weighted draws come in rounds, between which it takes up the mean and covariance that all draws show; the first
    round only adapts it. Where a posterior has several modes, each has a component. A cell whose k-hat stays above 0.7
    gets twice the steps and rounds, then four times as many. The amortized q itself is not good enough a proposal to
    compare models: on real cells its k-hat (Vehtari, Simpson, Gelman, Yao and Gabry 2024) is above 0.7 nearly
    everywhere. With an observed library size and Poisson counts, it is log p(total) under the LogNormal distribution of
    the size, and the counts given the total. With one and other counts it is conditional on the total
    (``attrs["conditional_on_total"]``). If x has a continuous distribution, it is a log density
    (``attrs["density"]``). Global latents (weights, dispersions with a prior) are held at the guide's
    medians, unless ``global_draws`` averages over them.

    Parameters
    ----------
    fit, cells
        The fit and cells with its schema, best held out from training.
    samples
        Draws of the adapted proposal for every cell.
    global_draws
        None: global latents are held at the guide's medians. A number n: log p(x_n) is averaged over n of their draws
        from the guide, log mean_s p(x_n | theta_s), at n times the cost. This is what is predicted of a new cell, for
        each cell by itself, and not the evidence of all cells together.
    seed
        Of the draws; the global random state is left alone.
    batch_size
        Cells at a time.
    steps, rounds
        Gradient steps of the refinement, where each Newton step counts as 13; and the most rounds of draws that only
        adapt the proposal, as they do while their k-hat is above 0.5.
    compiled
        Whether to compile the density, as ``fit`` does with its steps. This takes up to a minute at the start, then
        about three quarters of the time: worth it for thousands of cells. Results differ by rounding only.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    DataFrame by cell
        ``log_evidence`` (nats per cell), its standard error ``se``, ``ess`` (of ``samples`` draws), ``khat``, and
        ``amortized_bound``, the guide's ELBO by 100 draws (NaN where the guide has no density for the cell). With
        ``global_draws``, ``se`` has their spread in it, ``ess`` and the bound are means over them, and ``khat`` is the
        largest.

    Raises
    ------
    ModelError
        For the prior Flat, under which no evidence exists, for numbers that are too small, and for arguments of the
        wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.
    FitError
        If the density cannot be compiled.

    Warns
    -----
    UserWarning
        If k-hat is above 0.7 for more than a tenth of the cells, if the evidence is conditional on the total or a
        density, or if annealing finds more mass than the proposals. It checks one of 200 cells, and one of 20 for which
        several modes are found; at most two of each, of the latter at least one.

    Examples
    --------
    >>> table = ps.evidence(fit, test.take(range(4)), samples=100)
    >>> table.columns.tolist()
    ['log_evidence', 'se', 'ess', 'khat', 'amortized_bound']
    >>> table.index.tolist() == test.obs.index[:4].tolist()
    True
    """
    require_inputs(fit, cells)
    require_proper(fit.model, "the evidence does not exist")
    require_at_least(2, samples=samples)
    require_at_least(1, batch_size=batch_size)
    require_at_least(0, steps=steps, rounds=rounds)
    if global_draws is not None:
        options: dict[str, Any] = {"samples": samples, "batch_size": batch_size, "steps": steps, "rounds": rounds}
        fits, own = at_draws(fit, global_draws, seed), seeds_of(seed, global_draws)
        options |= {"compiled": compiled, "progress": progress}
        return _averaged([evidence(one, cells, seed=s, **options) for one, s in zip(fits, own, strict=True)])
    budget = SamplingBudget(samples, steps, rounds)
    joint = RecordedJoint(min(batch_size, cells.n_cells)) if compiled else log_joint
    with evaluating(fit.model, fit.guide, seed):
        batches = over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress)
        values = torch.cat([_of_batch(fit.guide, x, gamma, budget, joint) for x, gamma in batches])
    *columns, several = values.numpy().T
    table = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), index=pd.Index(cells.cell_names, name="cell"))
    _warn_of(table)
    _check_some(fit, cells, table, several > 0, seed)
    table.attrs |= {CONDITIONAL: warn_if_conditional(fit.model), DENSITY: warn_if_density(fit.model)}
    return table


def _averaged(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """Log mean of p(x) over draws of the global latents, with the error of that mean."""
    log_p = np.stack([table.log_evidence for table in tables])  # (draws, cells)
    n = len(log_p)
    log_mean = np.logaddexp.reduce(log_p, 0) - np.log(n)
    ratios = np.exp(log_p - log_mean)
    # Their spread holds the error of each, as the draws are independent; a single one has no spread.
    se = ratios.std(0, ddof=1) / np.sqrt(n) if n > 1 else tables[0].se.to_numpy()
    joined = {name: np.stack([table[name] for table in tables]) for name in ("ess", "khat", "amortized_bound")}
    columns = (log_mean, se, joined["ess"].mean(0), joined["khat"].max(0), joined["amortized_bound"].mean(0))
    table = pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)), index=tables[0].index)
    table.attrs |= {name: tables[0].attrs[name] for name in (CONDITIONAL, DENSITY)}
    return table


def _of_batch(guide: Guide, x: Tensor, gamma: Tensor, budget: SamplingBudget, joint: Joint) -> Tensor:
    result = weighted(guide, x, gamma, budget, joint=joint)
    charge = total_term(guide.model, x, gamma)
    log_evidence, bound = result.log_evidence + in_float64(charge), _amortized_bound(guide, x, gamma) + charge
    columns = (log_evidence, result.se, result.ess, result.khat, bound, result.several)
    return torch.stack([in_float64(column).cpu() for column in columns], -1)


def _amortized_bound(guide: Guide, x: Tensor, gamma: Tensor) -> Tensor:
    if not (guide.amortized and guide.stochastic):
        return torch.full_like(x[:, 0], torch.nan)
    return bound_terms(guide, x, gamma, 100)[0].mean(0)


def _checked_rows(several: np.ndarray) -> list[int]:
    """Rows of the cells to anneal: some of all, and some of those with several modes (cells,)."""
    evenly = _evenly(np.arange(len(several)), len(several) // CELLS_FOR_A_CHECK)
    found = several.nonzero()[0]
    return np.union1d(evenly, _evenly(found, -(-len(found) // SEVERAL_FOR_A_CHECK))).tolist()


def _evenly(rows: np.ndarray, n: int) -> np.ndarray:
    few = min(n, MOST_CHECKED)
    return rows[np.arange(few) * len(rows) // max(few, 1)]


def _check_some(fit: Fit, cells: Cells, table: pd.DataFrame, several: np.ndarray, seed: int) -> None:
    """Anneal few of the cells, and warn if that finds mass which the proposals have missed."""
    rows = _checked_rows(several)
    if not rows:
        return
    few, some = cells.take(rows), table.iloc[rows]
    with evaluating(fit.model, fit.guide, seed):
        for x, gamma in batches_in_streams(fit, few, len(rows), seed):
            value, se, ess, _ = evidence_of(annealed_weights(fit.guide, x, gamma, CHAINS, TEMPERATURES, 1))
            excess = (value + in_float64(total_term(fit.model, x, gamma))).cpu().numpy() - some.log_evidence
            # Annealing in few steps is too low, if anything: only where it is higher does it say something.
            error = (se.cpu().numpy() ** 2 + some.se**2) ** 0.5
            missed = excess[(excess > 3 * error + 0.1) & (ess.cpu().numpy() > 4) & (some.khat <= KHAT_LIMIT)]
    if len(missed):
        warn(
            f"annealing finds {missed.max():.1f} nats more for {list(missed.index)}: the proposals miss modes, "
            "which k-hat does not show. Check other cells by ps.annealed_evidence"
        )


def _warn_of(table: pd.DataFrame) -> None:
    bad = (~(table.khat <= KHAT_LIMIT)).mean()
    if bad > 0.1:
        warn(
            f"k-hat is above {KHAT_LIMIT} for {bad:.0%} of the cells: do not trust their evidence. Raise "
            "samples=, or rounds= of ps.evidence"
        )
