"""Lazy counts: count matrices on disk, whose rows and genes are selected when they are read."""

from collections.abc import Callable
from typing import Any

import h5py
import numpy as np
from anndata.abc import CSCDataset, CSRDataset

from pyro_scvi.data.compressed import require_whole
from pyro_scvi.data.counts import Counts, Matrix, Source, canonical, select_genes
from pyro_scvi.data.indexing import consecutive, within
from pyro_scvi.data.names import warn_of_numbered_genes
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.disk.unreadable import errors_named


def rows_of(counts: Counts, rows: np.ndarray) -> Counts:
    """Select rows: a copy if they are in memory, else a source that reads them on request."""
    return RowsOf(counts, rows) if isinstance(counts, Source) else counts[rows]


def genes_of(counts: Counts, positions: np.ndarray) -> Counts:
    """Reorder and select genes as :func:`select_genes` does; for a source, when its rows are read."""
    if not isinstance(counts, Source):
        return select_genes(counts, positions)
    unchanged = np.array_equal(positions, np.arange(counts.shape[1]))
    return counts if unchanged else GenesOf(counts, positions)


class RowsOf(Source):
    """The given rows of another source."""

    def __init__(self, source: Source, rows: np.ndarray) -> None:
        shape, totals = (len(rows), source.shape[1]), source.totals[rows]
        super().__init__(shape, source.dtype, source.kind, checked=source.checked, totals=totals)
        self.source: Source = source
        self.rows: np.ndarray = within(rows, source.shape[0])
        if isinstance(source, RowsOf):
            self.source, self.rows = source.source, source.rows[rows]

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        return self.source[self.rows[rows]]


class GenesOf(Source):
    """Selected genes of another source; a position of -1 gives a gene with zeros only."""

    def __init__(self, source: Source, positions: np.ndarray) -> None:
        super().__init__((source.shape[0], len(positions)), source.dtype, source.kind, checked=source.checked)
        self.source, self.positions = source, positions

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        return select_genes(self.source[rows], self.positions)


class Backed(Source):
    """A matrix that anndata leaves in its file, CSR or dense, in HDF5 or zarr.

    Parameters
    ----------
    matrix
        (cells, genes): ``X`` of a backed AnnData, a ``CSRDataset``, or a dense array on disk.
    name
        Name of the matrix in errors.

    Raises
    ------
    DataError
        If it is stored by genes, is in memory already, or is a broken sparse matrix.
    """

    def __init__(self, matrix: Any, name: str) -> None:
        if isinstance(matrix, CSCDataset):
            raise DataError(
                f"{name} is stored by genes (CSC), so the counts of one cell are spread over the file. Read it into "
                "memory, or write it anew by cells: adata = anndata.read_h5ad(old); adata.X = adata.X.tocsr(), or the "
                "same for a layer or raw; adata.write_h5ad(new)."
            )
        is_sparse = isinstance(matrix, CSRDataset)
        if not is_sparse and (isinstance(matrix, np.ndarray) or not hasattr(matrix, "chunks")):
            raise DataError(
                f"{name} is not a matrix on disk ({type(matrix).__name__}). Read it without backed=True; or, if "
                "an early version of anndata wrote the file, write it anew: "
                "anndata.read_h5ad(old).write_h5ad(new)."
            )
        with errors_named(name):
            _require_matrix(matrix, name)
            require_whole(matrix, name)
            super().__init__(tuple(matrix.shape), matrix.dtype, f"backed {'sparse' if is_sparse else 'dense'}")
        self.matrix, self.name = matrix, name

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        with errors_named(self.name):
            return in_file_order(lambda wanted: canonical(self.matrix[wanted], self.name), rows, self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and other processes, to which an open HDF5 file cannot go."""
        held = getattr(self.matrix, "group", self.matrix)
        if isinstance(held, h5py.HLObject):
            raise DataError(
                f"{self.name} was left in an open HDF5 file, which cannot be copied or sent to another process. Read "
                "the file there; or take a store, which can: ps.stores.build(file, path), then Cells.from_store(path)."
            )
        return self.__dict__


class Chunked(Source):
    """A dask array of dense or sparse chunks, as in an AnnData that was read lazily.

    Parameters
    ----------
    array
        (cells, genes).
    name
        Name of the matrix in errors.

    Raises
    ------
    DataError
        If it is no matrix, or has no cells or genes.
    """

    def __init__(self, array: Any, name: str) -> None:
        _require_matrix(array, name)
        super().__init__(tuple(array.shape), array.dtype, "lazy")
        self.array, self.name = array, name

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        with errors_named(self.name):
            return in_file_order(lambda wanted: canonical(self.array[wanted], self.name), rows, self)


class Collection(Source):
    """Counts of an ``anndata.experimental.AnnCollection``: several AnnData, backed ones too, as one.

    Parameters
    ----------
    collection
        Made with ``join_vars="inner"`` where the genes differ.
    layer
        Layer with the counts, or None for ``X``.
    name
        Name of the matrix in errors.
    """

    def __init__(self, collection: Any, layer: str | None, name: str) -> None:
        self.collection, self.layer, self.name = collection, layer, name
        self.types = []  # of the parts, which the collection brings into a common one
        for adata in collection.adatas:
            if layer is not None and layer not in adata.layers:
                raise SchemaError(f"a part of the collection has no layer {layer!r}; it has {list(adata.layers)}.")
            matrix = adata.X if layer is None else adata.layers[layer]
            require_whole(matrix, name)
            self.types.append(matrix.dtype)
        if len(collection.adatas) > 1:
            warn_of_numbered_genes(*(adata.var_names for adata in collection.adatas))
        first = self._read(slice(0, 1))
        super().__init__(collection.shape, first.dtype, "collected")

    def __getitem__(self, rows: np.ndarray) -> Matrix:
        return in_file_order(self._read, rows, self)

    def _read(self, rows: np.ndarray | slice) -> Matrix:
        with errors_named(self.name):
            view = self.collection[rows]
            return canonical(view.X if self.layer is None else view.layers[self.layer], self.name)


def _require_matrix(matrix: Any, name: str) -> None:
    if len(matrix.shape or ()) != 2 or min(matrix.shape) < 1:  # an array without content has the shape None
        raise DataError(f"{name} must be (cells, genes) with at least 1 cell and 1 gene; its shape is {matrix.shape}.")


def in_file_order(read: Callable[[np.ndarray | slice], Matrix], rows: np.ndarray, source: Source) -> Matrix:
    """Rows in the order of ``rows``, read once each in the order of the file; as one block if they lie close."""
    rows = within(rows, source.shape[0])
    if rows.size == 0:
        return np.empty((0, source.shape[1]), dtype=source.dtype)
    wanted, place = np.unique(rows, return_inverse=True)
    first, end = int(wanted[0]), int(wanted[-1]) + 1
    if end - first > 2 * len(wanted):  # else one block costs less than many single rows
        return read(wanted)[place]
    block = read(slice(first, end))
    return block if consecutive(rows) else block[rows - first]
