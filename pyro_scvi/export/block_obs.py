"""Annotations of cells beside results: in types that anndata writes, or refused by name before any work is done."""

import re
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from pyro_scvi.data.obs_columns import inferred, object_columns
from pyro_scvi.errors import DataError
from pyro_scvi.export.block_files import Format
from pyro_scvi.utils.checks import brief
from pyro_scvi.utils.out_of_memory import is_out_of_memory

_NUMBERS = ("integer", "floating", "mixed-integer-float", "complex")
_WRITTEN = ("string", "boolean")
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # half a character, and what ends a string of C
_OBJECTS = {"bytes": "bytes", "mixed": "lists, other objects or values of several kinds"}


def writable(kind: Format, obs: pd.DataFrame) -> pd.DataFrame:
    """A copy in types that can be written: objects by their values, nullable floats with NaN.

    Raises
    ------
    DataError
        If a column holds what cannot be written; names it and says what to do.
    """
    if doubled := sorted(map(str, obs.columns[obs.columns.duplicated()])):
        raise DataError(f"obs has several columns named {doubled}; rename all but one")
    obs = obs.copy()
    for name in object_columns(obs):
        obs[name] = _typed(name, obs[name])
    for name, column in obs.items():
        if isinstance(column.dtype, pd.Float32Dtype | pd.Float64Dtype):
            obs[name] = column.to_numpy(column.dtype.name.lower(), na_value=np.nan)
    _try(kind, obs)
    return obs


def _typed(name: Any, column: pd.Series) -> pd.Series:
    """A column of objects in the type of its values."""
    known = column.dropna()
    if known.empty:
        return pd.Series(np.nan, column.index)
    values = pd.api.types.infer_dtype(known, skipna=False)
    if values in _NUMBERS:
        return column.convert_dtypes() if values == "integer" and column.hasnans else pd.to_numeric(column)
    if values not in _WRITTEN:
        raise DataError(_unwritable(name, column, f"holds {_OBJECTS.get(values, 'values of several kinds')}"))
    return inferred(column) if column.hasnans or values == "boolean" else column


def _try(kind: Format, obs: pd.DataFrame) -> None:
    """Write one cell of each column where it costs nothing; categories are written whole."""
    with kind.in_memory() as group, ad.settings.override(allow_write_nullable_strings=True):
        for position, (name, column) in enumerate(obs.items()):
            row = _hardest(column)
            first = column.iloc[row : row + 1].reset_index(drop=True).to_frame("values")
            try:
                ad.io.write_elem(group, str(position), first)
            except Exception as error:  # anndata, h5py and zarr have no error in common
                if is_out_of_memory(error):
                    raise
                raise DataError(_unwritable(name, column, f"holds {_kind(column)}, which cannot be written")) from error


def _hardest(column: pd.Series) -> int:
    """The row of a string that no file may take, else the first."""
    if not pd.api.types.is_string_dtype(column):
        return 0
    return next((i for i, word in enumerate(column) if isinstance(word, str) and not _plain(word)), 0)


def _plain(word: str) -> bool:
    return (word.isascii() and "\0" not in word) or not _UNWRITABLE.search(word)


def _kind(column: pd.Series) -> str:
    if isinstance(column.dtype, pd.CategoricalDtype):
        return f"categories of {column.cat.categories.dtype}"
    return "strings" if pd.api.types.is_string_dtype(column.dropna()) else str(column.dtype)


def _unwritable(name: Any, column: pd.Series, what: str) -> str:
    start = f"the column {name!r} of obs {what}"
    if isinstance(column.dtype, pd.SparseDtype):
        return f"{start}; make it dense: obs[{name!r}].sparse.to_dense(), or drop it"
    if pd.api.types.is_string_dtype(column.dropna()):
        example = column.iloc[_hardest(column)]
        return f"{start}: {brief(example)}; replace such characters, or drop it"
    return f"{start}; make them strings: obs[{name!r}].astype(str), or drop it"
