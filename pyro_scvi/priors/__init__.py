"""Priors p(z): each is a callable without arguments that returns a Pyro distribution with event shape (latents,).

Any other callable of that kind serves as well; a module may hold parameters, which are then learned with the model.
"""

from pyro_scvi.priors.flat import Flat
from pyro_scvi.priors.flow import Flow
from pyro_scvi.priors.heavy_tailed import Laplace, StudentT
from pyro_scvi.priors.mixture import GaussianMixture, VampPrior
from pyro_scvi.priors.normal import ARDNormal, StandardNormal
from pyro_scvi.priors.simplex import Dirichlet, LogisticNormal

__all__ = [
    "ARDNormal",
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
