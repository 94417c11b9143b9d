"""Results written block by block to disks that are full, break or lie: what is marked as done is there."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from zarr.storage import LocalStore

import pyro_scvi as ps
from pyro_scvi.errors import DataError
from pyro_scvi.export import block_files
from tests.support.faults import DISK_ERRORS, disk_error, failing, file_size_limit
from tests.support.paths import ROOT
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.faults

N, BLOCK = 96, 16
OPTIONS = {"block": BLOCK, "seed": 4, "progress": False}


def wide(fit, cells, seed):
    """A layer that is large beside the tables of the file, other for every cell and seed."""
    totals = cells.totals.astype(np.float32)[:, None]
    return totals + np.arange(cells.n_genes, dtype=np.float32) / 64 + np.float32(seed % 7)


VERBS = {"z": ps.embed, "w": wide, "total": lambda fit, cells, seed: cells.totals.astype(float)}


@pytest.fixture(scope="module")
def cells():
    return ps.Cells.from_counts(simulated_counts(N), obs=pd.DataFrame(index=[f"c{i}" for i in range(N)]))


@pytest.fixture(scope="module")
def fit(cells):
    torch.manual_seed(0)
    return ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=8), cells, epochs=1, progress=False, device="cpu")


@pytest.fixture(scope="module")
def expected(fit, cells, tmp_path_factory):
    path = tmp_path_factory.mktemp("expected") / "out.h5ad"
    assert ps.shards.write(fit, cells, path, VERBS, **OPTIONS) == 0
    return ad.read_h5ad(path)


def read(path):
    return (ad.read_zarr if path.suffix == ".zarr" else ad.read_h5ad)(path)


def check_partial(path, expected):
    """Blocks marked as done hold what they should, others are missing; returns how many are done."""
    found = read(path)
    done = np.repeat(found.uns["pyro_scvi_blocks"], BLOCK)
    for result, right in (
        (found.layers["w"], expected.layers["w"]),
        (found.obsm["z"], expected.obsm["z"]),
        (found.obs[["total"]].to_numpy(), expected.obs[["total"]].to_numpy()),
    ):
        np.testing.assert_array_equal(result[done], right[done])
        assert ((result == right) | np.isnan(result)).all()
    return int(found.uns["pyro_scvi_blocks"].sum())


def check_goes_on(fit, cells, path, expected):
    assert ps.shards.write(fit, cells, path, VERBS, **OPTIONS) == 0
    assert check_partial(path, expected) == N // BLOCK
    assert [item.name for item in path.parent.iterdir()] == [path.name]


def test_space_is_reserved_before_the_first_block(fit, cells, expected, tmp_path):
    path = tmp_path / "out.h5ad"
    for number in DISK_ERRORS:
        message = f"no room for all results.*{os.strerror(number)}.*No block"
        with failing(os, "posix_fallocate", disk_error(number)), pytest.raises(DataError, match=message):
            ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
        assert check_partial(path, expected) == 0
    check_goes_on(fit, cells, path, expected)


def test_a_file_has_its_size_before_the_first_block(fit, cells, tmp_path):
    sizes = []

    def measuring(fit, cells, seed):
        sizes.append(os.stat(tmp_path / "out.h5ad").st_size if (tmp_path / "out.h5ad").exists() else 0)
        return ps.embed(fit, cells, seed=seed)

    ps.shards.write(fit, cells, tmp_path / "out.h5ad", {"z": measuring}, **OPTIONS)
    assert len(set(sizes[1:])) == 1  # the first asks for the shape
    assert sizes[-1] == os.stat(tmp_path / "out.h5ad").st_size


@pytest.mark.parametrize("limit", [0, 1_000, 6_000, 16_000])
def test_a_limit_on_the_size_of_files(fit, cells, expected, tmp_path, limit):
    path = tmp_path / "out.h5ad"
    with file_size_limit(limit), pytest.raises(DataError, match="no room|cannot be made"):
        ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
    assert not path.exists() or check_partial(path, expected) == 0
    check_goes_on(fit, cells, path, expected)


@pytest.mark.parametrize(("name", "call"), [("out.h5ad", "pwrite"), ("out.h5ad", "fsync"), ("out.zarr", "fsync")])
def test_a_disk_that_fails_in_the_middle_loses_one_block(fit, cells, expected, tmp_path, name, call):
    path, done = tmp_path / name, 0
    for number in DISK_ERRORS:
        with (
            failing(block_files.os, call, disk_error(number), after=5),
            pytest.raises(DataError, match=f"could not be written: .*{os.strerror(number)}.*marked as done are safe"),
        ):
            ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
        assert check_partial(path, expected) == (done := done + 1)
    check_goes_on(fit, cells, path, expected)


def test_a_stop_at_any_call_of_the_system(fit, cells, expected, tmp_path):
    path, done = tmp_path / "out.h5ad", 0
    for after in range(8):
        with failing(block_files.os, "pwrite", KeyboardInterrupt(), after=after), pytest.raises(KeyboardInterrupt):
            ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
        assert check_partial(path, expected) == (done := done + after // 4)  # three arrays and the mark of each block
    check_goes_on(fit, cells, path, expected)


def test_short_writes_are_finished(fit, cells, expected, tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(block_files.os, "pwrite", lambda file, content, at: write(file, content[:100], at))
    check_goes_on(fit, cells, tmp_path / "out.h5ad", expected)


@pytest.mark.parametrize("share", [1, 2])
def test_a_disk_that_lies_is_found_out(fit, cells, expected, tmp_path, monkeypatch, share):
    path = tmp_path / "out.h5ad"
    with monkeypatch.context() as patch:
        patch.setattr(block_files.os, "pwrite", lambda file, content, at: -(-len(content) // share))
        with pytest.raises(DataError, match="does not read back as it was written"):
            ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
    assert check_partial(path, expected) == 0
    check_goes_on(fit, cells, path, expected)


def test_a_folder_on_a_full_disk_loses_one_block(fit, cells, expected, tmp_path):
    path = tmp_path / "out.zarr"
    ps.shards.write(fit, cells, path, VERBS, shard=(0, 3), **OPTIONS)
    with file_size_limit(100), pytest.raises(DataError, match="could not be written: .*File too large"):
        ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
    assert check_partial(path, expected) == 2
    check_goes_on(fit, cells, path, expected)


def test_two_writers_of_one_file(fit, cells, expected, tmp_path):
    path = tmp_path / "out.h5ad"

    def beside(fit, cells, seed):
        if path.exists():
            with pytest.raises(DataError, match="is locked: another process is writing"):
                ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
        return ps.embed(fit, cells, seed=seed)

    assert ps.shards.write(fit, cells, path, {"z": beside}, **OPTIONS) == 0
    np.testing.assert_array_equal(read(path).obsm["z"], expected.obsm["z"])
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_process_left_is_deleted(fit, cells, expected, tmp_path):
    path = tmp_path / "out.h5ad"
    child = os.fork()
    if not child:
        block_files.shutil.copyfile = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # between file and space
        ps.shards.write(fit, cells, path, VERBS, **OPTIONS)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 3
    assert check_partial(path, expected) == 0
    check_goes_on(fit, cells, path, expected)


def test_files_of_another_layout_are_refused(fit, cells, tmp_path):
    path = tmp_path / "out.h5ad"
    ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    with h5py.File(path, "r+") as file:
        run = file["uns/pyro_scvi_run"][()].decode().replace('"in one piece"', '"chunks"')
        del file["uns/pyro_scvi_run"]
        file["uns/pyro_scvi_run"] = run
    shutil.copy(path, tmp_path / "before")
    with pytest.raises(DataError, match="another run: layout differ"):
        ps.shards.write(fit, cells, path, {"z": ps.embed}, **OPTIONS)
    assert path.read_bytes() == (tmp_path / "before").read_bytes()


def test_a_disk_that_may_be_too_small_for_a_folder_is_told(fit, cells, tmp_path, monkeypatch):
    for free, told in ((10**3, True), (10**6, False)):
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(block_files.shutil, "disk_usage", lambda path, usage=usage: usage)
        path = tmp_path / f"{free}.zarr"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert ps.shards.write(fit, cells, path, VERBS, **OPTIONS) == 0
        assert [str(one.message)[:14] for one in caught if one.category is UserWarning] == ["the results in"] * told
    monkeypatch.setattr(block_files.shutil, "disk_usage", lambda path: usage._replace(free=100))
    assert ps.shards.write(fit, cells, path, VERBS, **OPTIONS) == 0  # finished: nothing more is needed


NAMES = ("..", "..\\x", ".zattrs", ".zgroup", "a/b", "c" * 300)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("as_index", [False, True], ids=["column", "index"])
def test_names_that_are_none_of_a_folder(fit, cells, tmp_path, name, as_index):
    """Of a column or of the index of obs: none leads out of the folder, or to the files of zarr itself."""
    obs = pd.DataFrame(index=cells.cell_names)
    if as_index:
        obs.index.name = name
    else:
        obs[name] = np.arange(float(N))
    named = ps.Cells.from_counts(simulated_counts(N), obs=obs)
    with pytest.raises(DataError, match="cannot be made"):
        ps.shards.write(fit, named, tmp_path / "in" / "out.zarr", VERBS, **OPTIONS)
    assert [path.name for path in tmp_path.rglob("*")] == ["in"]


@pytest.mark.parametrize("waits", [".zgroup", ".zattrs", ".zarray"])
@pytest.mark.parametrize("name", [".zattrs", ".zgroup"])
def test_writes_that_zarr_has_begun_end_before_the_folder_is_deleted(fit, cells, tmp_path, monkeypatch, name, waits):
    """One of several writes fails; the others go on in threads of zarr, and would make the folder anew."""
    begun = LocalStore.set

    async def late(store, key, value):
        await asyncio.sleep(0.2 if key.endswith(waits) else 0)
        await begun(store, key, value)

    monkeypatch.setattr(LocalStore, "set", late)
    named = ps.Cells.from_counts(simulated_counts(N), obs=pd.DataFrame(index=pd.Index(cells.cell_names, name=name)))
    with pytest.raises(DataError, match="cannot be made"):
        ps.shards.write(fit, named, tmp_path / "out.zarr", VERBS, **OPTIONS)
    time.sleep(1)
    assert not list(tmp_path.iterdir())


KILLED_WHILE_MADE = """
import os, signal, sys
import pyro_scvi as ps
from pyro_scvi.export import block_results
from tests.support.simulate import simulated_counts

fill = block_results._fill
block_results._fill = lambda *arguments: (fill(*arguments), os.kill(os.getpid(), signal.SIGKILL))
cells = ps.Cells.from_counts(simulated_counts(96))
ps.shards.write(ps.load(sys.argv[1] + "/fit"), cells, sys.argv[1] + "/" + sys.argv[2], {"z": ps.embed}, progress=False)
"""


@pytest.mark.parametrize("name", ["out.zarr", "out.h5ad"])
def test_what_a_killed_process_left_before_the_first_block_is_named_or_deleted(fit, cells, tmp_path, name):
    fit.save(tmp_path / "fit")
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_MADE, tmp_path, name], cwd=ROOT, check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.glob(f".{name}.*.partial")
    assert not (tmp_path / name).exists()
    plain = ps.Cells.from_counts(simulated_counts(N))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert ps.shards.write(fit, plain, tmp_path / name, {"z": ps.embed}, progress=False) == 0
    told = [str(one.message) for one in caught if str(left) in str(one.message)]
    assert left.exists() == bool(told) == name.endswith("zarr")  # others may be making a folder, but no file
    assert np.isfinite(read(tmp_path / name).obsm["z"]).all()
