"""Temporary folders beside what they are for, under names by which those of killed processes are found."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pyro_scvi.utils.disk.files import short_name
from pyro_scvi.utils.disk.publishing import signals_deferred

_SUFFIX = ".partial"


def new_temporary(path: Path, within: Path) -> Path:
    """Make a hidden folder in ``within`` for something that will be called ``path``."""
    return Path(tempfile.mkdtemp(dir=within, prefix=f".{short_name(path)}.", suffix=_SUFFIX))


@contextmanager
def one_file_spare() -> Iterator[None]:
    """Hold a file open during the block: after it one can be opened, as deleting a folder needs, whatever else is open.

    Raises
    ------
    OSError
        If too many files are open already.
    """
    with open(os.devnull, "rb"):
        yield


def remove(folder: Path) -> None:
    """Delete a folder; a signal waits until all of it is gone."""
    with signals_deferred():
        shutil.rmtree(folder, ignore_errors=True)
        if folder.is_dir():  # too many files are open: it opens two for each level
            _remove_one_by_one(folder)


def _remove_one_by_one(folder: Path) -> None:
    """Delete a folder with one open file at a time."""
    with suppress(OSError):
        for parent, folders, files in os.walk(folder, topdown=False):
            for name in files:
                os.unlink(os.path.join(parent, name))
            for name in folders:
                path = os.path.join(parent, name)
                os.unlink(path) if os.path.islink(path) else os.rmdir(path)
        folder.rmdir()


def leftovers(path: Path, within: Path) -> list[Path]:
    """Folders that :func:`new_temporary` has made; those of processes that died, if no other one is writing."""
    return sorted(within.glob(f".{glob.escape(short_name(path))}.????????{_SUFFIX}"))
