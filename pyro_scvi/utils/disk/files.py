"""Reading files that somebody else may have put there."""

import errno
import os
import stat
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
