"""Priors p(z): each is a callable that returns a Pyro distribution with event shape (latents,).

A callable that takes an argument is given gamma (cells, 1, covariates).

Any other callable of that kind serves as well; a module may hold parameters, which are then learned with the model.
"""

from pyro_scvi.priors.conditional import ByLabel, Conditional
from pyro_scvi.priors.flat import Flat
from pyro_scvi.priors.flow import Flow
from pyro_scvi.priors.heavy_tailed import Laplace, StudentT
from pyro_scvi.priors.mixture import GaussianMixture, VampPrior
from pyro_scvi.priors.normal import ARDNormal, StandardNormal
from pyro_scvi.priors.simplex import Dirichlet, LogisticNormal

__all__ = [
    "ARDNormal",
    "ByLabel",
    "Conditional",
    "Dirichlet",
    "Flat",
    "Flow",
    "GaussianMixture",
    "Laplace",
    "LogisticNormal",
    "StandardNormal",
    "StudentT",
    "VampPrior",
]


def __dir__() -> list[str]:
    return __all__
