"""Columns of obs, read as categories or numbers, with errors that name the column and a cell."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.errors import DataError, SchemaError

MOST_FLOAT_LEVELS = 20
"""A batch column of floats with more levels than this is refused: it is probably a continuous covariate."""


def categories(obs: pd.DataFrame, name: str) -> tuple[list[str], np.ndarray]:
    """Read a column of categories.

    Returns
    -------
    labels
        Names of the categories that occur, in the order of the column's categories, else sorted.
    codes
        (cells,): position of each cell's category among the labels.

    Raises
    ------
    SchemaError
        If there is no column of this name.
    DataError
        If a cell has no value, or the column looks continuous.
    """
    column = _column(obs, name)
    absent = column.isna().to_numpy()
    if absent.any():
        raise DataError(
            f"batch column {name!r} has no value for {absent.sum()} cells, such as {_first(obs, absent)}; "
            "fill or drop them."
        )
    categorical = column.astype("category").cat.remove_unused_categories()
    labels = [_label(level) for level in categorical.cat.categories]
    if column.dtype.kind == "f" and len(labels) > MOST_FLOAT_LEVELS:
        raise DataError(
            f"batch column {name!r} holds floats with {len(labels)} levels. If it is continuous, pass "
            f"covariates=[{name!r}]; if it does name batches, turn it into strings."
        )
    return labels, categorical.cat.codes.to_numpy()


def numbers(obs: pd.DataFrame, name: str) -> np.ndarray:
    """Read a continuous column: (cells,), float64, finite.

    Raises
    ------
    SchemaError
        If there is no column of this name.
    DataError
        If it is not numeric, or a value is NaN or infinite.
    """
    column = _column(obs, name)
    levels = column.dtype.categories if isinstance(column.dtype, pd.CategoricalDtype) else column
    try:
        if levels.dtype.kind in "cmM":  # NumPy would drop imaginary parts, and turn dates into nanoseconds
            raise TypeError
        values = column.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"covariate column {name!r} must be numeric; its type is {column.dtype}. Pass categories as batch=."
        ) from error
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"covariate column {name!r} must be finite; {wrong.sum()} cells, such as {_first(obs, wrong)}, "
            "hold NaN or infinity."
        )
    return values


def object_columns(obs: pd.DataFrame) -> list[Any]:
    """Names of the columns of Python objects; ``select_dtypes(object)`` of pandas 3 adds those of type str."""
    return [name for name, kind in obs.dtypes.items() if pd.api.types.is_object_dtype(kind)]


def inferred(column: pd.Series) -> pd.Series:
    """A column of objects in the type of its values; strings and booleans may have missing values."""
    column = column.infer_objects()  # first: floats stay floats, which convert_dtypes would turn into Float64
    return column.convert_dtypes() if pd.api.types.is_object_dtype(column) else column


def quoted(names: Sequence[str] | pd.Index, most: int = 10) -> str:
    """List names for a message: the first few, and how many there are."""
    shown = ", ".join(repr(str(name)) for name in names[:most])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > most else shown


def _column(obs: pd.DataFrame, name: str) -> pd.Series:
    if name not in obs.columns:
        raise SchemaError(f"obs has no column {name!r}; its columns are {sorted(map(str, obs.columns))}.")
    column = obs[name]
    if isinstance(column, pd.DataFrame):
        raise DataError(f"obs has {column.shape[1]} columns named {name!r}; rename all but one.")
    return column


def _first(obs: pd.DataFrame, mask: np.ndarray) -> str:
    return repr(str(obs.index[int(mask.argmax())]))


def _label(level: Any) -> str:
    """Name of a category; 1.0 is named 1, because a missing value turns a column of integers into floats."""
    return str(int(level)) if isinstance(level, float | np.floating) and float(level).is_integer() else str(level)
