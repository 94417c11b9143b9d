"""Messages of the package in the words of the command line: options where Python has arguments.

A message names an argument as ``name=`` or ``name=value``. Each such word becomes an option here, so that messages need
not be listed. Listed are those that say how to do in Python what a command does in another way.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_SENTENCES = (
    (r"[Pp]ass allow_new_batches=True to read cells of other batches: ps\.embed and .*?learns their batches",
     "Add --allow-new-batches to embed or impute cells of other batches; in Python, ps.map_query learns their batches"),
    (r"ps\.embed, ps\.annotate, .*? let ps\.map_query\(fit, cells\) learn these batches",
     "the commands embed and impute take them; in Python, ps.map_query(fit, cells) learns these batches"),
    (r"pass raw=True, or pass adata\.raw\.to_adata\(\)", "add --raw"),
    (r"pass covariates=\['(.*?)'\]", r"pass --covariates '\1' in place of --batch"),
    (r"make the Cells with batch=", "make the fit with --batch"),
    (r"(only one batch.*?)Fit without batch=", r"\1Make the fit without --batch"),
    (r"Read it without backed=True; or, if", "If"),
    (r"backed=True reads", "infer reads"),
    (r"Use Cells\.take for some of the cells, and ps\.stores\.build\(file, path, layer=\.\.\.\) for a layer",
     "Make a store of the layer: python -m pyro_scvi store FILE --layer LAYER --out STORE"),
    (r" \(in fit, validation=0 holds out none\)", ""),
    (r", or fit with dtype=torch\.float32", ""),
    (r"Fit with dtype=torch\.float64", "Fit with float64 in Python"),
    (r"estimand=GroupMeans\(within_batches=True\)", "--within-batch"),
    (r"within_batches", "--within-batch"),
    (r"GroupMeans\(replicates=\)", "--replicates"),
    (r"Raise samples=, or rounds= of ps\.evidence", "In Python, ps.evidence takes more samples and rounds"),
    (r"Check other cells by ps\.annealed_evidence", "In Python, ps.annealed_evidence checks other cells"),
    (r"take ps\.Refined\(\), ps\.Importance\(\) or ps\.HMC\(\)", "take --sampler refined, importance or hmc"),
    (r"results of ps\.shards\.write", "results of the command infer"),
    (r"only ps\.SCVI with", "only the model of this package with"),
    (r"the AnnData of the reference, after ps\.annotate\(reference, fit\)", "--beside the result of embed for the "
     "reference"),
    (r"as ps\.annotate writes them", "as embed writes them"),
    (r"components=\S+ must", "the components must"),
    (r"(Pass fewer, or|pass) a space that was fitted to more cells: .*?\.fitted\(fit, reference\)",
     "Add --space latent, or place them --beside a reference"),
)  # fmt: skip

_CODE = re.compile(r"[\w.]+\((?:[^()]|\([^()]*\))*\)")  # a call in Python, as of what mends a file
_ARGUMENT = re.compile(r"(?<![\w.'\"=\[(-])([a-z]\w+)=((?!=)[\w'.-]*)")
_NAME = re.compile(r"(?<![\w.'\"=\[(-])[a-z]+(?:_[a-z]+)+\b(?![\w.'\"=(\]])")

_here: ContextVar[frozenset[str] | None] = ContextVar("pyro_scvi_options", default=None)
"""Names of the options of the command that runs."""


@contextmanager
def options_of(command: Any) -> Iterator[None]:
    """Let messages of the block be those of a command, which says of other options whose they are."""
    token = _here.set(names_of(command))
    try:
        yield
    finally:
        _here.reset(token)


def names_of(command: Any) -> frozenset[str]:
    """Names of the options of a command, as its function has them."""
    return frozenset(each.name for each in command.params if each.opts[0].startswith("--"))


def on_the_command_line(text: str) -> str:
    """A message that names options of the commands; one line."""
    for pattern, option in _SENTENCES:
        text = re.sub(pattern, option, text)
    parts, place = list[str](), 0
    for code in _CODE.finditer(text):
        parts += [_in_options(text[place : code.start()]), code[0]]
        place = code.end()
    return " ".join("".join([*parts, _in_options(text[place:])]).split())


def _in_options(text: str) -> str:
    """Arguments of a text without code as options."""
    text = re.sub(r"\b([Pp])ass (\w+=True)\b", lambda found: ("Add " if found[1] == "P" else "add ") + found[2], text)
    return _NAME.sub(_named, _ARGUMENT.sub(_option, text))


def _option(found: re.Match[str]) -> str:
    name, value = found[1], found[2]
    stop = "." if value.endswith(".") else ""
    value = value.removesuffix(".").strip("'")
    here = _here.get()
    whose = "" if here is None or name in here or name not in _of_fit() else " of the command fit"
    return f"--{name.replace('_', '-')}{'' if value in ('', 'True') else ' ' + value}{whose}{stop}"


def _named(found: re.Match[str]) -> str:
    """An option of the command that runs, where a message begins with the name of an argument."""
    here = _here.get() or frozenset()
    return f"--{found[0].replace('_', '-')}" if found[0] in here else found[0]


def _of_fit() -> frozenset[str]:
    from pyro_scvi.cli import loaded  # takes a second, which only such messages need

    return names_of(loaded("fit"))
