"""The check that a program's densities are the same for a stack of draws as for each draw by itself."""

import pyro
import torch
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.log_joint import cell_terms, scored
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.random_state import seeded

DRAWS = 3
"""Another number than the two cells of a look, lest one be taken for the other."""


def require_broadcasting(model: SCVI, coordinates: Coordinates, global_latents: dict[str, Tensor]) -> None:
    """Refuse a program whose densities differ between single values of its latents and a stack of draws.

    Training gives latents of shape (cells, 1), other verbs (samples, cells, 1): code that counts dimensions from the
    left takes draws for cells there.

    Raises
    ------
    ModelError
        If they differ, or cannot be computed for a stack.
    """
    if _is_packaged(model):
        return
    looks = [{site.name: site.value for site in model.discovered(seed=seed)} for seed in range(DRAWS)]
    single = [{name: look[name] for name in coordinates.local} for look in looks]
    stacked = {name: torch.stack([sites[name] for sites in single]) for name in coordinates.local}
    alone = torch.cat([_log_joint(model, global_latents, sites).reshape(1, -1) for sites in single])
    try:
        together = _log_joint(model, global_latents, stacked)
        same = together.shape == alone.shape and torch.allclose(alone, together, rtol=1e-3, equal_nan=True)
    except (RuntimeError, IndexError, ValueError):  # of shapes that do not fit
        same = False
    if not same:
        raise ModelError(
            f"{type(model).__name__}: the log density of a stack of draws of {list(coordinates.local)}, each (samples, "
            "cells, 1), is not that of each draw by itself: index from the right, as in z[..., 0, :1], and let all "
            "broadcast over leading dimensions"
        )


def _is_packaged(model: SCVI) -> bool:
    """Whether all that the program runs is this package's."""
    parts = (model, model.prior, model.likelihood, model.library, model.decoder, *model.weights.makers)
    return all(type(part).__module__.startswith("pyro_scvi.") for part in parts) and "forward" not in vars(model)


def _log_joint(model: SCVI, global_latents: dict[str, Tensor], sites: dict[str, Tensor]) -> Tensor:
    """Log p(x, latents) (..., cells) of two cells with counts of 1."""
    ones, gamma = like(model).new_ones(2, model.n_genes), like(model).new_zeros(2, model.n_covariates)
    with evaluation_mode(model), seeded(0), torch.no_grad(), pyro.poutine.block(), pyro.validation_enabled(False):
        trace = scored(model, ones, gamma, global_latents | sites)
        return torch.stack(cell_terms(trace, *sites)).sum(0)
