"""Reading files that somebody else may have put there."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path


def regular_bytes(path: Path) -> bytes:
    """Content of a regular file: a pipe or a device would hang, or never end.

    Raises
    ------
    OSError
        If it is none, or cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    with open(descriptor, "rb") as file:
        return file.read()


_LONGEST = 200  # bytes; systems allow 255, and endings come to a name


def short_name(path: Path) -> str:
    """The last part of a path, for the names of files that are made beside it: a long one is cut, with a digest."""
    name = path.name
    if len(os.fsencode(name)) <= _LONGEST:
        return name
    return f"{name[:32]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:16]}"


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to the disk, on systems that can."""
    if os.name == "posix":
        sync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lies_in(path: Path, given: Path) -> bool:
    """Whether a path leads to a file or folder that is ``given``, or inside of it, by whatever links."""
    place, home = Path(os.path.realpath(path)), Path(os.path.realpath(given))
    same = os.path.exists(place) and os.path.exists(home) and os.path.samefile(place, home)
    return same or place.is_relative_to(home)


def files_under(folder: Path) -> Iterator[tuple[Path, str | None]]:
    """Every file under a folder; with each what it is, if it would be read from elsewhere or never end.

    Those are links out of the folder or to nowhere, pipes and devices. Links are not followed, so that none leads
    round in a circle.
    """
    home, waiting = folder.resolve(), [folder]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(path)
                elif entry.is_symlink():
                    target = Path(os.path.realpath(path))
                    inside = target.is_relative_to(home) and (target.is_file() or target.is_dir())
                    yield path, None if inside else f"a link to {target}"
                else:
                    yield path, None if entry.is_file(follow_symlinks=False) else "a pipe or a device"
