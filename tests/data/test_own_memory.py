"""Counts stay what they were when the AnnData or array that they were read from is changed afterwards."""

import anndata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import torch
import xarray as xr
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.utils.own_memory import owned

COUNTS = np.random.default_rng(0).poisson(2.0, (30, 12))
TYPES = (np.float32, np.int32, np.int16, np.float64)
NAMES = {"index": [f"c{i}" for i in range(30)], "columns": [f"g{i}" for i in range(12)]}


def spoil(matrix):
    """Change every entry in place, and for a sparse matrix where the entries are."""
    if sparse.issparse(matrix) and hasattr(matrix, "indptr"):
        matrix.data[:] = 7
        matrix.indices[:] = matrix.indices[::-1].copy()
        matrix.indptr[1:-1] = 0
    elif sparse.issparse(matrix):
        matrix.data[:] = 7
    elif isinstance(matrix, torch.Tensor) and matrix.layout != torch.strided:
        matrix.values().fill_(7)
        for part in (matrix.crow_indices(), matrix.col_indices()) if matrix.layout == torch.sparse_csr else ():
            part.fill_(0)
    elif isinstance(matrix, pd.DataFrame):
        matrix.iloc[:, :] = 7
    else:
        matrix[:] = 7


MATRICES = {
    "dense": lambda kind: COUNTS.astype(kind),
    "a view of an array": lambda kind: np.pad(COUNTS, ((0, 5), (0, 0))).astype(kind)[:30],
    "CSR matrix": lambda kind: sparse.csr_matrix(COUNTS, dtype=kind),
    "CSR array": lambda kind: sparse.csr_array(COUNTS.astype(kind)),
    "CSC": lambda kind: sparse.csc_array(COUNTS.astype(kind)),
    "COO": lambda kind: sparse.coo_array(COUNTS.astype(kind)),
    "a DataFrame": lambda kind: pd.DataFrame(COUNTS.astype(kind), **NAMES),
    "a DataArray": lambda kind: xr.DataArray(COUNTS.astype(kind), dims=("cell", "gene")),
    "torch": lambda kind: torch.from_numpy(COUNTS.astype(kind)),
    "torch CSR": lambda kind: torch.from_numpy(COUNTS.astype(kind)).to_sparse_csr(),
    "torch COO": lambda kind: torch.from_numpy(COUNTS.astype(kind)).to_sparse_coo(),
}


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("make", MATRICES.values(), ids=MATRICES.keys())
def test_changing_a_matrix_leaves_the_cells_alone(make, kind):
    matrix = make(kind)
    cells = ps.Cells.from_counts(matrix)
    spoil(matrix)
    np.testing.assert_array_equal(cells[:][0], COUNTS)


@pytest.mark.parametrize("values", [COUNTS.astype(np.float32), sparse.csr_matrix(COUNTS.astype(np.float32))])
def test_changing_what_dask_holds_leaves_the_cells_alone(values):
    lazy = pytest.importorskip("dask.array").from_array(values, chunks=values.shape, asarray=False)
    cells = ps.Cells.from_counts(lazy)
    spoil(values)
    np.testing.assert_array_equal(cells[:][0], COUNTS)


def made(form):
    adata = anndata.AnnData(form(COUNTS.astype(np.float32)))
    adata.var_names = NAMES["columns"]
    adata.layers["counts"] = adata.X.copy()
    adata.raw = adata.copy()
    return adata


class Duck:
    """An array of another package."""

    def __init__(self, values):
        self.values = values
        self.shape, self.dtype = values.shape, values.dtype

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize("wrap", [Duck, memoryview])
def test_arrays_of_other_packages_are_copied(wrap):
    values = COUNTS.astype(np.float32)
    cells = ps.Cells.from_counts(wrap(values))
    values[:] = 7
    np.testing.assert_array_equal(cells[:][0], COUNTS)


PLACES = {
    "X": ({}, lambda adata: adata.X),
    "layer": ({"layer": "counts"}, lambda adata: adata.layers["counts"]),
    "raw": ({"raw": True}, lambda adata: adata.raw.X),
}
FORMS = {"dense": np.asarray, "CSR": sparse.csr_matrix}


@pytest.mark.parametrize(("options", "matrix"), PLACES.values(), ids=PLACES.keys())
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_changing_an_anndata_leaves_the_cells_alone(form, options, matrix):
    adata = made(form)
    cells, part = ps.Cells.from_anndata(adata, **options), ps.Cells.from_anndata(adata[5:20], **options)
    spoil(matrix(adata))
    np.testing.assert_array_equal(cells[:][0], COUNTS)
    np.testing.assert_array_equal(part[:][0], COUNTS[5:20])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_scanpy_after_reading_does_not_change_what_is_fitted(form):
    adata = made(form)
    cells = ps.Cells.from_anndata(adata)
    fit = ps.fit(ps.SCVI(12, 2, n_hidden=8, n_layers=1), cells, epochs=1, progress=False, device="cpu")
    before = ps.embed(fit, cells)
    sc.pp.normalize_total(adata)
    sc.pp.log1p(adata)
    pd.testing.assert_frame_equal(pd.DataFrame(ps.embed(fit, cells)), pd.DataFrame(before))
    np.testing.assert_array_equal(cells.totals, COUNTS.sum(1))


def test_genes_in_the_order_of_a_schema_are_copied_once():
    """Selected genes lie in memory of their own already."""
    adata = made(np.asarray)
    turned = ps.Cells.from_anndata(adata, schema=ps.Cells.from_anndata(adata[:, ::-1].copy()).schema)
    spoil(adata.X)
    np.testing.assert_array_equal(turned[:][0], COUNTS[:, ::-1])


def test_what_is_in_memory_of_its_own_is_not_copied_again(monkeypatch):
    """Float64 is converted, and with that copied."""
    copies = []
    monkeypatch.setattr("pyro_scvi.data.cells.owned", lambda counts, given: copies.append(counts) or counts)
    matrix = COUNTS.astype(np.float64)
    cells = ps.Cells.from_counts(matrix)
    monkeypatch.undo()
    assert owned(copies[0], matrix) is cells.counts


def test_a_file_that_is_mapped_for_reading_stays_there(tmp_path):
    np.save(tmp_path / "counts.npy", COUNTS.astype(np.float32))
    for mode, shared in {"r": True, "r+": False, "c": False}.items():
        mapped = np.load(tmp_path / "counts.npy", mmap_mode=mode)
        assert np.shares_memory(ps.Cells.from_counts(mapped).counts, mapped) == shared


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_copies_may_be_left_out(form):
    adata = made(form)
    cells = ps.Cells.from_anndata(adata, copy=False)
    ours, theirs = (getattr(x, "data", x) if sparse.issparse(x) else x for x in (cells.counts, adata.X))
    assert np.shares_memory(ours, theirs)
