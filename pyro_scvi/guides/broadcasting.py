"""The check that a program's densities are the same for a stack of draws, and for several cells, as for each alone."""

from collections.abc import Callable

import pyro
import torch
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.log_joint import cell_terms, scored
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import conditional
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.random_state import seeded

DRAWS = 3
"""Another number than the two cells of a look, lest one be taken for the other."""


def require_broadcasting(model: SCVI, coordinates: Coordinates, global_latents: dict[str, Tensor]) -> None:
    """Refuse a program whose densities differ between single values of its latents and a stack, or with other cells.

    Training gives latents of shape (cells, 1), other verbs (samples, cells, 1): code that counts dimensions from the
    left takes draws for cells there. Cells come in batches of any kind: a density that depends on what is beside a cell
    is none of the cell.

    Raises
    ------
    ModelError
        If they differ, or cannot be computed for a stack or for one cell.
    """
    if is_packaged(model):
        return
    looks = [{site.name: site.value for site in model.discovered(seed=seed)} for seed in range(DRAWS)]
    for name in {name for look in looks for name in look if any(name not in other for other in looks)}:
        raise conditional(name)
    single = [{name: look[name] for name in coordinates.local} for look in looks]
    # Of gamma = 0 nothing would be seen that gamma multiplies; so each cell has each column at 1 in one of the looks.
    x, gamma = like(model).new_tensor([[1.0], [3.0]]).expand(-1, model.n_genes), model.varied_gamma(2)
    for constants in (gamma, gamma.flip(0)):
        _require_same(model, global_latents, single, x, constants)


def _require_same(
    model: SCVI, global_latents: dict[str, Tensor], single: list[dict[str, Tensor]], x: Tensor, gamma: Tensor
) -> None:
    """Compare densities at single values of the latents with those of their stack, and of two cells with each alone."""
    stacked = {name: torch.stack([sites[name] for sites in single]) for name in single[0]}
    alone = torch.cat([_log_joint(model, global_latents, sites, x, gamma).reshape(1, -1) for sites in single])
    if not _gives(alone, lambda: _log_joint(model, global_latents, stacked, x, gamma)):
        raise ModelError(
            f"{type(model).__name__}: the log density of a stack of draws of {list(stacked)}, each (samples, "
            "cells, 1), is not that of each draw by itself: index from the right, as in z[..., 0, :1], and let all "
            "broadcast over leading dimensions"
        )
    _require_cells_apart(model, global_latents, single[0], (x, gamma), alone[0])


def _require_cells_apart(
    model: SCVI,
    global_latents: dict[str, Tensor],
    sites: dict[str, Tensor],
    cells: tuple[Tensor, Tensor],
    together: Tensor,
) -> None:
    """Compare the log joint density of two cells ``together``, (cells,), with that of each without the other."""

    def alone() -> Tensor:
        parts = [{name: value[[n]] for name, value in sites.items()} for n in range(len(together))]
        found = (_log_joint(model, global_latents, part, *(of[[n]] for of in cells)) for n, part in enumerate(parts))
        return torch.cat([one.flatten() for one in found])

    if not _gives(together, alone):
        raise ModelError(
            f"{type(model).__name__}: the log density of a cell depends on the cells that come with it, or on its "
            "place among them, so that cells have no evidence of their own: let what cells share be a latent outside "
            "the plate 'cells' or a parameter, and what is known of each be a column of gamma"
        )


def _gives(expected: Tensor, computed: Callable[[], Tensor]) -> bool:
    """Whether densities can be computed and are those expected, up to rounding."""
    try:
        found = computed()
    except (RuntimeError, IndexError, ValueError):  # of shapes that do not fit
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, equal_nan=True)


def _log_joint(
    model: SCVI, global_latents: dict[str, Tensor], sites: dict[str, Tensor], x: Tensor, gamma: Tensor
) -> Tensor:
    """Log p(x, latents) (..., cells) of cells with counts x and covariates gamma."""
    with evaluation_mode(model), seeded(0), torch.no_grad(), pyro.poutine.block(), pyro.validation_enabled(False):
        trace = scored(model, x, gamma, global_latents | sites)
        return torch.stack(cell_terms(trace, *sites)).sum(0)
