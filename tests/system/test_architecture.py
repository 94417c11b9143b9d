"""The import contract, public names, and what no file may do."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_scvi as ps
from tests.support.paths import ROOT

PACKAGE = Path(ps.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def lint_imports(folder):
    """Run the import contract of pyproject.toml on the package in a folder."""
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, '.'); {program}"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_imports_only_move_forward():
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("distributions/gamma_ratio.py", "from pyro_scvi.training.fit import fit"),
        ("utils/checks.py", "from pyro_scvi.utils import random_state"),
        ("model.py", "from pyro_scvi.data.cells import Cells"),
    ],
)
def test_an_import_that_runs_back_breaks_the_contract(file, line, tmp_path):
    shutil.copytree(PACKAGE, tmp_path / "pyro_scvi", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "pyro_scvi" / file).open("a") as source:
        source.write(f"\n{line}\n")
    assert lint_imports(tmp_path).returncode == 1


@pytest.mark.parametrize("top", [PACKAGE, ROOT / "benchmarks"], ids=lambda path: path.name)
def test_no_folder_is_crowded(top):
    for folder in {file.parent for file in top.rglob("*.py")}:
        assert len(set(folder.glob("*.py")) - {folder / "__init__.py"}) <= 16, folder


@pytest.mark.parametrize("top", [PACKAGE, ROOT / "benchmarks", ROOT / "tests"], ids=lambda path: path.name)
def test_the_first_line_of_a_file_says_what_it_holds(top):
    for path in (path for path in top.rglob("*.py") if path.stat().st_size):
        check_first_line(path)


def check_first_line(path):
    first = path.read_text().partition("\n")[0]
    assert re.match('r?""".{15,}', first), f"{path} must begin with a docstring of one line that says what it holds"


def test_public_names():
    assert sorted(ps.__all__) == [
        "Amortized",
        "Cells",
        "Fit",
        "Given",
        "HMC",
        "Importance",
        "Refined",
        "SCVI",
        "Schema",
        "add_rank_genes_groups",
        "annealed_evidence",
        "annotate",
        "baselines",
        "calibrate",
        "calibrate_globals",
        "calibration",
        "check_predictions",
        "compare",
        "criticism",
        "datasets",
        "differential",
        "differential_abundance",
        "differential_expression",
        "distributed",
        "elbos",
        "embed",
        "errors",
        "evidence",
        "fit",
        "guides",
        "imputation",
        "impute",
        "leave_one_out",
        "libraries",
        "likelihoods",
        "load",
        "loadings",
        "log_density",
        "map_query",
        "networks",
        "normalized_expression",
        "plots",
        "posterior_predictive",
        "predict_labels",
        "presets",
        "prior_predictive",
        "prior_sensitivity",
        "priors",
        "sample_globals",
        "sample_posterior",
        "schedules",
        "shards",
        "spaces",
        "stacking_weights",
        "stores",
        "technical_zero_probability",
        "to_datatree",
        "transfer_labels",
        "weights",
    ]
    assert all(hasattr(ps, name) for name in ps.__all__)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_assert_print_or_pickle(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        assert not isinstance(node, ast.Assert), f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "pickle.load", "pickle.loads", "torch.load", "eval", "exec")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_variants_are_objects_not_strings(path):
    """No option of a fit or a model is told apart by comparing it with a word."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Name):
            words = [c for c in node.comparators if isinstance(c, ast.Constant) and isinstance(c.value, str)]
            named = node.left.id in ("prior", "likelihood", "library", "dispersion", "guide", "sampler", "norm", "elbo")
            assert not (words and named), f"{path.name}:{node.lineno}"


ROOMS = [name for name in ps.__all__ if inspect.ismodule(getattr(ps, name))]


@pytest.mark.parametrize("room", ROOMS)
def test_tab_completion_shows_public_names_only(room):
    shown = dir(getattr(ps, room))
    assert sorted(shown) == sorted(getattr(ps, room).__all__)
    assert all(hasattr(getattr(ps, room), name) for name in shown)
    assert sorted(dir(ps)) == sorted([*ps.__all__, "__version__"])


def test_shared_options_have_one_name_and_are_given_by_it():
    shared = {"samples", "seed", "batch_size", "device", "dtype", "sampler", "progress", "overwrite"}
    other = {"n_samples", "num_samples", "n_draws", "random_state", "random_seed", "rng", "generator", "chunk_size"}
    asked = 0
    for name, function in public_callables():
        for option in inspect.signature(function).parameters.values():
            assert option.name not in other, f"{name}({option.name}=)"
            if option.name in shared:
                assert option.kind is option.KEYWORD_ONLY, f"{name}({option.name}=) can be given by position"
                asked += 1
    assert asked > 60


def test_signatures_show_what_is_taken():
    open_ended = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    for name, function in public_callables():
        kinds = {option.kind for option in inspect.signature(function).parameters.values()}
        assert not kinds & open_ended, f"{name}{inspect.signature(function)}"


def public_callables():
    """Functions and constructors of the package and its rooms, and what Cells can be asked."""
    owners = [("ps", ps, ps.__all__), *((room, getattr(ps, room), dir(getattr(ps, room))) for room in ROOMS)]
    owners.append(("Cells", ps.Cells, [name for name in vars(ps.Cells) if not name.startswith("_")]))
    for owner, home, names in owners:
        for name in names:
            value = getattr(home, name)
            if callable(value) and not (inspect.isclass(value) and issubclass(value, BaseException)):
                yield f"{owner}.{name}", value


def test_training_needs_no_packages_of_plots_and_baselines():
    program = (
        "import sys, pyro_scvi as ps\n"
        "large = {'matplotlib', 'sklearn', 'scipy.stats', 'scipy.optimize'}\n"
        "assert not large & sys.modules.keys(), large & sys.modules.keys()\n"
        "assert {'plots', 'baselines'} <= set(dir(ps)) and callable(ps.plots.loss) and callable(ps.baselines.PCA)\n"
        "assert large - {'scipy.optimize'} <= sys.modules.keys()\n"
        "from pyro_scvi import *\n"
        "assert fit is ps.fit and evidence is ps.evidence and plots is ps.plots\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=PACKAGE.parent)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ps.nothing
