"""embed: a place for every cell, z or principal components of what is decoded from it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from pyro_scvi.analysis.inputs import require_inputs
from pyro_scvi.analysis.integration.spaces import Latent, Space, require_space
from pyro_scvi.data.cells import Cells
from pyro_scvi.utils.checks import require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def embed(fit: Fit, cells: Cells, *, space: Space = Latent(), batch_size: int = 1024, seed: int = 0) -> np.ndarray:
    r"""Embed cells: the guide's posterior mean E_q[z | x], or their coordinates in ``space``.

    .. math:: \hat z_n = \int z\, q(z | x_n)\, dz

    Exact if q is normal. From 200 draws under ``seed`` if q is a flow or on the simplex. If the guide is not amortized,
    by refinement from the nearest fitted cell.

    Parameters
    ----------
    fit, cells
        The fit and cells with its schema; they need not be those it was fitted to. Cells of batches that the fit does
        not know are taken, if they were read with ``allow_new_batches=True``.
    space
        ``ps.spaces.Latent()``, ``ps.spaces.Expression()`` or ``ps.spaces.Hidden()``. The principal axes of the latter
        two are those of ``cells``. For a query beside a reference, pass a space fitted to the reference:
        ``ps.spaces.Expression().fitted(fit, reference)``.
    batch_size
        Cells at a time.
    seed
        Of the draws, where there are any.

    Returns
    -------
    ndarray (cells, latents), or (cells, components)

    Raises
    ------
    SchemaError
        If the cells' genes or covariates are not those of the fit.
    ModelError
        If ``fit``, ``cells`` or ``space`` has the wrong type, ``batch_size`` is below 1, or the seed is no integer of 0
        or more; if the space was fitted with another fit, has more components than there are cells, or is of a decoder
        that does not give it.

    Examples
    --------
    >>> ps.embed(fit, test).shape
    (12, 2)
    >>> ps.embed(fit, cells, space=ps.spaces.Expression(components=5)).shape
    (60, 5)
    """
    require_inputs(fit, cells)
    require_space(space)
    require_at_least(1, batch_size=batch_size)
    return space.place(fit, cells, batch_size=batch_size, seed=seed)
