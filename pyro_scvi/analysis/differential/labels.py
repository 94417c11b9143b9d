"""Labels of cells, and the rows of the two groups that they name."""

from collections.abc import Hashable, Sequence

import numpy as np
import pandas as pd

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.names import as_series, in_order_of
from pyro_scvi.data.obs_columns import quoted, words_for_missing
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn


def labels_of(
    cells: Cells, groupby: str | Sequence[Hashable] | np.ndarray | pd.Series, what: str = "groupby"
) -> np.ndarray:
    """One label per cell, (cells,) of objects; NaN where a label is missing.

    A Series is matched by the names of the cells, whatever its order, and may have further rows. ``what`` is the name
    of the argument, for messages.

    Raises
    ------
    DataError
        For an unknown column, labels that are not one per cell or of other cells, or labels that cannot be compared.

    Warns
    -----
    UserWarning
        If a label is a word for a missing value, such as "nan".
    """
    if isinstance(groupby, str):
        if groupby not in cells.obs:
            raise DataError(
                f"cells.obs has no column {groupby!r}; its columns are {list(cells.obs.columns)}; name one of them, or "
                f"pass one value per cell, such as adata.obs[{groupby!r}] for a column that is newer than the cells"
            )
        labels = cells.obs[groupby].to_numpy(dtype=object)
    else:
        labels = _as_objects(cells, groupby, what)
    if labels.shape != (cells.n_cells,):
        raise DataError(f"{what} must hold one value for each of the {cells.n_cells} cells, got {labels.shape}")
    if not all(isinstance(label, Hashable) for label in labels):
        raise DataError(f"{what} must hold words, numbers or other labels that can be compared; some are lists")
    if missing := words_for_missing(list(pd.unique(labels))):
        warn(
            f"{what} holds {quoted(missing)}, as missing values are written in text: these cells count as a group "
            "of their own. Replace the word by None to leave them out."
        )
    return np.where(pd.isna(labels), np.nan, labels)  # pandas' own NA cannot be compared: it has no truth value


def _as_objects(cells: Cells, groupby: Sequence[Hashable] | np.ndarray | pd.Series, what: str) -> np.ndarray:
    values = as_series(groupby)
    if isinstance(values, pd.Series):
        return in_order_of(cells.cell_names, values, what).to_numpy(dtype=object)
    if not isinstance(groupby, list | tuple):
        return np.asarray(groupby, dtype=object)
    return pd.Series(list(groupby), dtype=object).to_numpy()  # NumPy would take tuples for the rows of a matrix


def batch_of(cells: Cells, needed_by: str) -> np.ndarray:
    """The batch of each cell, (cells,) codes.

    Raises
    ------
    DataError
        If the cells have no batches.
    """
    if cells.schema.batch is None:
        raise DataError(f"{needed_by} needs cells with batches; make the Cells with batch=")
    return cells.gamma.codes(cells.schema.batch).astype(int)


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
        raise DataError(f"every cell is in group {group_a!r}: there is no other cell to compare with")
    return np.flatnonzero(in_a), np.flatnonzero(in_b)


def _in(labels: np.ndarray, group: Hashable) -> np.ndarray:
    """Whether each label is the group, (cells,)."""
    # A group may be a tuple, which NumPy would take for several labels.
    one = np.empty((), dtype=object)
    one[()] = group
    return np.asarray(labels == one, dtype=bool)
