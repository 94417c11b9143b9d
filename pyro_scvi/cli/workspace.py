"""Output folders and files: written completely or not at all, what is finished stays, inputs are never touched."""

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from pyro_scvi.cli.messages import note, notes_of, reporting
from pyro_scvi.persistence.archive import CONFIG
from pyro_scvi.utils.disk.files import lies_in
from pyro_scvi.utils.disk.locks import lock_name, only_writer
from pyro_scvi.utils.disk.publishing import NotRolledBack, publish, rescue
from pyro_scvi.utils.disk.temporary import leftovers, new_temporary, one_file_spare, remove

FIT, PAGE = "fit", "index.html"
STEPS, WRITTEN = "steps", "written.json"
_NEW = "new"


@dataclass(frozen=True)
class Workspace:
    """A folder or file being written, where it will be, and the warnings raised meanwhile.

    ``kept`` names results that are finished whatever becomes of the others.
    """

    path: Path
    out: Path
    caught: list[warnings.WarningMessage]
    kept: list[str] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """Every warning once, without its line of code."""
        return notes_of(self.caught)

    def keep(self, name: str) -> None:
        """Keep a finished result, whatever happens from now on.

        It takes its place at once. Where an earlier one is in this place, that stays until all results are finished.
        """
        self.kept.append(name)
        if not os.path.lexists(self.out / name):
            self.out.mkdir(exist_ok=True)
            (self.path / name).rename(self.out / name)


def saved_in(folder: Path) -> Path | None:
    """The saved fit at a path, or in the folder ``fit`` there; None if there is none."""
    return next((place for place in (folder, folder / FIT) if (place / CONFIG).is_file()), None)


def require_apart(out: Path, *inputs: Path, fit: Path | None = None) -> None:
    """Refuse to write an input, or into one; ``fit`` is where a saved fit may be.

    Raises
    ------
    FileExistsError
        If ``out`` is one of the inputs or in it: a file, a store, a zarr folder or a saved fit; names it.
    """
    saved = None if fit is None else saved_in(fit)
    for given in (*inputs, *([] if saved is None else [saved])):
        if lies_in(out, given):
            what = "is the input" if lies_in(given, out) else f"is inside the input {given}"
            raise FileExistsError(f"{out} {what}, which is never written; pass another --out")


@contextmanager
def new_folder(
    out: Path, results: tuple[str, ...], force: bool, source: Path | None = None, fit: Path | None = None
) -> Iterator[Workspace]:
    """A folder to fill, whose content moves into ``out`` at the end, or not at all.

    ``results`` are files in it that must not be ``source`` and must not replace other things; ``fit`` is read, too.
    """
    with reporting(out / PAGE) as caught:
        _check_source(source)
        require_apart(out, *([] if source is None else [source]), fit=fit)
        _check_folder(out, results, force, source)
        with _temporary(out) as temporary:
            space = Workspace(temporary / _NEW, out, caught)
            space.path.mkdir()
            with _finished_results_kept(space):
                yield space
                _check_folder(out, results, force, source, space.kept)  # others may have come meanwhile
                publish(space.path, out, temporary)


@contextmanager
def new_file(out: Path, force: bool, *sources: Path, fit: Path) -> Iterator[Workspace]:
    """A file to write, which becomes ``out`` at the end, or not at all; ``sources`` and ``fit`` are never replaced."""
    with reporting(out) as caught:
        for source in sources:
            _check_source(source)
        require_apart(out, *sources, fit=fit)
        _check_file(out, force, sources)
        with _temporary(out) as temporary:
            space = Workspace(temporary / out.name, out, caught)
            yield space
            _check_file(out, force, sources)
            space.path.replace(out)


@contextmanager
def resumable_folder(out: Path, results: Iterable[str], source: Path) -> Iterator[Workspace]:
    """A folder to fill, whose content moves into ``out`` at the end; finished steps survive an interruption.

    ``results`` are files that will be written; ``source`` is the folder of the data. Those of an earlier run are
    replaced, unless somebody changed them: a file is ours if its hash is among those in ``out / STEPS / WRITTEN``.
    """
    with reporting(out / PAGE) as caught:
        if lies_in(out, source) and lies_in(source, out):
            raise FileExistsError(f"{out} is the folder of the data, which is never written; pass another --out")
        _check_resumable(out)
        _check_ours(out, results)
        (out / STEPS).mkdir(parents=True, exist_ok=True)
        with _temporary(out) as temporary:
            space = Workspace(temporary / _NEW, out, caught)
            space.path.mkdir()
            yield space
            made = sorted(space.path.iterdir())
            _check_ours(out, [file.name for file in made])
            hashes = sorted(_written(out) | set(map(_digest, made)))
            (temporary / WRITTEN).write_text(json.dumps(hashes, indent=1))
            (temporary / WRITTEN).replace(out / STEPS / WRITTEN)
            publish(space.path, out, temporary)


@contextmanager
def _temporary(out: Path) -> Iterator[Path]:
    """A temporary folder on the disk of ``out``, so that a rename moves its content; no other process writes there.

    It is inside a folder that exists: that may be a link, or a disk of its own, or in a place that cannot be written.
    """
    within = out if out.is_dir() else out.parent
    within.mkdir(parents=True, exist_ok=True)
    with only_writer(out):
        earlier = leftovers(out, within)
        for folder in earlier:
            note(f"{folder} was left by a run that was stopped{_finished_in(folder)}; move or delete it")
        try:
            with one_file_spare():
                yield new_temporary(out, within)
        except NotRolledBack:
            raise
        except BaseException:
            _remove_ours(out, within, earlier)
            raise
        _remove_ours(out, within, earlier)


def _remove_ours(out: Path, within: Path, earlier: list[Path]) -> None:
    """Delete the temporary folder, also one that a signal has left nameless just after it was made."""
    for folder in leftovers(out, within):
        if folder not in earlier:
            remove(folder)


def _finished_in(folder: Path) -> str:
    fit = folder / _NEW / FIT
    return f", and its fit is in {fit}" if (fit / CONFIG).is_file() else ""


@contextmanager
def _finished_results_kept(space: Workspace) -> Iterator[None]:
    """Whatever is raised in the block, results that were kept stay, and the user hears where."""
    try:
        yield
    except NotRolledBack:
        raise
    except BaseException:
        for name in space.kept:
            if os.path.lexists(space.path / name):  # with an earlier one in its place
                place = rescue(space.path / name, space.out)
                note(f"the new {name} is finished and in {place}; earlier results in {space.out} are as they were")
            else:
                note(f"the {name} is finished and in {space.out / name}; the other results are missing")
        raise


def _check_source(source: Path | None) -> None:
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")


def _check_folder(
    out: Path, results: tuple[str, ...], force: bool, source: Path | None, kept: Iterable[str] = ()
) -> None:
    """Raise, before computing anything, if results could not be written or would overwrite something else."""
    _require_folder(out)
    if not force and _holds_others(out, kept):
        raise FileExistsError(f"{out} is not empty; pass another --out, or --force to replace earlier results in it")
    for result in results:
        if source is not None and lies_in(source, out / result):
            verb = "is" if lies_in(out / result, source) else "holds"
            raise FileExistsError(f"{out / result} {verb} the input, which is never written; pass another --out")
    if (out / CONFIG).exists() or ((out / FIT).exists() and FIT not in results):
        raise FileExistsError(f"{out} holds a fit, whose page would be overwritten; pass another --out")
    if (out / FIT).exists() and not (out / FIT / CONFIG).is_file():
        raise FileExistsError(f"{out / FIT} is no saved fit and would be overwritten; pass another --out")


def _require_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; pass a folder as --out")
    if os.path.lexists(out) and not out.is_dir():
        raise FileExistsError(f"{out} is a link that leads nowhere; pass another --out")
    if out.is_dir() and not os.access(out, os.W_OK | os.X_OK):
        raise PermissionError(f"{out} cannot be written; pass another --out")


def _holds_others(out: Path, kept: Iterable[str]) -> bool:
    """Whether a folder holds more than ``kept`` results and the temporary folders of runs."""
    if not out.is_dir():
        return False
    ours = {*kept, *(folder.name for folder in leftovers(out, out)), lock_name(Path(os.path.realpath(out)))}
    return any(item.name not in ours for item in out.iterdir())


def _check_resumable(out: Path) -> None:
    _require_folder(out)
    if _holds_others(out, ()) and not (out / STEPS).is_dir():
        raise FileExistsError(f"{out} is not empty and holds no earlier run; pass another --out")


def _check_ours(out: Path, results: Iterable[str]) -> None:
    written = _written(out)
    for result in results:
        path = out / result
        if os.path.lexists(path) and not (path.is_file() and _digest(path) in written):
            raise FileExistsError(f"{path} is not as an earlier run wrote it; move it away or pass another --out")


def _written(out: Path) -> set[str]:
    """Hashes of all that earlier runs have written; none if their list is damaged, so that nothing is replaced."""
    path = out / STEPS / WRITTEN
    try:
        found = json.loads(path.read_text()) if path.is_file() else []
    except (ValueError, RecursionError):
        return set()
    return {text for text in found if isinstance(text, str)} if isinstance(found, list) else set()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_file(out: Path, force: bool, sources: Iterable[Path]) -> None:
    if out.is_dir():
        raise IsADirectoryError(f"{out} is a folder; pass a file as --out")
    if out.exists() and any(out.samefile(source) for source in sources):
        raise FileExistsError(f"{out} is the input, which is never written; pass another --out")
    if os.path.lexists(out) and not force:  # a link that leads nowhere is somebody's too
        raise FileExistsError(f"{out} exists; pass another --out, or --force to replace it")
