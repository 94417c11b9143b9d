"""Other methods that the paper compares with, as estimators of scikit-learn: fit, transform, score_samples.

Counts (cells, genes) are raw, dense or sparse. Packages other than the core's are imported when a method needs them.
"""

from pyro_scvi.baselines.differential.deseq2 import DESeq2
from pyro_scvi.baselines.differential.mast import MAST
from pyro_scvi.baselines.differential.wilcoxon import Wilcoxon
from pyro_scvi.baselines.factor_analysis import FactorAnalysis
from pyro_scvi.baselines.leiden import LeidenClusters
from pyro_scvi.baselines.magic import MAGIC
from pyro_scvi.baselines.normalization.scalings import RLE, TMM, FullQuantile, NoScaling, TotalScaling, UpperQuartile
from pyro_scvi.baselines.normalization.scone import SCONE, Normalisation
from pyro_scvi.baselines.pca import PCA
from pyro_scvi.baselines.reproducibility import AUTHORS_START, IDRResult, Mixture, idr
from pyro_scvi.baselines.scvi_tools import SCVITools
from pyro_scvi.baselines.zifa.estimator import ZIFA
from pyro_scvi.baselines.zinbwave.estimator import CommonDispersion, GenewiseDispersion, ZINBWaVE

__all__ = [
    "AUTHORS_START",
    "MAGIC",
    "MAST",
    "PCA",
    "RLE",
    "SCONE",
    "TMM",
    "ZIFA",
    "CommonDispersion",
    "DESeq2",
    "FactorAnalysis",
    "FullQuantile",
    "GenewiseDispersion",
    "IDRResult",
    "LeidenClusters",
    "Mixture",
    "NoScaling",
    "Normalisation",
    "SCVITools",
    "TotalScaling",
    "UpperQuartile",
    "Wilcoxon",
    "ZINBWaVE",
    "idr",
]


def __dir__() -> list[str]:
    return __all__
