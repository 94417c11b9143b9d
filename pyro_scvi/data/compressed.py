"""Compressed sparse matrices (CSR, CSC): whether their rows hold all the values that they store."""

from typing import Any

import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from pyro_scvi.errors import DataError

_POINTED = ("csr", "csc", "bsr")  # formats of SciPy with an index pointer


def require_whole(matrix: Any, source: str) -> None:
    """Refuse a matrix, in memory or on disk, that stores values outside its index pointer.

    SciPy drops such values without a word, and anndata reads past them. Other matrices are left to other checks.

    Raises
    ------
    DataError
        If the pointer does not start at 0 or does not end at the last value.
    """
    if isinstance(matrix, CSRDataset | CSCDataset):
        group: Any = matrix.group
        pointer = group["indptr"][...]
        _require_ends(pointer, group["indices"].shape[0], group["data"].shape[0], source)
        _require_increasing(pointer, matrix.shape[0 if isinstance(matrix, CSRDataset) else 1], source)
        return
    stored: Any = matrix
    if sparse.issparse(matrix) and stored.format in _POINTED:
        _require_ends(stored.indptr, len(stored.indices), len(stored.data), source)


def _require_ends(pointer: np.ndarray, n_indices: int, n_values: int, source: str) -> None:
    if not len(pointer) or n_indices != n_values:
        raise DataError(f"{source} is a broken sparse matrix: {n_values} values have {n_indices} indices.")
    first, last = int(pointer[0]), int(pointer[-1])
    if first != 0 or last != n_values:
        raise DataError(
            f"{source} is a broken sparse matrix: its index pointer runs from {first} to {last}, but it stores "
            f"{n_values} values, and the others would be lost. Make it again from its source. If the rest is unused "
            "room behind the last cell, matrix.prune() removes it."
        )


def _require_increasing(pointer: np.ndarray, n: int, source: str) -> None:
    """What SciPy checks of a matrix in memory."""
    if len(pointer) != n + 1 or (np.diff(pointer) < 0).any():
        raise DataError(f"{source} is a broken sparse matrix: its index pointer does not increase along its {n} rows.")
