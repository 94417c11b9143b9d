"""Checks of a baseline's input: one dense matrix of counts, and a fit before anything is asked of it."""

from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.data.counts import canonical
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_at_least


def dense_counts(
    counts: Any, *, n_genes: int | None = None, unseen_genes: bool = True, fitted: Any = None
) -> np.ndarray:
    """Bring counts (cells, genes), sparse or dense, to a float64 array, checked.

    Parameters
    ----------
    counts
        Raw counts: NumPy, any SciPy sparse format, torch or a DataFrame.
    n_genes
        How many genes there must be, for a method that was fitted before; None for any number.
    unseen_genes
        Whether a gene may be zero in every cell.
    fitted
        The method that was fitted before: columns of a DataFrame are put into the order of those of its fit.

    Raises
    ------
    DataError
        For an AnnData instead of its X; or naming the first entry that is NaN, infinite or negative, the number of
        genes, the genes without counts, or those that the fit had and a DataFrame lacks.
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
    """Keep the names of a DataFrame's columns as ``feature_names_in_``, scikit-learn's word for them."""
    vars(method).pop("feature_names_in_", None)
    if isinstance(counts, pd.DataFrame):
        method.feature_names_in_ = counts.columns.to_numpy(dtype=object)


def _in_order_of(fitted: Any, counts: Any) -> Any:
    names = getattr(fitted, "feature_names_in_", None)
    if names is None or not isinstance(counts, pd.DataFrame) or len(counts.columns) != len(names):
        return counts
    if missing := [name for name in names if name not in counts.columns]:
        raise DataError(f"{len(missing)} genes of the fit are no columns of counts, the first of them {missing[0]!r}")
    return counts[names]


def require_fitted(method: Any, attribute: str) -> None:
    """Refuse questions to a method that has not been fitted.

    Raises
    ------
    ModelError
        Naming the method.
    """
    if not hasattr(method, attribute):
        raise ModelError(f"{type(method).__name__} has not been fitted; call fit(counts) first")


def missing_extra(package: str, error: ImportError) -> ImportError:
    """What to raise where an optional package is absent."""
    return ImportError(f"{package} is not installed: pip install 'pyro-scvi[baselines]' brings it ({error})")


def require_latents(n_latent: int, counts: np.ndarray) -> None:
    """Refuse a number of latents that the counts (cells, genes) cannot determine.

    Raises
    ------
    ModelError
        Naming the number and its limits.
    """
    require_at_least(1, n_latent=n_latent)
    if n_latent > min(counts.shape):
        raise ModelError(f"n_latent must be at most {min(counts.shape)}, the smaller side of counts; got {n_latent}")


def require_varying_genes(counts: np.ndarray) -> None:
    """Refuse genes with one value in all cells, whose normal density has no bound.

    Raises
    ------
    DataError
        Naming how many there are and the first of them.
    """
    constant = np.flatnonzero((counts == counts[0]).all(0))
    if constant.size:
        raise DataError(
            f"{constant.size} genes have the same count in every cell, the first of them gene {constant[0]}; drop them "
            "before the fit"
        )
