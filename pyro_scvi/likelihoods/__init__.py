"""Likelihoods p(x | z): distributions of counts given the decoder's outputs, and the dispersions they use."""

from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.dispersion import PerCellAndGene, PerGene, PerGeneAndBatch
from pyro_scvi.likelihoods.negative_binomial import NB, ZINB
from pyro_scvi.likelihoods.poisson import ZIP, Poisson

__all__ = ["NB", "ZINB", "ZIP", "Likelihood", "PerCellAndGene", "PerGene", "PerGeneAndBatch", "Poisson"]


def __dir__() -> list[str]:
    return __all__
