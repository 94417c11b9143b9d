"""sample_globals: the guide's draws of global latents, resampled to follow their posterior given the cells."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import xarray as xr
from torch import Tensor

from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.analysis.posterior_samples import of_globals, weighed_global_draws
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.global_draws import GlobalDraws
from pyro_scvi.guides.log_joint import global_terms
from pyro_scvi.inference.evaluation import evaluating, watched, weigh
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.inference.pareto_khat import pareto_smoothed
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.checks import require_at_least, switches_checked, warn
from pyro_scvi.utils.precision import in_float64
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


@switches_checked
def sample_globals(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 1000,
    cell_samples: int = 50,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> xr.Dataset:
    r"""Draw the global latents from their posterior given all cells, by weighing draws.

    .. math:: w_s \propto \frac{p(\theta_s)}{q(\theta_s)} \prod_n \hat p(x_n | \theta_s), \qquad
        \hat p(x_n | \theta) = \frac1K \sum_{k=1}^K \frac{p(x_n, z_{nk} | \theta)}{q(z_{nk} | x_n)}, \qquad
        \theta_s \sim q(\theta), \quad z_{nk} \sim q(z | x_n)

    The weights (samples,) are Pareto-smoothed (Vehtari et al. 2024), and draws are taken in proportion to them. The
    draws z of a cell are the same for all theta, so that most of their error is in all weights alike. The results can
    be no better than the guide allows: ``khat`` and ``ess`` say how far it is from the posterior. Neither sees a part
    of the posterior that the guide never draws from, such as a second mode. Discrete latents are summed out.

    The draws go into ``fit.with_globals(draws)``; every verb then follows them. For this to be worth while, fit with
    a joint ``global_guide``, and go on from there with ``elbo=ps.elbos.ImportanceWeighted()``. Each theta decodes
    ``cell_samples`` values of z of all cells, so that the time grows with samples x cell_samples x cells.

    Parameters
    ----------
    fit, cells
        The fit, and all cells that it was fitted to: the posterior is that given these.
    samples
        Draws of the global latents, before and after they are weighed.
    cell_samples
        K, draws of the latents of each cell.
    seed
        The same seed gives the same draws, up to rounding, whatever the ``batch_size``.
    batch_size
        Cells at a time.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    Dataset
        Each global latent with dimensions (sample, ...), and the attributes ``khat`` of the weights and ``ess``, the
        number of independent draws that they are worth. Draws repeat where weights are large.

    Raises
    ------
    ModelError
        For a model without global latents, or whose prior has no density; for a guide whose draws have no density
        (Point, or draws that ``with_globals`` gave), or that cannot encode cells (PerCell); for a number below 1 or an
        argument of the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Warns
    -----
    UserWarning
        If k-hat is above 0.7: the guide is too far from the posterior for its draws to be weighed. If there are fewer
        cells than the fit was trained on.

    Examples
    --------
    >>> donors = ps.Cells.from_anndata(adata, batch="donor")
    >>> prior = ps.priors.Conditional(2, donors.columns["donor"])
    >>> model = ps.SCVI(20, 2, 2, prior=prior, weight_priors={"prior.loc": ps.weights.NormalWeights()})
    >>> options = {"epochs": 50, "batch_size": 16, "progress": False}
    >>> made = ps.fit(model, donors, elbo=ps.elbos.ImportanceWeighted(10), **options)
    >>> draws = ps.sample_globals(made, donors, samples=200, cell_samples=20)
    >>> dict(draws.sizes), sorted(draws.attrs)
    ({'sample': 200, 'prior.loc_dim_0': 2, 'prior.loc_dim_1': 2}, ['ess', 'khat'])
    >>> made.with_globals(draws).guide.weights.n_draws
    200
    """
    require_inputs(fit, cells)
    require_at_least(1, samples=samples, cell_samples=cell_samples, batch_size=batch_size)
    require_proper(fit.model, "there is no posterior")
    _require_weighable(fit)
    _warn_of_few(fit, cells)
    with evaluating(fit.model, fit.guide, seed):
        drawn, log_q = weighed_global_draws(fit, samples, seed)
        log_weights = -in_float64(log_q)
        batches = over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress)
        for place, (x, gamma) in enumerate(batches):
            with per_cell():
                sites, log_q_cells = fit.guide.draw(x, gamma, cell_samples)
            log_weights = log_weights + _log_evidence(fit, x, gamma, sites, log_q_cells, drawn)
            if place == 0:
                log_weights = log_weights + _log_prior(fit, x, gamma, sites, drawn)
        smoothed, khat = pareto_smoothed(watched(log_weights)[:, None])
    weights = smoothed[:, 0].exp()
    _warn_of_khat(float(khat))
    kept = _in_proportion_to(weights).to(log_q.device)
    chosen = {name: values[kept].cpu().numpy() for name, values in drawn.items()}
    return xr.Dataset(of_globals(chosen), attrs={"khat": float(khat), "ess": float(1 / weights.square().sum())})


def _log_evidence(
    fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], log_q: Tensor, drawn: dict[str, Tensor]
) -> Tensor:
    """Sum over cells of the estimates of log p(x_n | theta) at each draw of theta, (samples,)."""
    sums = []
    for values in zip(*drawn.values(), strict=True):
        theta = dict(zip(drawn, values, strict=True))
        log_weights, _ = weigh(fit.guide, x, gamma, sites, log_q, theta)
        sums.append(in_float64(log_weights).logsumexp(0).sum() - len(x) * math.log(len(log_q)))
    return torch.stack(sums)


def _log_prior(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], drawn: dict[str, Tensor]) -> Tensor:
    """Log p(theta) at each draw, (samples,): of a program that runs for the first of the cells, at one draw of z."""
    one = {name: value[:1, :1] for name, value in sites.items()}
    terms = global_terms(fit.model, x[:1], gamma[:1], one, drawn, fit.guide.coordinates)
    return in_float64(torch.stack(list(terms.values()))).sum(0)


def _in_proportion_to(weights: Tensor) -> Tensor:
    """Places (samples,) of draws, each about samples x its weight times: none by less than one more or fewer."""
    samples = len(weights)
    levels = (torch.arange(samples, dtype=weights.dtype, device=weights.device) + 0.5) / samples
    return torch.searchsorted(weights.cumsum(0), levels).clamp(max=samples - 1)  # rounding may leave the sum below 1


def _require_weighable(fit: Fit) -> None:
    guide = fit.guide
    if not guide.weights.supports:
        raise ModelError("sample_globals is for models with global latents, and this one has none")
    if isinstance(guide.weights, GlobalDraws):
        raise ModelError(
            "the global latents of this fit are at draws of your own, whose density is not known: pass the fit that "
            "with_globals was called on"
        )
    if not guide.stochastic:
        raise ModelError(
            f"draws are weighed by the guide's density, and {type(guide).__name__} has none: fit with another guide"
        )
    if not guide.amortized:
        raise ModelError(
            f"{type(guide).__name__} cannot encode cells, and z is drawn from the guide: fit with one that has an "
            "encoder, as DiagonalNormal"
        )


def _warn_of_few(fit: Fit, cells: Cells) -> None:
    trained = fit.settings.get("n_cells", 0)  # saves of earlier versions do not tell
    if cells.n_cells < trained:
        warn(
            f"the fit was trained on {trained:,} cells, and the draws will be those of the posterior given "
            f"{cells.n_cells:,} cells: pass all cells of the fit"
        )


def _warn_of_khat(khat: float) -> None:
    if not khat <= KHAT_LIMIT:
        warn(
            f"k-hat is {khat:.2f}, above {KHAT_LIMIT}: the draws of the global latents do not follow their posterior. "
            "Fit for more epochs, with elbo=ps.elbos.ImportanceWeighted() and global_guide="
            "pyro.infer.autoguide.AutoMultivariateNormal, or sample everything by NUTS (docs/howto/plain_pyro.md)"
        )
