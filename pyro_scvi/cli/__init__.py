"""The command line: fit a model to a data set, ask the fit, and leave files to open and to go on from."""

import typer

from pyro_scvi.cli.comparing import de
from pyro_scvi.cli.options import Recorded
from pyro_scvi.cli.paper import paper
from pyro_scvi.cli.sharding import infer
from pyro_scvi.cli.storing import store
from pyro_scvi.cli.training import demo, fit
from pyro_scvi.cli.verbs import embed, impute

app = typer.Typer(
    name="pyro-scvi",
    help="scVI as a Pyro program: fit single-cell counts, then embed, impute and compare cells.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

for command in (demo, fit, embed, impute, de, infer, store, paper):
    app.command(cls=Recorded)(command)
