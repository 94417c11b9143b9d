"""Temporary folders beside what they are for, under names by which those of killed processes are found."""

import glob
import shutil
import tempfile
from pathlib import Path

from pyro_scvi.utils.disk.publishing import signals_deferred

_SUFFIX = ".partial"


def new_temporary(path: Path, within: Path) -> Path:
    """Make a hidden folder in ``within`` for something that will be called ``path``."""
    return Path(tempfile.mkdtemp(dir=within, prefix=f".{path.name}.", suffix=_SUFFIX))


def remove(folder: Path) -> None:
    """Delete a folder; a signal waits until all of it is gone."""
    with signals_deferred():
        shutil.rmtree(folder, ignore_errors=True)


def leftovers(path: Path, within: Path) -> list[Path]:
    """Folders that :func:`new_temporary` has made; those of processes that died, if no other one is writing."""
    return sorted(within.glob(f".{glob.escape(path.name)}.????????{_SUFFIX}"))
