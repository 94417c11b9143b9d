"""The file of results that are written block by block: how it is made, found again, filled and marked."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_scvi.errors import DataError
from pyro_scvi.export.block_columns import Column, names_in
from pyro_scvi.export.block_files import Format, reached, something_else, temporary_folder
from pyro_scvi.export.block_identity import VERSION, differences
from pyro_scvi.persistence.digests import digest_of_names, digests_of_columns
from pyro_scvi.utils.disk.publishing import signals_deferred
from pyro_scvi.utils.out_of_memory import is_out_of_memory

DONE, RUN = "pyro_scvi_blocks", "pyro_scvi_run"
_DONE_PLACE = f"uns/{DONE}"
_OF_LIBRARIES = (OSError, RuntimeError, ValueError)  # zarr and HDF5 have no error of their own


def create(
    kind: Format, path: Path, obs: pd.DataFrame, genes: pd.Index, columns: list[Column], run: dict[str, Any]
) -> None:
    """Make the file with empty arrays under a temporary name; move it into place unless another process was faster."""
    adata = AnnData(obs=obs, var=pd.DataFrame(index=genes), uns={RUN: json.dumps(run)})
    # zarr writes in threads of its own, which would go on after an interrupt, into a folder that is deleted
    with signals_deferred(), temporary_folder(path) as folder:
        new = folder / path.name
        with _errors_told(lambda reason: f"{path} cannot be made: {reason}"):
            _fill(kind, new, adata, columns, run["block"])
        try:
            new.rename(path)
        except OSError:  # a folder that is not empty: another process was faster
            if not path.exists():
                raise


def _fill(kind: Format, path: Path, adata: AnnData, columns: list[Column], block: int) -> None:
    """Write cells and genes, and empty arrays for the results."""
    with kind.opened(path, "w") as group, ad.settings.override(allow_write_nullable_strings=True):
        ad.io.write_elem(group, "/", adata)
        kind.add(group["uns"], DONE, np.dtype(bool), (-(-adata.n_obs // block),), 1)
        for column in columns:
            place, name = column.place.split("/", 1)
            shape = (adata.n_obs, *column.values.shape[1:])
            kind.add(group[place], name, column.values.dtype, shape, min(block, adata.n_obs))
        attributes = group["obs"].attrs
        attributes["column-order"] = [*attributes["column-order"], *names_in(columns, "obs")]


def _line(error: Any) -> str:
    """An error as one line of limited length."""
    return " ".join(str(error).split())[:300]


class Results:
    """The arrays of an open file, and which blocks of them are done."""

    def __init__(self, kind: Format, path: Path, group: Any, n_blocks: int) -> None:
        self.kind, self.path, self.group, self.n_blocks = kind, path, group, n_blocks

    def missing(self) -> list[int]:
        """Blocks that are not done."""
        done = self.kind.get(self.group, _DONE_PLACE, slice(0, self.n_blocks))
        return [int(k) for k in np.flatnonzero(~done)]

    def put(self, column: Column, rows: slice) -> None:
        """Write a block of a column, and read it back.

        Raises
        ------
        DataError
            If it is not in the file afterwards.
        """
        with _errors_told(self._lost):
            self.kind.put(self.group, column.place, rows, column.values)
            found = self.kind.get(self.group, column.place, rows)
        if not np.array_equal(found, column.values, equal_nan=True):
            raise DataError(self._lost(f"{column.place} does not read back as it was written"))

    def mark(self, k: int) -> None:
        """Mark a block as done, once all of it can be read."""
        self.put(Column(_DONE_PLACE, np.ones(1, bool)), slice(k, k + 1))

    def _lost(self, reason: str) -> str:
        return (
            f"{self.path}: a block could not be written: {reason}. The blocks marked as done are "
            "safe; mend that, and the same call continues with the others"
        )


@contextmanager
def opened(kind: Format, path: Path, run: dict[str, Any]) -> Iterator[Results]:
    """The file, if it holds results of this run."""
    try:
        with reached(kind, path, "r") as group:
            text = group["uns"][RUN][()]
            recorded = json.loads(text.decode() if isinstance(text, bytes) else str(text))
            differing = list(differences(recorded, run))
            if not differing:
                _require_as_made(kind, path, group, run)
    except DataError:
        raise
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise DataError(something_else(path, error)) from error
    if differing and VERSION in differing:
        raise DataError(
            f"{path} was begun by pyro_scvi {recorded.get(VERSION, 'of an earlier version')}, and this is "
            f"{run[VERSION]}: results of two versions do not belong in one file; choose another path, or delete it"
        )
    if differing:
        raise DataError(
            f"{path} holds results of another run: {', '.join(differing)} differ; pass what that run had, or "
            "choose another path"
        )
    _reserve(kind, path)
    with reached(kind, path, "r+") as group:
        yield Results(kind, path, group, -(-run["n_cells"] // run["block"]))


def _require_as_made(kind: Format, path: Path, group: Any, run: dict[str, Any]) -> None:
    """Refuse a file of this run whose cells or arrays somebody changed: rows would come beside other cells' names."""
    n_cells, block = run["n_cells"], run["block"]
    changed = [*_changed_names(group, run)] or [*_changed_annotations(group["obs"], run["obs"])]
    arrays = [(place, (n_cells, *rest), min(block, n_cells)) for place, _, *rest in run["arrays"]]
    for place, shape, rows in [*arrays, (_DONE_PLACE, (-(-n_cells // block),), 1)]:
        if tuple(group[place].shape) != shape or not kind.as_made(group[place], rows):
            changed.append(place)
    if changed:
        raise DataError(
            f"{path} was changed after its run began: {', '.join(changed)} are not as they were, so it cannot be "
            "continued; choose another path"
        )


def _changed_names(group: Any, run: dict[str, Any]) -> Iterator[str]:
    for table, recorded in (("obs", "cell names"), ("var", "gene names")):
        names = ad.io.read_elem(group[table][group[table].attrs["_index"]])
        if digest_of_names(names) != run[recorded]:
            yield f"{table}_names"


def _changed_annotations(obs: Any, digests: dict[str, str]) -> Iterator[str]:
    """Columns of the cells that are gone or hold other values; those that somebody added are no matter."""
    for name, digest in digests.items():
        held = pd.DataFrame({name: ad.io.read_elem(obs[name])}) if name in obs else pd.DataFrame()
        if digests_of_columns(held) != {name: digest}:
            yield f"the column {name!r} of obs"


def _reserve(kind: Format, path: Path) -> None:
    room = f"there is no room for all results in {path}"
    with _errors_told(lambda reason: f"{room}: {reason}. No block was computed. Make room and repeat the call"):
        kind.reserve(path)


@contextmanager
def _errors_told(told: Callable[[str], str]) -> Iterator[None]:
    """Let errors of zarr and HDF5 end as one of the package; want of memory is none of the file."""
    try:
        yield
    except _OF_LIBRARIES as error:
        if is_out_of_memory(error):
            raise
        raise DataError(told(_line(error))) from error
