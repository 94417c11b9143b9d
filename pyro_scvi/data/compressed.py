"""Compressed sparse matrices (CSR, CSC): whether their rows hold all the values that they store."""

from typing import Any

import numpy as np
from anndata.abc import CSCDataset, CSRDataset
from scipy import sparse

from pyro_scvi.errors import DataError
from pyro_scvi.utils.disk.unreadable import errors_named

_POINTED = ("csr", "csc", "bsr")  # formats of SciPy with an index pointer
_AT_ONCE = 2**22  # indices that are looked at together


def require_whole(matrix: Any, source: str) -> None:
    """Refuse a matrix, in memory or on disk, whose index pointer or indices do not fit its values or its shape.

    SciPy drops values outside the pointer without a word, cuts indices to 32 bits, and reads and writes outside its
    memory where indices of a matrix by columns lie beyond the rows; anndata reads past the values. Matrices of other
    kinds are left to other checks.

    Raises
    ------
    DataError
        If there is such a fault, or an array of the matrix cannot be read.
    """
    if isinstance(matrix, CSRDataset | CSCDataset):
        with errors_named(source):
            _require_whole_on_disk(matrix, source)
        return
    stored: Any = matrix
    if sparse.issparse(matrix) and stored.format in _POINTED:
        with errors_named(source):
            _require_whole_in_memory(stored, source)


def _require_whole_on_disk(matrix: Any, source: str) -> None:
    by_rows, group, shape = isinstance(matrix, CSRDataset), matrix.group, matrix.shape
    pointer, indices, values = (group[name] for name in ("indptr", "indices", "data"))
    _require_arrays(pointer, indices, values, source)
    _require_pointer(pointer, shape[0 if by_rows else 1], indices.shape[0], values.shape[0], source)
    if _is_wide(indices):
        _require_inside(indices, shape[1 if by_rows else 0], source)


def _require_whole_in_memory(matrix: Any, source: str) -> None:
    _require_arrays(matrix.indptr, matrix.indices, matrix.data, source, blocks=matrix.format == "bsr")
    height, width = matrix.blocksize if matrix.format == "bsr" else (1, 1)
    lines, places = matrix.shape[0] // height, matrix.shape[1] // width
    lines, places = (places, lines) if matrix.format == "csc" else (lines, places)
    _require_pointer(matrix.indptr, lines, len(matrix.indices), len(matrix.data), source)
    if matrix.format != "csr" or _is_wide(matrix.indices):  # SciPy checks other indices of CSR, where it is asked to
        _require_inside(matrix.indices, places, source)


def _require_arrays(pointer: Any, indices: Any, values: Any, source: str, *, blocks: bool = False) -> None:
    named = {"index pointer": pointer, "indices": indices} | ({} if blocks else {"values": values})
    for name, array in named.items():
        if len(getattr(array, "shape", None) or ()) != 1:
            raise DataError(f"{source} is a broken sparse matrix: its {name} are not a list of numbers.")
        if name != "values" and array.dtype.kind not in "iu":
            raise DataError(f"{source} is a broken sparse matrix: its {name} are of type {array.dtype}, not integers.")


def _require_pointer(pointer: Any, n_lines: int, n_indices: int, n_values: int, source: str) -> None:
    if not pointer.shape[0] or n_indices != n_values:
        raise DataError(f"{source} is a broken sparse matrix: {n_values} values have {n_indices} indices.")
    first, last = int(pointer[0]), int(pointer[-1])
    if first != 0 or last != n_values:
        raise DataError(
            f"{source} is a broken sparse matrix: its index pointer runs from {first} to {last}, but it stores "
            f"{n_values} values. The others would be lost. Make the matrix again from its source. If the rest is "
            "unused space behind the last cell, matrix.prune() removes it."
        )
    if pointer.shape[0] == n_lines + 1:
        whole = pointer[...]
        if not (whole[1:] < whole[:-1]).any():
            return
    raise DataError(
        f"{source} is a broken sparse matrix: its index pointer does not increase along its {n_lines} rows or columns."
    )


def _is_wide(indices: Any) -> bool:
    """Whether SciPy may cut indices of this type, because a matrix of this size needs no more than 32 bits."""
    return indices.dtype.itemsize > 4 or indices.dtype == np.uint32


def _require_inside(indices: Any, n: int, source: str) -> None:
    for start in range(0, indices.shape[0], _AT_ONCE):
        part = indices[start : start + _AT_ONCE]
        if int(part.min()) < 0 or int(part.max()) >= n:
            raise DataError(f"{source} is a broken sparse matrix: indices must be from 0 to {n - 1}.")
