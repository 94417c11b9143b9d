"""Count matrices: one canonical form of all kinds of input, in memory or on disk."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse

from pyro_scvi.data.compressed import require_whole
from pyro_scvi.errors import DataError


class TypeLimit(NamedTuple):
    """Up to which number a type holds counts as they were, and what it does to larger ones, in words.

    Beyond ``most``, its largest number, are sums of several entries at one place, which were added up in a wider type.
    """

    value: float = np.inf
    effect: str = ""
    most: float = np.inf


NO_LIMIT = TypeLimit()
_ROUNDS, _CUTS = "a type of 16 bits, which rounds counts", "an integer type of few bits, which cuts or wraps counts"
# The next integer is exact, too, but the one after it is rounded to it.
_HALF, _BRAIN = TypeLimit(2.0**11 - 1, _ROUNDS), TypeLimit(2.0**8 - 1, _ROUNDS)
# A count that comes close to the largest number of its type stands for others that were beyond it.
_CLOSE = 0.98
_INTEGERS: dict[Any, torch.dtype] = {
    np.uint8: torch.uint8,
    np.int8: torch.int8,
    np.uint16: torch.uint16,
    np.int16: torch.int16,
}
_LIMITS = {np.dtype(np.float16): _HALF, torch.float16: _HALF, torch.bfloat16: _BRAIN} | {
    kind: TypeLimit(int(_CLOSE * np.iinfo(ours).max), _CUTS, np.iinfo(ours).max)
    for ours, theirs in _INTEGERS.items()
    for kind in (np.dtype(ours), theirs)
}

_SCAN_SIZE = 2**22  # entries per block: temporary arrays stay at a few MB for any matrix
_CELLS_AT_ONCE = 2**14  # rows whose totals are computed together
_BLOCK_ENTRIES = 2**24  # entries, zeros included, of the rows that are read together from a source

Matrix = np.ndarray | sparse.csr_array
"""Counts in memory, (cells, genes)."""

Look = Callable[[slice, Matrix], None]


class Source(ABC):
    """Counts (cells, genes) that stay where they are, such as on disk, and are read by rows.

    Minibatches use ``source[rows]`` only. Arrays in memory, dense or CSR, are indexed in the same way.

    Parameters
    ----------
    shape, dtype
        Of the matrix.
    kind
        Name of the storage in the repr of cells, such as ``"backed sparse"``.
    checked
        Whether its entries are known to be counts, so that they need not be scanned again.
    totals, detected
        Total count of each cell, (cells,), and number of cells with each gene, (genes,), if they are known.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: np.dtype,
        kind: str,
        *,
        checked: bool = False,
        totals: np.ndarray | None = None,
        detected: np.ndarray | None = None,
    ) -> None:
        self.shape, self.dtype, self.kind, self.checked = shape, np.dtype(dtype), kind, checked
        self._totals, self._detected = totals, detected

    @abstractmethod
    def __getitem__(self, rows: np.ndarray) -> Matrix:
        """Rows in memory, (rows, genes), for integer positions in any order, repetitions included."""

    @property
    def totals(self) -> np.ndarray:
        """Total count of each cell, (cells,); the source is scanned if they are not known."""
        return self.scan()[0] if self._totals is None else self._totals

    @property
    def detected(self) -> np.ndarray:
        """Number of cells with each gene, (genes,); the source is scanned if they are not known."""
        return self.scan()[1] if self._detected is None else self._detected

    def scan(self, look: Look = lambda rows, block: None) -> tuple[np.ndarray, np.ndarray]:
        """Read all rows once in their order, show each block to ``look``, and keep totals and detected."""
        totals, detected = np.empty(self.shape[0]), np.zeros(self.shape[1], dtype=np.int64)
        for rows, block in row_blocks(self, np.arange(self.shape[0])):
            look(rows, block)
            totals[rows] = cell_totals(block)
            detected += cells_by_gene(block)
        self._totals, self._detected = totals, detected
        return totals, detected


Counts = Matrix | Source


def row_blocks(counts: Counts, rows: np.ndarray) -> Iterator[tuple[slice, Matrix]]:
    """Yield the given rows in blocks that fit in memory, each with its slice of ``rows``."""
    for place in block_slices(len(rows), counts.shape[1]):
        yield place, counts[rows[place]]


def block_slices(n_rows: int, n_genes: int) -> Iterator[slice]:
    """Yield slices of rows, as blocks that fit in memory."""
    size = max(1, _BLOCK_ENTRIES // n_genes)
    for start in range(0, n_rows, size):
        yield slice(start, min(start + size, n_rows))


def canonical(matrix: Any, source: str) -> Matrix:
    """Bring a matrix to row-major form without densifying it and without changing the caller's object.

    Parameters
    ----------
    matrix
        Counts, (cells, genes): NumPy, any SciPy sparse format, torch, a backed AnnData matrix or a dask array.
    source
        Name of the matrix in errors, such as ``"X"``.

    Returns
    -------
    csr_array or ndarray
        (cells, genes), counts. Sparse input gives CSR, duplicates summed, int32 indices where they fit;
        dense input gives a C-ordered array. The data are shared with the input if no conversion is needed.

    Raises
    ------
    DataError
        If the matrix is missing, boolean, not numeric, not two-dimensional, without cells or without genes.
    """
    if matrix is None:
        raise DataError(f"{source} is None: there are no counts to read.")
    matrix = _in_memory(matrix, source)
    require_whole(matrix, source)
    if not sparse.issparse(matrix):
        matrix = _dense(matrix, source)
    if matrix.ndim != 2 or 0 in matrix.shape:
        raise DataError(
            f"{source} must be (cells, genes) with at least 1 cell and 1 gene; its shape is {matrix.shape}."
        )
    if matrix.dtype.kind not in "iuf":
        raise _no_counts(source, matrix.dtype)
    if matrix.dtype == np.float16:  # it overflows in comparisons, and SciPy converts no sparse matrix of it
        matrix = matrix.astype(np.float32)
    return _row_major(matrix, source)


def is_chunked(matrix: Any) -> bool:
    """Whether a matrix is a dask array, as in an AnnData that was read lazily."""
    return hasattr(matrix, "compute") and hasattr(matrix, "numblocks")


def limit_of(dtype: Any) -> TypeLimit:
    """What a type of 8 or 16 bits does to large counts; no limit for other types."""
    return _LIMITS.get(dtype, NO_LIMIT)


def cell_totals(counts: Counts) -> np.ndarray:
    """Total count per cell, (cells,), float64; no converted copy of the matrix is made."""
    if isinstance(counts, Source):
        return counts.totals
    if isinstance(counts, np.ndarray):
        return counts.sum(axis=1, dtype=np.float64)
    totals = np.zeros(counts.shape[0])
    for start in range(0, len(totals), _CELLS_AT_ONCE):  # NumPy converts the whole input of a sum to float64 at once
        bounds = counts.indptr[start : start + _CELLS_AT_ONCE + 1]
        filled = np.flatnonzero(np.diff(bounds))
        if filled.size:
            values, firsts = counts.data[bounds[0] : bounds[-1]], bounds[filled] - bounds[0]
            # reduceat gives an empty slice its next value, so empty rows are left out.
            totals[start + filled] = np.add.reduceat(values, firsts, dtype=np.float64)
    return totals


def expressed_genes(counts: Counts) -> np.ndarray:
    """Whether each gene has a count in any cell, (genes,), bool."""
    if isinstance(counts, Source):
        return counts.detected > 0
    if isinstance(counts, np.ndarray):
        return np.asarray(counts.any(axis=0))
    seen = np.zeros(counts.shape[1], dtype=bool)
    for start, values in blocks(counts.data):
        seen[counts.indices[start : start + values.size][values != 0]] = True
    return seen


def cells_by_gene(counts: Matrix) -> np.ndarray:
    """Number of cells with a count of each gene, (genes,)."""
    if isinstance(counts, np.ndarray):
        return np.count_nonzero(counts, axis=0)
    return np.bincount(counts.indices[counts.data != 0], minlength=counts.shape[1])


def n_nonzero(counts: Counts) -> int:
    """Count the entries that are not zero."""
    if isinstance(counts, Source):
        return int(counts.detected.sum())
    return sum(int(np.count_nonzero(values)) for _, values in blocks(stored_values(counts)))


def select_genes(counts: Matrix, positions: np.ndarray) -> Matrix:
    """Reorder and select genes; a position of -1 gives a gene with zeros only.

    Parameters
    ----------
    counts
        (cells, genes).
    positions
        (new genes,): for each new gene its old position, or -1.
    """
    if np.array_equal(positions, np.arange(counts.shape[1])):
        return counts
    present = np.flatnonzero(positions >= 0)
    shape = (counts.shape[0], positions.size)
    chosen = counts[:, positions[present]]
    if isinstance(chosen, np.ndarray):
        filled = np.zeros(shape, dtype=counts.dtype)
        filled[:, present] = chosen
        return filled
    return sparse.csr_array((chosen.data, present.astype(np.int32)[chosen.indices], chosen.indptr), shape=shape)


def narrow(counts: Matrix) -> Matrix:
    """Convert 64-bit and other unusual types to float32; smaller types are returned unchanged."""
    kind, size = counts.dtype.kind, counts.dtype.itemsize
    if counts.dtype.isnative and (
        (kind == "f" and size == 4) or (kind == "i" and size <= 4) or (kind == "u" and size <= 2)
    ):
        return counts
    return counts.astype(np.float32)


def smallest_type(counts: Counts) -> np.dtype:
    """The smallest of uint8, int16 and float32 that holds every count; float32 if one is no integer.

    A source is not scanned; its own type decides.
    """
    if isinstance(counts, Source):
        return counts.dtype if counts.dtype in (np.uint8, np.int16) else np.dtype("f4")
    largest = 0.0
    for _, values in blocks(stored_values(counts)):
        if values.dtype.kind == "f" and not np.array_equal(values, np.rint(values)):
            return np.dtype(np.float32)
        largest = max(largest, float(values.max(initial=0)))
    return next((np.dtype(kind) for kind in (np.uint8, np.int16) if largest <= np.iinfo(kind).max), np.dtype("f4"))


def dense(block: Matrix, dtype: Any = np.float32) -> np.ndarray:
    """Some rows of counts as an array of this type, (rows, genes); a copy only where it must be."""
    return (block if isinstance(block, np.ndarray) else block.toarray()).astype(dtype, copy=False)


def stored_values(counts: Matrix) -> np.ndarray:
    """All stored values, one-dimensional; a sparse matrix stores at least all that are not zero."""
    return counts.reshape(-1) if isinstance(counts, np.ndarray) else counts.data


def blocks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield consecutive blocks of a long array, each with the position of its first value."""
    for start in range(0, values.size, _SCAN_SIZE):
        yield start, values[start : start + _SCAN_SIZE]


def _no_counts(source: str, dtype: Any) -> DataError:
    return DataError(f"{source} must hold counts; its values are of type {dtype}. Pass integer counts.")


def _in_memory(matrix: Any, source: str) -> Any:
    if isinstance(matrix, torch.Tensor):
        return _from_torch(matrix, source)
    if hasattr(matrix, "to_memory"):  # sparse matrix of a backed AnnData
        require_whole(matrix, source)
        return matrix.to_memory()
    return _computed(matrix, source) if is_chunked(matrix) else matrix


def _computed(array: Any, source: str) -> Any:
    """A dask array in memory; chunk by chunk, because dask cannot join every kind of sparse matrix."""
    if len(array.shape) != 2:
        return array.compute()
    height, width = array.numblocks
    chunks = [[array.blocks[i, j].compute() for j in range(width)] for i in range(height)]
    # An empty chunk is no matrix of counts, and it adds nothing.
    rows: list[list[Any]] = [[canonical(chunk, source) for chunk in row if 0 not in chunk.shape] for row in chunks]
    rows = [row for row in rows if row]
    if not rows:
        return np.empty(array.shape)
    if any(sparse.issparse(chunk) for row in rows for chunk in row):
        return sparse.vstack([sparse.hstack([sparse.csr_array(chunk) for chunk in row]) for row in rows], format="csr")
    return np.block(rows)


def _from_torch(tensor: torch.Tensor, source: str) -> Any:
    if tensor.device.type == "meta":
        raise DataError(f"{source} is a tensor without data (device meta).")
    if tensor.dtype == torch.bool or tensor.is_complex():  # below, sparse ones would become float64
        raise _no_counts(source, tensor.dtype)
    tensor = tensor.detach().cpu()
    tensor = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # NumPy has no bfloat16
    if tensor.layout == torch.strided:
        return tensor.numpy()
    if tensor.ndim != 2 or tensor.dense_dim():  # SciPy has no such matrix
        return tensor.to(torch.float64).to_dense().numpy()
    if tensor.layout == torch.sparse_csr:
        return _pointed(sparse.csr_array, tensor, tensor.crow_indices(), tensor.col_indices())
    if tensor.layout == torch.sparse_csc:
        return _pointed(sparse.csc_array, tensor, tensor.ccol_indices(), tensor.row_indices())
    # torch adds up entries at the same place in their own type, where small integers overflow
    entries = tensor.to_sparse_coo()
    entries = entries if entries.is_coalesced() else entries.to(torch.float64).coalesce()
    return sparse.coo_array((entries.values().numpy(), tuple(entries.indices().numpy())), shape=tuple(entries.shape))


def _pointed(kind: Any, tensor: torch.Tensor, pointer: torch.Tensor, indices: torch.Tensor) -> Any:
    """A matrix of SciPy with the parts of a tensor; its constructor would drop what the pointer leaves out."""
    matrix = kind(tuple(tensor.shape))
    matrix.data, matrix.indices, matrix.indptr = tensor.values().numpy(), indices.numpy(), pointer.numpy()
    return matrix


def _dense(matrix: Any, source: str) -> np.ndarray:
    if np.ma.isMaskedArray(matrix):
        raise DataError(f"{source} is a masked array; fill or drop the masked entries first.")
    try:
        return np.asarray(matrix)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source} is not a matrix that NumPy can read: {type(matrix).__name__}.") from error


def _row_major(matrix: Any, source: str) -> Matrix:
    if isinstance(matrix, np.ndarray):
        return np.ascontiguousarray(matrix)
    rows = _by_rows(matrix)
    # SciPy keeps mixed index types, and then converts all of them at every row selection: 100 times slower.
    index = np.int32 if max(rows.nnz, *rows.shape) <= np.iinfo(np.int32).max else np.int64
    parts = (rows.data, rows.indices.astype(index, copy=False), rows.indptr.astype(index, copy=False))
    try:
        counts = sparse.csr_array(parts, shape=rows.shape)
        counts.check_format(full_check=True)
    except ValueError as error:
        raise DataError(f"{source} is a broken sparse matrix: {error}.") from error
    if not counts.has_canonical_format:
        counts = counts.astype(np.float64)  # a copy, in which small integer types cannot overflow
        counts.sum_duplicates()
    return counts


def _by_rows(matrix: Any) -> Any:
    """The matrix as CSR. SciPy adds up entries at the same place on the way, in their own type if it is let."""
    if matrix.format in ("csr", "csc"):
        return matrix.tocsr()
    summed, own = matrix.astype(np.float64).tocsr(), matrix.dtype
    if own.kind in "iu" and summed.nnz and np.iinfo(own).min <= summed.min() and summed.max() <= np.iinfo(own).max:
        return summed.astype(own)
    return summed
