"""Locks: one process at a time writes to one place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyro_scvi.utils.disk.files import short_name

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]


@contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Hold the lock of a path, a hidden file beside it, while the block runs.

    The system drops the lock of a process that dies. File systems that know no locks are written to without one.

    Raises
    ------
    BlockingIOError
        If another process, or another thread of this one, holds the lock.
    OSError
        If nothing can be written there.
    """
    if fcntl is None:
        yield
        return
    file = _lock_file(path)
    descriptor = _locked(file, path)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # while it is still locked: nobody else can have taken it
        os.close(descriptor)


def lock_name(path: Path) -> str:
    """Name of the lock of a path, whose links were resolved."""
    return f".{short_name(path)}.lock"


def _lock_file(path: Path) -> Path:
    """Beside the path, or inside a folder whose parent cannot be written; the same one by whatever links one comes."""
    path = Path(os.path.realpath(path))
    inside = path.is_dir() and not os.access(path.parent, os.W_OK)
    return (path if inside else path.parent) / lock_name(path)


def _locked(file: Path, path: Path) -> int:
    """Descriptor of the lock file, locked."""
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BlockingIOError(f"another process is writing {path}; wait for it, or choose another path") from error
        except OSError:
            return descriptor
        if _is_at(file, descriptor):
            return descriptor
        os.close(descriptor)  # its last holder deleted it between the two calls


def _is_at(file: Path, descriptor: int) -> bool:
    """Whether a path still leads to an open file."""
    try:
        return os.path.samestat(os.stat(file), os.fstat(descriptor))
    except FileNotFoundError:
        return False
