"""embed: the posterior mean of z for every cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.base import Guide
from pyro_scvi.utils.checks import require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit
from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.proposals import refined


def embed(fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
    r"""Posterior mean of z under the guide, E_q[z | x].

    .. math:: \hat z_n = \int z\, q(z | x_n)\, dz

    Exact if q is normal. From 200 draws under ``seed`` if q is a flow or on the simplex. If the guide is not amortized,
    by refinement from the nearest fitted cell.

    Parameters
    ----------
    fit, cells
        The fit and cells with its schema; they need not be those it was fitted to.
    batch_size
        Cells at a time.
    seed
        Of the draws, where there are any.

    Returns
    -------
    ndarray (cells, latents)

    Raises
    ------
    SchemaError
        If the cells' genes or covariates are not those of the fit.
    ModelError
        If ``fit`` or ``cells`` has the wrong type, ``batch_size`` is below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> ps.embed(fit, test).shape
    (12, 2)
    """
    require_inputs(fit, cells)
    require_at_least(1, batch_size=batch_size)
    with evaluating(fit.model, fit.guide, seed):
        means = [_mean(fit.guide, x, gamma) for x, gamma in minibatches(fit, cells).in_order(batch_size)]
        return torch.cat(means).cpu().numpy()


def _mean(guide: Guide, x: Tensor, gamma: Tensor) -> Tensor:
    site = guide.coordinates.of_z()
    if not guide.amortized:
        loc, _ = refined(guide, x, gamma)
        return guide.coordinates.sites(loc)[site.name].squeeze(-2)
    return guide.mean(site, x, gamma).squeeze(-2)
