"""to_datatree: posterior and predictive draws in ArviZ's groups, as an xarray DataTree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import torch
import xarray as xr
from torch import Tensor

from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.analysis.posterior_samples import (
    DIMS,
    check_sites,
    draw_sites,
    latent_sites,
    n_event,
    weighed_global_draws,
)
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.log_joint import cell_terms, entry_terms, global_terms, latent_terms, scored
from pyro_scvi.guides.program_runs import entries_kept, masked_entries
from pyro_scvi.guides.supported import EXPLICIT, own_dims
from pyro_scvi.inference.evaluation import (
    USUAL,
    drawn_from_prior,
    draws_at_once,
    evaluating,
    law_given,
    sampled_counts,
    with_enumerated,
)
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Draws, Sampler
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.cell_streams import cell_streams, narrowed, own_names, per_cell
from pyro_scvi.utils.checks import require_at_least, switches_checked
from pyro_scvi.version import __version__

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

Groups = dict[str, dict[str, Tensor]]
"""Group -> variable -> values."""

DRAWN, FIXED = ("chain", "draw", "cell"), ("cell",)
"""Leading dimensions, before those of the variable itself."""

TRAILING = {**DIMS, "x": ("gene",), "gamma": ("covariate",)}

MODERATE = 10_000
"""Numbers in a global latent up to which it is exported without being asked for by name."""

LOG_Q = "log_q_global"
"""Name of the log density of all global latents under the guide."""

FROM_SAMPLER = ("posterior", "log_prior", "sample_stats", "log_likelihood", "posterior_predictive")


@switches_checked
def to_datatree(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 200,
    sites: Sequence[str] | None = None,
    sampler: Sampler = Amortized(),
    log_likelihood: bool = False,
    posterior_predictive: bool = False,
    prior_predictive: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> xr.DataTree:
    """Collect draws, densities, predictions and data in an xarray DataTree for ArviZ.

    The groups are those of ArviZ's schema.

    - ``posterior``: z (chain, draw, cell, latent), l (chain, draw, cell), counts, other latents likewise, and global
      latents (chain, draw, ...) from the guide; with ``sites`` also w, y and h (chain, draw, cell, gene).
    - ``log_prior``: log p(z) and log p(l) as z and l (chain, draw, cell), nats per cell, and likewise of every latent,
      given those before it in the program. Discrete latents are summed out. Of a global latent (chain, draw), nats.
    - ``sample_stats``: lp = log p(x, z, l) (chain, draw, cell), nats per cell; the sampler's diagnostics (cell): khat
      and ess, or rhat, ess and divergences. If there are global latents in ``posterior``, log_q_global (chain, draw),
      nats: the density of all of them under the guide.
    - ``prior``: z and l of new cells with the covariates of these, independent draws, dimensions as in ``posterior``.
    - ``observed_data``: x (cell, gene), counts. ``constant_data``, if there are covariates: gamma (cell, covariate).
    - on request ``log_likelihood``: log p(x_ng | z_n, l_n) as x (chain, draw, cell, gene), nats per entry.
    - on request ``posterior_predictive`` and ``prior_predictive``: x (chain, draw, cell, gene), counts, at the draws of
      ``posterior`` and of ``prior``.

    Groups added on request hold samples x cells x genes numbers of up to 4 bytes; the rest takes a hundredth of that.
    Densities are those of the model in its own coordinates: z on its support, l in counts. w, y and h are integrated
    out, and global latents are at the guide's medians. With ``ObservedLibrary`` the density is that of x given the
    cell's total.

    The log likelihood is per entry and not per cell, on purpose. Importance sampling can leave an entry out of its
    cell, but not a cell out of the data, because z_n is inferred from that cell alone (k-hat of 1 / p(x_n | z_n) is
    above 0.7 for nine cells in ten). To score whole cells use ``evidence``.

    Parameters
    ----------
    fit, cells
        The fit and the cells; they need not be those it was fitted to.
    samples
        Draws per cell, over all chains, rounded down to a multiple of the number of chains.
    sites
        Variables of ``posterior``: names of latents, and any of "w", "y", "h"; None: all latents, but no global one of
        more than 10,000 numbers.
    sampler
        ``ps.Amortized()``, ``ps.Refined()``, ``ps.Importance()`` or ``ps.HMC()``. HMC has several chains. The others
        draw independently and have one chain. Draws of the first two only approximate the posterior, see ``khat``.
    log_likelihood, posterior_predictive, prior_predictive
        Whether to add these groups.
    seed
        The same seed gives the same tree. Its draws are those of ``sample_posterior`` under that seed.
    batch_size
        Cells at a time.

    Returns
    -------
    DataTree
        Real numbers as float32, h as int8, counts as int32 (squares of smaller integers overflow silently), or as
        float32 if they are not whole or too large for int32. ``tree.to_netcdf(path, engine="h5netcdf")`` writes it.

    Raises
    ------
    ModelError
        For a site that the model does not have, for the prior Flat, which has no density, for fewer samples than
        chains, and for arguments of the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    References
    ----------
    The ArviZ schema, https://python.arviz.org/en/stable/schema/schema.html

    Examples
    --------
    >>> tree = ps.to_datatree(fit, test, samples=10)
    >>> sorted(tree.children)
    ['log_prior', 'observed_data', 'posterior', 'prior', 'sample_stats']
    >>> tree["posterior"].z.dims
    ('chain', 'draw', 'cell', 'latent')
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide if log_likelihood or posterior_predictive else None)
    require_proper(fit.model, "there is no posterior to export")
    if sites is None:
        sites = _of_moderate_size(fit)
    require_at_least(1, samples=samples, batch_size=batch_size)
    sites = check_sites(fit, sites)
    extent = _Extent(tuple(sites), samples, log_likelihood, posterior_predictive, prior_predictive)
    gathered, start = _Gathered(cells.n_cells), 0
    # Draws other than the sampler's have a seed of their own, so that the sampler's do not depend on them.
    names = own_names(cells.cell_names)
    of_others = int(np.random.SeedSequence(seed).spawn(1)[0].generate_state(1)[0])
    with evaluating(fit.model, fit.guide, seed, theta=bool(set(sites) & set(EXPLICIT))):
        for x, gamma in batches_in_streams(fit, cells, batch_size, seed):
            draws = sampler.draw(fit.guide, x, gamma, samples)
            rows = slice(start, start := start + len(x))
            groups = _of_draws(fit, x, gamma, draws, extent)
            with cell_streams(of_others, names[rows]):
                groups |= _replicated(fit, x, gamma, draws, extent)
            for group, values in groups.items():
                gathered.fill(rows, group, {name: _by_chain(v, draws.chains) for name, v in values.items()}, DRAWN)
            gathered.fill(rows, "sample_stats", draws.diagnose(), FIXED)
            gathered.fill(rows, "observed_data", {"x": _counted(x)}, FIXED)
            gathered.fill(rows, "constant_data", {"gamma": gamma} if cells.n_covariates else {}, FIXED)
        if set(sites) & set(fit.guide.weights.supports):
            cell = {name: value[:1, :1] for name, value in draws.sites.items()}
            for group, values in _of_globals(fit, x[:1], gamma[:1], cell, gathered.n_draws, seed).items():
                gathered.share(group, {name: v for name, v in values.items() if group != "posterior" or name in sites})
    return _tree(gathered, cells, fit.model.n_latent, {"sampler": repr(sampler), "seed": seed})


class _Extent(NamedTuple):
    """How much to draw, and what of it to keep."""

    sites: tuple[str, ...]
    samples: int
    log_likelihood: bool
    posterior_predictive: bool
    prior_predictive: bool


def _of_draws(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws, extent: _Extent) -> Groups:
    """Groups of the sampler's draws of these cells, each variable (samples, cells, ...)."""
    values = draw_sites(fit, x, gamma, draws, extent.sites)
    groups = {"posterior": {site: _stored(site, value) for site, value in values.items()}}
    return groups | _densities(fit, x, gamma, draws.sites, extent.log_likelihood)


def _replicated(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws, extent: _Extent) -> Groups:
    """Groups of draws other than the sampler's: of new cells, and of counts."""
    groups = _prior(fit, gamma, extent)
    if extent.posterior_predictive:
        sites = with_enumerated(fit.guide, x, gamma, draws.sites)
        groups["posterior_predictive"] = {"x": _counted(sampled_counts(fit.guide, x, gamma, sites))}
    return groups


def _densities(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], entries: bool) -> Groups:
    """Log p of each latent and of latents and x, each (samples, cells), and log p(x | latents), (..., genes)."""
    fixed, terms, of_entries = fit.guide.weights.medians(), [], []
    for part in _split(sites, draws_at_once(x)):
        trace = scored(fit.model, x, gamma, {**fixed, **part}, fit.guide.coordinates)
        terms.append(latent_terms(trace, *sites) | {"x": cell_terms(trace, *sites)[1]})
        of_x: Any = trace.nodes["x"]
        if entries and not entries_kept(of_x["fn"], of_x["mask"]).all():
            raise masked_entries(fit.model)
        of_entries += [entry_terms(trace, *sites)] if entries else []
    log_p = {name: torch.cat([term[name] for term in terms]) for name in terms[0]}
    groups = {"log_prior": {name: log_p[name] for name in sites}}
    groups["sample_stats"] = {"lp": torch.stack(list(log_p.values())).sum(0)}
    return groups | ({"log_likelihood": {"x": torch.cat(of_entries)}} if entries else {})


def _of_globals(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], samples: int, seed: int) -> Groups:
    """Draws of the global latents from the guide, log p of each and log q of all; ``sites`` are latents of a cell."""
    drawn, log_q = weighed_global_draws(fit, samples, seed)
    log_p = global_terms(fit.model, x, gamma, sites, drawn, fit.guide.coordinates)
    return {"posterior": drawn, "log_prior": log_p, "sample_stats": {LOG_Q: log_q}}


def _prior(fit: Fit, gamma: Tensor, extent: _Extent) -> Groups:
    """Draws of ``samples`` new cells for each row of gamma, z (samples, cells, latents) and l (samples, cells)."""
    shape = (extent.samples, len(gamma))
    many = gamma.repeat(extent.samples, 1)  # rows of their own, so that an observed library has a total for each
    sites = {name: value[0] for name, value in drawn_from_prior(fit.guide, many, 1, enumerated=True).items()}
    groups = {
        "prior": {
            name: value.reshape(*shape, *value.shape[value.dim() - n_event(fit, name) :])
            for name, value in sites.items()
        }
    }
    if extent.prior_predictive:
        groups["prior_predictive"] = {"x": _counted(_new_counts(fit, many, sites, len(gamma)).reshape(*shape, -1))}
    return groups


def _new_counts(fit: Fit, gamma: Tensor, sites: dict[str, Tensor], n_cells: int) -> Tensor:
    """Counts (samples x cells, genes) of new cells, rows for all ``n_cells`` in turn."""
    size, counts = draws_at_once(gamma.new_empty(USUAL, fit.model.n_genes)), list[Tensor]()
    for rows, part in zip(gamma.split(size * n_cells), _split(sites, size * n_cells), strict=True):
        law: Any = law_given(fit.guide, None, rows, part, scores_x=False)
        with narrowed(torch.arange(len(rows)) % n_cells), per_cell():
            counts.append(law.expand((1, *law.batch_shape)).sample()[0])
    return torch.cat(counts)


def _of_moderate_size(fit: Fit) -> tuple[str, ...]:
    """All latents, but no global one that is an array of more numbers than ``MODERATE``."""
    shared = fit.guide.weights.medians()
    return tuple(name for name in latent_sites(fit) if name not in shared or shared[name].numel() <= MODERATE)


def _split(sites: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    for parts in zip(*(value.split(size) for value in sites.values()), strict=True):
        yield dict(zip(sites, parts, strict=True))


def _stored(site: str, value: Tensor) -> Tensor:
    return {"y": _counted, "h": Tensor.char}.get(site, Tensor.float)(value)


def _counted(value: Tensor) -> Tensor:
    whole = value.int()
    return whole if bool((whole == value).all()) else value


def _by_chain(value: Tensor, chains: int) -> Tensor:
    """(samples, cells, ...) as (chains, draws, cells, ...)."""
    draws = len(value) // chains
    if draws == 0:
        raise ModelError(f"{chains} chains need at least {chains} samples, got {len(value)}")
    return value[: draws * chains].unflatten(0, (draws, chains)).swapaxes(0, 1)


class _Gathered:
    """Variables with their dimensions, by group, filled batch by batch: no second copy of a large one is ever held."""

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self.groups: dict[str, dict[str, tuple[tuple[str, ...], np.ndarray]]] = {}

    @property
    def n_draws(self) -> int:
        """Number of draws over all chains."""
        return int(np.prod(self._shape))

    @property
    def _shape(self) -> tuple[int, ...]:
        """Numbers of chains and of draws of each."""
        return self.groups["sample_stats"]["lp"][1].shape[:2]

    def share(self, group: str, values: dict[str, Tensor]) -> None:
        """Write variables (samples, ...) that all cells share, as (chain, draw) and their own dimensions."""
        for name, value in values.items():
            shaped = value.cpu().numpy().reshape(*self._shape, *value.shape[1:])
            self.groups.setdefault(group, {})[name] = (("chain", "draw", *own_dims(name, value.dim() - 1)), shaped)

    def fill(self, rows: slice, group: str, values: dict[str, Tensor], lead: tuple[str, ...]) -> None:
        """Write the values of some cells, with leading dimensions ``lead`` of which the cells are the last."""
        for name, value in values.items():
            part = (value.float() if value.is_floating_point() else value).cpu().numpy()
            known, cell = self.groups.setdefault(group, {}), len(lead) - 1
            if name not in known:
                shape = (*part.shape[:cell], self.n_cells, *part.shape[cell + 1 :])
                own = TRAILING.get(name) or own_dims(name, part.ndim - len(lead))
                known[name] = (lead + own[: part.ndim - len(lead)], np.empty(shape, part.dtype))
            dims, target = known[name]
            if target.dtype.kind != "f" and part.dtype.kind == "f":  # counts that were int32 so far
                target = target.astype(np.float32)
                known[name] = dims, target
            target.swapaxes(0, cell)[rows] = part.swapaxes(0, cell)


def _tree(gathered: _Gathered, cells: Cells, n_latent: int, run: dict[str, str | int]) -> xr.DataTree:
    schema, library = cells.schema, _library()
    names: dict[str, Sequence[Any]] = {
        "cell": list(cells.cell_names),
        "gene": list(cells.gene_names),
        "latent": range(n_latent),
        "covariate": list(schema.column_names),
    }
    tree = {"/": xr.Dataset(attrs=library | run)}
    for group, variables in gathered.groups.items():
        sizes = {dim: size for dims, value in variables.values() for dim, size in zip(dims, value.shape, strict=True)}
        coordinates = {dim: np.asarray(names.get(dim, range(size))) for dim, size in sizes.items()}
        tree[group] = xr.Dataset(variables, coordinates, library | (run if group in FROM_SAMPLER else {}))
    return xr.DataTree.from_dict(tree)


def _library() -> dict[str, str | int]:
    return {
        "creation_library": "pyro-scvi",
        "creation_library_version": __version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }
