"""The command line: fit a model to a data set, then embed, impute and compare cells, with files as results."""

import os
import sys
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from pyro_scvi.utils.unloaded import docstring, imported

COMMANDS = {
    "demo": "training",
    "fit": "training",
    "embed": "apply",
    "impute": "apply",
    "de": "de",
    "infer": "sharding",
    "store": "storing",
    "paper": "paper",
}
"""Commands, and the module of this folder that holds each."""

HELP = "scVI as a Pyro program: fit single-cell counts, then embed, impute and compare cells."
STYLE: dict[str, Any] = {
    "add_completion": False,
    "pretty_exceptions_enable": False,
    "rich_markup_mode": None,  # markup would take the brackets of E[w | x] for a style, and leave them out
}


class Commands(TyperGroup):
    """Commands whose modules are imported when one of them is called: what they need takes seconds to import."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {
            name: TyperCommand(name, help=docstring(f"{__name__}.{module}", name), rich_markup_mode=None)
            for name, module in COMMANDS.items()
        }

    def main(self, *args: Any, **settings: Any) -> Any:
        """Run a command, where it has the streams and the working directory that all of them need."""
        _open_streams()
        try:
            os.getcwd()
        except OSError:
            typer.echo("error: the working directory is gone; change to one that exists", err=True)
            sys.exit(1)
        return super().main(*args, **settings)

    def list_commands(self, ctx: Any) -> list[str]:
        """Names of the commands, in the order in which one meets them."""
        return list(COMMANDS)

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """The command that is called, with its options."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, None if command is None else loaded(str(command.name)), rest


def _open_streams() -> None:
    """Open what a daemon has closed: else files would get these numbers, and messages be written into results."""
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def loaded(name: str) -> Any:
    """A command with its options."""
    recorded = imported(f"{__name__}.options", "Recorded")
    alone = typer.Typer(**STYLE)
    alone.command(name, cls=recorded)(imported(f"{__name__}.{COMMANDS[name]}", name))
    return typer.main.get_command(alone)


app = typer.Typer(name="pyro-scvi", cls=Commands, help=HELP, no_args_is_help=True, **STYLE)


@app.callback()
def _together() -> None:
    pass
