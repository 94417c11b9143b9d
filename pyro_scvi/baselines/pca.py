"""PCA: principal components of log1p counts."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn import decomposition
from sklearn.base import BaseEstimator, TransformerMixin

from pyro_scvi.baselines.inputs import dense_counts, remember_genes, require_fitted, require_latents


class PCA(TransformerMixin, BaseEstimator):
    r"""Principal components of y = log(1 + x), by scikit-learn.

    This is no model of counts, so there is no score.

    .. math:: t_n = V^T (y_n - \bar y)

    with V (genes, latents) the leading eigenvectors of the covariance of y, t (cells, latents).

    Parameters
    ----------
    n_latent
        Number of components.
    seed
        Of the randomised decomposition that scikit-learn takes for large matrices.

    Attributes
    ----------
    model_
        The fitted :class:`sklearn.decomposition.PCA` of log1p counts.

    Examples
    --------
    >>> ps.baselines.PCA(2).fit(counts).transform(counts).shape
    (60, 2)
    """

    def __init__(self, n_latent: int = 10, *, seed: int = 0) -> None:
        self.n_latent = n_latent
        self.seed = seed

    def fit(self, counts: Any, y: None = None) -> PCA:
        """Fit to raw counts (cells, genes); ``y`` is ignored.

        Raises
        ------
        DataError
            If a count is negative or not finite.
        ModelError
            If there are more latents than genes or cells.
        """
        x = dense_counts(counts)
        require_latents(self.n_latent, x)
        self.model_ = decomposition.PCA(self.n_latent, random_state=self.seed).fit(np.log1p(x))
        remember_genes(self, counts)
        return self

    def transform(self, counts: Any) -> np.ndarray:
        """Scores on the components, (cells, latents).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        require_fitted(self, "model_")
        return self.model_.transform(np.log1p(dense_counts(counts, n_genes=self.model_.n_features_in_, fitted=self)))
