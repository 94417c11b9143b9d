"""Concordance of a score of genes with microarrays of sorted cells: AUC, rank correlation and IDR."""

import warnings
from typing import Any

import numpy as np
from scipy import stats
from sklearn.metrics import roc_auc_score

from pyro_scvi.baselines import AUTHORS_START, idr
from pyro_scvi.paper.data.blood import Blood

AUC, SPEARMAN, MIXTURE, RHO = "auc", "spearman", "mixture", "rho"
LEAST_P = np.finfo(np.float64).tiny


def significance(p_value: Any) -> np.ndarray:
    """-log p in float64, (genes,); finite: p is at least the smallest float, and 1 for a gene without a p-value."""
    p = np.nan_to_num(np.asarray(p_value, dtype=np.float64), nan=1.0)
    return -np.log(np.maximum(p, LEAST_P))


def judged(blood: Blood, score: np.ndarray) -> dict[str, float]:
    """Agreement of a score (genes,), larger = more different, with the arrays, over the matched genes.

    ``auc`` is the area under the ROC curve for the arrays' most significant genes, ``spearman`` the rank correlation
    with the arrays' p-values; ``mixture`` and ``rho`` are weight and correlation of the reproducible part by the
    irreproducible discovery rate, from the authors' start (:func:`pyro_scvi.baselines.idr`).
    """
    ours, theirs = score[blood.matched], significance(blood.p)
    with warnings.catch_warnings():  # an undetermined mixture is judged by the rows of random orders
        warnings.simplefilter("ignore", UserWarning)
        mixture = idr(ours, theirs, starts=[AUTHORS_START])
    return {
        AUC: float(roc_auc_score(blood.positive, ours)),
        SPEARMAN: float(stats.spearmanr(ours, theirs).statistic),
        MIXTURE: mixture.mixture_weight,
        RHO: mixture.rho,
    }
