"""Temporary folders are deleted, also where hardly a file can be opened."""

import os
import resource
from contextlib import contextmanager

import pytest
import typer

from pyro_scvi.cli.workspace import new_folder
from pyro_scvi.export.block_files import temporary_folder
from pyro_scvi.utils.disk.temporary import new_temporary, remove

pytestmark = pytest.mark.faults


@contextmanager
def few_files(more):
    """At most so many more open files."""
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)  # the lowest number that is free
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def of_a_command(out):
    with new_folder(out, ("table.csv",), force=False) as space:
        yield space.path


def fill(folder, taken):
    """Open all files that may be open."""
    (folder / "more").mkdir()
    while True:
        taken.append(os.open(os.devnull, os.O_RDONLY))


@pytest.mark.parametrize("more", [1, 2, 3, 4])
@pytest.mark.parametrize("made", [temporary_folder, of_a_command])
def test_nothing_is_left_where_all_files_are_open(tmp_path, made, more):
    """Matplotlib keeps the files of fonts open: where no number was left, the folder could not be deleted."""
    taken = []
    try:
        with few_files(more), pytest.raises((OSError, typer.Exit)), made(tmp_path / "out") as folder:
            fill(folder, taken)
    finally:
        for descriptor in taken:
            os.close(descriptor)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [1, 2, 3])
def test_a_folder_is_deleted_where_few_files_can_be_opened(tmp_path, more):
    folder = new_temporary(tmp_path / "out", tmp_path)
    deep = folder / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (folder / "a" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    with few_files(more):
        remove(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
