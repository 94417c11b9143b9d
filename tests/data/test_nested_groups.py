"""Files of counts whose groups lie in themselves, are deep, or double: refused at once, by one short line."""

import threading

import h5py
import pytest

from pyro_scvi.errors import DataError
from tests.data.test_hostile_files import WAYS
from tests.support import hostile_files

pytestmark = pytest.mark.faults


def around(file):
    file["uns/more"] = h5py.SoftLink("/")


def column(file):
    del file["obs/age"]
    file["obs/age"] = h5py.SoftLink("/")


def hard(file):
    file["uns/a/b"] = file["uns"]


def twice(file):
    file["uns/a/to_b"] = file.create_group("uns/b")
    file["uns/b/to_a"] = h5py.SoftLink("/uns/a")


def beside(file):
    with h5py.File(f"{file.filename}.part", "w") as other:
        other["a/back"] = h5py.ExternalLink("in.h5ad", "uns")
    file["uns/a"] = h5py.ExternalLink("in.h5ad.part", "a")


def deep(file):
    file.create_group("uns/" + "/".join("a" * 64))


def deep_by_links(file):
    """Short names, and yet 80 groups below one another, of which those below are seen first."""
    file.create_group("uns/a/" + "/".join("a" * 40))
    file.create_group("uns/b/" + "/".join("b" * 40))["last"] = h5py.SoftLink("/uns/a")


def doubling(file):
    """12 groups, of which anndata would read 4095."""
    group = file["uns"].create_group("first")
    for _ in range(11):
        below = group.create_group("a")
        group["b"] = below
        group = below


ENDLESS = {
    around: "is a link to a group that it lies in",
    column: "obs/age of .* is a link to a group that it lies in",
    hard: "uns/a/b of .* is a link to a group that it lies in",
    twice: "is a link to a group that it lies in",
    beside: "uns/a/back of .* is a link to a group that it lies in",
    deep: "more than 64 groups",
    deep_by_links: "more than 64 groups",
    doubling: r"objects, so that \d{4} would be read",
}


@pytest.fixture
def file(tmp_path):
    return hostile_files.write_file(tmp_path / "in.h5ad")


@pytest.mark.filterwarnings("ignore:.*is in another file")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("change", "told"), ENDLESS.items())
def test_groups_without_an_end(file, change, told, way):
    with h5py.File(file, "r+") as opened:
        opened.require_group("uns")
        change(opened)
    with pytest.raises(DataError, match=told) as error:
        way(file)
    assert "in.h5ad" in str(error.value)
    assert len(str(error.value)) < 250 + len(str(file))
    assert others_may_open(file)


def others_may_open(path):
    """Whether another thread gets the lock of h5py, whose older versions kept it after too deep a recursion."""
    opened = threading.Thread(target=lambda: h5py.File(path, "r").close(), daemon=True)
    opened.start()
    opened.join(timeout=10)
    return not opened.is_alive()


@pytest.mark.parametrize("way", WAYS)
def test_links_that_end_are_read(file, way):
    """One table by several names, a link to nowhere beside the counts, and groups as deep as anybody needs."""
    with h5py.File(file, "r+") as opened:
        for number in range(5):
            opened[f"obsm/z{number}"] = opened["obs"] if number % 2 else h5py.SoftLink("/obs")
        group = opened["uns"]
        for _ in range(60):
            group = group.create_group("a")
            group.attrs.update({"encoding-type": "dict", "encoding-version": "0.1.0"})
    assert len(way(file)) == 60
