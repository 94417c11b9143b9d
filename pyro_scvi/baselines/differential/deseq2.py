"""Differential expression by DESeq2 (Love et al. 2014) through InMoose, its port to Python."""

import warnings
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator

from pyro_scvi.baselines.differential.two_groups import two_groups
from pyro_scvi.baselines.inputs import missing_extra
from pyro_scvi.errors import DataError


class DESeq2(BaseEstimator):
    r"""Wald test of log fold change, by negative binomial regression with shrunken dispersions.

    .. math:: x_{ng} \sim NB(s_n q_{ng}, \alpha_g), \qquad \log_2 q_{ng} = \beta_{0g} + \beta_{1g} 1[n \in second]

    (Love et al. 2014, Methods). Size factors are "poscounts": medians of ratios to geometric means of positive counts.
    DESeq2's default needs genes without a zero, which single-cell data lack. There is no independent filtering and no
    shrinkage of fold changes. Outliers are treated as DESeq2 does.

    Computed by inmoose 0.9.1 (GPL-3, in the extra ``baselines``, imported at the first test). It agrees with DESeq2
    1.38.3 in R to 5e-5 in log10 p. pydeseq2 (MIT, the more common port) was measured too: its size factors differ from
    R's by up to 4 %, its p values by up to two orders of magnitude. If dispersions follow no parametric trend, DESeq2
    uses a local regression, which inmoose lacks. Their mean then replaces the trend, with a warning.

    Examples
    --------
    >>> mean = np.geomspace(5, 500, 200)
    >>> r = 1 / (0.1 + 1 / mean)  # inverse dispersions with a trend
    >>> x = rng.negative_binomial(r, r / (r + mean), (20, 200))
    >>> ps.baselines.DESeq2().test(x, np.arange(20) % 2).columns.tolist()
    ['p_value', 'log_fold_change']
    """

    def test(self, counts: Any, group: Any) -> pd.DataFrame:
        """Test every gene.

        Parameters
        ----------
        counts, group
            Raw counts (cells, genes), integers, and one label per cell, of two values.

        Returns
        -------
        DataFrame by gene
            ``p_value``; ``log_fold_change``, log2 of the second group over the first, groups in the order of their
            sorted labels. Both are NaN for a gene without counts. ``p_value`` is NaN for a gene with an outlier that
            DESeq2 cannot replace.

        Raises
        ------
        DataError
            For counts that are not integers, and as :func:`~pyro_scvi.baselines.differential.two_groups.two_groups`.
        ValueError
            From inmoose, if no gene varies more than a Poisson distribution; DESeq2 in R refuses such counts too.
        ImportError
            If inmoose is not installed.
        """
        data = two_groups(counts, group)
        if (data.x != np.round(data.x)).any():
            raise DataError("DESeq2 takes integer counts; these are not. Pass raw counts, not normalised ones")
        try:
            from inmoose.deseq2 import DESeq, DESeqDataSet
        except ImportError as error:
            raise missing_extra("inmoose", error) from error
        names = [f"cell {n}" for n in range(len(data.x))]
        cells = pd.DataFrame({"group": pd.Categorical(np.where(data.second, "second", "first"))}, index=names)

        def fitted(trend: str) -> Any:
            with (
                warnings.catch_warnings()
            ):  # inmoose leaves filters behind, and does what pandas will not allow for long
                warnings.simplefilter("ignore", FutureWarning)
                counted = DESeqDataSet(data.x.astype(int), clinicalData=cells, design="~ group")
                fit = DESeq(counted, sfType="poscounts", fitType=trend, quiet=True)
                return fit.results(independentFiltering=False)

        try:
            tested = fitted("parametric")
        except NotImplementedError:  # the local regression that DESeq2 falls back on is not in inmoose
            warnings.warn("no parametric trend fits the dispersions; their mean is used instead", stacklevel=2)
            tested = fitted("mean")
        columns = (np.asarray(tested[name], dtype=float) for name in ("pvalue", "log2FoldChange"))
        return data.table(*columns)
