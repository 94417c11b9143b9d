"""Columns of results: what verbs give for some cells, and where that belongs in an AnnData."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import brief

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

Verb = Callable[..., np.ndarray | pd.DataFrame]
"""(fit, cells, seed=) -> a row for each cell, such as ``ps.embed`` or ``functools.partial(ps.impute, samples=10)``."""

_RESERVED = re.compile(r"\.|__|zarr\.json$")  # zarr keeps its own files under such names, beside the arrays
_SEPARATORS = re.compile(r"[/\\\0]")  # zarr takes a backslash for a slash


class Column(NamedTuple):
    """An array of results: where it belongs in an AnnData, and its values for some cells."""

    place: str
    values: np.ndarray

    @property
    def shape(self) -> list[Any]:
        """What all blocks share: place, type, and the shape without the cells."""
        return [self.place, self.values.dtype.name, *self.values.shape[1:]]


def split(name: str, result: Any, n_cells: int, n_genes: int) -> list[Column]:
    """The columns of a verb's result.

    Raises
    ------
    ModelError
        If it is not a row of real numbers for each cell.
    """
    if isinstance(result, pd.DataFrame):
        try:
            columns = [Column(f"obs/{name}_{column}", result[column].to_numpy(float)) for column in result]
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name!r} must give real numbers in every column: {error}") from error
    else:
        values = np.asarray(result)
        own = "layers" if values.shape == (n_cells, n_genes) else "obsm"
        columns = [Column(f"{'obs' if values.ndim == 1 else own}/{name}", values)]
    for column in columns:
        if column.values.ndim == 0 or len(column.values) != n_cells or column.values.dtype.kind != "f":
            what = f"{column.values.dtype} of shape {column.values.shape}"
            raise ModelError(f"{name!r} must give real numbers, a row for each of {n_cells} cells, got {what}")
    return columns


def require_verbs(verbs: Any) -> None:
    """Refuse what are no functions by name.

    Raises
    ------
    ModelError
        If verbs are no functions, or names are empty or reserved.
    """
    if not isinstance(verbs, Mapping) or not verbs or not all(callable(verb) for verb in verbs.values()):
        raise ModelError(f"verbs must be functions by name, as in {{'X_pyro_scvi': ps.embed}}, got {brief(verbs)}")
    for name in verbs:
        if not isinstance(name, str) or not name or _RESERVED.match(name):
            raise ModelError(
                f"names of verbs become names of arrays, such as 'X_pyro_scvi', and must not begin with '.' or '__'; "
                f"got {brief(name)}"
            )


def columns_of(fit: Fit, cells: Cells, verbs: Mapping[str, Verb], seed: int) -> dict[str, list[Column]]:
    """The arrays that each verb fills, inferred from its result for the first cell.

    Raises
    ------
    ModelError
        If names are taken or given twice.
    """
    first = cells.take(np.arange(1))
    by_verb = {name: split(name, verb(fit, first, seed=seed), 1, cells.n_genes) for name, verb in verbs.items()}
    places = [column.place for some in by_verb.values() for column in some]
    names = [place.split("/", 1)[1] for place in places]
    if within := [name for name in names if _SEPARATORS.search(name)]:
        raise ModelError(f"names of verbs and of their columns must be without '/', got {within}")
    if doubled := sorted({place for place in places if places.count(place) > 1}):
        raise ModelError(f"verbs give {doubled} more than once; choose another name")
    held = {*map(str, cells.obs), str(cells.obs.index.name or "_index")}  # an index has an array beside the columns
    if taken := [place for place in places if place.startswith("obs/") and place[4:] in held]:
        raise ModelError(f"the cells have the columns {taken} already; choose another name")
    return by_verb


def require_alike(name: str, columns: list[Column], first: list[Column]) -> None:
    """Refuse columns that are not those of the first cell.

    Raises
    ------
    ModelError
        If places, types or shapes differ.
    """
    shapes, expected = [column.shape for column in columns], [column.shape for column in first]
    if shapes != expected:
        raise ModelError(f"{name!r} must give the same for every block: of the first cell {expected}, now {shapes}")


def names_in(columns: list[Column], place: str) -> list[str]:
    """Names of the columns that belong into ``obs``, ``obsm`` or ``layers``."""
    return [column.place.removeprefix(f"{place}/") for column in columns if column.place.startswith(f"{place}/")]
