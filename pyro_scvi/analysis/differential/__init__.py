"""Differential expression between groups of cells: their means, or random pairs (Lopez et al. 2017, Sec. 4)."""

from pyro_scvi.analysis.differential.all_pairs import AllPairs
from pyro_scvi.analysis.differential.contrasts import DepthCorrected, Uncorrected
from pyro_scvi.analysis.differential.differential import differential_expression
from pyro_scvi.analysis.differential.group_means import GroupMeans
from pyro_scvi.analysis.differential.groups import EveryOther, TheRest
from pyro_scvi.analysis.differential.random_pairs import RandomPairs
from pyro_scvi.analysis.differential.summary import expected_false_share as expected_false_share

__all__ = [
    "AllPairs",
    "DepthCorrected",
    "EveryOther",
    "GroupMeans",
    "RandomPairs",
    "TheRest",
    "Uncorrected",
    "differential_expression",
]


def __dir__() -> list[str]:
    return __all__
