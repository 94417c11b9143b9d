"""Temporary folders are deleted, also where hardly a file can be opened."""

import os
import resource

import pytest

from pyro_scvi.utils.disk.temporary import new_temporary, remove

pytestmark = pytest.mark.faults


@pytest.mark.parametrize("more", [1, 2, 3])
def test_a_folder_is_deleted_where_few_files_can_be_opened(tmp_path, more):
    folder = new_temporary(tmp_path / "out", tmp_path)
    deep = folder / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "file").touch()
    (folder / "a" / "link").symlink_to(tmp_path / "kept")
    (tmp_path / "kept").mkdir()
    free = os.open(os.devnull, os.O_RDONLY)
    os.close(free)  # the lowest number that is free
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, hard))
    try:
        remove(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
