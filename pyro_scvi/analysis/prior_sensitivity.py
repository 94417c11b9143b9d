"""prior_sensitivity: how much each cell's latents depend on prior and likelihood, by power-scaling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

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

FEWEST_DRAWS = 25  # a Pareto law is fitted to five or more in each tail, which is a fifth of them


def prior_sensitivity(tree: xr.DataTree, *, priors: Sequence[str] | None = None, step: float = 0.01) -> pd.DataFrame:
    r"""Measure how sensitive every cell's latents are to their prior and to the cell's counts, by power-scaling.

    .. math::

        p_\alpha(z, l | x) \propto p(z, l)^\alpha\, p(x | z, l) \quad or \quad p(z, l)\, p(x | z, l)^\alpha

    The sensitivity is the rate at which the marginal posterior of a latent moves with log2 alpha at alpha = 1, in
    cumulative Jensen-Shannon distance. Draws are reweighted to the posterior at alpha = 1 - step and 1 + step, with the
    Pareto-smoothed weights p(z, l)^(alpha - 1) or p(x | z, l)^(alpha - 1). z_n and l_n belong to one cell, so the
    weights do too. A density summed over all cells, as ``arviz_stats.psense`` of the whole tree takes it, is mostly
    noise from the other cells. The same holds of every other continuous latent of the cells. w, y and h are left out,
    because the scaled density has them integrated out. Global latents belong to no cell and get no row.

    Parameters
    ----------
    tree
        From ``to_datatree``, with z, l or other continuous latents of the cells in ``posterior``. The draws must follow
        the posterior: take ``ps.Importance()`` or ``ps.HMC()``, and a thousand or more, see ``prior_noise`` below.
    priors
        Variables whose prior density is scaled, by their names in ``log_prior``, such as ("z",) or ("l",); by default,
        all.
    step
        Distance of alpha from 1.

    Returns
    -------
    DataFrame by (cell, variable), the variables z[0], z[1], ..., l, and others in the same way
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
        ``sample_stats``, or no cell has enough draws that differ.

    Warns
    -----
    UserWarning
        If k-hat shows that the draws of more than a tenth of the cells do not follow the posterior.

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
    latents, log_prior, log_likelihood = _parts(tree, priors)
    _warn_of_khat(tree)
    columns = {}
    for name, log_density in {"prior": log_prior, "likelihood": log_likelihood}.items():
        weights = [_weights(array_stats, log_density, alpha) for alpha in (1 - step, 1 + step)]
        # Draws half a chain apart are as good as unrelated, and a shift keeps the chain's autocorrelation.
        unrelated = [weight.roll(draw=weight.sizes["draw"] // 2) for weight in weights]
        columns[name] = _distance_moved(dataarray_stats, latents, weights, step)
        columns[f"{name}_noise"] = _distance_moved(dataarray_stats, latents, unrelated, step)
    index = pd.MultiIndex.from_product([latents["cell"].values, latents["variable"].values], names=["cell", "variable"])
    return pd.DataFrame(columns, index)


def _arviz() -> tuple[BaseArray, BaseDataArray]:
    try:
        from arviz_stats.base.array import array_stats
        from arviz_stats.base.dataarray import dataarray_stats
    except ImportError as error:
        raise ImportError("prior_sensitivity needs arviz-stats: pip install 'pyro-scvi[arviz]'") from error
    return array_stats, dataarray_stats


def _parts(tree: xr.DataTree, priors: Sequence[str] | None) -> tuple[xr.DataArray, xr.DataArray, xr.DataArray]:
    """Latents (chain, draw, cell, variable), log density of the priors to scale and of x (chain, draw, cell), nats."""
    try:
        posterior, log_joint = tree["posterior"], tree["sample_stats"]["lp"].astype(float)
        log_prior = {str(name): value.astype(float) for name, value in tree["log_prior"].data_vars.items()}
        scaled = [log_prior[name] for name in priors or log_prior]
    except KeyError as error:
        raise ModelError(
            f"the tree lacks {error}; needed are posterior, lp in sample_stats, and log_prior with the variables that "
            "priors= names: pass what to_datatree returns"
        ) from error
    # lp holds prior and likelihood: the likelihood is what the priors leave.
    latents = _joined(posterior, list(log_prior))
    return latents, _total(scaled), log_joint - _total(list(log_prior.values()))


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
    return xr.DataArray(flat, known, (*DRAWS, "cell", "variable"))


def _total(terms: Sequence[xr.DataArray]) -> xr.DataArray:
    return sum(terms[1:], terms[0])


def _warn_of_khat(tree: xr.DataTree) -> None:
    diagnostics = tree["sample_stats"].to_dataset()
    bad = float((diagnostics["khat"] > KHAT_LIMIT).mean()) if "khat" in diagnostics else 0.0
    if bad > 0.1:
        warn(
            f"k-hat is above {KHAT_LIMIT} for {bad:.0%} of the cells: their draws do not follow the posterior, whose "
            "sensitivity is asked for; draw with sampler=ps.Importance() or ps.HMC()"
        )


def _weights(stats: BaseArray, log_density: xr.DataArray, alpha: float) -> xr.DataArray:
    """Smoothed weights density^(alpha - 1) of the draws of each cell, up to a factor."""

    def of_cell(values: np.ndarray) -> np.ndarray:
        try:
            enough = len(np.unique(values)) >= FEWEST_DRAWS
            return stats.power_scale_lw(values, alpha=alpha, axis=(0, 1)) if enough else np.full_like(values, np.nan)
        except ValueError:  # a tail of equal draws
            return np.full_like(values, np.nan)

    weights = np.exp(
        xr.apply_ufunc(of_cell, log_density, input_core_dims=[DRAWS], output_core_dims=[DRAWS], vectorize=True)
    )
    if bool(weights.isnull().all()):
        raise ModelError(
            f"to weigh its draws, a cell needs {FEWEST_DRAWS} or more that differ, and none has; take samples=1000 "
            "and sampler=ps.Importance() or ps.HMC()"
        )
    return weights


def _distance_moved(
    stats: BaseDataArray, latents: xr.DataArray, weights: Sequence[xr.DataArray], step: float
) -> np.ndarray:
    """Distance from the weighted to the plain draws per unit of log2 alpha, the mean of both sides, flattened."""
    lower, upper = weights
    with np.errstate(invalid="ignore"):  # equal draws have no spread to measure the distance in
        moved = stats.power_scale_sense(latents, lower, upper, 1 - step, 1 + step, sample_dims=DRAWS)
    return moved.transpose("cell", "variable").values.ravel()
