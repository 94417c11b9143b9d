"""Stores of counts: what is built from which files, what an interruption leaves, and what is never read as if whole."""

import copy
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from anndata import AnnData
from scipy import sparse

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.lazy_counts import Backed
from pyro_scvi.data.minibatches import Minibatches, resolve_device
from pyro_scvi.data.stores import CountStore, build, building
from pyro_scvi.errors import DataError, ModelError, SchemaError, StoreError
from pyro_scvi.utils.disk.locks import only_writer
from pyro_scvi.utils.random_state import seeded
from tests.support.cli_runs import run
from tests.support.paths import ROOT

FILES = ("indptr.npy", "indices.npy", "data.npy", "totals.npy", "detected.npy", "annotations.h5ad")


def make_adata(n_cells=50, genes="abcdefg", seed=0, form=sparse.csr_matrix, largest=None, dtype=np.float32):
    counts = np.random.default_rng(seed).poisson(1.0, size=(n_cells, len(genes)))
    counts[:, [0, -1]] += 1
    counts[0] += 1
    if largest is not None:
        counts[3, 1] = largest
    obs = pd.DataFrame(
        {
            "donor": pd.Categorical(np.where(np.arange(n_cells) % 3, "x", "y"), categories=["y", "x", "never"]),
            "age": np.linspace(20.0, 50.0, n_cells),
            "note": ["é", ""] * (n_cells // 2),
        },
        index=[f"c{i}" for i in range(n_cells)],
    )
    return AnnData(form(counts.astype(dtype)), obs=obs, var=pd.DataFrame(index=list(genes)))


def stored(folder, adata, name="cells"):
    path = folder / f"{name}.h5ad"
    adata.write_h5ad(path, convert_strings_to_categoricals=False)
    return path


def quietly(*arguments, **options):
    return build(*arguments, progress=False, **options)


def dense(cells):
    return cells[:][0].numpy()


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of five or six cells of seven genes."""
    monkeypatch.setattr("pyro_scvi.data.counts._BLOCK_ENTRIES", 40)


@pytest.fixture
def file(tmp_path):
    return stored(tmp_path, make_adata())


@pytest.fixture
def store(file, tmp_path):
    return quietly(file, tmp_path / "store")


# --- what a store gives back ---


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix, sparse.csr_array])
@pytest.mark.usefixtures("small_blocks")
def test_cells_of_a_store_are_those_of_the_file(tmp_path, form):
    adata = make_adata(form=form)
    options = {"batch": "donor", "covariates": ["age"]}
    path = quietly(stored(tmp_path, adata), tmp_path / "store")
    found, expected = Cells.from_store(path, **options), Cells.from_anndata(adata, **options)
    np.testing.assert_array_equal(dense(found), adata.to_df().to_numpy())
    np.testing.assert_array_equal(found.totals, expected.totals)
    np.testing.assert_array_equal(found.covariates, expected.covariates)
    assert found.schema == expected.schema
    pd.testing.assert_frame_equal(found.obs, adata.obs)
    assert "on disk, sparse uint8" in repr(found)
    assert "50 cells x 7 genes" in repr(found)
    assert not (tmp_path / "store.partial").exists()


def test_a_zarr_folder_is_read_too(tmp_path):
    adata = make_adata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zarr and anndata announce the next version of the format
        adata.write_zarr(tmp_path / "cells.zarr")
    found = Cells.from_store(quietly(tmp_path / "cells.zarr", tmp_path / "store"))
    np.testing.assert_array_equal(dense(found), adata.X.toarray())
    assert list(found.cell_names) == list(adata.obs_names)


def test_a_layer_and_a_query_that_has_it(tmp_path):
    adata = make_adata()
    adata.layers["counts"] = adata.X.copy()
    adata.X = np.log1p(adata.X.toarray())
    cells = Cells.from_store(quietly(stored(tmp_path, adata), tmp_path / "store", layer="counts"))
    np.testing.assert_array_equal(dense(cells), adata.layers["counts"].toarray())
    query = Cells.from_anndata(adata, schema=cells.schema)
    np.testing.assert_array_equal(dense(query), dense(cells))
    with pytest.raises(SchemaError, match=r"has no layer 'raw'; its layers are: 'counts'"):
        quietly(tmp_path / "cells.h5ad", tmp_path / "other", layer="raw")


@pytest.mark.parametrize(
    ("largest", "dtype", "expected"),
    [
        (255, np.float32, "uint8"),
        (256, np.uint16, "int16"),
        (40_000, np.int64, "float32"),
        (2.5, np.float64, "float32"),
    ],
)
def test_counts_are_stored_in_the_smallest_type(tmp_path, largest, dtype, expected, small_blocks):
    adata = make_adata(largest=1, dtype=np.float64)
    adata.X[3, 1] = largest
    adata.X = adata.X.astype(dtype)
    path = quietly(stored(tmp_path, adata), tmp_path / "store", allow_non_integer=largest == 2.5)
    cells = Cells.from_store(path)
    assert cells.counts.dtype == np.load(path / "data.npy").dtype == np.dtype(expected)
    assert dense(cells)[3, 1] == largest
    np.testing.assert_array_equal(dense(cells), adata.X.toarray())


def test_more_genes_than_sixteen_bits_number(tmp_path):
    counts = sparse.csr_matrix(([1, 2, 3], ([0, 1, 2], [0, 65_535, 69_999])), shape=(3, 70_000))
    file = stored(tmp_path, AnnData(counts, obs=pd.DataFrame(index=list("abc"))))
    path = quietly(file, tmp_path / "store")
    assert np.load(path / "indices.npy").dtype == np.int32
    np.testing.assert_array_equal(CountStore(path)[np.arange(3)].toarray(), counts.toarray())


def test_explicit_zeros_and_duplicate_entries_are_not_stored(tmp_path):
    counts = sparse.csr_matrix(([1.0, 2.0, 0.0, 4.0], [0, 0, 1, 2], [0, 3, 4]), shape=(2, 3))
    store = CountStore(quietly(stored(tmp_path, AnnData(counts)), tmp_path / "store"))
    assert store.schema.n_nonzero == 2
    np.testing.assert_array_equal(store[np.arange(2)].toarray(), [[3, 0, 0], [0, 0, 4]])


@pytest.mark.parametrize("dtype", [">i4", ">f8", "f2"])
def test_dense_counts_of_another_byte_order_or_half_precision(tmp_path, dtype):
    adata = make_adata(form=np.asarray)
    adata.write_h5ad(tmp_path / "a.h5ad")
    with h5py.File(tmp_path / "a.h5ad", "r+") as file:
        values, attributes = file["X"][()], dict(file["X"].attrs)
        del file["X"]
        file.create_dataset("X", data=values.astype(dtype)).attrs.update(attributes)
    build(tmp_path / "a.h5ad", tmp_path / "a.store", progress=False)
    store = CountStore(tmp_path / "a.store")
    np.testing.assert_array_equal(store[np.arange(50)].toarray(), adata.X)


@pytest.mark.parametrize("rows", [[3, 1, 1, 49], [-1, 0], [7, 8, 9], [5], [], np.arange(50)[::-1]])
def test_rows_in_any_order(store, rows):
    expected = make_adata().X.toarray()[np.array(rows, dtype=int)]
    np.testing.assert_array_equal(CountStore(store)[np.array(rows, dtype=int)].toarray(), expected)


def test_rows_outside(store):
    for rows in ([50], [-51], [0, 1000]):
        with pytest.raises(IndexError, match="from 0 to 49"):
            CountStore(store)[np.array(rows)]


def test_parts_of_the_cells_stay_on_disk(store):
    cells, whole = Cells.from_store(store), make_adata().X.toarray()
    train, test = cells.split(10, seed=1)
    names = list(cells.cell_names)
    for part in (train, test, train.take([5, 0, 5]), test.take(slice(None, None, -1)).take([-1, 2])):
        rows = [names.index(name) for name in part.cell_names]
        assert not isinstance(part.counts, np.ndarray | sparse.csr_array)
        np.testing.assert_array_equal(dense(part), whole[rows])
        np.testing.assert_array_equal(part.totals, whole[rows].sum(1))
        assert f"{np.count_nonzero(whole[rows]) / whole[rows].size:.1%} non-zero" in repr(part)


def test_a_query_store_is_matched_by_gene_names(tmp_path, store):
    adata = make_adata(genes="gfxdcba", seed=3)
    query = quietly(stored(tmp_path, adata, "query"), tmp_path / "query")
    schema = Cells.from_store(store).schema
    with pytest.raises(SchemaError, match="1 are missing: 'e'"):
        Cells.from_store(query, schema=schema)
    with pytest.warns(UserWarning, match="filled with zeros: 'e'"):
        found = Cells.from_store(query, schema=schema, fill_missing_genes=True)
    expected = adata.to_df().assign(e=0)[list("abcdefg")].to_numpy()
    np.testing.assert_array_equal(dense(found), expected)
    np.testing.assert_array_equal(found.totals, expected.sum(1))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_copies_open_the_files_themselves(store, again):
    first = CountStore(store)
    second = again(first)
    assert second._data.descriptor != first._data.descriptor
    del first
    np.testing.assert_array_equal(second[np.arange(50)].toarray(), make_adata().X.toarray())


# --- several files ---


@pytest.fixture
def files(tmp_path):
    first, second = make_adata(), make_adata(30, "xfdbga", seed=1, form=np.asarray)
    del second.obs["note"]
    return {"A": stored(tmp_path, first, "one"), "B": stored(tmp_path, second, "two")}


@pytest.mark.usefixtures("small_blocks")
def test_several_files_as_one(tmp_path, files):
    path = quietly(files, tmp_path / "store", label="batch", index_unique="-")
    cells = Cells.from_store(path, batch="batch")
    first, second = (anndata.read_h5ad(file).to_df() for file in files.values())
    assert list(cells.gene_names) == list("abdfg")  # those of both, in the order of the first
    expected = pd.concat([first, second])[list("abdfg")].to_numpy()
    np.testing.assert_array_equal(dense(cells), expected)
    assert list(cells.cell_names) == [f"c{i}-A" for i in range(50)] + [f"c{i}-B" for i in range(30)]
    assert cells.schema.batches == ("A", "B")
    np.testing.assert_array_equal(cells.covariates[:, 0], [1] * 50 + [0] * 30)
    assert list(cells.obs["donor"][-3:]) == ["y", "x", "x"]
    assert cells.obs["note"][:50].tolist() == ["é", ""] * 25
    assert cells.obs["note"][50:].isna().all()


def test_a_given_list_of_genes(tmp_path, files):
    path = quietly(files, tmp_path / "store", genes=["g", "a", "f"], index_unique="_")
    first, second = (anndata.read_h5ad(file).to_df() for file in files.values())
    expected = pd.concat([first, second])[["g", "a", "f"]].to_numpy()
    np.testing.assert_array_equal(dense(Cells.from_store(path)), expected)
    with pytest.raises(SchemaError, match=r"two\.h5ad lacks 1 of the 2 genes: 'c'"):
        quietly(files, tmp_path / "other", genes=["c", "a"], index_unique="_")
    with pytest.raises(DataError, match="listed once each; twice: 'a'"):
        quietly(files, tmp_path / "other", genes=["a", "a"], index_unique="_")


def test_names_that_clash(tmp_path, files):
    with pytest.raises(DataError, match=r"30 cell names occur more than once .* index_unique='-'"):
        quietly(files, tmp_path / "store")
    with pytest.raises(DataError, match="has a column 'donor' already"):
        quietly(files, tmp_path / "store", label="donor", index_unique="-")
    (tmp_path / "sub").mkdir()
    shutil.copy(files["A"], tmp_path / "sub" / "one.h5ad")
    with pytest.raises(ModelError, match="dict that names them"):
        quietly([files["A"], tmp_path / "sub" / "one.h5ad"], tmp_path / "store")
    with pytest.raises(DataError, match="no gene is in all of the 2 files"):
        quietly([files["A"], stored(tmp_path, make_adata(genes="tuv"), "others")], tmp_path / "store")
    with pytest.raises(ModelError, match="pass one file"):
        quietly([], tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_cell_names_twice_in_one_file(tmp_path):
    adata = make_adata()
    adata.obs_names = ["c0", *adata.obs_names[:-1]]
    path = quietly(stored(tmp_path, adata), tmp_path / "store")
    with pytest.warns(UserWarning, match="cell names occur more than once: 'c0'") as caught:
        Cells.from_store(path)
    assert [each.filename for each in caught if each.category is UserWarning] == [__file__]


# --- what is refused ---


def test_counts_by_genes_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"X of .*cells\.h5ad is stored by genes \(CSC\).*tocsr"):
        quietly(stored(tmp_path, make_adata(form=sparse.csc_matrix)), tmp_path / "store")


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "finite"), (-1.0, "0 or more"), (0.5, "raw integer"), (2.0**25, "up to")]
)
@pytest.mark.usefixtures("small_blocks")
def test_what_is_no_count_is_named_and_leaves_no_store(tmp_path, value, message):
    good, bad = make_adata(), make_adata(seed=1)
    bad.X = bad.X.toarray()
    bad.X[41, 2] = value
    bad.obs_names = [f"d{i}" for i in range(50)]
    files = [stored(tmp_path, good, "good"), stored(tmp_path, bad, "bad")]
    with pytest.raises(DataError, match=rf"X of .*bad\.h5ad must hold .*{message}.*cell 'd41', gene 'c'"):
        quietly(files, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    with pytest.raises(StoreError, match="build was interrupted"):
        Cells.from_store(tmp_path / "store")


def test_an_implausible_count_is_warned_of_once(tmp_path, small_blocks):
    adata = make_adata(largest=2_000_000)
    adata.X[40, 2] = 3_000_000
    with pytest.warns(UserWarning, match="implausibly large count: cell 'c3', gene 'b' holds 2e") as caught:
        quietly(stored(tmp_path, adata), tmp_path / "store")
    assert [each.filename for each in caught if each.category is UserWarning] == [__file__]


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "text.h5ad").write_text("no HDF5")
    (tmp_path / "folder").mkdir()
    for name, what in (("text.h5ad", "as h5ad"), ("absent.h5ad", "as h5ad"), ("folder", "as zarr")):
        with pytest.raises(DataError, match=f"{name}: cannot read it {what}"):
            quietly(tmp_path / name, tmp_path / "store")


def test_what_is_there_already_is_not_touched(tmp_path, file, store):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("kept")
    with pytest.raises(StoreError, match="is there already"):
        quietly(file, tmp_path / "mine")
    assert (tmp_path / "mine" / "notes").read_text() == "kept"
    before = {item.name: item.stat().st_mtime_ns for item in store.iterdir()}
    assert quietly(file, store) == store
    assert {item.name: item.stat().st_mtime_ns for item in store.iterdir()} == before
    with pytest.raises(StoreError, match="not built from these files"):
        quietly(file, store, genes=["a"])
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "notes").write_text("kept")
    with pytest.raises(StoreError, match="files that are not parts"):
        quietly(file, tmp_path / "new")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_an_altered_file_is_refused(store, name, share):
    path = store / name
    content = bytearray(path.read_bytes())
    content[int(share * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{name} was altered: its checksum"):
        Cells.from_store(store)


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_longer_or_missing_file_is_refused_even_unverified(store, name):
    path = store / name
    content = path.read_bytes()
    for changed, what in ((content[:-1], "truncated: it has"), (b"", "truncated"), (content + b"0", "altered: it has")):
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=f"{name} was {what}"):
            Cells.from_store(store, verify=False)
    path.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        Cells.from_store(store, verify=False)


def test_a_schema_that_does_not_belong(store, tmp_path):
    text = (store / "schema.json").read_text()
    sizes = json.loads(text)
    for key in ("n_cells", "n_genes", "n_nonzero"):
        (store / "schema.json").write_text(json.dumps(sizes | {key: sizes[key] + 1}))
        with pytest.raises(StoreError, match="not of the sizes in its schema"):
            CountStore(store)
    for broken, what in ((text[:-9], "corrupt"), ("[]", "format 1"), (json.dumps({"format": 1}), "corrupt")):
        (store / "schema.json").write_text(broken)
        with pytest.raises(StoreError, match=what):
            CountStore(store)
    with pytest.raises(StoreError, match="is not a store of counts"):
        CountStore(tmp_path / "absent")


def test_a_schema_without_files_is_refused(store):
    schema = json.loads((store / "schema.json").read_text())
    for files in ({}, {**schema["files"], "../mine": {}}, [], {name: {} for name in FILES}, dict.fromkeys(FILES)):
        (store / "schema.json").write_text(json.dumps(schema | {"files": files}))
        with pytest.raises(StoreError, match="schema.json is corrupt"):
            CountStore(store)


@pytest.mark.parametrize("name", FILES)
def test_a_broken_store_is_not_called_built(tmp_path, file, store, name):
    content = (store / name).read_bytes()
    (store / name).write_bytes(content[:-5])
    for call in (lambda: quietly(file, store), lambda: Cells.from_store(store)):
        with pytest.raises(StoreError, match=f"{name} was truncated.*; delete {store} and build it again"):
            call()
    assert (store / name).read_bytes() == content[:-5]
    (store / name).unlink()
    with pytest.raises(StoreError, match=f"{name} is missing; delete {store} and build it again"):
        quietly(file, store)
    shutil.rmtree(store)
    quietly(file, store)
    assert (store / name).stat().st_size == len(content)


def test_a_file_changed_since_is_said(file, store):
    count_changed(file)
    with pytest.raises(StoreError, match="content is another now"):
        quietly(file, store)


def linked(file):
    os.link(file, file.with_name("backup"))


def copied_back(file):
    shutil.copy(file, file.with_name("copy"))
    os.replace(file.with_name("copy"), file)


UNCHANGED = [os.utime, linked, copied_back, lambda file: file.chmod(0o600)]


@pytest.mark.parametrize("touch", UNCHANGED, ids=["time", "link", "copy", "rights"])
def test_a_file_whose_bytes_are_the_same_is_known_again(file, store, touch):
    touch(file)
    assert quietly(file, store) == store


@pytest.mark.usefixtures("small_blocks")
def test_a_link_to_a_file_while_it_is_read_ends_nothing(tmp_path, file, monkeypatch):
    write, asked = building._written, []

    def writing(block, path):
        asked.append(1)
        if len(asked) == 2:
            linked(file)
        return write(block, path)

    monkeypatch.setattr(building, "_written", writing)
    assert quietly(file, tmp_path / "store").is_dir()


@contextmanager
def times_kept(folder):
    """Write into files, and give them back their times, as tar and rsync do."""
    states = {file: file.stat() for file in (folder.rglob("*") if folder.is_dir() else [folder])}
    yield
    for file, state in states.items():
        assert file.stat().st_size == state.st_size
        os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns))


def count_changed(file):
    """Change one byte of the counts, in a file or a folder."""
    if file.is_dir():
        (chunk,) = [each for each in (file / "X").rglob("*") if each.is_file() and each.name in ("0.0", "c/0/0")]
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"\1")
        return
    with h5py.File(file, "r+") as content:
        content["X/data" if isinstance(content["X"], h5py.Group) else "X"][0] += 1


@pytest.mark.parametrize("kind", ["h5ad", "zarr"])
@pytest.mark.filterwarnings("ignore:Writing zarr v2")
def test_a_count_that_was_put_right_is_seen_though_size_and_time_are_the_same(tmp_path, kind):
    file = tmp_path / f"in.{kind}"
    getattr(make_adata(form=np.asarray), f"write_{kind}")(file)
    quietly(file, tmp_path / "store")
    with times_kept(file):
        count_changed(file)
    with pytest.raises(StoreError, match="content is another now"):
        quietly(file, tmp_path / "store")


@pytest.mark.usefixtures("unfinished")
def test_parts_of_a_file_that_was_put_right_since_are_not_mixed_in(tmp_path, file):
    with times_kept(file):
        count_changed(file)
    with pytest.raises(StoreError, match="parts of a build from other files"):
        quietly(file, tmp_path / "store")


@pytest.mark.usefixtures("small_blocks")
def test_a_file_that_is_written_while_it_is_read_gives_no_store(tmp_path, file, monkeypatch):
    write, asked = building._written, []

    def writing(block, path):
        asked.append(1)
        if len(asked) == 2:
            with file.open("ab") as content:
                content.write(b"0")
        return write(block, path)

    monkeypatch.setattr(building, "_written", writing)
    with pytest.raises(StoreError, match=f"{file} was written while it was read.*delete .*store.partial"):
        quietly(file, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_stores_of_earlier_versions_are_built_already(file, store):
    schema = json.loads((store / "schema.json").read_text())
    for name in ("states", "content"):
        assert schema["plan"]["files"]["cells"].pop(name)
    (store / "schema.json").write_text(json.dumps(schema))
    assert quietly(file, store) == store
    os.utime(file)
    with pytest.raises(StoreError, match="content is another now"):
        quietly(file, store)


def test_a_refused_build_does_not_block_the_next(tmp_path):
    adata = make_adata()
    adata.X = adata.X / 2
    file = stored(tmp_path, adata)
    with pytest.raises(DataError, match="integer"):
        quietly(file, tmp_path / "store")
    assert not (tmp_path / "store.partial").exists()
    assert quietly(file, tmp_path / "store", allow_non_integer=True).is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"genes": "a"}, r"genes must be a list of names, such as \['a'\]; got 'a'"),
        ({"genes": 3}, "genes must be a list of names.*got 3"),
        ({"label": 3}, "label must be a string, got 3"),
        ({"layer": 3}, "layer must be the name of a layer, or None; got 3"),
        ({"index_unique": True}, "index_unique must be a string, got True"),
    ],
)
def test_names_that_are_none(tmp_path, file, options, message):
    with pytest.raises(ModelError, match=message):
        quietly(file, tmp_path / "new", **options)
    assert not (tmp_path / "new.partial").exists()


MIXED = {
    "numbers and text": ([1, 2, 1, 1], ["1", "2", "2", "1"]),
    "numbers and categories": ([1, 2, 1, 1], pd.Categorical(["1", "2", "2", "1"])),
    "categories of numbers and text": (pd.Categorical([1, 2, 1, 1]), ["1", "2", "2", "1"]),
    "whole floats and text": ([1.0, 2.0, 1.0, 1.0], ["1", "2", "2", "1"]),
}


@pytest.mark.parametrize("columns", MIXED.values(), ids=MIXED)
def test_a_batch_that_is_a_number_in_one_file_and_text_in_another_is_one_batch(columns, tmp_path):
    files = []
    for place, column in enumerate(columns):
        obs = pd.DataFrame({"run": column, "lane": ["a", None, "b", "b"]}, index=[f"c{place}{i}" for i in range(4)])
        adata = AnnData(np.ones((4, 2), dtype=np.float32), obs, pd.DataFrame(index=["g", "h"]))
        files.append(tmp_path / f"{place}.h5ad")
        adata.write_h5ad(files[-1])
    cells = Cells.from_store(build(files, tmp_path / "store", progress=False), batch="run")
    assert cells.schema.batches == ("1", "2")
    np.testing.assert_array_equal(cells.gamma[:, :1][:, 0], [1, 0, 1, 1, 1, 0, 0, 1])
    np.testing.assert_array_equal(cells.with_batch(1).gamma[:], cells.with_batch("1").gamma[:])
    assert cells.obs["lane"].isna().sum() == 2


def test_no_files_and_no_annotations(tmp_path):
    for files in ({}, []):
        with pytest.raises(ModelError, match="pass one file or several"):
            quietly(files, tmp_path / "new")
    with h5py.File(tmp_path / "bare.h5ad", "w") as bare:
        bare["X"] = np.ones((3, 2))
    with pytest.raises(DataError, match="was not written by anndata: it has no obs and no var"):
        quietly(tmp_path / "bare.h5ad", tmp_path / "new")


def test_a_file_cut_short_while_it_is_read(store):
    cells = Cells.from_store(store)
    os.truncate(store / "data.npy", 200)
    with pytest.raises(StoreError, match=r"data\.npy ended early"):
        cells[np.array([3, 49])]


# --- interruptions ---


class Interrupted(BaseException):
    """As a KeyboardInterrupt is: no handler of errors sees it."""


class Writing:
    """Lets so many bytes be written to files, cuts the last write short there, and stops the process's work."""

    def __init__(self, budget, stop):
        self.left, self.stop, self.open = budget, stop, Path.open

    def __call__(self, path, mode="r", *arguments, **options):
        file = self.open(path, mode, *arguments, **options)
        if mode != "w+b":
            return file
        if path.name.startswith("annotations"):  # HDF5 writes it with its own hands: count it as 1,000 bytes
            self.left -= 1000
            if self.left < 0:
                file.write(b"half")
                file.close()
                self.stop()
            return file
        return Dying(file, self)


class Dying:
    """A file of :class:`Writing`."""

    def __init__(self, file, writing):
        self.file, self.writing = file, writing

    def write(self, content):
        content = memoryview(content).cast("B")
        self.file.write(content[: max(self.writing.left, 0)])
        self.writing.left -= len(content)
        if self.writing.left < 0:
            self.file.flush()
            self.writing.stop()
        return len(content)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()


def interrupt():
    raise Interrupted


def check_interruption(file, target, monkeypatch, budget):
    """Build with so many bytes: no store, or all of it; then again: the store of an uninterrupted build."""
    with monkeypatch.context() as patched:
        writing = Writing(budget, interrupt)
        patched.setattr(Path, "open", lambda *arguments, **options: writing(*arguments, **options))
        try:
            quietly(file, target)
        except Interrupted:
            assert not target.exists()
    check_complete(file, target)
    return writing.left >= 0


def check_complete(file, target):
    quietly(file, target)
    np.testing.assert_array_equal(dense(Cells.from_store(target)), anndata.read_h5ad(file).X.toarray())
    assert not target.with_name(target.name + ".partial").exists()
    shutil.rmtree(target)


def bytes_written(file, target, monkeypatch):
    with monkeypatch.context() as patched:
        writing = Writing(10**9, interrupt)
        patched.setattr(Path, "open", lambda *arguments, **options: writing(*arguments, **options))
        quietly(file, target)
    shutil.rmtree(target)
    return 10**9 - writing.left


@pytest.mark.parametrize("share", np.linspace(0, 1, 25).round(3))
def test_an_interruption_leaves_no_store_or_one_that_resumes(tmp_path, monkeypatch, small_blocks, share):
    file = stored(tmp_path, make_adata(16))
    total = bytes_written(file, tmp_path / "store", monkeypatch)
    budget = round(share * total)
    assert check_interruption(file, tmp_path / "store", monkeypatch, budget) == (budget == total)


@pytest.mark.slow
def test_interruptions_all_along_the_bytes(tmp_path, monkeypatch, small_blocks):
    file = stored(tmp_path, make_adata(16))
    total = bytes_written(file, tmp_path / "store", monkeypatch)
    whole = [check_interruption(file, tmp_path / "store", monkeypatch, budget) for budget in range(0, total + 1, 41)]
    assert len(whole) > 150
    assert sum(whole) <= 1


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(11))
def test_an_interruption_between_files(tmp_path, monkeypatch, small_blocks, call, after):
    file, calls, really = stored(tmp_path, make_adata(16)), [0], os.replace

    def replace(*arguments):
        if calls[0] == call and not after:
            raise Interrupted
        really(*arguments)
        if calls[0] == call and after:
            raise Interrupted
        calls[0] += 1

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", replace)
        with pytest.raises(Interrupted):
            quietly(file, tmp_path / "store")
    assert not (tmp_path / "store").exists()
    check_complete(file, tmp_path / "store")


def test_an_interruption_before_the_parts_are_removed(tmp_path, monkeypatch, file):
    with monkeypatch.context() as patched:
        patched.setattr(
            shutil, "rmtree", lambda path, **options: interrupt() if path.name.endswith("partial") else None
        )
        with pytest.raises(Interrupted):
            quietly(file, tmp_path / "store")
    assert (tmp_path / "store.partial").exists()
    check_complete(file, tmp_path / "store")


@pytest.mark.slow
def test_a_killed_process(tmp_path):
    file = stored(tmp_path, make_adata(16))
    script = (
        "import os, signal, sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]);"
        "from tests.data.stores.test_stores import Writing, quietly; import pyro_scvi.data.counts as counts;"
        "counts._BLOCK_ENTRIES = 40;"
        "writing = Writing(2500, lambda: os.kill(os.getpid(), signal.SIGKILL));"
        "Path.open = lambda *a, **k: writing(*a, **k); quietly(sys.argv[2], sys.argv[3])"
    )
    arguments = [str(ROOT), str(file), str(tmp_path / "store")]
    done = subprocess.run([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert list((tmp_path / "store.partial").glob("part-*.npz"))
    assert not (tmp_path / "store").exists()
    check_complete(file, tmp_path / "store")


@pytest.fixture
def unfinished(tmp_path, monkeypatch, file, small_blocks):
    """A build of ten blocks that was interrupted in the eighth; returns the numbers of rows read since."""
    target, read = tmp_path / "store", []
    total = bytes_written(file, target, monkeypatch)
    with monkeypatch.context() as patched:
        writing = Writing(round(0.45 * total), interrupt)
        patched.setattr(Path, "open", lambda *arguments, **options: writing(*arguments, **options))
        with pytest.raises(Interrupted):
            quietly(file, target)
    really = Backed.__getitem__
    monkeypatch.setattr(Backed, "__getitem__", lambda self, rows: read.extend(rows) or really(self, rows))
    return read


def test_only_what_is_missing_is_read_again(tmp_path, file, unfinished):
    kept = len(list((tmp_path / "store.partial").glob("part-*.npz")))
    assert 2 < kept < 10
    quietly(file, tmp_path / "store")
    assert unfinished == list(range(5 * kept, 50))


def test_a_damaged_part_is_read_again(tmp_path, file, unfinished, caplog):
    kept = len(list((tmp_path / "store.partial").glob("part-*.npz")))
    part = tmp_path / "store.partial" / "part-000001.npz"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    check_complete(file, tmp_path / "store")
    assert unfinished == [*range(5, 10), *range(5 * kept, 50)]
    assert "part-000001.npz is damaged" in caplog.text


def test_parts_of_another_build_are_not_mixed_in(tmp_path, file, unfinished):
    parts = sorted((tmp_path / "store.partial").iterdir())
    with pytest.raises(StoreError, match="from other files or with other options"):
        quietly(file, tmp_path / "store", allow_non_integer=True)
    stored(tmp_path, make_adata(seed=9))  # the same name, other cells
    with pytest.raises(StoreError, match="from other files or with other options"):
        quietly(file, tmp_path / "store")
    assert sorted((tmp_path / "store.partial").iterdir()) == parts


@pytest.mark.faults
def test_the_second_of_two_builds_of_one_store_is_refused(tmp_path, file, unfinished):
    parts = sorted((tmp_path / "store.partial").iterdir())
    with only_writer(tmp_path / "store"), pytest.raises(StoreError, match="another process is writing"):
        quietly(file, tmp_path / "store")
    assert sorted((tmp_path / "store.partial").iterdir()) == parts
    quietly(file, tmp_path / "store")
    with only_writer(tmp_path / "store"):
        check_complete(file, tmp_path / "store")  # it is there, so nothing is written


@pytest.mark.faults
def test_a_store_that_another_process_has_just_built_is_taken(tmp_path, file, monkeypatch):
    quietly(file, tmp_path / "other")

    @contextmanager
    def waited_for(target):
        (tmp_path / "other").rename(target)
        yield

    monkeypatch.setattr(building, "_alone", waited_for)
    check_complete(file, tmp_path / "store")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cells.h5ad"]  # no parts, and no lock


# --- minibatches ---


def numbered_cells(folder, n_cells):
    """Cells whose counts tell their number."""
    numbers = np.arange(n_cells)
    counts = np.stack([numbers % 100, numbers // 100, np.ones(n_cells, dtype=int)], axis=1)
    adata = AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=pd.DataFrame(index=numbers.astype(str)))
    return Cells.from_store(quietly(stored(folder, adata), folder / "store"))


def numbers_of(x):
    return (x[:, 0] + 100 * x[:, 1]).numpy().astype(int)


@pytest.fixture
def from_disk(monkeypatch):
    """No counts are held in memory however few they are."""
    monkeypatch.setattr("pyro_scvi.data.minibatches.RESIDENT_BYTES", 0)


@pytest.mark.usefixtures("from_disk")
def test_an_epoch_visits_each_cell_once(tmp_path):
    cells = numbered_cells(tmp_path, 1000)
    selected = np.flatnonzero(np.arange(1000) % 10)
    batches = Minibatches(cells, resolve_device("cpu"), selected=selected)
    assert batches.resident is None
    epochs = [np.concatenate([numbers_of(batches.rows(i)[0]) for i in batches.shuffled(128)]) for _ in range(3)]
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), selected)
    assert (epochs[0] != epochs[1]).any()
    in_order = np.concatenate([numbers_of(x) for x, _ in batches.in_order(64)])
    np.testing.assert_array_equal(in_order, selected)


@pytest.mark.slow
@pytest.mark.usefixtures("from_disk")
def test_random_minibatches_are_uniform(tmp_path):
    """Chi-square of a million draws: the first minibatches of 7,813 epochs, numbers read off the counts.

    A batch has no cell twice, so that a cell's count varies less than a Poisson variable: by (N - B) / (N - 1).
    """
    n, batch_size = 10_000, 128
    cells, seen, draws = numbered_cells(tmp_path, n), np.zeros(n), 0
    batches = Minibatches(cells, resolve_device("cpu"))
    with seeded(0):
        while draws < 1_000_000:
            rows = next(batches.shuffled(batch_size))
            seen += np.bincount(numbers_of(batches.rows(rows)[0]), minlength=n)
            draws += len(rows)
    statistic = ((seen - draws / n) ** 2).sum() / (draws / n) * (n - 1) / (n - len(rows))
    p = scipy.stats.chi2(n - 1).cdf(statistic)
    assert 0.001 < p < 0.999


# --- the command ---


def test_command(tmp_path, files):
    result = run("store", *files.values(), "--out", tmp_path / "store", "--label", "batch", "--index-unique", "-")
    assert result.exit_code == 0, result.output
    assert "80 cells x 5 genes" in result.output
    cells = Cells.from_store(tmp_path / "store", batch="batch")
    assert cells.schema.batches == ("one", "two")
    result = run("store", *files.values(), "--out", tmp_path / "other", "--no-progress")
    assert result.exit_code == 1
    assert "30 cell names occur more than once" in result.output
