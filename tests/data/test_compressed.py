"""Counts are never lost: entries at one place, values outside an index pointer, numbers that a type has rounded."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from anndata.experimental import AnnCollection
from scipy import sparse

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.stores import CountStore, build
from pyro_scvi.errors import DataError, StoreError

MOLECULES = np.full(25, 200, dtype=np.uint8)  # of one gene in one cell: 5,000, of which a uint8 keeps 136
EVERY_OTHER = np.zeros(25, dtype=int)
COUNTS = np.random.default_rng(3).poisson(2.0, (8, 6)) + 1


def names_of(shape):
    return {
        "obs": pd.DataFrame(index=[f"c{i}" for i in range(shape[0])]),
        "var": pd.DataFrame(index=[f"g{i}" for i in range(shape[1])]),
    }


# --- entries at one place ---


def of_scipy(dtype=np.uint8, form=sparse.coo_array):
    places = (np.append(EVERY_OTHER, 1), np.append(EVERY_OTHER, 1))
    return form((np.append(MOLECULES, 3).astype(dtype), places), shape=(2, 2))


def by_blocks():
    data = np.append(MOLECULES, 3).reshape(-1, 1, 1)
    return sparse.bsr_array((data, np.append(EVERY_OTHER, 1), [0, 25, 26]), shape=(2, 2))


def by_rows(kind):
    return kind((np.append(MOLECULES, 3), np.append(EVERY_OTHER, 1), [0, 25, 26]), shape=(2, 2))


def of_torch(is_coalesced=None):
    places = torch.tensor(np.stack([np.append(EVERY_OTHER, 1)] * 2))
    values = torch.tensor(np.append(MOLECULES, 3))
    return torch.sparse_coo_tensor(places, values, (2, 2), is_coalesced=is_coalesced, check_invariants=False)


def of_torch_by_rows(make):
    pointer, places = torch.tensor([0, 25, 26]), torch.tensor(np.append(EVERY_OTHER, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that sparse tensors are new
        return make(pointer, places, torch.tensor(np.append(MOLECULES, 3)), (2, 2), check_invariants=False)


def of_torch_by_blocks():
    pointer, places = torch.tensor([0, 25, 26]), torch.tensor(np.append(EVERY_OTHER, 1))
    values = torch.tensor(np.append(MOLECULES, 3)).reshape(-1, 1, 1)
    return torch.sparse_bsr_tensor(pointer, places, values, (2, 2), check_invariants=False)


def in_unsorted_rows():
    """Zeros stand between entries of one place."""
    places = np.append(np.tile([0, 1], 25), [1, 0])
    values = np.append(np.stack([MOLECULES, np.zeros_like(MOLECULES)], 1).ravel(), [3, 0]).astype(np.uint8)
    return sparse.csr_matrix((values, places, [0, 50, 52]), shape=(2, 2))


def negative_on_the_way():
    places = (np.append(np.zeros(50, int), 1), np.append(np.zeros(50, int), 1))
    return sparse.coo_matrix((np.append(np.full(50, 100), 3).astype(np.int8), places), shape=(2, 2))


def in_another_way(matrix, way, folder):
    """The matrix as part of an AnnData that is read in one of several ways."""
    adata = AnnData(matrix, **names_of((2, 2)))
    if way == "view":
        return Cells.from_anndata(adata[:, [0, 1]])
    if way == "layer":
        return Cells.from_anndata(AnnData(layers={"x": matrix}, **names_of((2, 2))), layer="x")
    adata.write_h5ad(folder / "cells.h5ad")
    if way == "store":
        return Cells.from_store(build(folder / "cells.h5ad", folder / "store", progress=False))
    file = anndata.read_h5ad(folder / "cells.h5ad", backed="r")
    parts = AnnCollection([file, AnnData(matrix, **names_of((2, 2)))], index_unique="-")
    return Cells.from_anndata(file if way == "backed" else parts, backed=True)


@pytest.mark.parametrize("way", ["view", "layer", "backed", "store", "collection"])
def test_molecules_at_one_place_are_added_up_wherever_they_lie(way, tmp_path):
    cells = in_another_way(in_unsorted_rows(), way, tmp_path)
    np.testing.assert_array_equal(cells[[0, 1]][0], [[5000, 0], [0, 3]])


@pytest.mark.parametrize(
    "matrix",
    [
        pytest.param(of_scipy(), id="coo array"),
        pytest.param(of_scipy(form=sparse.coo_matrix), id="coo matrix"),
        pytest.param(of_scipy(np.uint16), id="coo of a type that holds the sum"),
        pytest.param(of_scipy(np.float32), id="coo of float32"),
        pytest.param(by_blocks(), id="bsr"),
        pytest.param(by_rows(sparse.csr_array), id="csr"),
        pytest.param(by_rows(sparse.csc_array), id="csc"),
        pytest.param(of_torch(), id="torch coo"),
        pytest.param(of_torch(is_coalesced=True), id="torch coo that claims to be coalesced"),
        pytest.param(of_torch_by_rows(torch.sparse_csr_tensor), id="torch csr"),
        pytest.param(of_torch_by_rows(torch.sparse_csc_tensor), id="torch csc"),
        pytest.param(of_torch_by_blocks(), id="torch bsr"),
        pytest.param(in_unsorted_rows(), id="csr with unsorted indices"),
        pytest.param(negative_on_the_way(), id="int8, whose sums would be negative"),
    ],
)
def test_molecules_at_one_place_are_added_up_in_a_wide_type(matrix):
    np.testing.assert_array_equal(Cells.from_counts(matrix)[:][0], [[5000, 0], [0, 3]])


def test_tensors_that_are_dense_in_part():
    places, values = torch.tensor([[0, 0, 1]]), torch.tensor([[200, 1], [100, 2], [3, 4]], dtype=torch.uint8)
    tensor = torch.sparse_coo_tensor(places, values, (2, 2), check_invariants=True)
    np.testing.assert_array_equal(Cells.from_counts(tensor)[:][0], [[300, 3], [3, 4]])


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(2, 2, 2).to_sparse(), r"its shape is \(2, 2, 2\)"),
        (torch.ones(2, 2, device="meta"), "a tensor without data"),
    ],
)
def test_tensors_that_are_no_matrix(tensor, says):
    with pytest.raises(DataError, match=says):
        Cells.from_counts(tensor)


def test_a_type_that_holds_the_sums_is_kept():
    assert Cells.from_counts(of_scipy(np.uint16)).counts.dtype == np.uint16
    assert Cells.from_counts(of_scipy()).counts.dtype == np.float32


# --- what an AnnCollection says ---


def collected(matrix, other, layer=None, **var):
    parts = [AnnData(x, **names_of(x.shape)) for x in (matrix, other)]
    for part in parts:
        part.var = part.var.assign(**var)
        if layer is not None:
            part.layers[layer] = part.X
    parts[1].obs_names = [f"{name}b" for name in parts[1].obs_names]
    return Cells.from_anndata(AnnCollection(parts, join_vars="inner"), layer=layer, backed=True)


@pytest.mark.parametrize("layer", [None, "counts"])
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.float16])
def test_counts_near_the_end_of_their_type_are_told_in_a_collection(kind, layer):
    counts = COUNTS.astype(kind)
    counts[2, 3] = 4096 if kind is np.float16 else np.iinfo(kind).max
    for other in (counts, COUNTS.astype(np.float32)):
        with pytest.warns(UserWarning, match="came in .* type of .*bits.*cell 'c2', gene 'g3'"):
            collected(sparse.csr_matrix(counts) if kind is not np.float16 else counts, other, layer)


def test_features_that_are_no_genes_are_told_in_a_collection():
    kinds = ["Gene Expression"] * 4 + ["Antibody Capture"] * 2
    with pytest.warns(UserWarning, match="2 of the 6 features are not genes.*2 'Antibody Capture'"):
        collected(COUNTS, COUNTS, feature_types=kinds)


# --- values outside the index pointer ---


def broken(how, kind=sparse.csr_matrix):
    """A matrix whose pointer leaves out values; SciPy's constructor would drop them."""
    matrix = kind(COUNTS)
    if how == "start":
        matrix.indptr = np.append(matrix.indptr[:1] + 2, matrix.indptr[1:]).astype(np.int32)
    else:
        matrix.data, matrix.indices = np.append(matrix.data, [7, 7]), np.append(matrix.indices, [0, 1]).astype(np.int32)
    return matrix


HOW = pytest.mark.parametrize("how", ["start", "end"])
SAYS = r"is a broken sparse matrix: its index pointer runs from \d to 48, but it stores (48|50) values"


@HOW
@pytest.mark.parametrize("kind", [sparse.csr_matrix, sparse.csr_array, sparse.csc_matrix, sparse.csc_array])
def test_values_outside_the_pointer_are_refused(how, kind):
    with pytest.raises(DataError, match=f"counts {SAYS}"):
        Cells.from_counts(broken(how, kind))
    adata = AnnData(np.log1p(COUNTS), **names_of((8, 6)))
    adata.layers["counts"] = broken(how, kind)
    for part in (adata, adata[:4]):
        with pytest.raises(DataError, match=f"layer 'counts' {SAYS}"):
            Cells.from_anndata(part, layer="counts")


@HOW
def test_values_outside_the_pointer_of_small_floats_are_refused(how):
    matrix = broken(how)
    matrix.data = matrix.data.astype(np.float16)
    with pytest.raises(DataError, match=SAYS):
        Cells.from_counts(matrix)


def test_a_tensor_whose_pointer_leaves_values_out_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tensor = torch.sparse_csr_tensor(
            torch.tensor([0, 1, 2]), torch.tensor([0, 1, 0]), torch.tensor([4, 5, 6]), (2, 2), check_invariants=False
        )
    with pytest.raises(DataError, match="runs from 0 to 2, but it stores 3 values"):
        Cells.from_counts(tensor)


def test_room_that_was_removed_is_no_fault():
    matrix = broken("end")
    matrix.prune()
    np.testing.assert_array_equal(Cells.from_counts(matrix)[:][0], COUNTS)


@pytest.fixture(params=["start", "end", "order"])
def broken_file(request, tmp_path):
    path = tmp_path / "broken.h5ad"
    AnnData(sparse.csr_matrix(COUNTS.astype(np.float32)), **names_of((8, 6))).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        pointer = file["X/indptr"][...]
        if request.param == "end":
            pointer[-1] -= 3
        elif request.param == "start":
            pointer[0] = 2
        else:
            pointer[3] = pointer[5]
        file["X/indptr"][...] = pointer
    return path


def test_a_file_whose_pointer_leaves_values_out_is_refused_everywhere(broken_file, tmp_path):
    with pytest.raises(DataError, match="broken sparse matrix"):
        Cells.from_anndata(anndata.read_h5ad(broken_file))
    file = anndata.read_h5ad(broken_file, backed="r")
    ways = (
        lambda: Cells.from_anndata(file),
        lambda: Cells.from_anndata(file[:4]),
        lambda: Cells.from_anndata(file, backed=True),
        lambda: Cells.from_anndata(AnnCollection([file, file.to_memory()], index_unique="-"), backed=True),
        lambda: build(broken_file, tmp_path / "store", progress=False),
    )
    for way in ways:
        with pytest.raises(DataError, match="broken sparse matrix: its index pointer"):
            way()
    file.file.close()
    assert not (tmp_path / "store").exists()


def test_a_broken_matrix_in_unusual_places_is_refused(tmp_path):
    """A layer, raw, one part of a collection."""
    wrong, names = broken("start"), names_of((8, 6))
    whole = AnnData(sparse.csr_matrix(COUNTS), **names)
    whole.layers["x"] = wrong
    with_raw = AnnData(sparse.csr_matrix(COUNTS), **names)
    with_raw.raw = AnnData(broken("end"), **names)
    other = AnnData(broken("end"), **names_of((8, 6)))
    other.obs_names = [f"{name}b" for name in other.obs_names]
    ways = (
        lambda: Cells.from_anndata(whole, layer="x"),
        lambda: Cells.from_anndata(whole[2:5], layer="x"),
        lambda: Cells.from_anndata(with_raw, raw=True),
        lambda: Cells.from_anndata(AnnCollection([whole, other]), backed=True),
    )
    for way in ways:
        with pytest.raises(DataError, match="broken sparse matrix: its index pointer"):
            way()


def test_a_store_whose_pointer_leaves_values_out_is_refused(tmp_path):
    AnnData(sparse.csr_matrix(COUNTS), **names_of((8, 6))).write_h5ad(tmp_path / "cells.h5ad")
    store = build(tmp_path / "cells.h5ad", tmp_path / "store", progress=False)
    pointer = np.load(store / "indptr.npy")
    pointer[0] = 1
    np.save(store / "indptr.npy", pointer)
    with pytest.raises(StoreError, match="not of the sizes in its schema"):
        CountStore(store, verify=False)


# --- numbers that were rounded ---


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, torch.tensor])
def test_counts_that_float16_has_rounded_are_told(form):
    counts = np.array([[1.0, 2051.0], [3.0, 4.0]])  # float16 makes it 2052
    halves = counts.astype(np.float16)
    matrix = form(halves) if form is not sparse.csr_matrix else sparse.csr_matrix(counts, dtype=np.float32)
    if sparse.issparse(matrix):
        matrix.data = halves.reshape(-1)
    with pytest.warns(UserWarning, match=r"type of 16 bits.* above 2047: .*'cell_0', gene 'gene_1' holds 2052"):
        Cells.from_counts(matrix)


def test_counts_that_bfloat16_has_rounded_are_told():
    with pytest.warns(UserWarning, match="above 255"):
        Cells.from_counts(torch.tensor([[1.0, 257.0]], dtype=torch.bfloat16))


def test_counts_that_a_file_of_float16_has_rounded_are_told(tmp_path):
    counts = np.array([[1.0, 2051.0], [3.0, 4.0]], dtype=np.float16)
    AnnData(counts, **names_of((2, 2))).write_h5ad(tmp_path / "cells.h5ad")
    with pytest.warns(UserWarning, match="type of 16 bits"):
        build(tmp_path / "cells.h5ad", tmp_path / "store", progress=False)
    file = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.warns(UserWarning, match="type of 16 bits"):
        Cells.from_anndata(file, backed=True)
    file.file.close()


# --- numbers that are nearly integers ---


def won_back(counts):
    """Counts that went to logarithms of shares and back in single precision."""
    total = counts.sum(1, keepdims=True)
    return np.expm1(np.log1p(counts / total * 1e4).astype(np.float32)) * (total / 1e4).astype(np.float32)


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csc_array])
def test_nearly_integers_show_their_digits_and_how_to_round_them(form):
    matrix = form(won_back(COUNTS))
    with pytest.raises(DataError, match=r"holds \d+\.\d{4,}\. .*within \de-0\d of integers.*np\.rint\(matrix\)"):
        Cells.from_counts(matrix)
    np.testing.assert_array_equal(Cells.from_counts(np.rint(matrix))[:][0], COUNTS)


@pytest.mark.parametrize(
    ("value", "shown"), [(8.999998, "8.999998"), (1000000.2, "1000000.2"), (2.5, r"2\.5"), (0.1234567, "0.123457")]
)
def test_a_number_is_shown_with_digits_that_say_why(value, shown):
    counts = COUNTS.astype(float)
    counts[2, 3] = value
    with pytest.raises(DataError, match=f"holds {shown}"):
        Cells.from_counts(counts)


@pytest.mark.parametrize("transform", [np.log1p, np.sqrt, lambda counts: counts * 0.97])
def test_other_values_are_not_said_to_be_nearly_integers(transform):
    with pytest.raises(DataError) as caught:
        Cells.from_counts(transform(COUNTS.astype(float)))
    assert "rint" not in str(caught.value)
