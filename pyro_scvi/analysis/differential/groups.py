"""Groups of cells that are compared, and what each of them is compared with."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd

from pyro_scvi.analysis.differential.labels import members
from pyro_scvi.errors import DataError

REST = "the rest"


@dataclass(frozen=True, eq=False)
class Group:
    """Some of the cells, under a name for messages; ``rows`` (cells of the group,)."""

    name: Hashable
    rows: np.ndarray


class Comparison(Protocol):
    """Compares groups of one set of cells; what several comparisons share is computed once."""

    def table(self, a: Group, b: Group) -> pd.DataFrame:
        """One row per gene, (genes, columns); every fold change is a over b."""
        ...

    def least(self, tables: dict[Hashable, pd.DataFrame]) -> pd.DataFrame:
        """One row per gene: the weakest of several comparisons of one group."""
        ...

    def warn(self) -> None:
        """Warn of what makes the comparisons hard to read."""
        ...


@dataclass(frozen=True)
class TheRest:
    """Compare a group with all other cells, also those without a label.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", against=ps.differential.TheRest())
    >>> table.index.names
    FrozenList(['group', 'gene'])
    """

    name = REST

    def parts(self, labels: np.ndarray) -> np.ndarray:
        """One code per cell, (cells,), so that every group that is compared is a union of these parts; -1: not used."""
        codes, names = pd.factorize(labels, use_na_sentinel=True)
        return np.where(codes < 0, len(names), codes)

    def tables(self, comparison: Comparison, labels: np.ndarray, names: list[Hashable]) -> Iterator[pd.DataFrame]:
        """One table for each of the named groups."""
        for name in names:
            rows_a, rows_b = members(labels, name, None)
            yield comparison.table(Group(name, rows_a), Group(f"{REST} of {name}", rows_b))


@dataclass(frozen=True)
class EveryOther:
    """Compare a group with each other group, and keep the weakest comparison for every gene.

    A gene is then a marker only if it is higher in the group than in *every* other group, or lower than in every other.
    The row of the table is that of the comparison with the smallest ``z``, in absolute value, and ``against`` names its
    group. Where the signs disagree no direction holds against all: ``z`` is 0 and ``p_value`` 1. Cells without a label
    are left out.

    Examples
    --------
    >>> every = ps.differential.EveryOther()
    >>> table = ps.differential_expression(fit, cells, groupby="kind", against=every)
    >>> table.loc["a"].against.unique().tolist()
    ['b']
    """

    name = "every other group"

    def parts(self, labels: np.ndarray) -> np.ndarray:
        """One code per cell, (cells,); -1 without a label."""
        return pd.factorize(labels, use_na_sentinel=True)[0]

    def tables(self, comparison: Comparison, labels: np.ndarray, names: list[Hashable]) -> Iterator[pd.DataFrame]:
        """One table for each of the named groups."""
        found = pd.unique(labels[~pd.isna(labels)])
        if len(found) < 2:
            raise DataError(f"every labelled cell is in group {found[0]!r}: there is no other group")
        # One object for each group, so that what a comparison has computed for it serves all of its comparisons.
        groups = {name: Group(name, members(labels, name, None)[0]) for name in found}
        for name in names:
            others = {other: comparison.table(groups[name], groups[other]) for other in found if other != name}
            yield comparison.least(others)
