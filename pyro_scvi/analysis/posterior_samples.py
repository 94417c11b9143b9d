"""sample_posterior: posterior draws of all latent variables, with named dimensions and diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.evaluation import evaluating, theta_given
from pyro_scvi.inference.samplers import Amortized, Draws, Sampler, require_sampler
from pyro_scvi.types import Theta
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

Reducer = Callable[[dict[str, Tensor]], dict[str, Tensor]]

EXPLICIT = ("w", "y", "h")
DIMS = {"z": ("latent",), **{site: ("gene",) for site in EXPLICIT}}


def sample_posterior(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 100,
    sites: Sequence[str] = ("z",),
    sampler: Sampler = Amortized(),
    reduce: Reducer | None = None,
    diagnostics: bool = True,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> xr.Dataset:
    r"""Draw z, l, w, y and h of every cell from their posterior given its counts.

    .. math:: h | x, z \sim Bernoulli(\rho\, 1[x = 0]), \quad
        w | h, x, z \sim Gamma(r + x (1 - h), r / \mu + 1 - h), \quad
        y = x \text{ if } h = 0, \text{ else } y | w \sim Poisson(w)

    Here rho = pi / (pi + (1 - pi) p(y = 0 | z)), for every cell and gene.

    z and l come from ``sampler``. w, y and h come from their exact conditional given z, l and x (Gamma-Poisson
    conjugacy), so y = x and h = 0 wherever x > 0. Global latents are held at the guide's medians.

    Parameters
    ----------
    fit, cells
        The fit and the cells; they need not be those it was fitted to.
    samples
        Draws per cell.
    sites
        Any of "z", "l" (with a latent library), "w", "y", "h".
    sampler
        ``ps.Amortized()``, ``ps.Refined()``, ``ps.Importance()`` or ``ps.HMC()``.
    reduce
        Function that summarises the draws of a batch of cells. It takes tensors (samples, cells, ...) by site and
        returns tensors (cells, ...) by name. With it, samples x cells x genes numbers are never held at once.
    diagnostics
        Whether to diagnose the draws. For ``Amortized`` this needs the density of every draw, which costs far more than
        drawing.
    seed
        The same seed and the same ``batch_size`` give the same draws.
    batch_size
        Cells at a time.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    Dataset
        Sites with dimensions (sample, cell, latent), (sample, cell) or (sample, cell, gene), and, if asked for, the
        sampler's diagnostics with dimension (cell): ``khat`` and ``ess``, or ``rhat``, ``ess`` and ``divergences``.

    Raises
    ------
    ModelError
        For a site that the model does not have, an argument of the wrong type or a number below 1. For a prior without
        a density, except with Amortized. With Amortized, for a guide that cannot encode cells.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> draws = ps.sample_posterior(fit, test, samples=10, sites=("z", "w", "h"))
    >>> dict(draws.sizes)
    {'cell': 12, 'sample': 10, 'latent': 2, 'gene': 20}
    >>> zeros = test.counts == 0
    >>> bool((draws.h.values[:, ~zeros] == 0).all())
    True
    """
    require_inputs(fit, cells)
    require_sampler(sampler)
    require_at_least(1, samples=samples, batch_size=batch_size)
    check_sites(fit, sites)
    parts = []
    with evaluating(fit.model, fit.guide, seed, theta=bool(set(sites) & set(EXPLICIT))):
        for x, gamma in over_cells(minibatches(fit, cells).in_order(batch_size), cells.n_cells, progress):
            draws = sampler.draw(fit.guide, x, gamma, samples)
            values = draw_sites(fit, x, gamma, draws, sites)
            drawn = {name: values[name] for name in sites}
            judged = draws.diagnose() if diagnostics else {}
            part = {name: (False, value) for name, value in judged.items()}
            part |= {name: (reduce is None, value) for name, value in (reduce(drawn) if reduce else drawn).items()}
            parts.append({name: (lead, value.cpu().numpy()) for name, (lead, value) in part.items()})
    return _dataset(parts, cells, fit.model.n_latent)


def draw_sites(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws, sites: Sequence[str]) -> dict[str, Tensor]:
    """Sites as (samples, cells), (samples, cells, latents) or (samples, cells, genes)."""
    values = {"z": draws.sites["z"].squeeze(-2)}
    if "l" in draws.sites:
        values["l"] = draws.sites["l"].squeeze(-1)
    if set(sites) & set(EXPLICIT):
        values |= fit.model.likelihood.explained(x, decoded(fit, x, gamma, draws))
    return values


def decoded(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws) -> Theta:
    """The likelihood's parameters (samples, cells, genes) at drawn latents."""
    return theta_given(fit.guide, x, gamma, draws.sites)


def check_sites(fit: Fit, sites: Sequence[str]) -> None:
    """Raise if the model does not have one of the sites."""
    if isinstance(sites, str):
        raise ModelError(f"sites must be names in a list or tuple, as in ({sites!r},), got {sites!r}")
    known = ("z", *(("l",) if fit.model.library.latent else ()), *EXPLICIT)
    if unknown := [site for site in sites if site not in known]:
        raise ModelError(f"the model has no site {unknown}; its sites are {known}")


def _dataset(parts: list[dict[str, tuple[bool, np.ndarray]]], cells: Cells, n_latent: int) -> xr.Dataset:
    variables = {}
    for name, (drawn, first) in parts[0].items():
        value = np.concatenate([part[name][1] for part in parts], axis=int(drawn))
        lead = ("sample", "cell") if drawn else ("cell",)
        variables[name] = (lead + _trailing(name, first.shape[len(lead) :], cells, n_latent), value)
    used = {dim for dims, _ in variables.values() for dim in dims}
    known = {"cell": list(cells.cell_names), "gene": list(cells.gene_names), "latent": list(range(n_latent))}
    return xr.Dataset(variables, coords={dim: known[dim] for dim in used & known.keys()})


def _trailing(name: str, shape: tuple[int, ...], cells: Cells, n_latent: int) -> tuple[str, ...]:
    """Dimensions after the cells: known for a site, inferred from the length for a user's summary, each once."""
    sizes = {"latent": n_latent, "gene": cells.n_genes}
    known = DIMS.get(name, ())
    if shape == tuple(sizes[dim] for dim in known):
        return known
    by_length = {size: dim for dim, size in sizes.items()}
    told = [None if n in shape[:i] else by_length.get(n) for i, n in enumerate(shape)]
    return tuple(dim or f"{name}_dim_{i}" for i, dim in enumerate(told))
