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

from pyro_scvi.cli.workspace import FIT
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import resolve_device
from pyro_scvi.data.places import require_no_mudata
from pyro_scvi.errors import CheckpointError, DataError, SchemaError
from pyro_scvi.persistence.archive import CONFIG
from pyro_scvi.training.fitted import Fit
from pyro_scvi.training.loading import load
from pyro_scvi.version import __version__


def read_h5ad(file: Path, *, in_place: bool = False) -> AnnData:
    """Read a file into memory, or leave its counts in place.

    Raises
    ------
    DataError
        If it is no valid h5ad file, or one of MuData.
    """
    try:
        with h5py.File(file) as group:
            require_no_mudata(group, file)
        return anndata.read_h5ad(file, backed="r" if in_place else None)
    except DataError:
        raise
    except Exception as error:  # whatever h5py and anndata say of a broken file
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"{file}: cannot read it as h5ad: {reason}") from error


def write_h5ad(adata: AnnData, path: Path) -> None:
    """Write the data with strings as strings: anndata would turn them into categories, or refuse missing ones."""
    with anndata.settings.override(allow_write_nullable_strings=True):
        anndata.io.write_h5ad(path, adata, convert_strings_to_categoricals=False)


def load_fit(folder: Path, device: str) -> Fit:
    """Load the fit in ``folder``, or in the folder ``fit`` there, onto a device.

    Raises
    ------
    CheckpointError
        If there is none, or it is broken.
    """
    folders = [place for place in (folder, folder / FIT) if (place / CONFIG).is_file()]
    if not folders:
        raise CheckpointError(f"{folder} is no saved fit: neither it nor {folder / FIT} holds {CONFIG}")
    return load(folders[0]).to(resolve_device(device))


@dataclass(frozen=True)
class QueryOptions:
    """How the counts of a file are read for a fit; by default as those that the fit was made from."""

    layer: str | None
    raw: bool
    fill_missing_genes: bool
    allow_non_integer: bool

    def cells_of(self, fit: Fit, adata: AnnData, *, in_place: bool = False) -> Cells:
        """The cells of a file in the fit's schema, with genes matched by name."""
        return Cells.from_anndata(adata, schema=fit.schema, backed=in_place, **asdict(self))


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
        warnings.warn(f"{key!r} was there already; the copy holds the new one", UserWarning, stacklevel=2)
    slot[key] = value


def record(adata: AnnData, name: str, fit_folder: Path, **settings: Any) -> None:
    """Record in ``uns`` how a result was made, in values that h5ad can hold."""
    adata.uns[name] = {"version": __version__, "fit": str(fit_folder), **settings}
