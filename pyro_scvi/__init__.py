"""scVI as a Pyro program: read it, change it, fit it, sample its posterior."""

from pyro_scvi import datasets, guides, libraries, likelihoods, networks, presets, priors, schedules, weights
from pyro_scvi.cells import Cells
from pyro_scvi.evidence import evidence
from pyro_scvi.fit import Fit, fit
from pyro_scvi.model import SCVI
from pyro_scvi.posterior import embed
from pyro_scvi.schema import Schema
from pyro_scvi.store import load

__version__ = "0.1.0"

__all__ = [
    "SCVI",
    "Cells",
    "Fit",
    "Schema",
    "datasets",
    "embed",
    "evidence",
    "fit",
    "guides",
    "libraries",
    "likelihoods",
    "load",
    "networks",
    "presets",
    "priors",
    "schedules",
    "weights",
]
