"""Files and stores that are damaged, or made to harm: each is refused by name, or gives the counts that are in it."""

import hashlib
import json
import os
import shutil
import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.cli.files import read_h5ad
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.stores.layout import FILES, files_of
from pyro_scvi.errors import DataError, PyroScviError, StoreError
from tests.support import hostile_files
from tests.support.faults import file_size_limit
from tests.support.hostile_files import ARRAYS, DENSE, OF_ARRAYS, OF_GROUPS

pytestmark = pytest.mark.faults

COLUMNS = {"batch": "donor", "covariates": ["age"]}
UNREADABLE = {"gone", "no_content", "group", "type", "loop", "nowhere", "root", "garbled", "enormous"}
CHECKED_LATER = ("column 'age'", "column 'donor'", "gene names must be unique", "obs cannot be kept in a store")


def memory(path):
    return Cells.from_anndata(read_h5ad(path), **COLUMNS)


def backed(path):
    return Cells.from_anndata(read_h5ad(path, in_place=True), backed=True, **COLUMNS)


def store(path):
    return Cells.from_store(ps.stores.build(path, path.with_suffix(".store"), progress=False), **COLUMNS)


WAYS = (memory, backed, store)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Undamaged files, sparse and dense, and their counts."""
    folder = tmp_path_factory.mktemp("whole")
    files = [hostile_files.write_file(folder / f"{dense}.h5ad", dense) for dense in (False, True)]
    return *files, memory(files[0])[:][0].numpy()


def damaged(source, folder, change):
    path = folder / "in.h5ad"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    shutil.copy(source, path)
    with h5py.File(path, "r+") as file:
        change(file)
    return path


def check_each_way(source, counts, folder, change, *, unreadable=False):
    """Every way to read a damaged file refuses it by name, or gives the counts that it holds."""
    for way in WAYS:
        path = damaged(source, folder, change)
        x, told = outcome(way, path)
        if x is not None:
            assert not unreadable
            np.testing.assert_array_equal(x, counts)
            continue
        assert "\n" not in told
        if way is memory and not unreadable:  # content that is no counts, in an AnnData without a file
            continue
        assert str(path) in told or (not unreadable and any(text in told for text in CHECKED_LATER))


def outcome(way, path):
    """Counts, or the text of the error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return way(path)[:][0].numpy(), ""
    except (PyroScviError, MemoryError) as error:
        return None, str(error)


PAIRS = [(array, damage) for array in ARRAYS for damage in OF_ARRAYS]
QUARTER = [pair for i, pair in enumerate(PAIRS) if (i // len(OF_ARRAYS) + i % len(OF_ARRAYS)) % 4 == 1]


def damage_array(whole, folder, array, damage):
    change = OF_ARRAYS[damage]
    if array == "obs/age" and damage in ("no_content", "references", "type"):
        damage = "values of another kind"  # anndata gives objects, which are refused as a covariate
    check_each_way(whole[0], whole[2], folder, lambda file: change(file, array), unreadable=damage in UNREADABLE)


@pytest.mark.parametrize("array", ARRAYS)
def test_damaged_arrays(whole, tmp_path, array):
    for name, damage in QUARTER:
        if name == array:
            damage_array(whole, tmp_path / "in", array, damage)


@pytest.mark.slow
@pytest.mark.parametrize(("array", "damage"), sorted(set(PAIRS) - set(QUARTER)))
def test_other_damaged_arrays(whole, tmp_path, array, damage):
    damage_array(whole, tmp_path / "in", array, damage)


@pytest.mark.parametrize("damage", [name for i, name in enumerate(OF_ARRAYS) if i % 3 == 0])
def test_damaged_dense_counts(whole, tmp_path, damage):
    change = OF_ARRAYS[damage]
    unreadable = damage in UNREADABLE - {"gone"}  # an AnnData may have no X
    check_each_way(whole[1], whole[2], tmp_path / "in", lambda file: change(file, DENSE), unreadable=unreadable)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [name for i, name in enumerate(OF_ARRAYS) if i % 3])
def test_other_damaged_dense_counts(whole, tmp_path, damage):
    change = OF_ARRAYS[damage]
    unreadable = damage in UNREADABLE - {"gone"}  # an AnnData may have no X
    check_each_way(whole[1], whole[2], tmp_path / "in", lambda file: change(file, DENSE), unreadable=unreadable)


@pytest.mark.parametrize("group", dict.fromkeys(group for group, _ in OF_GROUPS))
def test_damaged_attributes(whole, tmp_path, group):
    for number, ((name, _), change) in enumerate(OF_GROUPS.items()):
        if name == group and number % 2 == 0:
            check_each_way(whole[0], whole[2], tmp_path / "in", lambda file, change=change: change(file[group]))


@pytest.mark.slow
@pytest.mark.parametrize(("group", "damage"), list(OF_GROUPS)[1::2])
def test_other_damaged_attributes(whole, tmp_path, group, damage):
    check_each_way(whole[0], whole[2], tmp_path / "in", lambda file: OF_GROUPS[group, damage](file[group]))


@pytest.mark.parametrize("size", [0, 7, 100, 2000, 9000, -1])
def test_truncated_files(whole, tmp_path, size):
    (tmp_path / "in.h5ad").write_bytes(whole[0].read_bytes()[:size])
    for way in WAYS:
        with pytest.raises(DataError, match="in.h5ad"):
            way(tmp_path / "in.h5ad")


@pytest.mark.parametrize("name", ["pipe", "folder", "zeros", "terminal"])
def test_what_is_no_file(tmp_path, name):
    path = tmp_path / "in.h5ad"
    {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "zeros": lambda: path.symlink_to("/dev/zero"),
        "terminal": lambda: path.symlink_to("/dev/tty"),
    }[name]()
    for way in WAYS:
        with pytest.raises(DataError, match="in.h5ad"):
            way(path)


def test_indices_that_scipy_would_cut(whole, tmp_path):
    """2**32 + 1 is 1 in 32 bits: another gene, without a word."""

    def beyond(file):
        hostile_files.replace(file, "X/indices", file["X/indices"][...].astype(np.int64) + 2**32)

    for way in WAYS:
        with pytest.raises(DataError, match=r"X of .*in.h5ad is a broken sparse matrix: indices must be from 0 to 19"):
            way(damaged(whole[0], tmp_path / "in", beyond))


@pytest.mark.parametrize("kind", ["csr", "csc", "bsr"])
def test_indices_beyond_a_matrix_in_memory(cells, kind):
    matrix = sparse.csr_matrix(cells.counts).asformat(kind)
    wide = matrix.copy()
    wide.indices = matrix.indices.astype(np.int64) + 2**32
    with pytest.raises(DataError, match="indices must be"):
        Cells.from_counts(wide)
    wide.indices = matrix.indices.astype(np.int64)
    np.testing.assert_array_equal(Cells.from_counts(wide)[:][0], cells[:][0])
    outside = matrix.copy()
    outside.indices[0] = 1000
    with pytest.raises(DataError, match="broken sparse matrix"):
        Cells.from_counts(outside)


def test_pointers_beside_the_shape(cells):
    """A matrix by rows that says it is one by columns: SciPy reads a third of its pointer, and drops the rest."""
    rows = sparse.csr_matrix(cells.counts)
    columns = rows.tocsc()
    columns.indptr, columns.indices, columns.data = rows.indptr, rows.indices, rows.data
    with pytest.raises(DataError, match="does not increase along its 20 rows or columns"):
        Cells.from_counts(columns)
    falling = rows.copy()
    falling.indptr = falling.indptr.astype(np.uint64)
    falling.indptr[1:3] = falling.indptr[2:0:-1]
    with pytest.raises(DataError, match="does not increase"):
        Cells.from_counts(falling)


def test_links_from_python(whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(whole[0], tmp_path / "elsewhere" / "secret.h5ad")

    def link(target):
        def change(file):
            del file["X"]
            file["X"] = h5py.ExternalLink(target, "X")

        return change

    ways = (store, lambda path: Cells.from_anndata(anndata.read_h5ad(path, backed="r"), backed=True, **COLUMNS))
    for way in ways:
        for target in ("../elsewhere/secret.h5ad", str(tmp_path / "elsewhere" / "secret.h5ad")):
            with pytest.raises(DataError, match=r"X of .*in.h5ad is in another file, .*secret.h5ad, which is not read"):
                way(damaged(whole[0], tmp_path / "in", link(target)))
        path = damaged(whole[0], tmp_path / "in", link("part.h5ad"))
        shutil.copy(whole[0], tmp_path / "in" / "part.h5ad")
        with pytest.warns(UserWarning, match="X of .* is in another file, .*part.h5ad"):
            np.testing.assert_array_equal(way(path)[:][0], whole[2])


ZARR = ("X/zarr.json", "X/data/zarr.json", "X/indptr/c/0", "obs/zarr.json", "obs/age/c/0", "zarr.json")


@pytest.mark.filterwarnings(
    "ignore:zarr v3 autosharding", "ignore:Consolidated metadata", "ignore:The codec .vlen-utf8"
)
@pytest.mark.parametrize("name", ZARR)
def test_damaged_zarr_folders(whole, tmp_path, name):
    path = tmp_path / "in.zarr"
    with anndata.settings.override(zarr_write_format=3):
        anndata.read_h5ad(whole[0]).write_zarr(path)
    (path / name).write_bytes(b"\0{")
    if (path / "zarr.json").is_file() and name != "zarr.json":  # its copy of all others would be read instead
        facts = json.loads((path / "zarr.json").read_bytes())
        (path / "zarr.json").write_text(
            json.dumps({key: facts[key] for key in facts if key != "consolidated_metadata"})
        )
    with pytest.raises(DataError, match="in.zarr"):
        store(path)


# --- stores with right checksums ---


def forge(path, name, write):
    """Write a file of a store, and its size and checksum into the schema."""
    write(path / name)
    content = (path / name).read_bytes()
    schema = json.loads((path / "schema.json").read_bytes())
    schema["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "schema.json").write_text(json.dumps(schema))


def array(name, change, **options):
    def write(path):
        np.save(path, change(np.load(path)), **options)

    return lambda store: forge(store, name, write)


def schema(**changes):
    def write(path):
        facts = json.loads((path / "schema.json").read_bytes())
        (path / "schema.json").write_text(json.dumps(facts | changes))

    return write


STORES = {
    "genes beyond": array("indices.npy", lambda values: values + np.uint16(20)),
    "genes below": array("indices.npy", lambda values: values.astype(np.int32) - 20),
    "a pointer that falls": array("indptr.npy", lambda values: np.r_[values[:1], values[-2:0:-1], values[-1:]]),
    "a pointer of words": array("indptr.npy", lambda values: values.astype(str)),
    "a pointer in a table": array("indptr.npy", lambda values: values[:, None]),
    "a pointer of objects": array("indptr.npy", lambda values: values.astype(object), allow_pickle=True),
    "values of objects": array("data.npy", lambda values: values.astype(object), allow_pickle=True),
    "values of words": array("data.npy", lambda values: values.astype("S1")),
    "complex values": array("data.npy", lambda values: values.astype(complex)),
    "values in a table": array("data.npy", lambda values: values[None]),
    "fewer values": array("data.npy", lambda values: values[:-1]),
    "genes of words": array("indices.npy", lambda values: values.astype("S1")),
    "fewer totals": array("totals.npy", lambda values: values[1:]),
    "totals of words": array("totals.npy", lambda values: values.astype(str)),
    "no array": lambda store: forge(store, "data.npy", lambda path: path.write_bytes(b"no array")),
    "a long header": lambda store: forge(
        store, "data.npy", lambda path: path.write_bytes(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 99)
    ),
    "no annotations": lambda store: forge(store, "annotations.h5ad", lambda path: path.write_bytes(b"no file")),
    "annotations of others": lambda store: forge(
        store, "annotations.h5ad", lambda path: anndata.AnnData(obs=pd.DataFrame(index=["a"])).write_h5ad(path)
    ),
    "cells of a word": schema(n_cells="60"),
    "more cells": schema(n_cells=10**18),
    "fewer genes": schema(n_genes=1),
    "no plan": schema(plan=None),
    "an empty plan": schema(plan={}),
    "a layer of a list": schema(plan={"layer": ["a"], "raw": 3}),
    "sizes of words": schema(files={"indptr.npy": {"bytes": "a", "sha256": 1}}),
    "a schema of lists": lambda store: (store / "schema.json").write_text("[" * 10**5),
    "no schema": lambda store: (store / "schema.json").write_text("null"),
}


@pytest.mark.parametrize("attack", STORES.values(), ids=STORES)
def test_stores_with_right_checksums(whole, tmp_path, attack):
    path = ps.stores.build(whole[0], tmp_path / "store", progress=False)
    attack(path)
    with pytest.raises(PyroScviError):
        Cells.from_store(path, **COLUMNS)[:]


@pytest.mark.parametrize(
    ("names", "cells"),
    [
        (list("abcde"), [2**62] * 4 + [60]),  # adds up to 60 in int64
        (["a", "b"], [-1, 61]),
        (["a", "b"], [30, 31]),
        (["a"], [30, 30]),
        ([["a"], ["b"]], [[30], [30]]),
        (["a", "b"], [30.0, 30.0]),
        ("a", 60),
    ],
)
def test_lists_of_files_that_are_not_of_the_cells_of_a_store(names, cells):
    """Nothing but warnings of units rests on the list."""
    annotations = anndata.AnnData(obs=pd.DataFrame(index=[str(i) for i in range(60)]))
    annotations.uns[FILES] = {"names": np.array(names), "cells": np.array(cells)}
    assert files_of(annotations) is None


@pytest.mark.parametrize("name", ["schema.json", "data.npy"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), os.mkdir])
def test_parts_of_a_store_that_are_no_files(whole, tmp_path, name, make):
    path = ps.stores.build(whole[0], tmp_path / "store", progress=False)
    (path / name).unlink()
    make(path / name)
    with pytest.raises(StoreError, match=name):
        Cells.from_store(path)


def test_columns_that_no_store_can_keep(whole, tmp_path):
    path = damaged(whole[0], tmp_path / "in", lambda file: OF_ARRAYS["references"](file, "obs/age"))
    with pytest.raises(DataError, match=r"obs cannot be kept in a store; .* \(at /obs/age\)"):
        ps.stores.build(path, tmp_path / "store", progress=False)
    path = damaged(whole[0], tmp_path / "in", lambda file: OF_ARRAYS["no_utf8"](file, "obs/age"))
    with pytest.raises(DataError, match="obs cannot be kept in a store"):
        ps.stores.build(path, tmp_path / "store", progress=False)


def test_a_full_disk_while_a_store_is_built(whole, tmp_path):
    """At any size of files there is a whole store, or none and an error that says so."""
    sizes = np.unique(np.geomspace(100, 20_000, 12).astype(int))
    for size in sizes.tolist():
        path = tmp_path / f"{size}.store"
        with file_size_limit(size), pytest.raises(OSError, match=r"File too large|annot|Unable"):
            ps.stores.build(whole[0], path, progress=False)
        assert not path.exists()
        built = ps.stores.build(whole[0], path, progress=False)  # the same call goes on
        np.testing.assert_array_equal(Cells.from_store(built)[:][0], whole[2])
