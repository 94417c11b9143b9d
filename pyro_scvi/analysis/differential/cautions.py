"""Warnings about groups whose comparison is easily misread: confounded batches, single cells, unequal depths."""

from __future__ import annotations

import numpy as np

from pyro_scvi.analysis.differential.groups import Group
from pyro_scvi.analysis.differential.labels import batch_of
from pyro_scvi.data.cells import Cells
from pyro_scvi.utils.checks import warn

LEAST_SHARE = 0.5  # of cells with a counterpart in their batch, below which groups and batches are confounded
MOST_DEPTHS = 2.0  # ratio of median depths


class Cautions:
    """What is to be said of the comparisons of one set of cells, one warning of each kind.

    ``pooled`` says that cells of all batches are compared with each other.
    """

    def __init__(self, cells: Cells, depth: np.ndarray, pooled: bool) -> None:
        self.depth = depth
        self.batch = batch_of(cells, "batches") if pooled and cells.n_batches > 1 else None
        self.single: list[str] = []
        self.confounded: list[str] = []
        self.overlapping = False  # whether some batch has both groups of a confounded comparison
        self.one_batch: list[str] = []
        self.unequal: list[str] = []

    def note(self, a: Group, b: Group) -> None:
        """Look at one comparison."""
        if single := [str(group.name) for group in (a, b) if len(group.rows) < 2]:
            self.single += single
            return
        if self.batch is not None:
            self._note_batches(self.batch, a, b)
        ratio = np.median(self.depth[a.rows]) / np.median(self.depth[b.rows])
        if max(ratio, 1 / ratio) > MOST_DEPTHS:
            self.unequal.append(f"{a.name} against {b.name}: {ratio:.2g} to 1")

    def _note_batches(self, batch: np.ndarray, a: Group, b: Group) -> None:
        share = counterparts(batch[a.rows], batch[b.rows])
        if share < LEAST_SHARE:
            self.confounded.append(f"{a.name} against {b.name}: {share:.0%}")
            self.overlapping |= share > 0
        self.one_batch += [str(group.name) for group in (a, b) if len(np.unique(batch[group.rows])) < 2]

    def warn(self) -> None:
        """One warning of each kind."""
        if self.single:
            warn(
                f"a single cell is in {_some(self.single)}: one cell does not show how such cells vary, so no "
                "gene is tested. Join the group with another one, or leave it out."
            )
        if self.confounded:
            remedy = (
                "estimand=GroupMeans(within_batches=True) compares inside the batches that have both."
                if self.overlapping
                else "No batch has both groups, so these counts cannot tell the two apart."
            )
            warn(
                f"groups and batches are confounded; share of cells with a counterpart of the other group in their "
                f"batch: {_some(self.confounded)}. A batch effect then looks like a difference between groups. {remedy}"
            )
        if self.one_batch:
            warn(
                f"all cells are from one batch in {_some(self.one_batch)}: if batches are donors, the p-values "
                "hold for the cells of these donors and say nothing about other donors. If a group has several "
                "donors, name them by GroupMeans(replicates=)."
            )
        if self.unequal:
            warn(
                f"depths differ more than {MOST_DEPTHS:g}-fold: {_some(self.unequal)}. Means are divided by "
                "depth. So a group with more RNA of every gene shows no change, and a few genes that are much "
                "higher make all others look lower. Tests on log counts are not valid here."
            )


def counterparts(batch_a: np.ndarray, batch_b: np.ndarray) -> float:
    """Overlap of two groups' batches, from 1 where they have equal shares of every batch to 0 where they share none."""
    n = max(batch_a.max(), batch_b.max()) + 1
    shares = [np.bincount(batch, minlength=n) / len(batch) for batch in (batch_a, batch_b)]
    return float(np.minimum(*shares).sum())


def _some(texts: list[str], n: int = 5) -> str:
    """The first of these, each once."""
    distinct = list(dict.fromkeys(texts))
    return "; ".join(distinct[:n]) + (f"; and {len(distinct) - n} more" if len(distinct) > n else "")
