"""Groups within groups of an HDF5 file: anndata reads them as deep, and as often, as the links of the file say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py

DEEPEST = 64  # anndata calls itself for each group, and Python ends at about 200
FEW, OFTEN = 1000, 10  # so many objects may always be read, and each of a file so many times on average


class NestingError(ValueError):
    """A file whose groups have no end, or nearly none."""


class Parts(NamedTuple):
    """What is read of a group: levels below it and with it, and objects, each as often as a link leads to it."""

    levels: int
    objects: int


def require_an_end(path: Path) -> None:
    """Refuse a file with groups that lie in themselves, are nested deeply, or double from level to level.

    Links are followed: those to other files have to be looked at before. A file that is no HDF5 file passes.

    Raises
    ------
    NestingError
        If there is such a group; names it, or the file.
    """
    try:
        file = h5py.File(path, "r")
    except OSError:
        return
    with file:
        known: dict[tuple[int, int], Parts] = {}
        objects = _parts(file, "", (), known, path).objects
    if objects > max(FEW, OFTEN * len(known)):
        raise NestingError(f"the links of {path} repeat its {len(known)} objects, so that {objects} would be read")


def _parts(
    item: Any, name: str, above: tuple[tuple[int, int], ...], known: dict[tuple[int, int], Parts], path: Path
) -> Parts:
    place = _place(item)
    if place in above:
        raise NestingError(f"{_short(name)} of {path} is a link to a group that it lies in")
    if len(above) + (known[place].levels if place in known else 1) > DEEPEST:
        raise NestingError(f"{_short(name)} of {path} lies in or holds more than {DEEPEST} groups, each in the other")
    if place not in known:
        below = [_parts(part, f"{name}/{key}".lstrip("/"), (*above, place), known, path) for key, part in _opened(item)]
        levels = max((part.levels for part in below), default=0)
        known[place] = Parts(1 + levels, 1 + sum(part.objects for part in below))
    return known[place]


def _place(item: Any) -> tuple[int, int]:
    found = h5py.h5o.get_info(item.id)
    return found.fileno, found.addr


def _opened(item: Any) -> Iterator[tuple[str, Any]]:
    """The parts of a group; links to nowhere are left to whoever reads them."""
    for name in item if isinstance(item, h5py.Group) else ():
        try:
            part = item[name]
        except (KeyError, OSError, RuntimeError, TypeError, ValueError):
            continue
        yield name, part


def _short(name: str) -> str:
    return name if len(name) <= 80 else f"{name[:80]}..."
