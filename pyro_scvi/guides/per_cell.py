"""Per-cell guide: variational parameters for every training cell, without an encoder."""

from typing import Any

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.amortized import Code
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.guides.global_latents import GlobalGuide
from pyro_scvi.guides.log_joint import log_joint
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
    global_guide
        As in :class:`DiagonalNormal`.

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
    cell_names: Any = None
    """Names of the cells of the fit that this guide is of, in the order of its rows. None: not known."""

    def __init__(self, model: SCVI, n_cells: int, *, seed: int = 0, global_guide: GlobalGuide | None = None) -> None:
        super().__init__(model, global_guide=global_guide, seed=seed)
        with seeded(seed):
            self.loc = nn.Parameter(0.1 * torch.randn(n_cells, self.coordinates.size))
        self.log_scale = nn.Parameter(torch.full((n_cells, self.coordinates.size), -1.0))

    @property
    def n_cells(self) -> int:
        """Number of training cells."""
        return len(self.loc)

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The rows of the free parameters; l is centred on the cell's total."""
        if index is None and len(x) != len(self.loc):
            raise ModelError(f"PerCell was made for {len(self.loc)} cells, got {len(x)}; pass index= with their rows")
        rows = slice(None) if index is None else index
        loc, scale = self._centred(self.loc[rows], x), self.log_scale[rows].exp()
        local = self.coordinates.local
        by_site = [{name: values[:, site.place] for name, site in local.items()} for values in (loc, scale)]
        return Code(loc, *by_site)

    def _centred(self, loc: Tensor, x: Tensor) -> Tensor:
        """Locations (..., cells, size) with the log total of each cell added to that of the library size."""
        if self.coordinates.library is None:
            return loc
        place, log_total = self.coordinates.library.place, torch.log1p(x.sum(-1, keepdim=True))
        return torch.cat([loc[..., : place.start], loc[..., place] + log_total, loc[..., place.stop :]], -1)

    def law(self, site: LocalSite, code: Code, drawn: dict[str, Tensor]) -> Distribution:
        """Independent normals of the coordinates."""
        return site.normal(code.loc[site.name], code.scale[site.name])

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """For each cell, the normal of the fitted cell, among at most 200, whose latents explain it best."""
        with torch.no_grad():
            rows = torch.linspace(0, len(self.loc) - 1, min(200, len(self.loc)), device=x.device).long()
            known = self._centred(self.loc[rows, None].expand(-1, len(x), -1), x)  # (candidates, cells, size)
            density = log_joint(self.model, x, gamma, self.weights.medians())
            best = torch.cat([density(part) for part in known.split(10)]).argmax(0)  # 10 at a time, for the memory
            loc = known[best, torch.arange(len(x), device=x.device)]
            return loc, self.log_scale[rows][best].exp()
