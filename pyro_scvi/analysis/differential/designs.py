"""How the cells of two groups are laid out: pooled, by donor, or inside batches; and the error of a group's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pyro_scvi.analysis.differential.groups import Group
from pyro_scvi.analysis.differential.weighted_means import Strata
from pyro_scvi.errors import DataError


class Pair(NamedTuple):
    """The strata of two groups, and the weight of each in the group's mean, (strata,) with sum 1."""

    a: Strata
    b: Strata
    weight_a: np.ndarray
    weight_b: np.ndarray


class Design(Protocol):
    """Which strata the cells of a group fall into, and how they make up the group's mean.

    ``pools_batches`` says that the error of a difference holds nothing of what differs between batches.
    """

    pools_batches: bool

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """Stratum of each of the rows, (rows,)."""
        ...

    def require(self, a: Group, b: Group) -> None:
        """Raise if the two groups cannot be compared."""
        ...

    def pair(self, a: Strata, b: Strata) -> Pair:
        """The strata that are compared, with their weights."""
        ...

    def variance(self, strata: Strata, weight: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Variance of the group's mean and its degrees of freedom, (genes,) each.

        ``pooled`` (genes,): the mean of both groups together, for the floor.
        """
        ...


class WithinStrata:
    """Designs in which the error comes from the cells of a stratum."""

    def variance(self, strata: Strata, weight: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The sum over the strata, with degrees of freedom by Satterthwaite (1946)."""
        parts = weight[:, None] ** 2 * strata.floored(pooled)
        total = parts.sum(0)
        squares = (parts**2 / np.maximum(strata.n_eff - 1, 1)).sum(0)
        return total, np.divide(total**2, squares, out=np.ones_like(total), where=squares > 0)


@dataclass(frozen=True, eq=False)
class Pooled(WithinStrata):
    """All cells of a group together."""

    pools_batches = True

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """One stratum."""
        return np.zeros(len(rows), dtype=int)

    def require(self, a: Group, b: Group) -> None:
        """Any two groups can be compared."""

    def pair(self, a: Strata, b: Strata) -> Pair:
        """The groups as they are."""
        return Pair(a, b, np.ones(1), np.ones(1))


@dataclass(frozen=True, eq=False)
class InsideBatches(WithinStrata):
    """Only batches that hold cells of both groups, each by the number of differences that it can tell.

    ``batch`` (all cells,): the batch of each.
    """

    batch: np.ndarray
    pools_batches = False

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """The batches."""
        return self.batch[rows]

    def require(self, a: Group, b: Group) -> None:
        """Raise unless a batch holds cells of both groups."""
        if not len(np.intersect1d(self.batch[a.rows], self.batch[b.rows])):
            raise DataError(
                f"no batch holds cells of both groups, {a.name!r} and {b.name!r}; compare without within_batches"
            )

    def pair(self, a: Strata, b: Strata) -> Pair:
        """The batches of both, weighted alike on both sides so that what differs between batches cancels."""
        _, in_a, in_b = np.intersect1d(a.key, b.key, return_indices=True)
        a, b = a.take(in_a), b.take(in_b)
        # The inverse variance of a difference of means, were all cells alike.
        weight = a.n * b.n / (a.n + b.n)
        return Pair(a, b, weight / weight.sum(), weight / weight.sum())


@dataclass(frozen=True, eq=False)
class Donors:
    """Replicates such as donors: the mean of a group is that of its donors' means, and its error is between them.

    ``donor`` (all cells,): the donor of each.
    """

    donor: np.ndarray
    pools_batches = False

    def keys(self, rows: np.ndarray) -> np.ndarray:
        """The donors."""
        return self.donor[rows]

    def require(self, a: Group, b: Group) -> None:
        """Raise unless each group has two donors."""
        for group in (a, b):
            if len(np.unique(self.donor[group.rows])) < 2:
                raise DataError(
                    f"all cells of {group.name!r} are from one replicate, so the variation between replicates is "
                    "unknown. Leave replicates out to compare these cells alone"
                )

    def pair(self, a: Strata, b: Strata) -> Pair:
        """Every donor counts the same, however many cells it has."""
        return Pair(a, b, np.full(len(a.key), 1 / len(a.key)), np.full(len(b.key), 1 / len(b.key)))

    def variance(self, strata: Strata, weight: np.ndarray, pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Between the donors, not below what counting molecules makes it."""
        n = len(strata.key)
        between = strata.mean.var(0, ddof=1) / n
        return np.maximum(between, strata.counting(pooled).sum(0) / n**2), np.full(strata.mean.shape[1], n - 1.0)
