"""What of a program depends on some columns of gamma, found by evaluating it with and without them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.log_joint import cell_terms, latent_terms, scored
from pyro_scvi.inference.evaluation import evaluating

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

LOOKED_AT = 16  # cells


class Dependence(NamedTuple):
    """What depends on columns of gamma: names of latents, "x" for the counts given these."""

    sites: tuple[str, ...]

    @property
    def of_counts(self) -> bool:
        """Whether the counts given the latents do."""
        return "x" in self.sites


def dependence(fit: Fit, cells: Cells, columns: slice) -> Dependence:
    """The sites whose densities change when each of the ``columns`` is set to 1 in turn, all others of them to 0.

    A few cells are looked at, at the guide's location and beside it: a density may change where none is expected.
    """
    few = cells.take(range(min(LOOKED_AT, cells.n_cells)))
    with evaluating(fit.model, fit.guide, 0):
        x, gamma = next(iter(minibatches(fit, few).in_order(LOOKED_AT)))
        loc, scale = fit.guide.start(x, gamma)
        u = torch.stack([loc, loc + 0.5 * scale])
        sites = fit.guide.weights.medians() | fit.guide.coordinates.sites(u)
        plain = _terms(fit, x, _with(gamma, columns), sites)
        others = [_terms(fit, x, _with(gamma, columns, at), sites) for at in range(columns.start, columns.stop)]
    moved = (name for name in plain if any(not torch.allclose(plain[name], other[name]) for other in others))
    return Dependence(tuple(moved))


def _with(gamma: Tensor, columns: slice, at: int | None = None) -> Tensor:
    changed = gamma.clone()
    changed[:, columns] = 0.0
    if at is not None:
        changed[:, at] = 1.0
    return changed


def _terms(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    coordinates = fit.guide.coordinates
    trace, names = scored(fit.model, x, gamma, sites, coordinates), list(coordinates.local)
    total = fit.model.library.log_prob_of_total(x, gamma)
    return latent_terms(trace, *names) | {"x": cell_terms(trace, *names)[1] + total}
