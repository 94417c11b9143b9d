"""Damaged and hostile files: what libraries raise over them becomes an error that names the array and the file."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from pyro_scvi.errors import DataError, PyroScviError

_NOTED = re.compile(r"Error raised while \w+ key '(?P<key>.*)' of <.*> (?:from|to) (?P<path>.*)")


class _NoMemory(MemoryError):
    """A MemoryError that says which array was too large."""


@contextmanager
def errors_named(name: str, fault: str = "cannot be read", kind: type[PyroScviError] = DataError) -> Iterator[None]:
    """Let whatever h5py, zarr, anndata, SciPy and pandas raise in the block end as one error of the package.

    A damaged file makes them raise almost anything: KeyError, TypeError, RuntimeError, errors of their own.

    Raises
    ------
    PyroScviError
        Of the kind given; says ``name``, ``fault`` and the reason. Errors of the package pass unchanged.
    MemoryError
        If an array does not fit into memory; names it, too.
    """
    try:
        yield
    except (PyroScviError, _NoMemory):
        raise
    except MemoryError as error:
        raise _NoMemory(f"{name} does not fit into memory ({reason_of(error)})") from error
    except Exception as error:
        raise kind(f"{name} {fault}: {reason_of(error)}") from error


def reason_of(error: Exception) -> str:
    """The first line of an error, and the array at which anndata met it."""
    text = next(iter(str(error).splitlines()), type(error).__name__)
    noted = [found for note in getattr(error, "__notes__", ()) if (found := _NOTED.match(note))]
    return f"{text} (at {noted[0]['path'].rstrip('/')}/{noted[0]['key']})" if noted else text
