"""Differential expression on a page: how many genes differ, which ones most, and the volcano plot."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from pyro_scvi import plots
from pyro_scvi.data.obs_columns import number_named
from pyro_scvi.export import html_page
from pyro_scvi.export.pictures import new_axes, save

LEVEL = 0.05
REST = "the rest"
HEADER = ("gene", "higher in", "log2 change", "95% interval")


class Question(Protocol):
    """What a table answers: how genes are called, and how that is told."""

    rate: str
    evidence: str

    @property
    def criterion(self) -> str:
        """Criterion for calling a gene, in words."""
        ...

    def called(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows of the genes called, the surest first."""
        ...

    def shown(self, row: pd.Series) -> str:
        """The evidence of one gene."""
        ...

    def counted(self, table: pd.DataFrame) -> tuple[str, str, str]:
        """A further row of the summary: quantity, value, explanation."""
        ...

    def legend(self) -> str:
        """What the columns mean."""
        ...


@dataclass(frozen=True)
class OfMeans:
    """Do the groups' means differ: a table of GroupMeans."""

    rate = "q_value"
    evidence = "p value"
    criterion = f"a difference of the groups' means at a false discovery rate of {LEVEL:.0%}"

    def called(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows up to the rate, ordered by z."""
        rows = table[table.q_value <= LEVEL]
        return rows.assign(size=rows.z.abs()).sort_values("size", ascending=False, kind="stable")

    def shown(self, row: pd.Series) -> str:
        """The p value."""
        return f"{row.p_value:.1e}"

    def counted(self, table: pd.DataFrame) -> tuple[str, str, str]:
        """How many genes had counts enough."""
        return "genes tested", f"{table.tested.sum():,}", "with molecules enough in cells enough"

    def legend(self) -> str:
        """What the columns mean."""
        return (
            "log2 change: mean a over mean b with its 95% interval; p value: of a t test of these means, over all "
            "cells unless replicates are named; mean a and b: molecules per cell of median depth. First are the genes "
            "with the largest difference of means, in standard errors."
        )


@dataclass(frozen=True)
class OfPairs:
    """Which of two random cells has more: a table of RandomPairs."""

    delta: float
    rate = "expected_false_share"
    evidence = "P(change)"

    @property
    def criterion(self) -> str:
        """Criterion for calling a gene, in words."""
        return (
            f"being higher by more than {self.delta:g} in log2 in the same one of two random cells, one from each "
            f"group, with an expected share of {LEVEL:.0%} false statements"
        )

    def called(self, table: pd.DataFrame) -> pd.DataFrame:
        """Rows up to the expected share, ordered by certainty and then by the size of the change."""
        rows = table[table.expected_false_share <= LEVEL]
        return rows.assign(size=rows.lfc.abs()).sort_values(["p_lfc", "size"], ascending=False)

    def shown(self, row: pd.Series) -> str:
        """The share of pairs."""
        return f"{row.p_lfc:.4f}"

    def counted(self, table: pd.DataFrame) -> tuple[str, str, str]:
        """The Monte Carlo error."""
        return "largest standard error", f"{table.se.max():.4f}", "of a gene's P(w_a < w_b), by Monte Carlo"

    def legend(self) -> str:
        """What the columns mean."""
        return (
            "log2 change: mean a over mean b of the model's rates, on average and in 95% of pairs of cells, one from "
            f"each group; P(change): share of the pairs in which it is more than {self.delta:g} in that direction; "
            "mean a and b: raw counts per cell. A gene that differs on average but varies as much within a group, as "
            "in a group of several types, is not called: p_a_lt_b and log_bayes_factor in the table tell of it."
        )


@dataclass(frozen=True)
class Comparison:
    """Two groups of cells compared gene by gene: the table of results, and the groups' names and sizes."""

    table: pd.DataFrame
    a: str
    b: str
    n_a: int
    n_b: int
    question: Question

    @property
    def called(self) -> pd.DataFrame:
        """Genes called at LEVEL, the surest first."""
        return self.question.called(self.table)

    def higher_in_a(self) -> pd.Index:
        """Names of the genes called because they are higher in a."""
        return self.called.index[self.called.lfc > 0]

    def higher_in_b(self) -> pd.Index:
        """Names of the genes called because they are higher in b."""
        return self.called.index[self.called.lfc < 0]


def named(labels: pd.Series) -> list[Hashable]:
    """Labels as text, as a user can type them; NaN if missing."""
    texts = labels.astype(object).map(str, na_action="ignore")
    return list(texts.where(texts.notna(), np.nan))


def typed(labels: list[Hashable], group: str | None) -> str | None:
    """The group that a user typed as the labels have it: 1 for "1.0" is enough, if no other label is that number."""
    if group is None or group in labels:
        return group
    same = [label for label in set(labels) if isinstance(label, str) and number_named(label) == number_named(group)]
    return same[0] if len(same) == 1 else group


def compared(table: pd.DataFrame, labels: list[Hashable], a: str, b: str | None, question: Question) -> Comparison:
    """The table of one comparison with the sizes of its groups; b is None for the rest."""
    n_a = labels.count(a)
    n_b = len(labels) - n_a if b is None else labels.count(b)
    return Comparison(table, a, REST if b is None else b, n_a, n_b, question)


def sides(comparison: Comparison) -> str:
    """A sentence that names the groups and their sizes."""
    return f"{comparison.n_a:,} cells of {comparison.a} against {comparison.n_b:,} of {comparison.b}."


def counted(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Rows of the summary: quantity, value, explanation."""
    table = comparison.table
    return [
        ("genes compared", f"{len(table):,}", ""),
        ("genes called", f"{len(comparison.called):,}", comparison.question.criterion),
        ("of these higher in", f"{len(comparison.higher_in_a()):,}", comparison.a),
        ("of these higher in", f"{len(comparison.higher_in_b()):,}", comparison.b),
        comparison.question.counted(table),
    ]


def volcano(comparison: Comparison, path: Path) -> html_page.Html:
    """Draw the fold changes against their evidence into ``path``; returns the picture for the page."""
    ax = plots.volcano(comparison.table, new_axes(7.6, 4.8), level=LEVEL)
    return save(ax, path, f"Every gene: a is {comparison.a}, b is {comparison.b}")


def top(comparison: Comparison, n: int) -> html_page.Html:
    """The first genes called, as a table."""
    header = (*HEADER, comparison.question.evidence, "mean a", "mean b")
    rows = [
        (
            str(gene),
            comparison.a if row.lfc > 0 else comparison.b,
            f"{row.lfc:+.2f}",
            f"{row.lfc_low:+.2f} to {row.lfc_high:+.2f}",
            comparison.question.shown(row),
            f"{row.mean_a:#.3g}",
            f"{row.mean_b:#.3g}",
        )
        for gene, row in comparison.called.head(n).iterrows()
    ]
    return html_page.table(rows or [("none", *[""] * 6)], header, numbers=range(2, 7))


def legend(comparison: Comparison) -> str:
    """What the columns of :func:`top` mean."""
    return f"a is {comparison.a}, b is {comparison.b}. {comparison.question.legend()}"


def by_group(comparisons: Sequence[Comparison], n: int = 8) -> html_page.Html:
    """One row per group compared with the rest, largest first: genes called, and some that are higher in it."""
    header = ("group", "cells", "called", "higher in it", "first of these")
    rows = [
        (
            one.a,
            f"{one.n_a:,}",
            f"{len(one.called):,}",
            f"{len(one.higher_in_a()):,}",
            ", ".join(map(str, one.higher_in_a()[:n])) or "none",
        )
        for one in sorted(comparisons, key=lambda comparison: -comparison.n_a)
    ]
    return html_page.table(rows, header, numbers=(1, 2, 3))
