"""HDF5 files on full disks: the error is raised, and the process lives on."""

import h5py
import numpy as np
import pytest

from pyro_scvi.utils.disk import hdf5
from tests.support.faults import file_size_limit

pytestmark = pytest.mark.faults


def fill(file):
    """What an AnnData is made of: groups, attributes, strings of any length, arrays in one piece and in chunks."""
    for number in range(6):
        group = file.create_group(f"group {number}")
        group.attrs["encoding-type"] = "dataframe"
        group["strings"] = np.array([f"cell {i}" for i in range(200)], dtype=object)
        group["array"] = np.arange(2000.0)
        group.create_dataset("chunks", data=np.arange(4000).reshape(80, 50), chunks=(7, 50), compression="gzip")


def write(path, more=lambda: None):
    with hdf5.written(path, "w") as file:
        fill(file)
        more()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "a.h5"
    write(path)
    return path


def test_without_faults_it_is_an_ordinary_file(whole, tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        fill(file)
    with h5py.File(whole) as found, h5py.File(tmp_path / "a.h5") as expected:
        for name in ("strings", "array", "chunks"):
            np.testing.assert_array_equal(found[f"group 5/{name}"][:], expected[f"group 5/{name}"][:])


def test_a_disk_that_is_full_at_any_size(whole, tmp_path):
    for limit in range(0, whole.stat().st_size - 1, whole.stat().st_size // 12):
        with (
            file_size_limit(limit),
            pytest.raises(OSError, match="File too large"),
            hdf5.written(tmp_path / "a", "w") as file,
        ):
            fill(file)
    write(tmp_path / "a")
    with h5py.File(whole) as expected, h5py.File(tmp_path / "a") as found:
        np.testing.assert_array_equal(found["group 0/array"][:], expected["group 0/array"][:])


def test_errors_of_the_block_are_its_own(tmp_path):
    with pytest.raises(ZeroDivisionError):
        write(tmp_path / "a", lambda: 1 / 0)
    with pytest.raises(FileNotFoundError):
        write(tmp_path / "none" / "a")
