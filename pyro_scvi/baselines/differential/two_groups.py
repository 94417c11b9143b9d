"""Input and output of every test of two groups of cells: test(counts, group) -> a table by gene."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from pyro_scvi.baselines.inputs import dense_counts
from pyro_scvi.data.names import in_order_of
from pyro_scvi.errors import DataError


class TwoGroups(NamedTuple):
    """Counts ``x`` (cells, genes), which cells are of the ``second`` group (cells,), and the ``genes``' names."""

    x: np.ndarray
    second: np.ndarray
    genes: pd.Index

    def table(self, p_value: np.ndarray, log_fold_change: np.ndarray) -> pd.DataFrame:
        """The result of a test, by gene."""
        return pd.DataFrame({"p_value": p_value, "log_fold_change": log_fold_change}, index=self.genes)


def two_groups(counts: Any, group: Any) -> TwoGroups:
    """Check counts (cells, genes) and one label per cell; the label that sorts first is the first group.

    Labels of an ordered categorical sort in the order of its categories. A Series of labels is matched by name with the
    index of a DataFrame of counts.

    Raises
    ------
    DataError
        For counts that are negative or not finite, cells without counts, a label that is missing, or not one label per
        cell of exactly two values.
    """
    x = dense_counts(counts)
    if (empty := np.flatnonzero(~x.any(1))).size:
        raise DataError(f"{empty.size} cells have no count, the first of them cell {empty[0]}; drop them")
    group = in_order_of(getattr(counts, "index", None), group, "group")
    labels = np.asarray(group)
    if labels.shape != (len(x),):
        raise DataError(f"group must be one label for each of {len(x)} cells, got shape {labels.shape}")
    if missing := int(pd.isna(labels).sum()):
        raise DataError(f"group must label every cell, {missing} have none; leave these cells out")
    values = _in_order(group, labels)
    if len(values) != 2:
        raise DataError(f"group must have two values, got {len(values)}: {list(values[:5])}; leave the other cells out")
    names = counts.columns if isinstance(counts, pd.DataFrame) else range(x.shape[1])
    return TwoGroups(x, labels == values[1], pd.Index(names, name="gene"))


def _in_order(group: Any, labels: np.ndarray) -> np.ndarray:
    """Labels that occur, in the order of an ordered categorical if they are one, else sorted."""
    levels = pd.Series(group).dtype
    if isinstance(levels, pd.CategoricalDtype) and levels.ordered:
        return np.asarray(levels.categories[levels.categories.isin(labels)])
    return np.unique(labels)
