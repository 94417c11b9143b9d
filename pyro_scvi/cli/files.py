"""Files of the commands: reading and writing h5ad, loading a saved fit, matching the cells of a file to it."""

import warnings
from collections.abc import MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anndata
import h5py
import pandas as pd
from anndata import AnnData
from anndata.io import sparse_dataset

from pyro_scvi.cli.workspace import FIT, saved_in
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.compressed import require_whole
from pyro_scvi.data.links import check_links, require_regular_file
from pyro_scvi.data.minibatches import resolve_device
from pyro_scvi.data.places import require_no_mudata
from pyro_scvi.errors import CheckpointError, SchemaError
from pyro_scvi.persistence.archive import CONFIG
from pyro_scvi.training.fitted import Fit
from pyro_scvi.training.loading import load
from pyro_scvi.utils.control_characters import spelled_out
from pyro_scvi.utils.disk import hdf5
from pyro_scvi.utils.disk.unreadable import errors_named
from pyro_scvi.version import __version__

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def read_h5ad(file: Path, *, in_place: bool = False) -> AnnData:
    """Read a file into memory, or leave its counts in place.

    Raises
    ------
    DataError
        If it is no valid h5ad file, one of MuData, or parts of it are links to files in other folders.
    """
    require_regular_file(file)
    with errors_named(f"{file}:", "cannot read it as h5ad"):
        check_links(file)
        with h5py.File(file) as group:
            require_no_mudata(group, file)
            _require_whole_matrices(group, file)
        return anndata.read_h5ad(file, backed="r" if in_place else None)


def _require_whole_matrices(group: h5py.File, file: Path) -> None:
    """Refuse broken sparse matrices before anndata reads them: what it makes of them may look whole."""
    layers = (f"layers/{name}" for name in group.get("layers", ()))
    for name in ("X", "raw/X", *layers):
        matrix = group.get(name)
        if isinstance(matrix, h5py.Group) and matrix.attrs.get("encoding-type") in ("csr_matrix", "csc_matrix"):
            require_whole(sparse_dataset(matrix), f"{name} of {file}")


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write the data with strings as strings: anndata would turn them into categories, or refuse missing ones."""
    with anndata.settings.override(allow_write_nullable_strings=True), hdf5.written(path, "w") as file:
        anndata.io.write_elem(file, "/", adata)


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table; text that a spreadsheet would calculate gets an apostrophe before it, with a warning.

    Control characters are spelled out: ``head`` would show them to a terminal.
    """
    plain = table.reset_index() if any(table.index.names) else table
    guarded = plain.map(_not_a_formula).rename(columns=_not_a_formula)
    risky = [text for text in [*plain, *plain.to_numpy(object).flat] if _not_a_formula(text) is not text]
    if risky:
        text = f"{path.name}: {risky[0]!r} and the like would be formulas in a spreadsheet; an ' stands before"
        warnings.warn(text, UserWarning, stacklevel=2)
    guarded.to_csv(path, index=plain is table)


def _not_a_formula(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    plain = spelled_out(value)
    if plain == value and not (value.startswith(_FORMULA) or "\r" in value):
        return value
    text = plain.replace("\r", " ")  # pandas leaves it unquoted, and readers take what follows as a new row
    return f"'{text}" if value.startswith(_FORMULA) else text


def load_fit(folder: Path, device: str) -> Fit:
    """Load the fit in ``folder``, or in the folder ``fit`` there, onto a device.

    Raises
    ------
    CheckpointError
        If there is none, or it is broken.
    """
    saved = saved_in(folder)
    if saved is None:
        raise CheckpointError(f"{folder} is no saved fit: neither it nor {folder / FIT} holds {CONFIG}")
    return load(saved).to(resolve_device(device))


@dataclass(frozen=True)
class QueryOptions:
    """How the counts of a file are read for a fit; by default as those that the fit was made from."""

    layer: str | None
    raw: bool
    fill_missing_genes: bool
    allow_non_integer: bool
    allow_new_batches: bool = False

    def cells_of(self, fit: Fit, adata: AnnData, *, in_place: bool = False) -> Cells:
        """The cells of a file in the fit's schema, with genes matched by name."""
        return Cells.from_anndata(adata, schema=fit.schema, backed=in_place, copy=False, **asdict(self))


def column(obs: pd.DataFrame, name: str, option: str) -> pd.Series:
    """The column of obs that an option names.

    Raises
    ------
    SchemaError
        If it is not there.
    """
    if name not in obs:
        raise SchemaError(f"obs has no column {name!r} for {option}; it has {', '.join(map(str, obs)) or 'none'}")
    return obs[name]


def add(slot: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Put a result into a copy, with a warning if it replaces an earlier one."""
    if key in slot:
        warnings.warn(f"{key!r} was there already; it is replaced in the copy", UserWarning, stacklevel=2)
    slot[key] = value


def record(adata: AnnData, name: str, fit_folder: Path, **settings: Any) -> None:
    """Record in ``uns`` how a result was made, in values that h5ad can hold."""
    adata.uns[name] = {"version": __version__, "fit": str(fit_folder), **settings}
