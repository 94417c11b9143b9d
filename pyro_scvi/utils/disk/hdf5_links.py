"""Links out of an HDF5 file: whoever reads such a file reads other files as well, wherever they are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py


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
    ValueError
        If a name is not text: what lies behind it cannot be looked at.
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
        names: list[Any] = []
        file.id.links.visit(names.append)  # names only: opening an object would follow its link
        for name in (_text(raw, path) for raw in names):
            for target in _targets(file, name):
                if target != ".":  # a virtual array of this file's own
                    yield Link(path, name, (path.parent / target).resolve())


def _text(name: str | bytes, path: Path) -> str:
    try:
        return name.decode() if isinstance(name, bytes) else name
    except UnicodeDecodeError as error:
        raise ValueError(f"the name {name!r} in {path} is not text in UTF-8") from error


def _targets(file: h5py.File, name: str) -> list[str]:
    """Other files that an object needs: by an external link, a virtual array or values outside."""
    link = file.get(name, getlink=True)
    if isinstance(link, h5py.ExternalLink):
        return [link.filename]
    item: Any = file[name] if isinstance(link, h5py.HardLink) else None
    if not isinstance(item, h5py.Dataset):
        return []
    virtual = [source.file_name for source in item.virtual_sources()] if item.is_virtual else []
    return [*virtual, *(part[0] for part in item.external or ())]
