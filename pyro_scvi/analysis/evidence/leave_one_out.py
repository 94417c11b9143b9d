"""Leave-one-out predictions of single entries (cell, gene), with Pareto k-hat and PIT values."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pyro_scvi.analysis.evidence.missed_mass import Entries, from_prior, left_out, with_missed_mass
from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.evaluation import entries_given_others, evaluating
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.inference.samplers import Importance, Sampler, weighted_by
from pyro_scvi.likelihoods.library_size import ObservedLibrary
from pyro_scvi.priors.base import has_density
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.checks import require_at_least, switches_checked, warn
from pyro_scvi.utils.precision import put_back
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyro_scvi.training.fitted import Fit

LIMITS = {"sampler_khat": KHAT_LIMIT, "sampler_rhat": 1.05}

WHY_NOT_CELLS = (
    "leaving a whole cell out cannot be had from log p(x_n | z_n): z_n is inferred from that cell alone, so that the "
    "weights 1 / p(x_n | z_n) have no usable tail (k-hat above 0.7 for nine cells in ten on real data). What a model "
    "says of a cell it has not seen is its evidence, log p(x_n)"
)


@switches_checked
def leave_one_out(
    fit: Fit,
    cells: Cells,
    *,
    over: Sequence[str] = ("cell", "gene"),
    samples: int = 1000,
    sampler: Sampler = Importance(),
    seed: int = 0,
    batch_size: int = 4,
    progress: bool = True,
) -> xr.Dataset:
    r"""Score each count given the cell's other counts, by Pareto-smoothed importance sampling.

    .. math:: \log p(x_{ng} | x_{n,-g}) = -\log E_{z, l | x_n} [1 / p(x_{ng} | z, l)]

    A single entry changes a cell's posterior little, so the weights 1 / p(x_ng | z, l) are mostly well behaved. k-hat
    shows for which entries they are not (Vehtari, Gelman and Gabry 2017, Sec. 2; Vehtari et al. 2024). Draws of a
    sampler that weighs draws of a proposal, as ``ps.Importance()`` and ``ps.Refined()`` do, enter with these weights:
    the proposal reaches farther than the posterior, as what is left without an entry does. Where the prior's draws show
    more mass without an entry than these, its numbers are from 1,000 draws of the prior. Discrete latents
    that the program sums out are summed out here too: p(x_ng | z, l) is then p(x_ng | z, l, x_n,-g).

    Parameters
    ----------
    fit, cells
        The fit and cells with its schema, best held out: the model's weights have seen the cells it was fitted to.
    over
        What is left out together. Only ``("cell", "gene")``, single entries, is valid.
    samples, sampler, seed, batch_size
        As in ``sample_posterior``; draws must follow the posterior, so ``ps.Importance()`` or ``ps.HMC()``. Of a
        sampler that makes more weighted draws than ``samples``, all are taken.
    progress
        Whether to show how many cells are done, once it has taken 5 seconds.

    Returns
    -------
    Dataset
        With dimensions (cell, gene): ``elpd``, log predictive probability, nats per entry; ``se``, its standard error
        if draws are independent (those of chains are worth fewer); ``khat``, above 0.7 where the result is unreliable,
        0 where all draws agree; ``pit``, the randomised probability integral transform P(x' < x) + u P(x' = x) with u
        uniform, uniform over entries under the model (Czado, Gneiting and Held 2009, Sec. 2).
        With dimension (cell), as ``sampler_khat``, ``sampler_rhat`` ...: the sampler's diagnostics; the other columns
        are only as good as its draws.

    Raises
    ------
    ModelError
        For ``over=("cell",)``, which is invalid for this model: use ``evidence``. For an observed library size, because
        the cell's total contains the entry left out. For numbers that are too small, and for arguments of the wrong
        type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Warns
    -----
    UserWarning
        If the sampler's draws do not follow the posterior of more than a tenth of the cells.

    Examples
    --------
    >>> left_out = ps.leave_one_out(fit, test.take(range(2)), samples=100, sampler=ps.Importance())
    >>> left_out.elpd.dims, left_out.elpd.shape
    (('cell', 'gene'), (2, 20))
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide)
    require_at_least(1, batch_size=batch_size)
    require_at_least(2, samples=samples)
    if tuple(over) != ("cell", "gene"):
        raise ModelError(f'over must be ("cell", "gene"), got {tuple(over)}: {WHY_NOT_CELLS}; use ps.evidence')
    if isinstance(fit.model.library, ObservedLibrary):
        raise ModelError(
            "with an ObservedLibrary a cell's total contains the entry that would be left out; fit with LatentLibrary"
        )
    judged, done = list[dict[str, Tensor]](), 0
    with evaluating(fit.model, fit.guide, seed):
        results = torch.empty(4, cells.n_cells, cells.n_genes, dtype=fit.dtype)
        for x, gamma in over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress):
            drawn = weighted_by(sampler, fit.guide, x, gamma, samples)
            judged.append(drawn.diagnose())
            # One replica per draw: averaged by the weights below, it gives P(x' < x) without the distribution function.
            log_p, below = entries_given_others(fit.guide, x, gamma, drawn.sites)
            with per_cell():
                uniform = torch.rand(1, *x.shape, dtype=log_p.dtype, device=log_p.device)
            rows = slice(done, done := done + len(x))
            weights = _of_entries(drawn.log_weights, log_p)
            of_entries = Entries(weights, log_p.flatten(1), below.flatten(1))
            found = left_out(*of_entries, uniform.flatten())
            if has_density(fit.model):
                prior, weighted = partial(from_prior, fit.guide, x, gamma), drawn.log_weights is not None
                found = with_missed_mass(found, of_entries, prior, uniform.flatten(), weighted=weighted)
            results[:, rows] = found.unflatten(1, x.shape).cpu()
    elpd, se, khat, pit = results.numpy()
    dims, coordinates = ("cell", "gene"), {"cell": list(cells.cell_names), "gene": list(cells.gene_names)}
    of_cells = {f"sampler_{name}": torch.cat([part[name] for part in judged]).cpu().numpy() for name in judged[0]}
    _warn_of(of_cells)
    columns = {"elpd": (dims, elpd), "se": (dims, se), "khat": (dims, khat), "pit": (dims, pit)}
    return xr.Dataset(columns | {name: (dims[:1], value) for name, value in of_cells.items()}, coords=coordinates)


def _warn_of(of_cells: dict[str, np.ndarray]) -> None:
    for name, limit in LIMITS.items():
        bad = float((~(of_cells[name] <= limit)).mean()) if name in of_cells else 0.0
        if bad > 0.1:
            warn(
                f"{name} is above {limit} for {bad:.0%} of the cells: their draws do not follow the posterior, so "
                "do not trust elpd, khat and pit. Take sampler=ps.Importance() or ps.HMC(), or more draws"
            )


def _of_entries(log_weights: Tensor | None, log_p: Tensor) -> Tensor:
    """Log weights (draws, entries) of the cells' draws, for the entries of log p (draws, cells, genes)."""
    if log_weights is None:
        return torch.zeros_like(log_p).flatten(1)
    return put_back(log_weights, log_p)[..., None].expand(log_p.shape).flatten(1)
