"""Files of results that are filled block by block: their space, their arrays, and what is on the disk for certain."""

import errno
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import brief, warn
from pyro_scvi.utils.disk import hdf5
from pyro_scvi.utils.disk.files import sync
from pyro_scvi.utils.disk.locks import only_writer
from pyro_scvi.utils.disk.temporary import leftovers, new_temporary, one_file_spare, remove
from pyro_scvi.utils.disk.zarr_groups import writes_ended, zarr_group

Mode = Literal["r", "r+", "w"]
_TABLES = 2**16  # bytes that HDF5 may add to its tables beside the arrays


class Format(ABC):
    """A file format of AnnData: ``shared`` says whether several processes may write into one file.

    Values are written by :meth:`put` and read back by :meth:`get`, which asks the file, not a cache of the library.
    """

    shared: bool
    layout: str
    """How arrays lie in the file; results of another layout are not continued."""

    @abstractmethod
    def opened(self, path: Path, mode: Mode) -> AbstractContextManager[Any]:
        """The root group."""

    @abstractmethod
    def in_memory(self) -> AbstractContextManager[Any]:
        """A root group that is on no disk."""

    @abstractmethod
    def make(self, group: Any, name: str, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> Any:
        """An array for blocks of so many rows, empty: NaN or False."""

    @abstractmethod
    def as_made(self, array: Any, rows: int) -> bool:
        """Whether values of an array lie as :meth:`make` lays them; a file written anew may have another layout."""

    @abstractmethod
    def put(self, group: Any, place: str, rows: slice, values: np.ndarray) -> None:
        """Write rows of an array, and wait until they are on the disk."""

    @abstractmethod
    def get(self, group: Any, place: str, rows: slice) -> np.ndarray:
        """Rows of an array as the file holds them."""

    @abstractmethod
    def alone(self, path: Path) -> AbstractContextManager[None]:
        """Keep other writers out, where only one may write."""

    @abstractmethod
    def reserve(self, path: Path) -> None:
        """Reserve the space of all arrays on the disk."""

    def add(self, group: Any, name: str, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> None:
        """Add an empty array with the attributes by which anndata recognises one."""
        array = self.make(group, name, dtype, shape, rows)
        array.attrs["encoding-type"], array.attrs["encoding-version"] = "array", "0.2.0"


class _Zarr(Format):
    """A folder in which every block of an array is a file, which zarr replaces at once."""

    shared, layout = True, "chunks"

    @contextmanager
    def opened(self, path: Path, mode: Mode) -> Iterator[Any]:
        group = zarr_group(path, mode, zarr_format=2)
        with writes_ended():
            yield group

    @contextmanager
    def in_memory(self) -> Iterator[Any]:
        with writes_ended():
            yield zarr_group({}, "w", zarr_format=2)

    def make(self, group: Any, name: str, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> Any:
        chunks = (rows, *shape[1:])
        return group.create_array(name, shape=shape, dtype=dtype, chunks=chunks, fill_value=_empty(dtype))

    def as_made(self, array: Any, rows: int) -> bool:
        return bool(tuple(array.chunks) == (rows, *array.shape[1:]))

    def put(self, group: Any, place: str, rows: slice, values: np.ndarray) -> None:
        array = group[place]
        array[rows] = values
        number = rows.start // array.chunks[0]
        chunk = array.store_path.store.root / array.path / ".".join(["0"] * array.ndim)
        written = chunk.with_name(".".join([str(number), *["0"] * (array.ndim - 1)]))
        if written.exists():  # zarr makes no file for a block of nothing but NaN
            sync(written)

    def get(self, group: Any, place: str, rows: slice) -> np.ndarray:
        return np.asarray(group[place][rows])

    @contextmanager
    def alone(self, path: Path) -> Iterator[None]:
        """Let others write as well; afterwards name what was left by one that was killed while it made the folder."""
        yield
        for folder in leftovers(path, path.parent):
            warn(
                f"{folder} was left by a run that was stopped, unless one has just begun elsewhere; it holds no "
                "results: delete it"
            )

    def reserve(self, path: Path) -> None:
        """Warn where there may be too little: how small its blocks become is known once they are compressed.

        A block without room is not marked as done.
        """
        with self.opened(path, "r") as group:
            arrays = [item for _, item in group.members(max_depth=None) if hasattr(item, "nbytes")]
            left = sum(array.nbytes * (1 - array.nchunks_initialized / array.nchunks) for array in arrays if array.size)
        free = shutil.disk_usage(path).free
        if left > free:
            warn(
                f"the results in {path} may take {left / 1e9:.3g} GB more, before compression, and its disk has "
                f"{free / 1e9:.3g} GB left. If the disk is full, the run stops after a block; make room and "
                "repeat the call to continue."
            )


class _HDF5(Format):
    """A file whose arrays get their space before the first result, each in one piece.

    HDF5 loses rows in silence when a disk is full while it closes an array, and its tables are torn if it is killed
    while it writes them. So nothing is written through it after the file was made: results go straight to their bytes.
    """

    shared, layout = False, "in one piece"

    def opened(self, path: Path, mode: Mode) -> AbstractContextManager[Any]:
        return hdf5.written(path, "w") if mode == "w" else h5py.File(path, mode)

    def in_memory(self) -> AbstractContextManager[Any]:
        return h5py.File("memory", "w", driver="core", backing_store=False)

    def make(self, group: Any, name: str, dtype: np.dtype, shape: tuple[int, ...], rows: int) -> Any:
        return group.create_dataset(name, shape, dtype, fillvalue=_empty(dtype))

    def as_made(self, array: Any, rows: int) -> bool:
        return array.chunks is None and not array.external and not array.is_virtual

    def put(self, group: Any, place: str, rows: slice, values: np.ndarray) -> None:
        if not group[place].nbytes:
            return
        path, offset, dtype = _bytes_of(group[place], rows)
        content = np.ascontiguousarray(values, dtype).tobytes()
        file = os.open(path, os.O_WRONLY)
        try:
            written = 0
            while written < len(content):  # a signal or a limit may cut a call short
                written += os.pwrite(file, content[written:], offset + written)
            os.fsync(file)
        finally:
            os.close(file)

    def get(self, group: Any, place: str, rows: slice) -> np.ndarray:
        array = group[place]
        shape = (rows.stop - rows.start, *array.shape[1:])
        if not array.nbytes:  # HDF5 gives no place to an array of no columns
            return np.empty(shape, array.dtype)
        path, offset, dtype = _bytes_of(array, rows)
        found = np.fromfile(path, dtype, int(np.prod(shape)), offset=offset)
        if found.size < np.prod(shape):
            raise OSError(errno.EIO, f"{path} ends before the rows {rows.start} to {rows.stop} of {place}")
        return found.reshape(shape)

    def alone(self, path: Path) -> AbstractContextManager[None]:
        return _only_writer(path)

    def reserve(self, path: Path) -> None:
        """Write NaN into every array, in a copy that replaces the file: at every moment the file is whole."""
        with h5py.File(path, "r") as file:
            missing = sum(array.nbytes + _TABLES for array in _without_space(file))
        if not missing:
            return
        with temporary_folder(path) as folder:
            copy = folder / path.name
            shutil.copyfile(path, copy)
            _allocate(copy, missing)
            with hdf5.written(copy, "r+") as file:
                for array in _without_space(file):
                    array[:1] = array.fillvalue  # HDF5 fills the rest as well
            copy.replace(path)


def _empty(dtype: np.dtype) -> Any:
    return False if dtype.kind == "b" else np.nan


def _bytes_of(array: h5py.Dataset, rows: slice) -> tuple[str, int, np.dtype]:
    """File, position and type of rows of an array that lies in one piece."""
    row = array.dtype.itemsize * int(np.prod(array.shape[1:]))
    return array.file.filename, array.id.get_offset() + rows.start * row, array.dtype


def _without_space(file: h5py.File) -> list[h5py.Dataset]:
    """Arrays of a file that have a size and no bytes yet."""
    found: list[h5py.Dataset] = []

    def note(_: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset) and item.nbytes and not item.chunks and not item.id.get_storage_size():
            found.append(item)

    file.visititems(note)
    return found


def _allocate(path: Path, more: int) -> None:
    """Let a file own so many more bytes of the disk; HDF5 gives back what it does not use."""
    if not hasattr(os, "posix_fallocate"):  # macOS: a full disk is noticed when HDF5 fills the arrays
        return
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size + more)


@contextmanager
def _only_writer(path: Path) -> Iterator[None]:
    try:
        with only_writer(path):
            for folder in leftovers(path, path.parent):  # of a process that was killed; it holds no results
                remove(folder)
            yield
    except BlockingIOError as error:
        raise DataError(f"{path} is locked: {error}") from error


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """A hidden folder on the disk of a path, deleted afterwards."""
    with ExitStack() as afterwards, one_file_spare():
        folder = new_temporary(path, path.parent)
        afterwards.callback(remove, folder)
        yield folder


@contextmanager
def reached(kind: Format, path: Path, mode: Mode) -> Iterator[Any]:
    """The root group; a locked or read-only file raises an error of its own."""
    with ExitStack() as stack:
        try:
            group = stack.enter_context(kind.opened(path, mode))
        except OSError as error:
            if error.errno is None or isinstance(error, FileNotFoundError | NotADirectoryError):
                raise DataError(something_else(path, error)) from error
            raise DataError(f"{path} cannot be opened: {error}") from error
        yield group


def something_else(path: Path, error: Exception) -> str:
    """Message for a file that does not hold results."""
    reason = " ".join(str(error).split())[:200]
    return f"{path} holds something else than results of ps.shards.write ({reason}); choose another path"


_FORMATS: dict[str, Format] = {".zarr": _Zarr(), ".h5ad": _HDF5()}


def format_of(path: Any) -> Format:
    """The format that the end of a name stands for.

    Raises
    ------
    DataError
        If it stands for none.
    """
    suffix = Path(path).suffix if isinstance(path, str | Path) else None
    if suffix not in _FORMATS:
        given = brief(path) if suffix is None else path
        raise DataError(f"path must end in {' or '.join(_FORMATS)}, got {given}")
    return _FORMATS[suffix]
