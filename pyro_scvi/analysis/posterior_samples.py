"""sample_posterior: posterior draws of all latent variables, with named dimensions and diagnostics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from torch import Tensor

from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.supported import EXPLICIT, own_dims
from pyro_scvi.inference.evaluation import evaluating, theta_given, watched, with_enumerated
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Draws, Sampler
from pyro_scvi.types import Theta
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.checks import brief, items_of, require_at_least, switches_checked
from pyro_scvi.utils.progress_bars import over_cells
from pyro_scvi.utils.random_state import seeded

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

Reducer = Callable[[dict[str, Tensor]], dict[str, Tensor]]

GLOBAL_STREAM = 1
"""Key of the random stream of global latents, which is not that of the cells'."""

DIMS = {"z": ("latent",), **{site: ("gene",) for site in EXPLICIT}}


@switches_checked
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
    r"""Draw the latents of every cell, w, y and h, and global latents from their posterior.

    .. math:: h | x, z \sim Bernoulli(\rho\, 1[x = 0]), \quad
        w | h, x, z \sim Gamma(r + x (1 - h), r / \mu + 1 - h), \quad
        y = x \text{ if } h = 0, \text{ else } y | w \sim Poisson(w)

    Here rho = pi / (pi + (1 - pi) p(y = 0 | z)), for every cell and gene.

    z, l and other latents of the cells come from ``sampler``, at the guide's medians of the global latents. Discrete
    ones come from their exact conditional given these and x, and w, y and h from theirs (Gamma-Poisson conjugacy), so y
    = x and h = 0 wherever x > 0. Global latents come from the guide.

    Parameters
    ----------
    fit, cells
        The fit and the cells; they need not be those it was fitted to.
    samples
        Draws per cell.
    sites
        Names of latents that the program samples, such as "z" and "l", and any of "w", "y", "h".
    sampler
        ``ps.Amortized()``, ``ps.Refined()``, ``ps.Importance()`` or ``ps.HMC()``.
    reduce
        Function that summarises the draws of a batch of cells. It takes tensors (samples, cells, ...) by site and
        returns tensors (cells, ...) by name. With it, samples x cells x genes numbers are never held at once.
    diagnostics
        Whether to diagnose the draws. For ``Amortized`` this needs the density of every draw, which costs far more than
        drawing.
    seed
        The same seed gives the same draws of a cell, up to rounding, whatever the ``batch_size`` and the other cells:
        each has a random stream of its own, by the seed and its name.
    batch_size
        Cells at a time.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    Dataset
        Sites with dimensions (sample, cell, latent), (sample, cell) or (sample, cell, gene), global latents without
        cell, and, if asked for, the sampler's diagnostics with dimension (cell): ``khat`` and ``ess``, or ``rhat``,
        ``ess`` and ``divergences``.

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
    require_at_least(1, samples=samples, batch_size=batch_size)
    sites = check_sites(fit, sites)
    if not (reduce is None or callable(reduce)):
        raise ModelError(f"reduce must be a function of the draws, or None; got {brief(reduce)}")
    # What is no latent, or summed out, is drawn at the medians of global latents.
    at_medians = set(sites) - {*fit.guide.coordinates.local, *fit.guide.weights.supports}
    sampler = sampler_for(sampler, cells, fit.guide if at_medians else None)
    parts = []
    with evaluating(fit.model, fit.guide, seed, theta=bool(set(sites) & set(EXPLICIT))):
        for x, gamma in over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress):
            draws = sampler.draw(fit.guide, x, gamma, samples)
            drawn = draw_sites(fit, x, gamma, draws, sites)
            judged = draws.diagnose() if diagnostics else {}
            part = {name: (False, value) for name, value in judged.items()}
            part |= {name: (reduce is None, value) for name, value in (reduce(drawn) if reduce else drawn).items()}
            parts.append({name: (lead, value.cpu().numpy()) for name, (lead, value) in part.items()})
        shared = global_draws(fit, sites, samples, seed)
    return _dataset(parts, cells, fit.model.n_latent).assign(of_globals(shared))


def of_globals(drawn: dict[str, np.ndarray]) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Draws (samples, ...) of global latents as variables of a Dataset."""
    return {name: (("sample", *own_dims(name, value.ndim - 1)), value) for name, value in drawn.items()}


def draw_sites(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws, sites: Sequence[str]) -> dict[str, Tensor]:
    """The ``sites`` of the cells: (samples, cells), and an event or genes behind."""
    discrete, explicit = set(fit.guide.coordinates.enumerated), set(sites) & set(EXPLICIT)
    latents = with_enumerated(fit.guide, x, gamma, draws.sites) if explicit or discrete & set(sites) else draws.sites
    values = {name: watched(v).squeeze(v.dim() - 1 - n_event(fit, name)) for name, v in latents.items()}
    if explicit:
        theta = theta_given(fit.guide, x, gamma, latents)
        with per_cell():
            values |= fit.model.likelihood.explained(x, theta)
    return {name: values[name] for name in sites if name in values}


def n_event(fit: Fit, name: str) -> int:
    """Number of dimensions of an event of a latent of the cells."""
    known = fit.guide.coordinates
    return len(known.local[name].event_shape if name in known.local else known.enumerated[name])


def decoded(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws) -> Theta:
    """The likelihood's parameters (samples, cells, genes) at drawn latents, discrete ones drawn beside them."""
    return theta_given(fit.guide, x, gamma, with_enumerated(fit.guide, x, gamma, draws.sites))


def latent_sites(fit: Fit) -> tuple[str, ...]:
    """Names of the latents: of the cells, then discrete ones, then global ones."""
    known = fit.guide.coordinates
    return (*known.local, *known.enumerated, *fit.guide.weights.supports)


def check_sites(fit: Fit, sites: Any) -> tuple[str, ...]:
    """Names of sites of any container; raises if the model does not have one of them."""
    if isinstance(sites, str):
        raise ModelError(f"sites must be names in a list or tuple, as in ({sites!r},), got {sites!r}")
    if (listed := items_of(sites)) is None:
        raise ModelError(f"sites must be names in a list or tuple, as in ('z',), got {brief(sites)}")
    known = (*latent_sites(fit), *EXPLICIT)
    if unknown := [site for site in listed if not isinstance(site, str) or site not in known]:
        raise ModelError(f"the model has no site {unknown}; its sites are {known}")
    return tuple(listed)


def global_draws(fit: Fit, sites: Sequence[str], samples: int, seed: int) -> dict[str, np.ndarray]:
    """Draws (samples, ...) of those of the ``sites`` that all cells share, from the guide."""
    if not any(name in fit.guide.weights.supports for name in sites):
        return {}
    drawn, _ = weighed_global_draws(fit, samples, seed)
    return {name: drawn[name].cpu().numpy() for name in sites if name in drawn}


def weighed_global_draws(fit: Fit, samples: int, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """Draws (samples, ...) of all global latents from the guide, and log q (samples,) of them together.

    They have a stream of their own: the draws of the cells do not depend on whether these are asked for.
    """
    own = int(np.random.SeedSequence(seed, spawn_key=(GLOBAL_STREAM,)).generate_state(1)[0])
    with seeded(own):
        return fit.guide.weights.weighed_draws(samples)


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
