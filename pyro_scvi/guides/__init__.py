"""Guides q(z, l | x): variational posteriors with the arguments and sites of the model (Lopez et al. 2017, Sec. 2)."""

from pyro_scvi.guides.amortized import DiagonalNormal
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.flow import InverseAutoregressiveFlow
from pyro_scvi.guides.full_rank import FullRankNormal
from pyro_scvi.guides.per_cell import PerCell
from pyro_scvi.guides.point import Point

__all__ = ["DiagonalNormal", "FullRankNormal", "Guide", "InverseAutoregressiveFlow", "PerCell", "Point"]


def __dir__() -> list[str]:
    return __all__
