"""Checks of a baseline's input: counts as one dense matrix, and methods that have been fitted."""

from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.data.counts import canonical
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_at_least


def dense_counts(
    counts: Any, *, n_genes: int | None = None, unseen_genes: bool = True, fitted: Any = None
) -> np.ndarray:
    """Check counts (cells, genes), sparse or dense, and return them as a float64 array.

    Parameters
    ----------
    counts
        Raw counts: NumPy, any SciPy sparse format, torch or a DataFrame.
    n_genes
        Required number of genes, for a method already fitted; None: any number.
    unseen_genes
        Whether genes may be zero in every cell.
    fitted
        The method, if already fitted: a DataFrame's columns are put into the order of its fit.

    Raises
    ------
    DataError
        For an AnnData instead of its X; for entries that are NaN, infinite or negative (the message names the first);
        for a wrong number of genes, genes without counts, or genes of the fit that a DataFrame lacks.
    """
    if hasattr(counts, "X") and hasattr(counts, "obs"):
        raise DataError(f"counts must be a matrix, got {type(counts).__name__}; pass adata.X or a layer with counts")
    matrix = canonical(_in_order_of(fitted, counts), "counts")
    x = np.asarray(matrix.toarray() if not isinstance(matrix, np.ndarray) else matrix, dtype=np.float64)
    wrong = ~(np.isfinite(x) & (x >= 0))
    if wrong.any():
        cell, gene = np.argwhere(wrong)[0]
        raise DataError(f"counts must be finite and 0 or more; cell {cell}, gene {gene} is {x[cell, gene]}")
    if n_genes is not None and x.shape[1] != n_genes:
        raise DataError(f"the method was fitted on {n_genes} genes, these counts have {x.shape[1]}")
    if not unseen_genes and (empty := np.flatnonzero(~x.any(0))).size:
        raise DataError(
            f"{empty.size} genes have no count in any cell, the first of them gene {empty[0]}; drop them before the fit"
        )
    return x


def remember_genes(method: Any, counts: Any) -> None:
    """Store the names of a DataFrame's columns as ``feature_names_in_``, as scikit-learn does."""
    vars(method).pop("feature_names_in_", None)
    if isinstance(counts, pd.DataFrame):
        method.feature_names_in_ = counts.columns.to_numpy(dtype=object)


def _in_order_of(fitted: Any, counts: Any) -> Any:
    names = getattr(fitted, "feature_names_in_", None)
    if names is None or not isinstance(counts, pd.DataFrame) or len(counts.columns) != len(names):
        return counts
    if missing := [name for name in names if name not in counts.columns]:
        raise DataError(
            f"{len(missing)} genes of the fit are missing from the columns of counts, the first of them {missing[0]!r}"
        )
    return counts[names]


def require_fitted(method: Any, attribute: str) -> None:
    """Raise if a method has not been fitted.

    Raises
    ------
    ModelError
        If it has not been fitted; the message names the method.
    """
    if not hasattr(method, attribute):
        raise ModelError(f"{type(method).__name__} has not been fitted; call fit(counts) first")


def missing_extra(package: str, error: ImportError) -> ImportError:
    """The error to raise if an optional package is missing."""
    return ImportError(f"{package} is not installed: pip install 'pyro-scvi[baselines]' brings it ({error})")


def require_latents(n_latent: int, counts: np.ndarray) -> None:
    """Raise if the counts (cells, genes) cannot determine this number of latents.

    Raises
    ------
    ModelError
        If there are too few or too many; the message names the limits.
    """
    require_at_least(1, n_latent=n_latent)
    if n_latent > min(counts.shape):
        raise ModelError(f"n_latent must be at most {min(counts.shape)}, the smaller side of counts; got {n_latent}")


def require_varying_genes(counts: np.ndarray) -> None:
    """Raise if a gene has the same value in all cells: its normal density would be unbounded.

    Raises
    ------
    DataError
        If there are any; the message names their number and the first of them.
    """
    constant = np.flatnonzero((counts == counts[0]).all(0))
    if constant.size:
        raise DataError(
            f"{constant.size} genes have the same count in every cell, the first of them gene {constant[0]}; drop them "
            "before the fit"
        )
