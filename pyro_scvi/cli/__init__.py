"""The command line: fit a model to a data set, then embed, impute and compare cells, with files as results."""

import typer

from pyro_scvi.cli import apply, de, paper, sharding, storing, training
from pyro_scvi.cli.options import Recorded

COMMANDS = (
    training.demo,
    training.fit,
    apply.embed,
    apply.impute,
    de.de,
    sharding.infer,
    storing.store,
    paper.paper,
)

app = typer.Typer(
    name="pyro-scvi",
    help="scVI as a Pyro program: fit single-cell counts, then embed, impute and compare cells.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # markup would take the brackets of E[w | x] for a style, and leave them out
)

for command in COMMANDS:
    app.command(cls=Recorded)(command)
