"""Every message that a command can give names options of the command line and no arguments of Python."""

import ast
import re
from pathlib import Path

import pytest

import pyro_scvi
from pyro_scvi.cli import COMMANDS, loaded
from pyro_scvi.cli.wording import names_of, on_the_command_line, options_of

ROOT = Path(pyro_scvi.__file__).parent
ARGUMENT = r"(?<![\w.'\"=\[(-])[a-z]\w+=(?!=)"
FUNCTION = r"\b(?:ps|Cells)\.\w+"

NO_COMMAND_CALLS = {  # folders and modules, and why their messages reach no command
    "paper": "has commands of its own, without arguments of users",
    "cli": "writes in options",
    "plots": "draws what commands pass",
    "baselines": "are called from Python only",
    "analysis/abundance": "no command compares abundances",
    "analysis/evidence/annealed": "no command anneals",
    "analysis/evidence/comparison": "no command compares models",
    "analysis/evidence/leave_one_out": "no command leaves entries out",
    "analysis/evidence/stacking": "no command stacks models",
    "analysis/outputs": "commands pass no array to write into",
    "analysis/global_posterior": "no command draws global latents",
    "analysis/integration/labels": "no command predicts labels",
    "analysis/integration/mapping": "no command learns batches",
    "analysis/integration/transfer": "no command transfers labels",
    "analysis/loadings": "no command asks for loadings",
    "analysis/log_density": "no command asks for densities",
    "analysis/predictive/calibration": "no command calibrates",
    "analysis/prior_sensitivity": "no command weighs priors",
    "discovery": "programs are written in Python",
    "failed_runs": "programs are written in Python",
    "export/arviz": "no command writes trees",
    "export/html_page": "HTML",
    "export/scanpy": "the command embed writes results itself",
    "guides": "are made by the commands",
    "inference/elbo": "no command weighs the divergence",
    "inference/importance_weighted": "no command takes a bound",
    "inference/given": "no command takes draws",
    "likelihoods/library_size": "no command reads size factors",
    "likelihoods/negative_binomial": "likelihoods are made by the commands",
    "model": "models are made by the commands",
    "nn": "networks are made by the commands",
    "persistence/serialization": "programs of one's own are loaded in Python",
    "presets": "no command makes a preset of other cells",
    "priors": "are made by the commands",
    "program": "programs are written in Python",
    "training/checks": "commands pass objects of the right kind",
    "utils/html_repr": "SVG",
}
NOT_BY_A_COMMAND = {  # beginnings of single messages
    "counts must hold numbers; ": "of from_counts",
    "from_anndata takes an AnnData": "commands pass one",
    "from_anndata takes an AnnCollection": "no command reads one",
    "from_anndata reads an AnnCollection": "no command reads one",
    "make the cells with Cells.from_anndata(adata": "commands read a query by the schema of the fit",
    "backed=True takes a backed AnnData or": "commands pass one",
    "an AnnCollection has no raw": "no command reads one",
    "allow_new_batches is for a query": "commands pass the schema",
    "expected the Fit that ps.fit": "commands pass one",
    "expected Cells{}, got": "commands pass them",
    "the genes of the cells differ from those of the fit": "commands read a query by the schema of the fit",
    "the covariates of the cells differ from those of the fit": "commands read a query by the schema of the fit",
    "E[w | x] uses the counts": "impute passes the quantity",
    "sampler must be an object": "commands pass one",
    "space must be an object": "commands pass one",
    "verbs must be functions": "infer passes them",
    "ps.differential.": "an example of what de passes",
    **dict.fromkeys(
        (
            "the validation cells have",
            "the cells have size factors",
            "the model takes size factors",
            "dtype must be",
            "autocast is",
            "learning_rate must",
            "kl_weight must",
            "checkpoint_every must",
            "ranks must",
        ),
        "fit has no such option",
    ),
    "compiled=True is for elbo=None": "no command takes a bound",
    "a column is given by its name": "commands pass strings",
    "there is no batch {}: these": "--batch-as is compared with the batches of the fit before",
    "the decoder {} has no hidden": "commands make the decoder",
    "{} calls its decoder": "commands make the model",
    "EveryOther() needs estimand": "de refuses --pairs beside --every-other",
    "not by ps.fit": "commands fit",
    "{} was left in an open HDF5 file": "commands send no cells to other processes",
}


def text_of(node):
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(text_of(part) if isinstance(part, ast.Constant) else "{}" for part in node.values)


def messages(path):
    """Strings of a module in the pieces in which it has them, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    inner = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in ast.walk(node)} - {
        id(node) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
    }
    nodes = (node for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr))
    return [text_of(node) for node in nodes if id(node) not in docs | inner]


def reaches_a_command(module):
    folders = [module, *map(str, Path(module).parents)]
    return not any(name in NO_COMMAND_CALLS for name in folders)


def in_python(text):
    return re.search(ARGUMENT, re.sub(r"[\w.]+\((?:[^()]|\([^()]*\))*\)", "", text)) or re.search(FUNCTION, text)


MODULES = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
MESSAGES = [
    text
    for module, path in MODULES.items()
    if reaches_a_command(module)
    for text in messages(path)
    if in_python(text) and not text.startswith(tuple(NOT_BY_A_COMMAND))
]
OPTIONS = {name: names_of(loaded(name)) for name in COMMANDS}


@pytest.mark.parametrize("text", MESSAGES, ids=range(len(MESSAGES)))
def test_messages_have_options_for_arguments(text):
    said = on_the_command_line(text)
    assert not re.search(ARGUMENT, re.sub(r"[\w.]+\((?:[^()]|\([^()]*\))*\)", "", said)), said
    assert all("in python, " in said[: found.start()].lower() for found in re.finditer(FUNCTION, said)), said
    named = re.findall(r"--([a-z][a-z-]+)", said)
    assert {name.replace("-", "_") for name in named} <= {"nproc_per_node"}.union(*OPTIONS.values()), said


def test_messages_are_found():
    assert len(MESSAGES) > 20
    assert not [name for name in NO_COMMAND_CALLS if name not in MODULES and not (ROOT / name).is_dir()]
    known = [text for path in MODULES.values() for text in messages(path)]
    assert not [start for start in NOT_BY_A_COMMAND if not any(text.startswith(start) for text in known)]


def test_options_are_those_of_the_command_that_runs():
    for command, said in (("fit", "read it with --batch."), ("embed", "read it with --batch of the command fit.")):
        with options_of(loaded(command)):
            assert on_the_command_line("read it with batch=.") == said
    with options_of(loaded("fit")):
        assert on_the_command_line("batch_size must be an integer, got 'batch_size'") == (
            "--batch-size must be an integer, got 'batch_size'"
        )
        assert on_the_command_line("batch_size_of(3) and 'n_latent'") == "batch_size_of(3) and 'n_latent'"


def test_code_and_names_of_columns_stay():
    for text in (
        "sc.pp.filter_cells(adata, min_counts=1) leaves them out",
        "adata.var_names = ['a', 'b']",
        "column 'batch=1' holds x",
        "anndata.io.write_zarr(path, adata, compressor=None)",
    ):
        assert on_the_command_line(text) == text
