"""Names and documentation that are there before their modules are imported."""

import ast
import signal
import subprocess
import sys
from types import ModuleType

import pytest

import pyro_scvi as ps
from pyro_scvi import cli
from pyro_scvi.utils.unloaded import docstring, imported, names_to_check
from tests.support.faults import interrupts_raise
from tests.support.paths import ROOT

HEAVY = ("torch", "pyro", "anndata", "pandas", "numpy", "matplotlib", "sklearn")


def loaded_after(code):
    """Which heavy modules a fresh process has after some code."""
    program = f"import sys\n{code}\nsys.stderr.write(' '.join(n for n in {HEAVY} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stderr.split()


def test_the_import_loads_nothing_heavy_and_a_name_what_it_needs():
    assert loaded_after("import pyro_scvi as ps; dir(ps); ps.__version__") == []
    assert loaded_after("import pyro_scvi as ps; ps.errors.DataError; from pyro_scvi import errors") == []
    assert "torch" in loaded_after("import pyro_scvi as ps; ps.SCVI")


def test_the_help_of_the_command_loads_nothing_heavy():
    code = "from pyro_scvi.cli import app\ntry: app(['--help'])\nexcept SystemExit as e: assert e.code == 0"
    assert loaded_after(code) == []


def test_every_public_name_has_a_home():
    homes = names_to_check(ps.__file__)
    assert set(homes) == set(ps.__all__)
    for name, home in homes.items():
        value = getattr(ps, name)
        assert value is imported(*home), name
        if not isinstance(value, ModuleType):
            assert value.__name__ == home[1], name


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="module 'pyro_scvi' has no attribute 'evidense'"):
        _ = ps.evidense
    with pytest.raises(ImportError, match="cannot import name 'evidense'"):
        exec("from pyro_scvi import evidense")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_list_of_commands_has_their_first_lines(name):
    function = imported(f"pyro_scvi.cli.{cli.COMMANDS[name]}", name)
    assert docstring(f"pyro_scvi.cli.{cli.COMMANDS[name]}", name).splitlines()[0] == function.__doc__.splitlines()[0]


@pytest.mark.faults
def test_an_interrupt_while_source_is_parsed_waits(monkeypatch):
    """Python 3.11 may raise SystemError otherwise, and the command would end by that."""
    parsed, parse = [], ast.parse

    def interrupted(text):
        signal.raise_signal(signal.SIGINT)
        parsed.append(parse(text))
        return parsed[-1]

    with interrupts_raise(), monkeypatch.context() as patch:
        patch.setattr(ast, "parse", interrupted)
        with pytest.raises(KeyboardInterrupt):
            docstring("pyro_scvi.cli.training", "fit")
    assert len(parsed) == 1
