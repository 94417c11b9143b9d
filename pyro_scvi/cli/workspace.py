"""Output folders and files: written completely or not at all, inputs never touched, errors in one line."""

import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import typer

from pyro_scvi.cli.wording import on_the_command_line
from pyro_scvi.errors import PyroScviError
from pyro_scvi.persistence.archive import CONFIG

FIT, PAGE = "fit", "index.html"
STEPS, WRITTEN = "steps", "written.json"


@dataclass(frozen=True)
class Workspace:
    """A folder or file being written, and the warnings raised meanwhile."""

    path: Path
    caught: list[warnings.WarningMessage]

    @property
    def notes(self) -> list[str]:
        """Every warning once, without its line of code."""
        texts = (str(note.message) for note in self.caught if note.category is UserWarning)
        return list(dict.fromkeys(map(on_the_command_line, texts)))


@contextmanager
def new_folder(out: Path, results: tuple[str, ...], force: bool, source: Path | None = None) -> Iterator[Workspace]:
    """A folder to fill, whose content moves into ``out`` at the end, or not at all.

    ``results`` are files in it that must not be ``source`` and must not replace other things.
    """
    with reporting(out / PAGE) as caught:
        _check_source(source)
        _check_folder(out, results, force, source)
        with _beside(out) as temporary:
            space = Workspace(temporary / "new", caught)
            space.path.mkdir()
            yield space
            _publish(space.path, out, temporary)


@contextmanager
def new_file(out: Path, force: bool, source: Path) -> Iterator[Workspace]:
    """A file to write, which becomes ``out`` at the end, or not at all."""
    with reporting(out) as caught:
        _check_source(source)
        _check_file(out, force, source)
        with _beside(out) as temporary:
            space = Workspace(temporary / out.name, caught)
            yield space
            space.path.replace(out)


@contextmanager
def resumable_folder(out: Path, results: Iterable[str]) -> Iterator[Workspace]:
    """A folder to fill, whose content moves into ``out`` at the end; finished steps survive an interruption.

    ``results`` are files that will be written. Those of an earlier run are replaced, unless somebody changed them: a
    file is ours if its hash is among those in ``out / STEPS / WRITTEN``.
    """
    with reporting(out / PAGE) as caught:
        _check_resumable(out)
        _check_ours(out, results)
        (out / STEPS).mkdir(parents=True, exist_ok=True)
        with _beside(out) as temporary:
            space = Workspace(temporary / "new", caught)
            space.path.mkdir()
            yield space
            made = sorted(space.path.iterdir())
            _check_ours(out, [file.name for file in made])
            hashes = sorted(_written(out) | set(map(_digest, made)))
            (temporary / WRITTEN).write_text(json.dumps(hashes, indent=1))
            (temporary / WRITTEN).replace(out / STEPS / WRITTEN)
            _publish(space.path, out, temporary)


@contextmanager
def reporting(result: Path) -> Iterator[list[warnings.WarningMessage]]:
    """Errors that a user can mend end as one line and exit code 1; warnings become notes."""
    with errors_in_one_line(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield caught
    for note in Workspace(result, caught).notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {result}")


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """Errors that a user can mend end as one line and exit code 1."""
    try:
        yield
    except (PyroScviError, OSError, ImportError, MemoryError) as error:
        typer.echo(f"error: {on_the_command_line(str(error))}", err=True)
        raise typer.Exit(1) from error


@contextmanager
def _beside(out: Path) -> Iterator[Path]:
    """A temporary folder on the same disk, so that a rename moves its content."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        yield Path(temporary)


def _check_source(source: Path | None) -> None:
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")


def _check_folder(out: Path, results: tuple[str, ...], force: bool, source: Path | None) -> None:
    """Raise, before computing anything, if results could not be written or would overwrite something else."""
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; pass a folder as --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; pass another --out, or --force to replace earlier results in it")
    for result in results:
        if source is not None and (out / result).exists() and (out / result).samefile(source):
            raise FileExistsError(f"{out / result} is the input, which is never written; pass another --out")
    if (out / CONFIG).exists() or ((out / FIT).exists() and FIT not in results):
        raise FileExistsError(f"{out} holds a fit, whose page would be overwritten; pass another --out")
    if (out / FIT).exists() and not (out / FIT / CONFIG).is_file():
        raise FileExistsError(f"{out / FIT} is no saved fit and would be overwritten; pass another --out")


def _check_resumable(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; pass a folder as --out")
    if out.is_dir() and any(out.iterdir()) and not (out / STEPS).is_dir():
        raise FileExistsError(f"{out} is not empty and holds no earlier run; pass another --out")


def _check_ours(out: Path, results: Iterable[str]) -> None:
    written = _written(out)
    for result in results:
        path = out / result
        if os.path.lexists(path) and not (path.is_file() and _digest(path) in written):
            raise FileExistsError(f"{path} is not as an earlier run wrote it; move it away or pass another --out")


def _written(out: Path) -> set[str]:
    """Hashes of all that earlier runs have written."""
    path = out / STEPS / WRITTEN
    return set(json.loads(path.read_text())) if path.is_file() else set()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_file(out: Path, force: bool, source: Path) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; pass a file as --out")
    if out.exists() and out.samefile(source):
        raise FileExistsError(f"{out} is the input, which is never written; pass another --out")
    if os.path.lexists(out) and not force:  # a link that leads nowhere is somebody's too
        raise FileExistsError(f"{out} exists; pass another --out, or --force to replace it")


def _publish(folder: Path, out: Path, temporary: Path) -> None:
    """Move every result into place; replaced files are deleted with the temporary folder."""
    replaced = temporary / "replaced"
    replaced.mkdir()
    out.mkdir(exist_ok=True)
    for result in sorted(folder.iterdir()):
        if (out / result.name).exists():
            (out / result.name).rename(replaced / result.name)
        result.rename(out / result.name)
