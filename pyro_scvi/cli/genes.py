"""Differential expression on a page: how many genes differ, which ones most, and the volcano plot."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from pyro_scvi import plots
from pyro_scvi.export import html_page
from pyro_scvi.export.pictures import new_axes, save

FDR = 0.05
REST = "the rest"
NOT_CALLED = (
    "A gene that differs on average but varies as much within a group, as in a group of several types, is not called: "
    "p_a_lt_b and log_bayes_factor in the table tell of it."
)


@dataclass(frozen=True)
class Comparison:
    """Two groups of cells compared gene by gene: the table of results, and the groups' names and sizes."""

    table: pd.DataFrame
    a: str
    b: str
    n_a: int
    n_b: int
    delta: float

    @property
    def called(self) -> pd.DataFrame:
        """Genes called at a false discovery rate of FDR, ordered by certainty and then by the size of the change."""
        rows = self.table[self.table.fdr <= FDR]
        return rows.assign(size=rows.lfc_mean.abs()).sort_values(["p_lfc", "size"], ascending=False)

    @property
    def criterion(self) -> str:
        """Criterion for calling a gene, in words."""
        return (
            f"being higher by more than {self.delta:g} in log2 in the same one of two random cells, one from each "
            f"group, at an expected false discovery rate of {FDR:.0%}"
        )

    def higher_in_a(self) -> pd.Index:
        """Names of the genes called because they are higher in a."""
        return self.called.index[self.called.lfc_mean < 0]

    def higher_in_b(self) -> pd.Index:
        """Names of the genes called because they are higher in b."""
        return self.called.index[self.called.lfc_mean > 0]


def named(labels: pd.Series) -> list[Hashable]:
    """Labels as text, as a user can type them; NaN if missing."""
    texts = labels.astype(object).map(str, na_action="ignore")
    return list(texts.where(texts.notna(), np.nan))


def compared(table: pd.DataFrame, labels: list[Hashable], a: str, b: str | None, delta: float) -> Comparison:
    """The table of one comparison with the sizes of its groups; b is None for the rest."""
    n_a = labels.count(a)
    n_b = len(labels) - n_a if b is None else labels.count(b)
    return Comparison(table, a, REST if b is None else b, n_a, n_b, delta)


def sides(comparison: Comparison) -> str:
    """A sentence that names the groups and their sizes."""
    return f"{comparison.n_a:,} cells of {comparison.a} against {comparison.n_b:,} of {comparison.b}."


def counted(comparison: Comparison) -> list[tuple[str, str, str]]:
    """Rows of the summary: quantity, value, explanation."""
    table = comparison.table
    return [
        ("genes compared", f"{len(table):,}", ""),
        ("genes called", f"{len(comparison.called):,}", comparison.criterion),
        ("of these higher in", f"{len(comparison.higher_in_a()):,}", comparison.a),
        ("of these higher in", f"{len(comparison.higher_in_b()):,}", comparison.b),
        ("largest standard error", f"{table.se.max():.4f}", "of a gene's P(w_a < w_b), by Monte Carlo"),
    ]


def volcano(comparison: Comparison, path: Path) -> html_page.Html:
    """Draw the fold changes against their evidence into ``path``; returns the picture for the page."""
    ax = plots.volcano(comparison.table, new_axes(7.6, 4.8), fdr=FDR)
    return save(ax, path, f"Every gene: a is {comparison.a}, b is {comparison.b}")


def top(comparison: Comparison, n: int) -> html_page.Html:
    """The first genes called, as a table."""
    header = ("gene", "higher in", "log2 change", "95% interval", "P(change)", "mean a", "mean b")
    rows = [
        (
            str(gene),
            comparison.a if row.lfc_mean < 0 else comparison.b,
            f"{row.lfc_mean:+.2f}",
            f"{row.lfc_low:+.2f} to {row.lfc_high:+.2f}",
            f"{row.p_lfc:.4f}",
            f"{row.mean_a:#.3g}",
            f"{row.mean_b:#.3g}",
        )
        for gene, row in comparison.called.head(n).iterrows()
    ]
    return html_page.table(rows or [("none", *[""] * 6)], header, numbers=range(2, 7))


def legend(comparison: Comparison) -> str:
    """What the columns of :func:`top` mean."""
    return (
        f"a is {comparison.a}, b is {comparison.b}. log2 change: mean b over mean a of the model's rates, on average "
        "and in 95% of pairs of cells, one from each group; P(change): share of the pairs in which it is more than "
        f"{comparison.delta:g} in that direction; mean a and b: raw counts per cell. {NOT_CALLED}"
    )


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
