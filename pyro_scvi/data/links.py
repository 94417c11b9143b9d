"""Links out of a file of counts: who made it would decide which other files are read."""

from pathlib import Path

from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn
from pyro_scvi.utils.disk.hdf5_links import Link, NameNotText, links_out_of
from pyro_scvi.utils.disk.hdf5_nesting import NestingError, require_an_end
from pyro_scvi.utils.disk.unreadable import errors_named


def require_regular_file(path: Path) -> None:
    """Refuse pipes, devices and folders in the place of an .h5ad file.

    Raises
    ------
    DataError
        If there is one.
    """
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: cannot read it as h5ad: it is not a regular file")  # a pipe would be waited for


def check_links(file: Path) -> None:
    """Refuse an HDF5 file whose parts are in other folders, or in themselves.

    Raises
    ------
    DataError
        If there is such a link, a name that is not text, or groups that cannot be read to an end; names it.

    Warns
    -----
    UserWarning
        If a part is in another file of the same folder.
    """
    if not file.is_file():
        return
    with errors_named(str(file)):
        links = _links(file)
    for link in links:
        what = f"{link.name} of {link.file} is in another file, {link.target}"
        if not link.beside:
            raise DataError(f"{what}, which is not read; copy its values into {link.file.name}, or that file beside it")
        warn(what)
    with errors_named(str(file)):
        _require_an_end(file)


def _links(file: Path) -> list[Link]:
    try:
        return links_out_of(file)
    except NameNotText as error:
        raise DataError(f"{error}; write the file anew, as anndata does") from error


def _require_an_end(file: Path) -> None:
    try:
        require_an_end(file)
    except NestingError as error:
        raise DataError(f"{error}; write the file anew, as anndata does") from error
