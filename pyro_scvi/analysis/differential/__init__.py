"""Differential expression between two groups of cells (Lopez et al. 2017, Sec. 4)."""

from pyro_scvi.analysis.differential.all_pairs import AllPairs
from pyro_scvi.analysis.differential.contrasts import DepthCorrected, Uncorrected
from pyro_scvi.analysis.differential.differential import differential_expression
from pyro_scvi.analysis.differential.summary import expected_fdr as expected_fdr

__all__ = ["AllPairs", "DepthCorrected", "Uncorrected", "differential_expression"]


def __dir__() -> list[str]:
    return __all__
