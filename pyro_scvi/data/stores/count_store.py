"""CountStore: counts on disk as three arrays, read by row positions."""

import os
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from anndata import AnnData
from scipy import sparse

from pyro_scvi.data.counts import Matrix, Source
from pyro_scvi.data.indexing import consecutive, within
from pyro_scvi.data.stores.layout import (
    ANNOTATIONS,
    DATA,
    DETECTED,
    INDICES,
    INDPTR,
    TOTALS,
    StoreSchema,
    doubled_names_allowed,
    rebuild,
)
from pyro_scvi.errors import StoreError
from pyro_scvi.utils.checks import switches_checked
from pyro_scvi.utils.disk.unreadable import errors_named

_LONGEST_READ = 2**28  # entries; Linux reads at most 2 GB at once


class CountStore(Source):
    """Counts (cells, genes) in a folder that :func:`build` wrote, read by rows.

    Entries are read into small buffers; the file is not mapped into memory. Pages of a mapping count as memory of the
    process once touched, so one epoch over random rows would hold the whole store. And a mapped file that is truncated
    kills the process, where a read raises an error.

    Parameters
    ----------
    path
        The store.
    verify
        Whether to compare the checksum of every file, which reads the store once. Sizes are always compared.

    Raises
    ------
    StoreError
        If there is no store, or it was truncated or changed.

    Examples
    --------
    >>> adata.write_h5ad(folder / "source.h5ad")
    >>> path = ps.stores.build(folder / "source.h5ad", folder / "source.store", progress=False)
    >>> store = ps.stores.CountStore(path)
    >>> store.shape, store[np.array([0, 59])].shape
    ((60, 20), (2, 20))
    """

    @switches_checked
    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path).expanduser().absolute()
        with errors_named(str(self.path), kind=StoreError):
            self._open(verify)

    def _open(self, verify: bool) -> None:
        self.schema = StoreSchema.read(self.path)
        self.schema.check(self.path, verify)
        n_cells, n_genes = self.schema.n_cells, self.schema.n_genes
        self.indptr = _numbers(self.path / INDPTR, "iu")
        self._indices, self._data = _Array(self.path / INDICES), _Array(self.path / DATA)
        totals, detected = _numbers(self.path / TOTALS, "iuf"), np.asarray(_numbers(self.path / DETECTED, "iu"))
        lengths = [len(self.indptr) - 1, len(totals), len(detected), self._indices.n, self._data.n, detected.sum()]
        n_nonzero = self.schema.n_nonzero
        ends = [self.indptr[0], self.indptr[-1]]
        if lengths != [n_cells, n_cells, n_genes, n_nonzero, n_nonzero, n_nonzero] or ends != [0, n_nonzero]:
            raise StoreError(f"the arrays of {self.path} are not of the sizes in its schema; {rebuild(self.path)}")
        super().__init__(
            (n_cells, n_genes),
            self._data.dtype,
            "on disk, sparse",
            checked=True,
            totals=np.asarray(totals),
            detected=detected,
        )

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        rows = within(rows, self.shape[0])
        starts = np.asarray(self.indptr[rows])
        lengths = np.asarray(self.indptr[rows + 1]) - starts
        if (lengths < 0).any() or (starts < 0).any():
            raise StoreError(f"{self.path / INDPTR} does not increase; {rebuild(self.path)}")
        pointers = np.concatenate([[0], np.cumsum(lengths)])
        if rows.size and consecutive(rows) and pointers[-1] < _LONGEST_READ:  # one read for all of them
            starts, lengths = starts[:1], pointers[-1:]
        index = np.int32 if pointers[-1] <= np.iinfo(np.int32).max else np.int64  # SciPy wants one type for both
        spans = list(zip(starts.tolist(), lengths.tolist(), strict=True))
        indices = self._indices.read(spans).astype(index)
        if indices.size and not 0 <= int(indices.min()) <= int(indices.max()) < self.shape[1]:
            raise StoreError(f"{self.path / INDICES} names genes that are not there; {rebuild(self.path)}")
        parts = (self._data.read(spans), indices, pointers.astype(index))
        return sparse.csr_array(parts, shape=(len(rows), self.shape[1]))

    def annotations(self) -> AnnData:
        """``obs`` of the cells and names of the genes, without counts."""
        file = self.path / ANNOTATIONS
        with doubled_names_allowed(), errors_named(str(file), kind=StoreError):
            annotations = anndata.read_h5ad(file)
        if annotations.shape != self.shape:
            raise StoreError(
                f"{file} is of {annotations.shape} cells and genes, not {self.shape}; {rebuild(self.path)}"
            )
        return annotations

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and other processes open the files themselves: a file descriptor is valid in its own process only."""
        return partial(CountStore, verify=False), (self.path,)


def _numbers(path: Path, kinds: str) -> np.ndarray:
    """A one-dimensional array in a file, of these kinds of numbers."""
    array = np.load(path, mmap_mode="r")
    if array.ndim != 1 or array.dtype.kind not in kinds:
        raise StoreError(f"{path} holds {array.dtype} of {array.ndim} dimensions, not a list of numbers")
    return array


class _Array:
    """A one-dimensional .npy file that is read in pieces."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            (self.n,), _, self.dtype = read_header(file)
            self.offset = file.tell()
        if self.dtype.kind not in "iuf":
            raise StoreError(f"{path} holds {self.dtype}, not numbers")
        self.descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.descriptor)

    def read(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """Entries of the spans (start, length), one after the other."""
        file, size, offset = self.descriptor, self.dtype.itemsize, self.offset
        content = b"".join([os.pread(file, length * size, offset + start * size) for start, length in spans])
        if len(content) != size * sum(length for _, length in spans):
            raise StoreError(f"{self.path} ended early: it was truncated after it was opened")
        return np.frombuffer(content, self.dtype)
