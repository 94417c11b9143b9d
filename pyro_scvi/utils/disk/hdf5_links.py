"""Links out of an HDF5 file: whoever reads such a file reads other files as well, wherever they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np


class NameNotText(ValueError):
    """A name that is not text: what lies behind it cannot be looked at."""


class Link(NamedTuple):
    """A place in a file whose content is in another one."""

    file: Path
    name: str
    target: Path

    @property
    def beside(self) -> bool:
        """Whether the other file is in the folder of this one, or below it."""
        return self.target.is_relative_to(self.file.parent.resolve()) and self.target.is_file()


def links_out_of(path: Path) -> list[Link]:
    """Links to other files, also those in files beside that this one links to; [] if it is no HDF5 file.

    Raises
    ------
    NameNotText
        If there is a name that is none.
    """
    found: list[Link] = []
    seen, waiting = set(), [path.absolute()]
    while waiting:
        file = waiting.pop()
        seen.add(file.resolve())
        links = list(_links(file))
        found += links
        waiting += [link.target for link in links if link.beside and link.target not in seen]
    return found


def _links(path: Path) -> Iterator[Link]:
    try:
        file = h5py.File(path, "r")
    except OSError:
        return
    with file:
        waiting: list[tuple[str, Any]] = [("", file)]
        seen = set()
        while waiting:
            at, item = waiting.pop()
            place = h5py.h5o.get_info(item.id).addr
            if place in seen:
                continue
            seen.add(place)
            for target in _targets(item):
                if target != ".":  # a virtual array of this file's own
                    yield Link(path, at, (path.parent / target).resolve())
            for name, link in _members(item, path):
                inside = f"{at}/{name}".removeprefix("/")
                if isinstance(link, h5py.ExternalLink):
                    yield Link(path, inside, (path.parent / link.filename).resolve())
                elif isinstance(link, h5py.HardLink):
                    waiting.append((inside, item[name]))
            # An object may have no name of its own: anndata opens categories by a reference in an attribute.
            waiting += [(f"{at} by its attribute {name!r}", other) for name, other in _referenced(item)]


def _members(item: Any, path: Path) -> Iterator[tuple[str, Any]]:
    """Names and links of a group. They are not followed: opening an object would follow its link."""
    for raw in item.id if isinstance(item, h5py.Group) else ():
        name = _text(raw, path)
        yield name, item.get(name, getlink=True)


def _text(name: str | bytes, path: Path) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else name
    except UnicodeDecodeError as error:
        raise NameNotText(f"the name {name!r} in {path} is not text in UTF-8") from error


def _targets(item: Any) -> list[str]:
    """Other files that an array needs: by a virtual array or values outside."""
    if not isinstance(item, h5py.Dataset):
        return []
    virtual = [source.file_name for source in item.virtual_sources()] if item.is_virtual else []
    return [*virtual, *(part[0] for part in item.external or ())]


def _referenced(item: Any) -> Iterator[tuple[str, Any]]:
    """Objects that references in attributes of an object lead to, by the attribute's name."""
    for name in item.attrs:
        if not _holds_references(item.attrs, name):
            continue
        for reference in np.ravel(np.asarray(item.attrs[name], object)):
            if reference:
                yield name, item.file[reference]


def _holds_references(attributes: Any, name: str) -> bool:
    try:
        return h5py.check_ref_dtype(attributes.get_id(name).dtype) is not None
    except TypeError:  # of a kind that h5py cannot read, nor can anndata
        return False
