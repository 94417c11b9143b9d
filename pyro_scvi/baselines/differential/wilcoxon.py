"""Differential expression by the Wilcoxon rank-sum test on scaled counts."""

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import mannwhitneyu
from sklearn.base import BaseEstimator

from pyro_scvi.baselines.differential.two_groups import two_groups
from pyro_scvi.baselines.normalization.scalings import Scaling, TotalScaling


class Wilcoxon(BaseEstimator):
    r"""Rank-sum test of every gene between two groups of cells, on logarithms of scaled counts.

    .. math:: U = \sum_{n \in first} \sum_{m \in second} 1[y_n > y_m] + \tfrac12 1[y_n = y_m], \quad
        p = 2 \Phi\Big(-\frac{|U - n_1 n_2 / 2| - 1/2}{\sigma}\Big), \quad
        \sigma^2 = \frac{n_1 n_2}{12} \Big(N + 1 - \sum_t \frac{t^3 - t}{N (N - 1)}\Big)

    Here t are the numbers of tied cells, N = n_1 + n_2, and p is at most 1.

    This is the normal approximation corrected for ties and continuity (Mann and Whitney 1947). The logarithm does not
    change ranks; only the scaling matters.

    Parameters
    ----------
    scaling
        How cells are scaled to a common depth, one of :mod:`pyro_scvi.baselines.normalization.scalings`.
    pseudocount
        Added to both means, in scaled counts, before computing the fold change.

    Examples
    --------
    >>> table = ps.baselines.Wilcoxon().test(counts, kind)
    >>> table.columns.tolist(), bool((table.p_value < 0.05).any())
    (['p_value', 'log_fold_change'], True)
    """

    def __init__(self, scaling: Scaling = TotalScaling(), pseudocount: float = 1.0) -> None:
        self.scaling = scaling
        self.pseudocount = pseudocount

    def test(self, counts: Any, group: Any) -> pd.DataFrame:
        """Test every gene.

        Parameters
        ----------
        counts, group
            Raw counts (cells, genes) and one label per cell, of two values.

        Returns
        -------
        DataFrame by gene
            ``p_value``, two-sided, 1 for a gene whose values are all equal; ``log_fold_change``, log2 of the mean of
            the second group over that of the first, groups in the order in which their labels sort.

        Raises
        ------
        DataError
            As :func:`~pyro_scvi.baselines.differential.two_groups.two_groups`.
        """
        data = two_groups(counts, group)
        scaled = self.scaling(data.x)
        first, second = scaled[~data.second], scaled[data.second]
        varying = scaled.max(0) > scaled.min(0)
        p_value = np.ones(scaled.shape[1])
        if varying.any():
            logs = np.log1p(first[:, varying]), np.log1p(second[:, varying])
            p_value[varying] = mannwhitneyu(*logs, axis=0, method="asymptotic").pvalue
        means = (part.mean(0) + self.pseudocount for part in (second, first))
        return data.table(p_value, np.subtract(*map(np.log2, means)))
