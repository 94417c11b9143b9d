"""What a count matrix may be, and every value that is refused."""

import time
import warnings

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError, SchemaError

RNG = np.random.default_rng(0)
COUNTS = RNG.poisson(1.0, size=(30, 12)) + np.eye(30, 12, dtype=int)
COUNTS[:, 0] += 1


def make_adata(counts=COUNTS, **kwargs):
    counts = counts if hasattr(counts, "shape") else np.asarray(counts)
    obs = pd.DataFrame(index=[f"c{i}" for i in range(counts.shape[0])])
    var = pd.DataFrame(index=[f"g{i}" for i in range(counts.shape[1])])
    return AnnData(counts, obs=obs, var=var, **kwargs)


def with_mixed_indices(matrix):
    matrix.indptr = matrix.indptr.astype(np.int64)
    return matrix


def with_long_indices(matrix):
    matrix.indptr, matrix.indices = matrix.indptr.astype(np.int64), matrix.indices.astype(np.int64)
    return matrix


def with_duplicates(counts, dtype=np.float32):
    rows, columns = np.nonzero(counts)
    data = np.tile(counts[rows, columns] / 2, 2).astype(dtype)  # integers only once summed
    order = np.argsort(np.tile(rows, 2), kind="stable")
    indptr = np.concatenate([[0], np.cumsum(2 * np.bincount(rows, minlength=len(counts)))])
    return sparse.csr_matrix((data[order], np.tile(columns, 2)[order], indptr), shape=counts.shape)


CSR = sparse.csr_matrix(COUNTS)
SPARSE = {
    "csr": CSR,
    "csc": sparse.csc_matrix(COUNTS),
    "csr_array": sparse.csr_array(COUNTS),
    "csc_array": sparse.csc_array(COUNTS),
    "float32": sparse.csr_matrix(COUNTS, dtype=np.float32),
    "float64": sparse.csr_matrix(COUNTS, dtype=np.float64),
    "uint16": sparse.csr_matrix(COUNTS, dtype=np.uint16),
    "mixed indices": with_mixed_indices(sparse.csr_matrix(COUNTS)),
    "long indices": with_long_indices(sparse.csr_array(COUNTS)),
    "float16": sparse.csr_matrix((CSR.data.astype(np.float16), CSR.indices, CSR.indptr), shape=CSR.shape),
    "duplicate entries": with_duplicates(COUNTS),
    "duplicate float64 entries": with_duplicates(COUNTS, np.float64),
}
DENSE = {dtype: COUNTS.astype(dtype) for dtype in ("uint8", "uint16", "int32", "int64", "uint64", "float16", "float32")}
DENSE |= {
    "float64": COUNTS.astype(float),
    "Fortran order": np.asfortranarray(COUNTS),
    "big-endian": COUNTS.astype(">f4"),
}


def check_same(cells, is_sparse):
    assert sparse.issparse(cells.counts) == is_sparse
    x, gamma = cells[np.arange(30)]
    assert x.dtype == gamma.dtype == torch.float32
    np.testing.assert_array_equal(x.numpy(), COUNTS)
    np.testing.assert_array_equal(cells.totals, COUNTS.sum(axis=1))
    assert gamma.shape == (30, 0)
    if is_sparse:
        assert isinstance(cells.counts, sparse.csr_array)
        assert cells.counts.indices.dtype == cells.counts.indptr.dtype == np.int32
        assert cells.counts.nnz == np.count_nonzero(COUNTS)
    else:
        assert cells.counts.flags.c_contiguous


@pytest.mark.parametrize("matrix", [pytest.param(matrix, id=name) for name, matrix in (SPARSE | DENSE).items()])
class TestEveryFormatGivesTheSameCells:
    def test_as_x(self, matrix):
        check_same(Cells.from_anndata(make_adata(matrix)), sparse.issparse(matrix))

    def test_as_layer(self, matrix):
        adata = make_adata(np.log1p(COUNTS), layers={"counts": matrix})
        check_same(Cells.from_anndata(adata, layer="counts"), sparse.issparse(matrix))

    def test_as_view(self, matrix):
        adata = make_adata(
            sparse.vstack([matrix, matrix]).asformat(matrix.format)
            if sparse.issparse(matrix)
            else np.vstack([matrix, matrix])
        )
        check_same(Cells.from_anndata(adata[:30]), sparse.issparse(matrix))

    def test_as_bare_matrix(self, matrix):
        check_same(Cells.from_counts(matrix), sparse.issparse(matrix))


@pytest.mark.parametrize("kind", ["dense", "csr", "csc"])
@pytest.mark.parametrize("view", [False, True])
def test_backed_file(tmp_path, kind, view):
    matrix = {"dense": COUNTS, "csr": sparse.csr_matrix(COUNTS), "csc": sparse.csc_matrix(COUNTS)}[kind]
    make_adata(matrix).write_h5ad(tmp_path / "cells.h5ad")
    adata = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    try:
        check_same(Cells.from_anndata(adata[:30] if view else adata), kind != "dense")
    finally:
        adata.file.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(COUNTS),
        torch.tensor(COUNTS, dtype=torch.bfloat16),
        torch.tensor(COUNTS, dtype=torch.float32, requires_grad=True),
        torch.tensor(COUNTS).to_sparse_coo(),
    ],
)
def test_torch_matrix(tensor):
    check_same(Cells.from_counts(tensor), tensor.layout != torch.strided)


TORCH_FORMS = {
    "dense": lambda dense: dense,
    "COO": lambda dense: dense.to_sparse_coo(),
    "COO with entries twice": lambda dense: torch.sparse_coo_tensor(
        torch.tensor([[0, 0, 1], [1, 1, 2]]), torch.ones(3, dtype=dense.dtype), tuple(dense.shape)
    ),
    "CSR": lambda dense: dense.to_sparse_csr(),
    "CSC": lambda dense: dense.to_sparse_csc(),
    "BSR": lambda dense: dense[:10, :10].to_sparse_bsr((5, 5)),
}


@pytest.mark.filterwarnings("ignore:Sparse")  # torch's own
@pytest.mark.parametrize("form", TORCH_FORMS.values(), ids=TORCH_FORMS.keys())
@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64], ids=str)
def test_tensors_of_no_numbers_are_refused_in_every_format(form, dtype):
    with pytest.raises(DataError, match=f"counts must hold counts; its values are of type {dtype}"):
        Cells.from_counts(form(torch.tensor(COUNTS).to(dtype)))


def test_input_is_neither_changed_nor_copied_needlessly():
    matrix = with_duplicates(COUNTS)
    data = matrix.data.copy()
    Cells.from_anndata(make_adata(matrix))
    np.testing.assert_array_equal(matrix.data, data)
    matrix = sparse.csr_matrix(COUNTS, dtype=np.float32)
    assert np.shares_memory(Cells.from_counts(matrix, copy=False).counts.data, matrix.data)


def poisoned(form, value, dtype=np.float64):
    counts = COUNTS.astype(dtype)
    counts[17, 5] = value
    return form(counts)


FORMS = [
    pytest.param(np.asarray, id="dense"),
    pytest.param(sparse.csr_matrix, id="csr"),
    pytest.param(sparse.csc_matrix, id="csc"),
]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, "finite counts; .*holds nan"),
        (np.inf, "finite counts; .*holds inf"),
        (-np.inf, "finite counts; .*holds -inf"),
        (-1, "0 or more; .*holds -1.*Pass layer=.*'raw'"),
        (1.5, r"integer counts; .*holds 1\.5.*Pass layer=.*'raw'.*allow_non_integer=True"),
        (2**25, "float32"),
        (1e300, "float32"),
    ],
)
def test_one_bad_entry_is_found_and_named(form, value, message):
    adata = make_adata(poisoned(form, value), layers={"raw": COUNTS})
    with pytest.raises(DataError, match=message) as caught:
        Cells.from_anndata(adata)
    assert "X must hold" in str(caught.value)
    assert "cell 'c17', gene 'g5'" in str(caught.value)
    with pytest.raises(DataError, match="layer 'bad' must hold.*cell 'c17', gene 'g5'"):
        Cells.from_anndata(make_adata(COUNTS, layers={"bad": poisoned(form, value)}), layer="bad")


def test_first_entry_of_a_row_after_empty_rows_is_named():
    with pytest.raises(DataError, match="cell 'cell_2', gene 'gene_1' holds nan"):
        Cells.from_counts(sparse.csr_matrix([[1.0, 0.0], [0.0, 0.0], [0.0, np.nan]]))


def test_names_of_layers_may_hold_braces():
    with pytest.raises(DataError, match=r"layer '\{a\}' must.*layers: '\{a\}'"):
        Cells.from_anndata(make_adata(COUNTS, layers={"{a}": COUNTS - 5}), layer="{a}")


def test_duplicate_entries_of_a_small_type_do_not_overflow():
    matrix = sparse.csr_matrix((np.array([200, 100], dtype=np.uint8), [0, 0], [0, 2]), shape=(1, 1))
    assert Cells.from_counts(matrix).totals == 300


def test_negative_integers_are_found():
    with pytest.raises(DataError, match="cell 'cell_17', gene 'gene_5' holds -3"):
        Cells.from_counts(poisoned(np.asarray, -3, np.int16))


def test_entries_past_the_first_block_are_scanned(monkeypatch):
    monkeypatch.setattr("pyro_scvi.data.counts._SCAN_SIZE", 7)
    for form in (np.asarray, sparse.csr_matrix):
        with pytest.raises(DataError, match="cell 'cell_17', gene 'gene_5' holds nan"):
            Cells.from_counts(poisoned(form, np.nan))
        assert (Cells.from_counts(form(COUNTS)).totals == COUNTS.sum(axis=1)).all()


@pytest.mark.parametrize("form", FORMS)
def test_normalised_and_scaled_values_are_refused_or_declared(form):
    logs = np.log1p(COUNTS)
    with pytest.raises(DataError, match="normalised or logarithms"):
        Cells.from_anndata(make_adata(form(logs)))
    x, _ = Cells.from_anndata(make_adata(form(logs)), allow_non_integer=True)[:]
    np.testing.assert_allclose(x.numpy(), logs, rtol=1e-6)
    with pytest.raises(DataError, match="scaled"):
        Cells.from_anndata(make_adata(form(logs - logs.mean(axis=0))), allow_non_integer=True)


@pytest.mark.parametrize("form", FORMS)
def test_cells_and_genes_without_counts_are_listed(form):
    counts = COUNTS.copy()
    counts[[3, 8]] = 0
    with pytest.warns(UserWarning, match="2 cells have no counts: 'c3', 'c8'"):
        cells = Cells.from_anndata(make_adata(form(counts)))
    assert np.isfinite(cells[:][0].numpy()).all()
    assert cells.totals[3] == cells.totals[8] == 0
    counts = COUNTS.copy()
    counts[:, 4] = 0
    with pytest.warns(UserWarning, match="1 gene has no counts: 'g4'"):
        Cells.from_anndata(make_adata(form(counts)))


def test_stored_zeros_do_not_hide_an_empty_gene():
    matrix = sparse.csr_matrix(COUNTS)
    matrix.data[matrix.indices == 4] = 0
    with pytest.warns(UserWarning, match="'gene_4'"):
        Cells.from_counts(matrix)


@pytest.mark.parametrize("form", FORMS)
def test_implausibly_large_counts_warn(form):
    with pytest.warns(UserWarning, match=r"implausibly large count: cell 'c17', gene 'g5' holds 1e\+07") as caught:
        cells = Cells.from_anndata(make_adata(poisoned(form, 1e7)))
    assert [each.filename for each in caught if each.category is UserWarning] == [__file__]
    assert cells[17][0][0, 5] == 1e7


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("form", [np.zeros, sparse.csr_matrix])
def test_no_cells_or_no_genes(shape, form):
    with pytest.raises(DataError, match="at least 1 cell and 1 gene"):
        Cells.from_anndata(make_adata(form(shape)))


@pytest.mark.parametrize("n_cells", [1, 2])
def test_one_or_two_cells(n_cells):
    cells = Cells.from_counts(np.ones((n_cells, 3)))
    assert cells[:][0].shape == (n_cells, 3)


def test_matrices_that_hold_no_numbers():
    with pytest.raises(DataError, match="bool"):
        Cells.from_anndata(make_adata(COUNTS > 0))
    with pytest.raises(DataError, match=r"X is None.*layer= .*'raw'"):
        Cells.from_anndata(AnnData(None, layers={"raw": COUNTS}))
    with pytest.raises(SchemaError, match="no layer 'count'; the layers are: 'counts', 'raw'"):
        Cells.from_anndata(make_adata(layers={"counts": COUNTS, "raw": COUNTS}), layer="count")
    for matrix in (
        None,
        np.array([["a"]]),
        [[1, 2], [3]],
        np.ones(3),
        np.ones((2, 2)) * 1j,
        np.ma.masked_equal(COUNTS, 1),
    ):
        with pytest.raises(DataError, match="counts"):
            Cells.from_counts(matrix)
    with pytest.raises(DataError, match="from_counts takes matrices"):
        Cells.from_anndata(COUNTS)


def test_broken_sparse_matrix_is_refused():
    matrix = sparse.csr_matrix(COUNTS)
    matrix.indices[0] = 500
    with pytest.raises(DataError, match="broken sparse matrix"):
        Cells.from_counts(matrix)


def test_names():
    adata = make_adata()
    adata.var_names = ["g0", "g0", *adata.var_names[2:]]
    with pytest.raises(DataError, match="unique; 'g0' occur"):
        Cells.from_anndata(adata)
    adata = make_adata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["c1", *adata.obs_names[1:]]
    with pytest.warns(UserWarning, match="cell names occur more than once: 'c1'"):
        Cells.from_anndata(adata)
    for names in ({"gene_names": ["a"]}, {"cell_names": ["a"]}, {"obs": pd.DataFrame(index=["a"])}):
        with pytest.raises(DataError, match="1 (gene|cell|rows)"):
            Cells.from_counts(COUNTS, **names)


def test_large_sparse_counts_are_read_in_time_and_stay_sparse():
    matrix = sparse.random_array((20_000, 2_000), density=0.1, format="csr", dtype=np.float32, random_state=0)
    matrix.data = np.ceil(matrix.data * 9)
    matrix.indptr = matrix.indptr.astype(np.int64)
    start = time.process_time()
    cells = Cells.from_counts(matrix)
    assert time.process_time() - start < 1.0  # 0.15 s when written; a dense copy alone takes longer
    assert cells.counts.nnz == matrix.nnz
    assert np.shares_memory(Cells.from_counts(matrix, copy=False).counts.data, matrix.data)
