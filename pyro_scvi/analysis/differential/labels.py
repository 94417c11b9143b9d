"""Labels of cells, and the rows of the two groups that they name."""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError


def labels_of(cells: Cells, groupby: str | Sequence[Hashable] | np.ndarray) -> np.ndarray:
    """One label per cell, (cells,) of objects; NaN where a label is missing.

    Raises
    ------
    DataError
        For an unknown column, labels that are not one per cell, or labels that cannot be compared.
    """
    if isinstance(groupby, str):
        if groupby not in cells.obs:
            raise DataError(
                f"cells.obs has no column {groupby!r}; its columns are {list(cells.obs.columns)}; name one of them, or "
                "pass one value per cell"
            )
        labels = cells.obs[groupby].to_numpy(dtype=object)
    else:
        labels = _as_objects(groupby)
    if labels.shape != (cells.n_cells,):
        raise DataError(f"groupby must hold one value for each of the {cells.n_cells} cells, got {labels.shape}")
    if not all(isinstance(label, Hashable) for label in labels):
        raise DataError("groupby must hold words, numbers or other labels that can be compared; some are lists")
    return np.where(pd.isna(labels), np.nan, labels)  # pandas' own NA cannot be compared: it has no truth value


def _as_objects(groupby: Sequence[Hashable] | np.ndarray) -> np.ndarray:
    if not isinstance(groupby, list | tuple):
        return np.asarray(groupby, dtype=object)
    return pd.Series(list(groupby), dtype=object).to_numpy()  # NumPy would take tuples for the rows of a matrix


def members(labels: np.ndarray, group_a: Hashable, group_b: Hashable | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the cells in group a and in group b; None for b: all other cells.

    Raises
    ------
    DataError
        If a group is unknown or empty, or both are the same.
    """
    known = sorted(map(repr, pd.unique(labels)))
    for group in (group_a, group_b):
        if group is not None and not (isinstance(group, Hashable) and _in(labels, group).any()):
            raise DataError(f"no cell is in group {group!r}; the groups are [{', '.join(known)}]")
    if group_a == group_b:
        raise DataError(f"both groups are {group_a!r}; name two of [{', '.join(known)}]")
    in_a = _in(labels, group_a)
    in_b = ~in_a if group_b is None else _in(labels, group_b)
    if not in_b.any():
        raise DataError(f"every cell is in group {group_a!r}: there is no rest to compare it with")
    return np.flatnonzero(in_a), np.flatnonzero(in_b)


def _in(labels: np.ndarray, group: Hashable) -> np.ndarray:
    """Whether each label is the group, (cells,)."""
    # A group may be a tuple, which NumPy would take for several labels.
    one = np.empty((), dtype=object)
    one[()] = group
    return np.asarray(labels == one, dtype=bool)
