"""Zarr folders from strangers: files that are elsewhere or never end, and values that are Python objects."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pyro_scvi.errors import DataError
from pyro_scvi.utils.disk.files import files_under, regular_bytes
from pyro_scvi.utils.disk.unreadable import errors_named

_METADATA = {".zarray", ".zmetadata", "zarr.json"}
_PICKLES = {("id", "pickle"), ("name", "numcodecs.pickle")}


def check_zarr_folder(folder: Path) -> None:
    """Refuse a zarr folder that would have other files read, a pipe waited for, or objects unpickled.

    Raises
    ------
    DataError
        If there is such a file; names it.
    """
    for path, foreign in files_under(folder):
        if foreign is not None:
            raise DataError(f"{path} is {foreign}, which is not read; copy the values into {folder}")
        if path.name in _METADATA:
            _require_no_pickles(path)


def _require_no_pickles(path: Path) -> None:
    """Refuse arrays of pickled objects: older releases of numcodecs run the code that is in them."""
    with errors_named(str(path)):
        metadata = json.loads(regular_bytes(path))
    for codec in _mappings(metadata):
        if any(codec.get(key) == name for key, name in _PICKLES):
            raise DataError(f"{path} has pickled objects, which are not read: they can run code")


def _mappings(value: Any) -> Iterator[dict[str, Any]]:
    """All mappings in what JSON holds, however deep."""
    waiting = [value]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
