"""Labels of cells, and the rows of the two groups that they name."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.names import as_series, in_order_of
from pyro_scvi.data.obs_columns import label_of, of_one_kind, quoted, warn_of_lookalikes, words_for_missing
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

Groupby = str | Sequence[Hashable] | np.ndarray | pd.Series | Mapping[str, Hashable]
"""Labels of cells: a column of ``cells.obs``, or a value for each cell."""

KINDS = {"groupby": "group", "sample": "sample", "replicates": "replicate", "labels": "label"}
"""What the labels of an argument are called in messages."""


def groups_of(cells: Cells, groupby: Groupby, what: str = "groupby") -> np.ndarray:
    """One label per cell, as :func:`values_of` gives them; 1 and "1" are one label.

    Raises
    ------
    DataError
        As :func:`values_of`.

    Warns
    -----
    UserWarning
        If a label is a word for a missing value, such as "nan", or looks like another one.
    """
    labels = values_of(cells, groupby, what)
    named = of_one_kind(pd.Series(labels, dtype=object)).to_numpy(dtype=object)
    found, kind = list(pd.unique(named[~pd.isna(named)])), KINDS[what]
    if len(found) < len(pd.unique(labels[~pd.isna(labels)])):
        warn(f"{what} holds the same {kind}s as numbers and as text, such as 1 and '1': taken as one.")
    if missing := words_for_missing(found):
        warn(
            f"{what} holds {quoted(missing)}, as missing values are written in text: these cells count as a {kind} "
            f"of their own. Write None in place of the word, and they have no {kind}; a comparison with the rest of "
            "the cells still counts them in the rest."
        )
    warn_of_lookalikes(what, f"{kind}s", [label_of(label) for label in found])
    return named


def values_of(cells: Cells, groupby: Groupby, what: str) -> np.ndarray:
    """One label per cell, (cells,) of objects; NaN where a label is missing.

    A Series or a dict is matched by the names of the cells, whatever its order, and may have further rows. ``what`` is
    the name of the argument, for messages.

    Raises
    ------
    DataError
        For an unknown column, labels that are not one per cell or of other cells, or labels that cannot be compared.
    """
    if isinstance(groupby, str):
        if groupby not in cells.obs:
            raise DataError(unknown_column(cells, groupby, what))
        labels = cells.obs[groupby].to_numpy(dtype=object)
    else:
        labels = _as_objects(cells, groupby, what)
    if labels.shape != (cells.n_cells,):
        raise DataError(f"{what} must hold one value for each of the {cells.n_cells} cells, got {labels.shape}")
    if not all(isinstance(label, Hashable) for label in labels):
        raise DataError(f"{what} must hold words, numbers or other labels that can be compared; some are lists")
    return np.where(pd.isna(labels), np.nan, labels)  # pandas' own NA cannot be compared: it has no truth value


def unknown_column(cells: Cells, name: str, what: str) -> str:
    """What to say where ``cells.obs`` has no such column, which the argument ``what`` names."""
    return (
        f"cells.obs has no column {name!r}; its columns are {list(cells.obs.columns)}; name one of them, or pass one "
        f"value per cell, such as {what}=adata.obs[{name!r}] for a column that is newer than the cells"
    )


def _as_objects(cells: Cells, groupby: Any, what: str) -> np.ndarray:
    values = in_order_of(cells.cell_names, as_series(groupby), what)
    if isinstance(values, pd.Series):
        return values.to_numpy(dtype=object)
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
