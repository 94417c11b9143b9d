"""Cells: minibatches, subsets, splits, batches, and what is shown."""

import random

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from scipy import sparse

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.paths import DATA

COUNTS = np.random.default_rng(1).poisson(2.0, size=(20, 6)) + 1
FORMS = [pytest.param(np.asarray, id="dense"), pytest.param(sparse.csr_matrix, id="sparse")]


def make_adata(form=sparse.csr_matrix):
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(["late", "early"] * 10, categories=["late", "never", "early"]),
            "mito": np.linspace(0.0, 0.2, 20),
            "age": np.arange(20) % 5,
            "kind": ["T", "B", "NK", "T"] * 5,
        },
        index=[f"c{i}" for i in range(20)],
    )
    return AnnData(form(COUNTS), obs=obs, var=pd.DataFrame(index=list("abcdef")))


def make_cells(form=sparse.csr_matrix):
    return Cells.from_anndata(make_adata(form), batch="donor", covariates=["mito", "age"])


def test_sizes_and_names():
    cells = make_cells()
    assert (len(cells), cells.n_cells, cells.n_genes, cells.n_batches, cells.n_covariates) == (20, 20, 6, 2, 4)
    assert list(cells.gene_names) == list("abcdef")
    assert list(cells.cell_names) == [f"c{i}" for i in range(20)]
    assert list(cells.obs["kind"]) == ["T", "B", "NK", "T"] * 5
    np.testing.assert_array_equal(cells.totals, COUNTS.sum(axis=1))


def test_covariates_are_one_hot_batches_then_standardised_columns():
    cells = make_cells()
    assert cells.schema.batches == ("late", "early")  # order of the categories; one that never occurs is left out
    gamma = cells.covariates
    assert gamma.dtype == np.float32
    np.testing.assert_array_equal(gamma[:3, :2], [[1, 0], [0, 1], [1, 0]])
    np.testing.assert_allclose(gamma[:, 2:].mean(axis=0), 0.0, atol=1e-6)
    np.testing.assert_allclose(gamma[:, 2:].std(axis=0), 1.0, rtol=1e-6)
    mito = np.linspace(0.0, 0.2, 20)
    np.testing.assert_allclose(gamma[:, 2], (mito - mito.mean()) / mito.std(), rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("index", "rows"),
    [
        ([3, 1, 1], [3, 1, 1]),
        (np.array([5, -1]), [5, 19]),
        (torch.tensor([7, 2]), [7, 2]),
        (slice(4, 10, 3), [4, 7]),
        (6, [6]),
        (np.arange(20) % 10 == 0, [0, 10]),
        (torch.arange(20) == 3, [3]),
        ([], []),
    ],
)
def test_minibatch(form, index, rows):
    cells = make_cells(form)
    x, gamma = cells[index]
    assert x.dtype == gamma.dtype == torch.float32
    assert x.shape == (len(rows), 6)
    np.testing.assert_array_equal(x.numpy(), COUNTS[rows])
    np.testing.assert_array_equal(gamma.numpy(), cells.covariates[rows])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_minibatch_is_a_copy(dtype):
    cells = Cells.from_counts(COUNTS.astype(dtype), obs=make_adata().obs, batch="donor")
    x, gamma = cells[:]
    x += 1
    gamma += 1
    np.testing.assert_array_equal(cells[:][0].numpy(), COUNTS)
    assert cells.covariates.max() == 1


def test_bad_index():
    cells = make_cells()
    for index in (np.array([0.5]), np.array([[1]]), np.array([True, False])):
        with pytest.raises(DataError, match="integers"):
            cells[index]
    with pytest.raises(IndexError):
        cells[[20]]


def test_cells_do_not_follow_later_changes_of_the_annotations():
    adata = make_adata()
    cells = Cells.from_anndata(adata)
    adata.obs["kind"] = "changed"
    assert "changed" not in set(cells.obs["kind"])


@pytest.mark.parametrize("form", FORMS)
def test_take_keeps_annotations_and_scale(form):
    cells = make_cells(form)
    few = cells.take([9, 2])
    assert list(few.cell_names) == ["c9", "c2"]
    assert list(few.obs["kind"]) == ["B", "NK"]
    assert few.schema is cells.schema
    np.testing.assert_array_equal(few.covariates, cells.covariates[[9, 2]])
    np.testing.assert_array_equal(few.totals, COUNTS[[9, 2]].sum(axis=1))
    assert sparse.issparse(few.counts) == sparse.issparse(cells.counts)
    with pytest.raises(DataError, match="no cell"):
        cells.take([])


@pytest.mark.parametrize(
    ("held_out", "n_test"), [(0.1, 2), (0.25, 5), (0.001, 1), (0.999, 19), (1, 1), (19, 19), (np.int64(4), 4)]
)
def test_split_is_a_partition_in_file_order(held_out, n_test):
    cells = make_cells()
    train, test = cells.split(held_out)
    assert (len(train), len(test)) == (20 - n_test, n_test)
    for part in (train, test):
        assert list(part.cell_names) == sorted(part.cell_names, key=lambda name: int(name[1:]))
    assert set(train.cell_names) | set(test.cell_names) == set(cells.cell_names)


def test_split_depends_on_its_seed_alone():
    cells = make_cells()
    parts = [list(cells.split(5, seed=seed)[1].cell_names) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
    assert parts[0] != [f"c{i}" for i in range(5)]


def global_random_state():
    legacy = np.random.get_state()  # noqa: NPY002 - the global state is what must not change
    return random.getstate(), legacy[1].tolist(), legacy[2], torch.get_rng_state().tolist()


def test_split_leaves_global_random_state_alone():
    before = global_random_state()
    make_cells().split(0.3, seed=4)
    assert global_random_state() == before


@pytest.mark.parametrize("held_out", [0, 20, -1, 0.0, 1.0, 2.5, float("nan"), True, "half", None])
def test_impossible_split(held_out):
    with pytest.raises(ModelError, match="h(e|o)ld"):
        make_cells().split(held_out)


def test_one_cell_cannot_be_split():
    with pytest.raises(ModelError, match="of 1 cells"):
        make_cells().take([0]).split()


def test_with_batch_sets_every_cell_and_nothing_else():
    cells = make_cells()
    early = cells.with_batch("early")
    np.testing.assert_array_equal(early.covariates[:, :2], np.tile([0, 1], (20, 1)))
    np.testing.assert_array_equal(early.covariates[:, 2:], cells.covariates[:, 2:])
    np.testing.assert_array_equal(cells.covariates[:2, :2], [[1, 0], [0, 1]])
    assert early.counts is cells.counts
    with pytest.raises(SchemaError, match="no batch 'never'; its batches are 'late', 'early'"):
        cells.with_batch("never")
    with pytest.raises(SchemaError, match="without batch="):
        Cells.from_anndata(make_adata()).with_batch("early")


def test_what_is_shown():
    shown = repr(make_cells())
    for fact in ("20 cells x 6 genes", "100.0% non-zero", "sparse int64", "donor (late, early)", "mito, age"):
        assert fact.replace("int64", str(make_cells().counts.dtype)) in shown
    adata = make_adata(np.asarray)
    adata.obs["donor"] = ["<b>", "&"] * 10
    page = Cells.from_anndata(adata, batch="donor")._repr_html_()
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "dense" in page


needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data at {DATA}; set PYRO_SCVI_DATA")


@needs_data
@pytest.mark.parametrize(
    ("name", "batch", "shape", "n_batches"),
    [("cortex_558", None, (3005, 558), 0), ("pbmc_8k4k_hvg", "batch", (11051, 134), 2)],
)
def test_real_files(name, batch, shape, n_batches):
    adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
    cells = Cells.from_anndata(adata, batch=batch)
    assert (cells.n_cells, cells.n_genes, cells.n_batches) == (*shape, n_batches)
    assert cells.counts.indptr.dtype == np.int32
    np.testing.assert_array_equal(cells[100:110][0].numpy(), adata.X[100:110].toarray())


@needs_data
def test_real_file_with_empty_cells_and_genes():
    adata = anndata.read_h5ad(DATA / "brain10k.h5ad")
    with pytest.warns(UserWarning, match="no counts") as caught:
        Cells.from_anndata(adata)
    n_empty = int((adata.X.sum(axis=1) == 0).sum())
    assert n_empty == 1
    assert [str(warning.message).split(" no counts")[0] for warning in caught] == ["1 cell has", "285 genes have"]


def test_gene_names_that_are_numbers_match_their_own_schema():
    adata = AnnData(np.ones((3, 2)))
    adata.var.index = pd.Index([1, 2])
    cells = Cells.from_anndata(adata)
    with pytest.warns(UserWarning, match="genes are named by numbers .'1', '2'"):
        query = Cells.from_anndata(adata, schema=cells.schema)
    np.testing.assert_array_equal(query[:][0], cells[:][0])
    adata.var.index = pd.Index([1, "1"], dtype=object)
    with pytest.raises(DataError, match="unique"):
        Cells.from_anndata(adata)
