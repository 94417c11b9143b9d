"""Messages of the commands: notes, errors in one line, and no byte that a terminal would obey."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import typer

from pyro_scvi.cli.wording import on_the_command_line
from pyro_scvi.errors import PyroScviError
from pyro_scvi.training.signals import sigterm_raises
from pyro_scvi.utils.out_of_memory import is_out_of_memory

_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS}
_MEMORY = "there is not enough memory; lower --batch-size, --block or --samples, or pass fewer cells or genes"


def printable(text: str) -> str:
    """The text with control characters spelled out: names from a file could rename or recolour a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def say(text: str) -> None:
    """Print a line."""
    _print(text, err=False)


def note(text: str) -> None:
    """Print a line for the user's attention, beside the results."""
    _print(f"note: {text}", err=True)


def notes_of(caught: list[warnings.WarningMessage]) -> list[str]:
    """Every warning once, without its line of code."""
    texts = (str(one.message) for one in caught if one.category is UserWarning)
    return list(dict.fromkeys(map(on_the_command_line, texts)))


@contextmanager
def reporting(result: Path) -> Iterator[list[warnings.WarningMessage]]:
    """As :func:`told_of`, and at the end a line that says what was written."""
    with told_of(result) as caught:
        yield caught
    say(f"wrote {result}")


@contextmanager
def told_of(result: Path) -> Iterator[list[warnings.WarningMessage]]:
    """Errors that a user can mend end as one line and exit code 1; warnings become notes."""
    with errors_in_one_line(), warnings_as_notes() as caught, _place_told(result):
        yield caught


@contextmanager
def _place_told(result: Path) -> Iterator[None]:
    """Errors of a disk name the result where they name no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS or error.filename is not None:
            raise
        raise OSError(f"{result} could not be written: {error}") from error


@contextmanager
def warnings_as_notes() -> Iterator[list[warnings.WarningMessage]]:
    """Warnings of the block are said after it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught
    for text in notes_of(caught):
        note(text)


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that a user can mend end as one line and exit code 1."""
    try:
        with sigterm_raises():
            yield
    except (PyroScviError, OSError, ImportError, MemoryError) as error:
        raise _told((str(error) or type(error).__name__) + _of_no_folder(error)) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise _told(f"{_MEMORY} ({str(error).splitlines()[0]})") from error


def _of_no_folder(error: BaseException) -> str:
    """What to say beside an error of relative paths, if the working directory was deleted."""
    if isinstance(error, FileNotFoundError):
        try:
            os.getcwd()
        except OSError:
            return "; the working directory is gone: change to one that exists"
    return ""


def _told(text: str) -> typer.Exit:
    _print(f"error: {on_the_command_line(text)}", err=True)
    return typer.Exit(1)


def _print(text: str, *, err: bool) -> None:
    """Print a line, unless nobody can read it: a terminal that is gone or a full log must not cost the results."""
    with suppress(OSError):
        typer.echo(printable(text), err=err)
