"""Figures of fits, models and results: each takes matplotlib axes, or makes some, and returns them."""

from pyro_scvi.plots.canvas import HELD_OUT, INK, MISSING, SHADE, TRAIN
from pyro_scvi.plots.diagram import RADIUS, program
from pyro_scvi.plots.expression import volcano
from pyro_scvi.plots.projection import PCA, UMAP, Projection, embedding, project
from pyro_scvi.plots.ranking import comparison
from pyro_scvi.plots.replicas import predictive
from pyro_scvi.plots.training import loss
from pyro_scvi.plots.uniformity import calibration, pit

__all__ = [
    "HELD_OUT",
    "INK",
    "MISSING",
    "PCA",
    "RADIUS",
    "SHADE",
    "TRAIN",
    "UMAP",
    "Projection",
    "calibration",
    "comparison",
    "embedding",
    "loss",
    "pit",
    "predictive",
    "program",
    "project",
    "volcano",
]


def __dir__():
    return __all__
