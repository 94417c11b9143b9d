"""Per-cell guide: variational parameters for every training cell, without an encoder."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.amortized import Code
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.coordinates import log_joint
from pyro_scvi.model import SCVI
from pyro_scvi.types import Distribution
from pyro_scvi.utils.random_state import seeded


class PerCell(Guide):
    r"""Free location and scale for every cell and no encoder: mean-field variational inference.

    .. math:: q(z_n | x_n) = Normal(m_n, diag(s_n^2)), \qquad q(l_n | x_n) = LogNormal(a_n, b_n^2)

    It knows only the ``n_cells`` cells that it is fitted on, by row. Other cells are refined from the nearest of these.

    Parameters
    ----------
    model
        The model; the guide does not own its parameters.
    n_cells
        Number of training cells.
    seed
        Of the initial locations.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its prior is Flat, or the seed is no integer of 0 or more. When called, if there are
        other than ``n_cells`` cells and no ``index`` gives their rows.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.PerCell(model, n_cells=len(cells))
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    amortized = False

    def __init__(self, model: SCVI, n_cells: int, *, seed: int = 0) -> None:
        super().__init__(model)
        with seeded(seed):
            self.loc = nn.Parameter(0.1 * torch.randn(n_cells, self.coordinates.size))
        self.log_scale = nn.Parameter(torch.full((n_cells, self.coordinates.size), -1.0))

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The rows of the free parameters; l is centred on the cell's total."""
        if index is None and len(x) != len(self.loc):
            raise ModelError(f"PerCell was made for {len(self.loc)} cells, got {len(x)}; pass index= with their rows")
        rows = slice(None) if index is None else index
        loc, scale, n = self.loc[rows], self.log_scale[rows].exp(), self.coordinates.n_z
        l_loc = torch.log1p(x.sum(-1, keepdim=True)) + loc[:, n:]
        return Code(loc, loc[:, :n], scale[:, :n], l_loc, scale[:, n:])

    def z_law(self, code: Code) -> Distribution:
        """Normal with diagonal covariance, on the support of z."""
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1))

    def l_law(self, code: Code, z: Tensor) -> Distribution:
        """LogNormal, independent of z."""
        return dist.LogNormal(code.l_loc, code.l_scale)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """For each cell, the normal of the fitted cell, among at most 200, whose latents explain it best."""
        with torch.no_grad():
            rows = torch.linspace(0, len(self.loc) - 1, min(200, len(self.loc)), device=x.device).long()
            known = self.loc[rows, None].expand(-1, len(x), -1).clone()  # (candidates, cells, size)
            known[..., self.coordinates.n_z :] += torch.log1p(x.sum(-1, keepdim=True))
            density = log_joint(self.model, x, gamma, self.weights.medians())
            best = torch.cat([density(part) for part in known.split(10)]).argmax(0)  # 10 at a time, for the memory
            loc = known[best, torch.arange(len(x), device=x.device)]
            return loc, self.log_scale[rows][best].exp()
