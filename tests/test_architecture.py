"""Which room imports which, what is public, and what no file may do."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import pyro_scvi as ps

PACKAGE = Path(ps.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def file_of(room):
    path = PACKAGE.joinpath(*room.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def imported(path):
    """Modules of this package that a file imports, outside TYPE_CHECKING blocks."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped and (node.module or "").startswith("pyro_scvi"):
            own = node.module.removeprefix("pyro_scvi").removeprefix(".")
            names |= {own} if own else {alias.name for alias in node.names}
    return names


def reachable(room):
    seen, waiting = set(), [room]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += imported(file_of(name))
    return {name.split(".")[0] for name in seen} - {room}


def test_the_law_knows_nothing_of_data_fitting_or_tables():
    allowed = {
        "display",
        "distributions",
        "entries",
        "errors",
        "libraries",
        "likelihoods",
        "negative_binomial",
        "networks",
        "opaque",
        "parts",
        "plates",
        "positive_counts",
        "priors",
        "random_bits",
        "seeding",
        "sites",
        "weights",
    }
    assert reachable("model") == allowed
    assert "anndata" not in (PACKAGE / "model.py").read_text()


def test_the_model_reads_in_one_sitting():
    assert len((PACKAGE / "model.py").read_text().splitlines()) < 150


@pytest.mark.parametrize(
    ("room", "never"),
    [
        ("distributions", {"likelihoods", "networks", "model"}),
        ("archive", {"descriptions", "checkpoint", "store", "fit", "model", "cells"}),
        ("descriptions", {"archive", "checkpoint", "progress", "fit", "store"}),
        ("recorded", {"cells", "fit", "training", "minibatches", "progress"}),
        ("progress", {"archive", "checkpoint", "fit", "store", "training"}),
        ("checkpoint", {"fit", "store", "training", "plots", "cli"}),
        ("interrupts", {"fit", "training"}),
        ("divergence", {"checkpoint", "fit", "store", "training"}),
        ("distributed", {"cells", "checkpoint", "fit", "training", "cli"}),
        ("counts", {"sources", "stores", "cells"}),
        ("stores", {"reading", "cells", "model", "fit", "store"}),
        ("cells", {"model", "guides", "fit", "posterior"}),
        ("guides", {"fit", "cells", "posterior", "evidence"}),
        ("fit", {"evidence", "plots", "cli"}),
        ("posterior", {"fit", "plots", "cli"}),
        ("evidence", {"fit", "plots", "cli"}),
        ("samplers", {"fit", "plots", "cli"}),
        ("calibration", {"fit", "plots", "cli"}),
        ("leave_one_out", {"fit", "plots", "cli"}),
        ("annealing", {"fit", "plots", "cli"}),
        ("export", {"fit", "plots", "cli"}),
        ("plots", {"cli"}),
        ("gamma_ratio", {"cells", "likelihoods", "model", "pairs"}),
        ("pairs", {"all_pairs", "differential", "fit", "plots", "cli"}),
        ("differential", {"fit", "plots", "cli"}),
        ("annotate", {"fit", "plots", "cli"}),
        ("paper", {"cli"}),
        ("baselines", {"model", "guides", "cells", "fit", "posterior", "plots", "cli"}),
    ],
)
def test_imports_only_move_forward(room, never):
    assert not reachable(room) & never


def test_only_the_command_line_knows_the_paper():
    outside = [path for path in FILES if path.relative_to(PACKAGE).parts[0] not in ("paper", "cli")]
    assert not [path.name for path in outside if any(room.split(".")[0] == "paper" for room in imported(path))]


def test_public_names():
    assert sorted(ps.__all__) == [
        "Amortized",
        "Cells",
        "Fit",
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
        "calibration",
        "check_predictions",
        "compare",
        "criticism",
        "datasets",
        "differential",
        "differential_expression",
        "distributed",
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
        "networks",
        "plots",
        "posterior_predictive",
        "presets",
        "prior_predictive",
        "prior_sensitivity",
        "priors",
        "sample_posterior",
        "schedules",
        "shards",
        "stores",
        "technical_zero_probability",
        "to_datatree",
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
