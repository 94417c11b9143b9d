"""Zarr folders where memory is short: refused before a thread is started, because Python may wait for it forever."""

import errno
import mmap
import os
import resource
import subprocess
import sys

import pytest
import zarr

import pyro_scvi as ps
from pyro_scvi.export.block_results import _errors_told
from pyro_scvi.utils.disk import zarr_groups
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.faults


@pytest.fixture
def short_of_memory(monkeypatch):
    """No room for the stacks of threads."""

    def none(*_, **__):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    zarr_groups._require_room.cache_clear()
    monkeypatch.setattr(mmap, "mmap", none)
    monkeypatch.setattr(zarr, "open_group", lambda *_, **__: pytest.fail("a thread was started"))
    yield
    zarr_groups._require_room.cache_clear()


def test_blocks_of_a_folder_need_room_for_threads(short_of_memory, tmp_path):
    cells = ps.Cells.from_counts(simulated_counts(20))
    model = ps.SCVI(cells.n_genes, 2, n_hidden=4)
    fit = ps.fit(model, cells, epochs=1, progress=False, device="cpu")
    verbs = {"X_pyro_scvi": ps.embed}
    with pytest.raises(
        MemoryError, match="zarr needs .* MB for .* threads; raise the limit of memory, .*or take .h5ad files"
    ):
        ps.shards.write(fit, cells, tmp_path / "out.zarr", verbs, progress=False)
    assert list(tmp_path.iterdir()) == []
    assert ps.shards.write(fit, cells, tmp_path / "out.h5ad", verbs, progress=False) == 0


def test_folders_that_are_read_need_it_too(request, tmp_path):
    source = tmp_path / "in.zarr"
    zarr.open_group(source, mode="w")
    request.getfixturevalue("short_of_memory")
    with pytest.raises(MemoryError, match="zarr needs"):
        ps.stores.build(source, tmp_path / "store", progress=False)


def test_a_forked_process_asks_again(short_of_memory, monkeypatch):
    monkeypatch.undo()
    zarr_groups._require_room(1)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOMEM, "none")))
    zarr_groups._require_room(1)
    with pytest.raises(MemoryError):
        zarr_groups._require_room(2)


def test_want_of_memory_is_no_fault_of_the_file():
    with pytest.raises(RuntimeError, match="can't start new thread"), _errors_told(lambda reason: f"lost: {reason}"):
        raise RuntimeError("can't start new thread")
    with pytest.raises(ps.errors.DataError, match="lost: another"), _errors_told(lambda reason: f"lost: {reason}"):
        raise RuntimeError("another")


def test_an_event_loop_needs_open_files(monkeypatch, tmp_path):
    """Without them asyncio leaves a traceback behind."""

    def none():
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(zarr, "open_group", lambda *_, **__: pytest.fail("a loop was started"))
    zarr_groups._require_room.cache_clear()
    with monkeypatch.context() as short:
        short.setattr(zarr_groups.os, "pipe", none)
        with pytest.raises(OSError, match="Too many open files"):
            zarr_groups.zarr_group(tmp_path, "r")
    zarr_groups._require_room.cache_clear()


@pytest.mark.parametrize("factor", [0.2, 0.5])
def test_stacks_that_are_mapped_one_by_one_have_room(factor, tmp_path):
    """Together they are larger than the memory of the machine, which they never fill."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    program = (
        "import sys; from pathlib import Path; from pyro_scvi.utils.disk.zarr_groups import zarr_group\n"
        "group = zarr_group(Path(sys.argv[1]), 'w', zarr_format=2)\n"
        "group.create_array('x', shape=(60,), chunks=(2,), dtype='f4')[:] = 1\n"
        "print(group['x'][:].sum())"
    )

    def large_stacks():
        hard = resource.getrlimit(resource.RLIMIT_STACK)[1]
        resource.setrlimit(resource.RLIMIT_STACK, (int(factor * memory) // 2**20 * 2**20, hard))

    command = [sys.executable, "-c", program, tmp_path / "o.zarr"]
    ended = subprocess.run(command, preexec_fn=large_stacks, capture_output=True, text=True, check=False, timeout=200)
    assert ended.stdout == "60.0\n", ended.stderr
