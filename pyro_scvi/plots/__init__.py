"""Figures of fits, models and results: each takes matplotlib axes, or makes them, and returns them."""

from pyro_scvi.plots.diagram import program
from pyro_scvi.plots.expression import ma, volcano
from pyro_scvi.plots.projection import Projection, embedding, project
from pyro_scvi.plots.ranking import comparison
from pyro_scvi.plots.replicas import predictive
from pyro_scvi.plots.training import loss
from pyro_scvi.plots.uniformity import calibration, pit

__all__ = [
    "Projection",
    "calibration",
    "comparison",
    "embedding",
    "loss",
    "ma",
    "pit",
    "predictive",
    "program",
    "project",
    "volcano",
]


def __dir__() -> list[str]:
    return __all__
