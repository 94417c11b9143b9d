"""Messages of the commands: notes, errors in one line, and no byte that a terminal would obey."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from pyro_scvi.errors import PyroScviError


def printable(text: str) -> str:
    """The text with control characters spelled out: names from a file could rename or recolour a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(text: str) -> None:
    """Print a line."""
    typer.echo(printable(text))


def note(text: str) -> None:
    """Print a line for the user's attention, beside the results."""
    typer.echo(f"note: {printable(text)}", err=True)


def notes_of(caught: list[warnings.WarningMessage]) -> list[str]:
    """Every warning once, without its line of code."""
    return list(dict.fromkeys(str(one.message) for one in caught if one.category is UserWarning))


@contextmanager
def reporting(result: Path) -> Iterator[list[warnings.WarningMessage]]:
    """Errors that a user can mend end as one line and exit code 1; warnings become notes."""
    with errors_in_one_line(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught
    for text in notes_of(caught):
        note(text)
    say(f"wrote {result}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that a user can mend end as one line and exit code 1."""
    try:
        yield
    except (PyroScviError, OSError, ImportError, MemoryError) as error:
        typer.echo(f"error: {printable(' '.join(str(error).split()))}", err=True)
        raise typer.Exit(1) from error
