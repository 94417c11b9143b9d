"""What is shipped: one version, an sdist whose own tests collect, and a wheel that runs where nothing else lies."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import pyro_scvi as ps
from tests.support.paths import ROOT


def run(*arguments, folder, imported_from):
    """Run Python in a folder, with the package of another and not the installed one."""
    environment = os.environ | {"PYTHONPATH": str(imported_from)}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the sdist and of the wheel that is built from it, as by ``pip install`` of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run("-m", "hatchling", "build", "-t", "sdist", "-d", folder, folder=ROOT, imported_from="")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    unpacked = next(path for path in folder.iterdir() if path.is_dir())
    run("-m", "hatchling", "build", "-t", "wheel", "-d", folder, folder=unpacked, imported_from="")
    return folder


def collected(folder):
    shown = run("-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", folder=folder, imported_from=folder)
    return sorted(line for line in shown.splitlines() if "::" in line)


def test_one_version_everywhere():
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited[1] == ps.__version__ == metadata.version("pyro-scvi")


RELATIVE = re.compile(r"\]\((?!https?://)")


@pytest.mark.parametrize("address", ["", "https://example.org/files", "https://example.org/files/"])
def test_links_of_the_readme_are_absolute_or_plain_words(address):
    text = pytest.importorskip("hatch_build").for_an_index((ROOT / "README.md").read_text(), address)
    assert not RELATIVE.search(text)
    assert "](https://arxiv.org/abs/1709.02082)" in text
    assert (
        "the ten-minute tour" if not address else "[the ten-minute tour](https://example.org/files/docs/tour.md)"
    ) in text
    assert ("![" in text) == bool(address)


@pytest.mark.slow
def test_a_package_index_gets_the_readme_without_dead_links(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        shown = wheel.read(f"pyro_scvi-{ps.__version__}.dist-info/METADATA").decode()
    assert "## Ten lines" in shown
    assert "Content-Type: text/markdown" in shown
    assert not RELATIVE.search(shown)


@pytest.mark.slow
def test_the_tests_of_the_sdist_collect(built):
    unpacked = built / f"pyro_scvi-{ps.__version__}"
    assert collected(unpacked) == collected(ROOT) != []


@pytest.mark.slow
def test_tests_of_the_sdist_pass(built):
    unpacked = built / f"pyro_scvi-{ps.__version__}"
    some = ["tests/test_errors.py", "tests/system/test_docs.py", "-k", "not code and not lines"]
    assert " passed" in run(
        "-m", "pytest", "-q", "-p", "no:cacheprovider", *some, folder=unpacked, imported_from=unpacked
    )


@pytest.mark.slow
def test_the_wheel_installs_and_its_command_starts(built, tmp_path):
    wheel = next(built.glob("*.whl"))
    pip = "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", tmp_path / "installed", wheel
    run(*pip, folder=tmp_path, imported_from="")
    where = run(
        "-c", "import pyro_scvi; print(pyro_scvi.__file__)", folder=tmp_path, imported_from=tmp_path / "installed"
    )
    assert Path(where.strip()).parent == tmp_path / "installed" / "pyro_scvi"
    shown = run("-m", "pyro_scvi", "demo", "--help", folder=tmp_path, imported_from=tmp_path / "installed")
    assert "Usage" in shown
    assert (tmp_path / "installed" / "pyro_scvi" / "py.typed").is_file()
