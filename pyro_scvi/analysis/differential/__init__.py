"""Differential expression between two groups of cells (Lopez et al. 2017, Sec. 4)."""

from pyro_scvi.analysis.differential.differential import AllPairs, DepthCorrected, Uncorrected, differential_expression

__all__ = ["AllPairs", "DepthCorrected", "Uncorrected", "differential_expression"]


def __dir__():
    return __all__
