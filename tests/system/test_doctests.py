"""Examples in docstrings: every public name has one, and it gives what it shows."""

import doctest
import inspect
import re
import types

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

import pyro_scvi as ps
from tests.support.paths import ROOT

REFERENCE = ROOT / "docs" / "api.md"
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
NEEDS = {  # packages outside the core
    "baselines.DESeq2": "inmoose",
    "baselines.LeidenClusters": "igraph",
    "baselines.MAGIC": "magic",
    "baselines.SCVITools": "scvi",
    "datasets.pbmc68k_reduced": "scanpy",
    "prior_sensitivity": "arviz_stats",
}


def named(name):
    value = ps
    for part in name.split("."):
        value = getattr(value, part)
    return value


LISTED = re.findall(r"^   (\w\S*)$", REFERENCE.read_text(), re.MULTILINE)
NAMES = sorted({*LISTED, *(name for name in ps.__all__ if not isinstance(named(name), types.ModuleType))})


@pytest.fixture(scope="module")
def world():
    """What the reference says its examples run on."""
    mpl.use("Agg")
    block = re.search(r"^```python\n(.*?)^```", REFERENCE.read_text(), re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(compile(block.group(1), REFERENCE.name, "exec"), namespace)
    return namespace


def example(name, namespace):
    """The example of the docstring itself, not of the class that it inherits from."""
    own = vars(named(name)).get("__doc__") if inspect.isclass(named(name)) else named(name).__doc__
    return doctest.DocTestParser().get_doctest(inspect.cleandoc(own or ""), namespace, name, REFERENCE.name, 0)


def failures(test):
    report = []
    doctest.DocTestRunner(optionflags=FLAGS).run(test, out=report.append)
    plt.close("all")
    return "".join(report)


@pytest.mark.filterwarnings("ignore::FutureWarning:lightning")
@pytest.mark.parametrize("name", NAMES)
def test_the_example_of_a_public_name_gives_what_it_shows(name, world, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    test = example(name, world | {"folder": tmp_path})
    assert test.examples, f"{name} has no example"
    assert any(part.want for part in test.examples), f"{name}'s example shows nothing"
    found = failures(test)
    assert not found, found


def test_an_example_that_shows_something_else_fails(world):
    """These tests can fail: another output, a warning, an error."""
    parser = doctest.DocTestParser()
    for source in (">>> cells.n_genes\n21\n", ">>> import warnings; warnings.warn('no')\n", ">>> nothing\n"):
        assert failures(parser.get_doctest(source, world, "wrong", None, 0))
