"""Which entries of x a program's density is of: all, unless it leaves some out by ``observe(mask=)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.inference.evaluation import evaluating, observed_given, with_enumerated

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

LOOKED_AT = 256
"""Cells, evenly spaced, whose entries are looked at."""


def entries_of_density(fit: Fit, cells: Cells) -> np.ndarray:
    """Whether entries of x are in the density, (cells, genes), for some of the cells, evenly spaced."""
    few = cells.take(np.unique(np.linspace(0, cells.n_cells - 1, LOOKED_AT).round().astype(int)))
    x, gamma = (part.to(next(fit.model.parameters())) for part in few[:])
    if is_packaged(fit.model):
        return np.ones(x.shape, bool)
    with evaluating(fit.model, fit.guide, 0):
        sites = fit.guide.coordinates.sites(fit.guide.start(x, gamma)[0][None])
        observed = observed_given(fit.guide, x, gamma, with_enumerated(fit.guide, x, gamma, sites), scores_x=False)
    entries: np.ndarray = torch.broadcast_to(observed.kept.to(x.device), x.shape).cpu().numpy()
    return entries
