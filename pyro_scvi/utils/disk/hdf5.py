"""HDF5 files on disks that may be full: every error is raised, and none reaches the library.

HDF5 drops errors that come while an array is closed, which loses its rows in silence, and may crash after any of them.
So it writes through a file that takes everything, keeps the first error to itself, and raises it at the end.
"""

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py

_PAGE = 4096
_LARGEST_TABLE = 2**20


@contextmanager
def written(path: Path, mode: Literal["w", "r+"]) -> Iterator[h5py.File]:
    """A file to write; at the end of the block all of it is on the disk.

    Raises
    ------
    OSError
        If a part could not be written. What is in the file is of no use then.
    """
    with _Written(path, {"w": "w+b", "r+": "r+b"}[mode]) as disk:
        try:
            with h5py.File(disk, mode) as file:
                yield file
        except Exception as error:  # HDF5 may have read what it could not write
            raise disk.error or error from error
        if disk.error is None:
            os.fsync(disk.fileno())
    if disk.error is not None:
        raise disk.error


class _Written(io.FileIO):
    """A file that keeps its first error, and says that all went well.

    HDF5 crashes if it reads back other tables than it wrote. What is written after the error is kept in memory for
    that, as pages by number, but for pieces so large that they hold values.
    """

    def __init__(self, path: Path, mode: str) -> None:
        super().__init__(path, mode)
        self.error: OSError | None = None
        self.pages: dict[int, bytearray] = {}

    def write(self, content: Any, /) -> int:
        """Write all of it."""
        whole = memoryview(content).cast("B")
        at = self.tell()
        try:
            left = whole
            while self.error is None and len(left):  # the system may take a part only
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        if self.error is not None and len(whole) <= _LARGEST_TABLE:
            for page, inside, part in _pieces(at, len(whole)):
                self.pages.setdefault(page, bytearray(self._read(page * _PAGE, _PAGE)))[inside] = whole[part]
        return len(whole)

    def readinto(self, buffer: Any, /) -> int:
        """Read as if all had been written."""
        target = memoryview(buffer).cast("B")
        if self.error is None:
            return super().readinto(target) or 0
        at = self.tell()
        target[:] = self._read(at, len(target))
        for page, inside, part in _pieces(at, len(target)):
            if page in self.pages:
                target[part] = self.pages[page][inside]
        return len(target)

    def _read(self, at: int, size: int) -> bytes:
        return os.pread(self.fileno(), size, at).ljust(size, b"\0")

    def truncate(self, size: int | None = None, /) -> int:
        """Change the size."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return size or 0


def _pieces(at: int, size: int) -> Iterator[tuple[int, slice, slice]]:
    """Pages that a piece of a file covers: number, where it is inside the page, and where in the piece that is."""
    for page in range(at // _PAGE, -(-(at + size) // _PAGE)):
        first, last = max(at, page * _PAGE), min(at + size, (page + 1) * _PAGE)
        yield page, slice(first - page * _PAGE, last - page * _PAGE), slice(first - at, last - at)
