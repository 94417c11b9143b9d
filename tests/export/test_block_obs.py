"""Annotations beside results: written and known again, or refused by name before any work."""

import json
import threading
from functools import partial

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
import zarr

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.export.block_files import format_of
from pyro_scvi.export.block_results import RUN
from tests.support.cli_runs import succeed
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.faults

N = 12
NAMES = [f"c{i}" for i in range(N)]
OPTIONS = {"block": 4, "progress": False}
DATES = pd.date_range("2020-01-01", periods=N)
READ = {"out.h5ad": ad.read_h5ad, "out.zarr": ad.read_zarr}


def objects(*values):
    column = pd.Series([None] * N, dtype=object)
    for i in range(N):
        column[i] = values[i % len(values)]
    return column.array


KEPT = {
    "big-endian": np.arange(N).astype(">f4"),
    "big-endian integers": np.arange(N).astype(">i2"),
    "nullable integers": pd.array([1, None] * (N // 2), dtype="Int64"),
    "nullable floats": pd.array([1.5, None] * (N // 2), dtype="Float32"),
    "nullable booleans": pd.array([True, None] * (N // 2), dtype="boolean"),
    "strings": pd.array(["a", None] * (N // 2), dtype="string"),
    "objects that are strings": objects("a", None),
    "objects that are integers": objects(3, None),
    "objects that are floats": objects(1.5, None, 2),
    "objects that are booleans": objects(True, False),
    "objects that are booleans or nothing": objects(True, None, False),
    "nothing": objects(None),
    "complex": np.arange(N) * 1j,
    "ordered": pd.Categorical(["x", "y"] * (N // 2), ["y", "x", "z"], ordered=True),
}
REFUSED = {
    "dates": (DATES.to_numpy(), "astype"),
    "dates with a zone": (DATES.tz_localize("UTC").array, "astype"),
    "durations": (pd.to_timedelta(np.arange(N), unit="h").array, "astype"),
    "months": (DATES.to_period("M").array, "astype"),
    "sparse": (pd.arrays.SparseArray(np.arange(N) % 2.0), "sparse.to_dense"),
    "lists": (objects([1], [2]), "astype"),
    "several kinds": (objects("a", 1), "astype"),
    "bytes": (objects(b"a"), "astype"),
    "dates as objects": (objects(DATES[0]), "astype"),
    "half a character": (objects("a", "b", "\udc80"), "replace such characters"),
}


@pytest.fixture(scope="module")
def matrix():
    return simulated_counts(N).astype(np.float32) + 1


@pytest.fixture(scope="module")
def fit(matrix):
    cells = ps.Cells.from_counts(matrix)
    return ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=4), cells, epochs=1, progress=False, device="cpu")


def cells_with(matrix, column):
    return ps.Cells.from_counts(matrix, obs=pd.DataFrame({"d": pd.Series(column, NAMES)}))


def not_called(*_, **__):
    raise AssertionError


@pytest.mark.parametrize("kind", KEPT)
@pytest.mark.parametrize("name", READ)
def test_a_column_is_written_and_known_again(matrix, fit, tmp_path, kind, name):
    cells = cells_with(matrix, KEPT[kind])
    for _ in range(2):  # the second call reads what the first wrote
        assert ps.shards.write(fit, cells, tmp_path / name, {"z": ps.embed}, **OPTIONS) == 0
    found = READ[name](tmp_path / name).obs.d
    given = pd.Series(KEPT[kind])
    assert found.isna().tolist() == given.isna().tolist()
    assert found.dropna().tolist() == given.dropna().tolist()


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("name", READ)
def test_a_column_that_no_file_takes_is_refused_before_work(matrix, fit, tmp_path, kind, name):
    column, advice = REFUSED[kind]
    with pytest.raises(DataError, match=rf"the column 'd' of obs holds .*{advice}.* drop it"):
        ps.shards.write(fit, cells_with(matrix, column), tmp_path / name, {"z": not_called}, **OPTIONS)
    assert not list(tmp_path.iterdir())


def scaled(fit, cells, seed, by):
    return ps.embed(fit, cells, seed=seed)


@pytest.mark.parametrize("by", [threading.Lock(), torch.zeros(3, device="meta"), (i for i in range(3))])
def test_what_is_bound_and_cannot_be_told_is_refused_before_work(matrix, fit, tmp_path, by):
    cells = ps.Cells.from_counts(matrix)
    verbs = {"y": not_called, "z": partial(scaled, by=by)}
    with pytest.raises(ModelError, match=r"the verb 'z' cannot be compared with a later call: .*[Bb]ind numbers"):
        ps.shards.write(fit, cells, tmp_path / "out.zarr", verbs, **OPTIONS)


def test_tables_of_any_columns_are_told_when_they_are_bound(matrix, fit, tmp_path):
    cells = ps.Cells.from_counts(matrix)
    write = partial(ps.shards.write, fit, cells, tmp_path / "out.zarr", **OPTIONS)
    columns = {name: column for name, (column, _) in REFUSED.items()} | KEPT
    write({"z": partial(scaled, by=pd.DataFrame(columns))})
    assert write({"z": partial(scaled, by=pd.DataFrame(columns))}) == 0
    with pytest.raises(DataError, match="another run: verb 'z' differ"):
        write({"z": partial(scaled, by=pd.DataFrame(columns | {"lists": objects([1], [3])}))})


def test_infer_reads_numbers_of_another_byte_order(matrix, fit, tmp_path):
    genes = ps.Cells.from_counts(matrix).gene_names
    fit.save(tmp_path / "fit")
    adata = ad.AnnData(matrix, pd.DataFrame({"d": KEPT["big-endian"]}, NAMES), pd.DataFrame(index=genes))
    adata.write_h5ad(tmp_path / "in.h5ad")
    command = ["infer", tmp_path / "fit", tmp_path / "in.h5ad", "--out", tmp_path / "out.h5ad", "--no-progress"]
    succeed(*command)
    assert ad.read_h5ad(tmp_path / "out.h5ad").obs.d.tolist() == list(range(N))


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda group: group["var"].attrs["_index"], "var_names"),
        (lambda group: "d", "the column 'd' of obs"),
    ],
)
def test_names_and_annotations_edited_between_two_runs_are_refused(matrix, fit, tmp_path, name, change, named):
    cells, path = cells_with(matrix, np.arange(N) / 3), tmp_path / name
    ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    with format_of(path).opened(path, "r+") as group:
        array = group["obs" if named.endswith("obs") else "var"][change(group)]
        array[:] = array[:][::-1]
    with pytest.raises(DataError, match=f"changed after its run began: {named} are not as they were"):
        ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)


@pytest.mark.parametrize(("version", "told"), [("0.0.9", "0.0.9"), (None, "of an earlier version")])
def test_results_of_another_version_are_refused(matrix, fit, tmp_path, version, told):
    cells, path = ps.Cells.from_counts(matrix), tmp_path / "out.zarr"
    ps.shards.write(fit, cells, path, {"z": ps.embed}, shard=(0, 2), **OPTIONS)
    record = zarr.open_group(path, mode="r+")["uns"][RUN]
    facts = json.loads(str(record[()]))
    del facts["package version"]
    record[()] = json.dumps(facts | ({"package version": version} if version else {}))
    with pytest.raises(DataError, match=f"was begun by pyro_scvi {told}, and this is {ps.__version__}: .*another path"):
        ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)


def test_the_order_of_verbs_is_no_matter(matrix, fit, tmp_path):
    cells, verbs = ps.Cells.from_counts(matrix), {"z": ps.embed, "a": partial(scaled, by=2)}
    assert ps.shards.write(fit, cells, tmp_path / "out.zarr", verbs, shard=(0, 2), **OPTIONS) == 1
    assert ps.shards.write(fit, cells, tmp_path / "out.zarr", dict(reversed(verbs.items())), **OPTIONS) == 0
