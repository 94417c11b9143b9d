"""Differential expression by the two-group hurdle test of MAST (Finak et al. 2015), in closed form."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.special import xlogy
from scipy.stats import chi2
from sklearn.base import BaseEstimator

from pyro_scvi.baselines.differential.two_groups import two_groups
from pyro_scvi.baselines.normalization.scalings import NoScaling, Scaling

EQUAL = 1e-12  # a residual sum of squares below this share of the sum of squares is rounding


class MAST(BaseEstimator):
    r"""Likelihood ratio test of detection plus that of the level in detected cells.

    See Finak et al. (2015), Methods.

    With y = log2(scaled counts + 1), k of n cells of a group detected, m detected cells in all, and RSS the residual
    sum of squares of y over the detected cells around one mean (0) or around the means of both groups (1),

    .. math:: LR = 2 [\ell(k_1, n_1) + \ell(k_2, n_2) - \ell(k, n)] + m \log(RSS_0 / RSS_1) \sim \chi^2_2, \qquad
              \ell(k, n) = k \log\tfrac{k}{n} + (n - k) \log\tfrac{n - k}{n}

    These are MAST's figures with method "glm" and no empirical Bayes. Its default adds a Cauchy prior on the
    logistic regression and shrinks the variances; p values then differ, mostly by less than a hundredth.

    A part without anything to compare adds no statistic and no degree of freedom. For detection that is a gene detected
    in all cells or in none. For the level it is a gene with no detected cell in one group, or with equal values in all
    detected cells of each group. With neither part, p is 1. MAST keeps a degree of freedom for some of these genes.

    Parameters
    ----------
    scaling
        How cells are scaled to a common depth, one of :mod:`pyro_scvi.baselines.normalization.scalings`. By default
        they are not scaled: if depth differs between the groups, nearly all genes then appear to differ.

    Examples
    --------
    >>> table = ps.baselines.MAST().test(counts, kind)
    >>> table.columns.tolist(), bool((table.p_value < 0.05).any())
    (['p_value', 'log_fold_change'], True)
    """

    def __init__(self, scaling: Scaling = NoScaling()) -> None:
        self.scaling = scaling

    def test(self, counts: Any, group: Any) -> pd.DataFrame:
        """Test every gene.

        Parameters
        ----------
        counts, group
            Raw counts (cells, genes) and one label per cell, of two values.

        Returns
        -------
        DataFrame by gene
            ``p_value``; ``log_fold_change``, the mean of y in the second group minus that in the first, log2 units,
            groups in the order in which their labels sort.

        Raises
        ------
        DataError
            As :func:`~pyro_scvi.baselines.differential.two_groups.two_groups`.
        """
        data = two_groups(counts, group)
        y = np.log2(self.scaling(data.x) + 1)
        parts = y[~data.second], y[data.second]
        detection, of_detection = detection_ratio(*parts)
        level, of_level = level_ratio(*parts)
        freedom = of_detection.astype(int) + of_level
        p_value = np.where(freedom > 0, chi2.sf(detection + level, np.maximum(freedom, 1)), 1.0)
        return data.table(p_value, parts[1].mean(0) - parts[0].mean(0))


def detection_ratio(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood ratio of detection, and whether there is anything to compare, (genes,) each."""
    k = [(part > 0).sum(0) for part in (first, second)]
    n = len(first), len(second)
    together = _binomial(k[0] + k[1], sum(n))
    ratio = 2 * (_binomial(k[0], n[0]) + _binomial(k[1], n[1]) - together)
    varies = (k[0] + k[1] > 0) & (k[0] + k[1] < sum(n))
    return np.where(varies, ratio, 0.0), varies


def level_ratio(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Likelihood ratio of the level of detected cells, and whether there is anything to compare, (genes,) each."""
    both = np.concatenate((first, second))
    within = _residual(first) + _residual(second)
    seen = (first > 0).any(0) & (second > 0).any(0)
    varies = seen & (within > EQUAL * np.square(both).sum(0))
    m = (both > 0).sum(0)
    log_ratio = np.log(np.where(varies, _residual(both), 1.0)) - np.log(np.where(varies, within, 1.0))
    return m * log_ratio, varies


def _binomial(k: np.ndarray, n: int) -> np.ndarray:
    return xlogy(k, k / n) + xlogy(n - k, (n - k) / n)


def _residual(y: np.ndarray) -> np.ndarray:
    """Sum of squares of the values above zero around their mean, (genes,)."""
    detected = y > 0
    mean = y.sum(0) / np.maximum(detected.sum(0), 1)
    return np.where(detected, np.square(y - mean), 0.0).sum(0)
