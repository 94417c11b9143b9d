"""prior_sensitivity: how much each cell's latents depend on prior and likelihood, by power-scaling."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from pyro_scvi.errors import ModelError
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.utils.checks import require_kind, warn

if TYPE_CHECKING:
    from arviz_stats.base.array import BaseArray
    from arviz_stats.base.dataarray import BaseDataArray

DRAWS = ["chain", "draw"]

ALL_CELLS = "all cells"
"""What rows of global latents have for a cell."""

FEWEST_DRAWS = 25  # a Pareto law is fitted to five or more in each tail, which is a fifth of them


def prior_sensitivity(tree: xr.DataTree, *, priors: Sequence[str] | None = None, step: float = 0.01) -> pd.DataFrame:
    r"""Measure how sensitive latents are to their prior and to the counts, by power-scaling.

    .. math::

        p_\alpha(z, l | x) \propto p(z, l)^\alpha\, p(x | z, l) \quad or \quad p(z, l)\, p(x | z, l)^\alpha

    The sensitivity is the rate at which the marginal posterior of a latent moves with log2 alpha at alpha = 1, in
    cumulative Jensen-Shannon distance. Draws are reweighted to the posterior at alpha = 1 - step and 1 + step, with the
    Pareto-smoothed weights p(z, l)^(alpha - 1) or p(x | z, l)^(alpha - 1). z_n and l_n belong to one cell, so the
    weights do too. A density summed over all cells, as ``arviz_stats.psense`` of the whole tree takes it, is mostly
    noise from the other cells. The same holds of every other continuous latent of the cells. w, y and h are left out,
    because the scaled density has them integrated out.

    Global latents theta get rows of no cell. Their draws come from the guide, which was fitted to all cells. So the
    guide's density stands for their posterior, and what it has over the prior for the likelihood of all cells:

    .. math::

        p_\alpha(\theta | x) \propto p(\theta)^\alpha\, \frac{q(\theta)}{p(\theta)} \quad or \quad
        p(\theta)\, \Big(\frac{q(\theta)}{p(\theta)}\Big)^\alpha

    If the guide is wrong about them, so are these rows. Of draws that ``with_globals`` gave, no density is known, and
    there are no such rows. Numbers of an array that are the same in all draws and cells have none either, as the upper
    triangle of a Cholesky factor.

    Parameters
    ----------
    tree
        From ``to_datatree``, with z, l or other continuous latents of the cells in ``posterior``. The draws must follow
        the posterior: take ``ps.Importance()`` or ``ps.HMC()``, and a thousand or more, see ``prior_noise`` below.
    priors
        Variables whose prior density is scaled, by their names in ``log_prior``, such as ("z",) or ("l",); by default,
        all. The table has rows of the latents of cells, or of global ones, if it is a prior of theirs.
    step
        Distance of alpha from 1.

    Returns
    -------
    DataFrame by (cell, variable), the variables z[0], z[1], ..., l, and others in the same way; global latents have
    the cell "all cells"
        ``prior`` and ``likelihood``: sensitivities, not negative; NaN where too few draws differ. ``prior_noise`` and
        ``likelihood_noise``: the same with the weights of unrelated draws, which shows the Monte Carlo error (with 10
        latents about 0.04 for 200 draws, 0.02 for 1,000). Kallioinen et al. count a sensitivity above 0.05. To the
        likelihood alone: the data inform the latent, as they should. To the prior alone: the prior decides. To both:
        prior and data both matter.

    Raises
    ------
    ImportError
        Without arviz-stats, which the extra ``arviz`` installs.
    ModelError
        If ``tree`` is no DataTree, has no latent of the cells, or lacks ``log_prior`` or the ``lp`` of
        ``sample_stats``, or no cell has enough draws that differ, or all ``priors`` are of global latents whose
        density is not known.

    Warns
    -----
    UserWarning
        If k-hat shows that the draws of more than a tenth of the cells do not follow the posterior, or global latents
        are left out because their density is not known.

    References
    ----------
    Kallioinen, Paananen, Buerkner and Vehtari 2024, Detecting and diagnosing prior and likelihood sensitivity with
    power-scaling, Statistics and Computing 34, 57.

    Examples
    --------
    >>> tree = ps.to_datatree(fit, test.take(range(2)), samples=1000, sampler=ps.Importance())
    >>> table = ps.prior_sensitivity(tree)
    >>> table.index.names, table.columns.tolist()
    (FrozenList(['cell', 'variable']), ['prior', 'prior_noise', 'likelihood', 'likelihood_noise'])
    """
    require_kind(tree, xr.DataTree, "tree", "ps.to_datatree(fit, cells, sampler=ps.Importance())")
    array_stats, dataarray_stats = _arviz()
    parts = _parts(tree, priors)
    if ALL_CELLS not in parts[0].latents.cell:
        _warn_of_khat(tree)
    table = pd.concat([_sensitivity(array_stats, dataarray_stats, part, step) for part in parts])
    if table.prior.isna().all():
        raise ModelError(
            f"each cell needs at least {FEWEST_DRAWS} different draws, and no cell has them. Pass samples=1000 "
            "and sampler=ps.Importance() or ps.HMC()"
        )
    return table


class _Part(NamedTuple):
    """Latents (chain, draw, cell, variable), and log densities (chain, draw, cell) of the scaled prior and of x, nats.

    Global latents have one cell, which stands for all.
    """

    latents: xr.DataArray
    log_prior: xr.DataArray
    log_likelihood: xr.DataArray


def _sensitivity(array_stats: BaseArray, dataarray_stats: BaseDataArray, part: _Part, step: float) -> pd.DataFrame:
    columns = {}
    for name, log_density in {"prior": part.log_prior, "likelihood": part.log_likelihood}.items():
        weights = [_weights(array_stats, log_density, alpha) for alpha in (1 - step, 1 + step)]
        # Draws half a chain apart are as good as unrelated, and a shift keeps the chain's autocorrelation.
        unrelated = [weight.roll(draw=weight.sizes["draw"] // 2) for weight in weights]
        columns[name] = _distance_moved(dataarray_stats, part.latents, weights, step)
        columns[f"{name}_noise"] = _distance_moved(dataarray_stats, part.latents, unrelated, step)
    labels = [part.latents[dim].values for dim in ("cell", "variable")]
    return pd.DataFrame(columns, pd.MultiIndex.from_product(labels, names=["cell", "variable"]))


def _arviz() -> tuple[BaseArray, BaseDataArray]:
    try:
        from arviz_stats.base.array import array_stats
        from arviz_stats.base.dataarray import dataarray_stats
    except ImportError as error:
        raise ImportError("prior_sensitivity needs arviz-stats: pip install 'pyro-scvi[arviz]'") from error
    return array_stats, dataarray_stats


def _parts(tree: xr.DataTree, priors: Sequence[str] | None) -> list[_Part]:
    """The latents of the cells and the global ones, those of the two that have a prior to scale."""
    try:
        posterior, stats = tree["posterior"].to_dataset(), tree["sample_stats"].to_dataset()
        log_prior = {str(name): value.astype(float) for name, value in tree["log_prior"].data_vars.items()}
        scaled = {name: log_prior[name] for name in (priors or log_prior)}
        shared = {name for name, value in log_prior.items() if "cell" not in value.dims}
        parts = []
        if scaled.keys() - shared:
            parts.append(_part(posterior, _of(log_prior, log_prior.keys() - shared), scaled, stats["lp"]))
        if scaled.keys() & shared and _has_density(stats["log_q_global"], alone=not parts):
            densities = {name: _as_cell(value) for name, value in _of(log_prior, shared).items()}
            of_globals = posterior[[name for name in posterior.data_vars if name in shared]].map(_as_cell)
            parts.append(_part(of_globals, densities, scaled, _as_cell(stats["log_q_global"])))
    except KeyError as error:
        raise ModelError(
            f"the tree lacks {error}; needed are posterior, lp in sample_stats, and log_prior with the variables that "
            "priors= names: pass what to_datatree returns"
        ) from error
    return parts


def _has_density(log_q: xr.DataArray, *, alone: bool) -> bool:
    """Whether the density of the global latents is known; says so if not, which is no error unless they are alone."""
    if bool(log_q.notnull().any()):
        return True
    unknown = (
        "the density of the global latents' draws is not known, as with_globals gives draws without one: take the tree "
        "of a fit whose guide has it"
    )
    if alone:
        raise ModelError(unknown)
    warn(f"{unknown}. There are no rows of {ALL_CELLS!r}")
    return False


def _of(log_prior: dict[str, xr.DataArray], names: Collection[str]) -> dict[str, xr.DataArray]:
    return {name: value for name, value in log_prior.items() if name in names}


def _as_cell(value: xr.DataArray) -> xr.DataArray:
    """A global latent, or its density, as that of one cell."""
    return value.expand_dims(cell=[ALL_CELLS], axis=2)


def _part(
    posterior: xr.Dataset, log_prior: dict[str, xr.DataArray], scaled: Collection[str], log_joint: xr.DataArray
) -> _Part:
    """``log_joint`` holds prior and likelihood: the likelihood is what the priors leave."""
    log_likelihood = log_joint.astype(float) - _total(list(log_prior.values()))
    return _Part(_joined(posterior, list(log_prior)), _total(list(_of(log_prior, scaled).values())), log_likelihood)


def _joined(posterior: Any, names: Sequence[str]) -> xr.DataArray:
    """The latents ``names`` of the cells as variables (chain, draw, cell, variable), one for each of their numbers."""
    latents = [_by_number(posterior[name]) for name in names if name in posterior]
    if not latents:
        raise ModelError(
            f"posterior has no latent of the cells, such as {' or '.join(names)}; leave sites= of to_datatree out, or "
            "name one there"
        )
    return xr.concat(latents, "variable")


def _by_number(latent: xr.DataArray) -> xr.DataArray:
    """A scalar by its name, an array's numbers by the name and their places."""
    own = [dim for dim in latent.dims if dim not in (*DRAWS, "cell")]
    if not own:
        return latent.expand_dims(variable=[latent.name], axis=-1)
    places = product(*(latent[dim].values for dim in own))
    labels = [f"{latent.name}[{', '.join(map(str, place))}]" for place in places]
    flat = latent.transpose(*DRAWS, "cell", *own).values.reshape(*(latent.sizes[d] for d in (*DRAWS, "cell")), -1)
    known = {dim: latent[dim].values for dim in (*DRAWS, "cell")} | {"variable": labels}
    numbers = xr.DataArray(flat, known, (*DRAWS, "cell", "variable"))
    varying = (numbers != numbers[0, 0, 0]).any([*DRAWS, "cell"])
    return numbers[..., varying.values] if varying.any() else numbers  # all the same: too few draws, which is said


def _total(terms: Sequence[xr.DataArray]) -> xr.DataArray:
    return sum(terms[1:], terms[0])


def _warn_of_khat(tree: xr.DataTree) -> None:
    diagnostics = tree["sample_stats"].to_dataset()
    bad = float((diagnostics["khat"] > KHAT_LIMIT).mean()) if "khat" in diagnostics else 0.0
    if bad > 0.1:
        warn(
            f"k-hat is above {KHAT_LIMIT} for {bad:.0%} of the cells: their draws do not follow the posterior. "
            "Draw with sampler=ps.Importance() or ps.HMC()"
        )


def _weights(stats: BaseArray, log_density: xr.DataArray, alpha: float) -> xr.DataArray:
    """Smoothed weights density^(alpha - 1) of the draws of each cell, up to a factor."""

    def of_cell(values: np.ndarray) -> np.ndarray:
        try:
            enough = len(np.unique(values)) >= FEWEST_DRAWS
            with np.errstate(divide="ignore", invalid="ignore"):  # a tail of nearly equal draws
                lw = stats.power_scale_lw(values, alpha=alpha, axis=(0, 1)) if enough else np.full_like(values, np.nan)
            return lw
        except ValueError:  # a tail of equal draws
            return np.full_like(values, np.nan)

    of_cells = xr.apply_ufunc(of_cell, log_density, input_core_dims=[DRAWS], output_core_dims=[DRAWS], vectorize=True)
    weights: xr.DataArray = np.exp(of_cells)
    return weights


def _distance_moved(
    stats: BaseDataArray, latents: xr.DataArray, weights: Sequence[xr.DataArray], step: float
) -> np.ndarray:
    """Distance from the weighted to the plain draws per unit of log2 alpha, the mean of both sides, flattened."""
    lower, upper = weights
    with np.errstate(invalid="ignore"):  # equal draws have no spread to measure the distance in
        moved = stats.power_scale_sense(latents, lower, upper, 1 - step, 1 + step, sample_dims=DRAWS)
    return moved.transpose("cell", "variable").values.ravel()
