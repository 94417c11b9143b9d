"""Imputation by MAGIC (van Dijk et al. 2018): counts smoothed over a graph of similar cells."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator

from pyro_scvi.baselines.inputs import dense_counts, missing_extra, remember_genes, require_fitted
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.random_state import global_state_kept


class MAGIC(BaseEstimator):
    r"""Imputation by diffusion, by the package magic-impute.

    .. math::

        \hat s = M^t s, \quad s_{ng} = \sqrt{x_{ng}\, \bar l / l_n}, \quad \hat x_{ng} = \hat s_{ng}^2\, l_n / \bar l

    M are the row-stochastic affinities of cells by their s, l_n the total count of a cell, and l-bar the median of the
    totals above 0. MAGIC only handles the cells of its fit, so there is no ``transform``. The paper's authors ran the
    MAGIC of 2017, which rescaled to the 99th percentile; magic-impute does not.

    Parameters
    ----------
    knn, knn_max, decay
        Number of the neighbour whose distance sets a cell's bandwidth; most neighbours, None: 3 knn; exponent of the
        affinity.
    t
        Steps of diffusion.
    n_pca
        Principal components in which distances are computed; none are used if there are no more cells or genes than
        this.
    seed
        Of the randomised principal components.

    Attributes
    ----------
    model_
        The fitted ``magic.MAGIC``.

    References
    ----------
    van Dijk et al. 2018, "Recovering gene interactions from single-cell data using data diffusion", Cell 174:716;
    Lopez et al. 2017, Sec. 4 (imputation). Defaults are those of magic-impute 3.0.0.

    Examples
    --------
    >>> system = ps.baselines.MAGIC(knn=3, n_pca=5).fit(counts)
    >>> system.impute(counts).shape
    (60, 20)
    """

    def __init__(
        self,
        *,
        knn: int = 5,
        knn_max: int | None = None,
        decay: float = 1.0,
        t: int = 3,
        n_pca: int = 100,
        seed: int = 0,
    ) -> None:
        self.knn = knn
        self.knn_max = knn_max
        self.decay = decay
        self.t = t
        self.n_pca = n_pca
        self.seed = seed

    def fit(self, counts: Any, y: None = None) -> MAGIC:
        """Build the graph of raw counts (cells, genes); ``y`` is ignored.

        Raises
        ------
        DataError
            If a count is negative or not finite, or a gene has no count in any cell.
        ModelError
            If a setting is below 1, or knn is not below the number of cells.
        ImportError
            Without magic-impute, naming the extra that brings it.
        """
        magic = _package()
        require_at_least(1, knn=self.knn, t=self.t, n_pca=self.n_pca)
        x = dense_counts(counts, unseen_genes=False)
        if self.knn >= len(x):
            raise ModelError(f"knn must be below the number of cells, {len(x)}; got {self.knn}")
        components = self.n_pca if self.n_pca < min(x.shape) else None
        settings = {"knn": self.knn, "knn_max": self.knn_max, "decay": self.decay, "t": self.t, "n_pca": components}
        model = magic.MAGIC(**settings, solver="exact", random_state=self.seed, n_jobs=1, verbose=0)
        with _undisturbed():
            self.model_ = model.fit(_roots(x))
        remember_genes(self, counts)
        return self

    def impute(self, counts: Any) -> np.ndarray:
        """Smoothed counts of the cells of the fit, (cells, genes), at each cell's own total.

        Raises
        ------
        DataError
            If these are not the counts of the fit.
        ModelError
            Before the fit.
        """
        require_fitted(self, "model_")
        x = dense_counts(counts, n_genes=self.model_.X.shape[1], fitted=self)
        if not np.array_equal(_roots(x), self.model_.X):
            raise DataError("MAGIC imputes only the counts that it was fitted to; call fit(counts) with these first")
        with _undisturbed():
            smooth = self.model_.transform()
        return np.square(smooth) * _depth(x)


def _package() -> Any:
    try:
        with global_state_kept():  # it brings numba
            import magic
    except ImportError as error:
        raise missing_extra("magic-impute", error) from error
    return magic


def _depth(x: np.ndarray) -> np.ndarray:
    """Each cell's total over the median total, (cells, 1); 1 for a cell without counts, which stays at 0."""
    totals = x.sum(1, keepdims=True)
    return np.where(totals > 0, totals / np.median(totals[totals > 0]), 1.0)


def _roots(x: np.ndarray) -> np.ndarray:
    return np.sqrt(x / _depth(x))


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the global random state, which magic draws from, and hide messages about its own logger."""
    with global_state_kept(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Call to deprecated method", category=DeprecationWarning)
        yield
