"""Volcano and MA figures of differential expression."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from pyro_scvi.analysis.differential.summary import half_step
from pyro_scvi.analysis.differential.welch import EPSILON
from pyro_scvi.errors import DataError
from pyro_scvi.plots.canvas import HELD_OUT, INK, MISSING, TRAIN, given_or_new, legend_beside, require
from pyro_scvi.utils.checks import brief, require_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

MANY = 2000  # genes beyond which they are drawn as pixels
NAME_WIDTH = 30  # letters of a group's name
_NEAR = 5  # points of length between a dot and its name
_ANGLES = (45, 135, 315, 225, 90, 270, 67, 113, 293, 247)
_DIRECTIONS = [
    (_NEAR, 0),
    (_NEAR, 180),
    *((reach, angle) for reach in (_NEAR, 11, 18, 26, 36, 48) for angle in _ANGLES),
]
_OFFSETS = [
    (reach * math.cos(math.radians(angle)), reach * math.sin(math.radians(angle))) for reach, angle in _DIRECTIONS
]
_SIDES, _HEIGHTS = {1: "left", 0: "center", -1: "right"}, {1: "bottom", 0: "center", -1: "top"}


def volcano(table: pd.DataFrame, ax: Axes | None = None, *, level: float = 0.05, names: int = 10) -> Axes:
    r"""Draw the genes of one comparison: log fold change, and the evidence for a difference.

    .. math:: x = \log_2 (a / b), \qquad y = -\log_{10} p

    of a table of :class:`~pyro_scvi.differential.GroupMeans`. Genes that were not tested lie at y = 0, at the fold
    change of their means, and count for nothing. A p value of 0 is drawn at the least that a number can be.

    Of a table of :class:`~pyro_scvi.differential.RandomPairs`, y is the log odds that two cells differ that way:

    .. math:: y = \log_{10} \frac{P}{1 - P}, \qquad P = \max(P(lfc > \delta), P(lfc < -\delta))

    P is ``p_lfc``, over pairs of cells, one from each group. y is 0 or less if neither direction is likelier than not,
    as for every gene of two equal groups. A finite number of pairs can give a P of 0 or 1. Such a P is moved by half of
    the least distance from 0 or 1 that another gene has, at most 0.0005. The Bayes factor of w_a < w_b is not drawn,
    because it can be as large for a slight but certain change.

    The genes called lie above a horizontal line.

    Parameters
    ----------
    table
        Result of ``pyro_scvi.differential_expression`` for one comparison.
    ax
        Axes to draw into; None: axes of a new pyplot figure. Labels are placed for the figure's current size.
    level
        Genes up to this ``q_value``, or ``expected_false_share``, are called: coloured by direction, the sign of
        ``lfc``.
    names
        Number of genes to label: the surest of those called, larger changes first among equals. Fewer if there is no
        room.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If columns are missing, no gene has counts, the table holds several comparisons, or ``level`` is not in (0, 1).
    ModelError
        If ``names`` is no integer of 0 or more, or ``ax`` are no axes.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b")
    >>> ax = ps.plots.volcano(table, names=3)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('log2 fold change, a over b', '-log10 p value')
    """
    require_at_least(0, names=names)
    kind, genes = _genes("volcano", table, level)
    ax = given_or_new(ax, (7.2, 4.6))
    genes = genes.take(np.isfinite(genes.evidence))
    _draw(ax, genes, genes.change, genes.evidence)
    ax.axvline(0, color=MISSING, linewidth=0.8, zorder=0)
    if genes.called.any():
        least = genes.evidence[genes.called].min()
        ax.axhline(least, color=INK, linewidth=0.8, linestyle=":", zorder=1, label=f"{kind.rate_name} {level:g}")
    ax.set_xlabel(genes.groups.change, parse_math=False)
    ax.set_ylabel(kind.evidence_name)
    return _finished(ax, genes, genes.change, genes.evidence, names)


def ma(table: pd.DataFrame, ax: Axes | None = None, *, level: float = 0.05, names: int = 10) -> Axes:
    r"""Draw the genes of one comparison: mean count of both groups, and log fold change.

    .. math:: x = \log_{10} \frac{mean_a + mean_b}{2}, \qquad y = \log_2 (a / b)

    Genes that were not tested are drawn, too, in grey: where counts are few, fold changes are large by chance. Genes
    without a count in either group are left out.

    Parameters
    ----------
    table
        Result of ``pyro_scvi.differential_expression`` for one comparison.
    ax, level, names
        As in :func:`volcano`.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If columns are missing, no gene has counts, the table holds several comparisons, or ``level`` is not in (0, 1).
    ModelError
        If ``names`` is no integer of 0 or more, or ``ax`` are no axes.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b")
    >>> ps.plots.ma(table).get_xlabel()
    'log10 mean count of both groups'
    """
    require_at_least(0, names=names)
    require(table, ["mean_a", "mean_b"], "the table of pyro_scvi.differential_expression")
    _, genes = _genes("ma", table, level)
    ax = given_or_new(ax, (7.2, 4.6))
    genes = genes.take(genes.mean > 0)
    x = np.log10(genes.mean)
    _draw(ax, genes, x, genes.change)
    ax.axhline(0, color=MISSING, linewidth=0.8, zorder=0)
    ax.set_xlabel("log10 mean count of both groups")
    ax.set_ylabel(genes.groups.change, parse_math=False)
    return _finished(ax, genes, x, genes.change, names)


class _Kind(NamedTuple):
    """How the table of an estimand is drawn: its rate of false calls, and its evidence for a difference."""

    rate: str
    rate_name: str
    evidence: str
    evidence_name: str
    of: Callable[[np.ndarray], np.ndarray]


def _minus_log(p: np.ndarray) -> np.ndarray:
    return -np.log10(np.maximum(p, np.finfo(float).tiny))


def _log_odds(p: np.ndarray) -> np.ndarray:
    half = half_step(p)
    clipped = np.clip(p, half, 1 - half)
    return np.log10(clipped) - np.log10(1 - clipped)


_MEANS = _Kind("q_value", "q value", "p_value", "-log10 p value", _minus_log)
_PAIRS = _Kind("expected_false_share", "expected false share", "p_lfc", "log10 odds of a change one way", _log_odds)


class _Groups(NamedTuple):
    """The names of the two groups, as the table gives them."""

    a: str = "a"
    b: str = "b"

    @property
    def change(self) -> str:
        return f"log2 fold change, {self.a} over {self.b}"


@dataclass(frozen=True)
class _Genes:
    """Names, coordinates, and whether tested and called, (genes,) each, the surest change first; and the groups."""

    groups: _Groups
    names: np.ndarray
    change: np.ndarray
    evidence: np.ndarray
    mean: np.ndarray
    tested: np.ndarray
    called: np.ndarray

    def take(self, rows: np.ndarray) -> _Genes:
        """Some of the genes, in this order."""
        return _Genes(self.groups, *(getattr(self, field.name)[rows] for field in fields(self)[1:]))


def _genes(name: str, table: pd.DataFrame, level: float) -> tuple[_Kind, _Genes]:
    kind = _MEANS if isinstance(table, pd.DataFrame) and _MEANS.rate in table else _PAIRS
    require(table, ["lfc", kind.evidence, kind.rate], "the table of pyro_scvi.differential_expression")
    if table.index.nlevels > 1:
        groups = table.index.unique(0)
        raise DataError(
            f"{name} draws one comparison, this table holds {len(groups)}: select a group, as in "
            f"table.loc[{groups[0]!r}]"
        )
    if not isinstance(level, Real) or not 0 < level < 1:
        raise DataError(f"level must be between 0 and 1, such as 0.05 for one false call in twenty, got {brief(level)}")
    genes = _placed(kind, table, float(level))
    if not (genes.tested | (genes.mean > 0)).any():
        raise DataError("every gene has NaN: pass the table of pyro_scvi.differential_expression")
    return kind, genes.take(np.lexsort((-np.abs(genes.change), -genes.evidence)))  # by evidence, then by size


def _placed(kind: _Kind, table: pd.DataFrame, level: float) -> _Genes:
    change, p, rate = (table[column].to_numpy(float) for column in ("lfc", kind.evidence, kind.rate))
    tested = np.isfinite(change) & np.isfinite(p)
    evidence = np.full(len(p), np.nan)
    evidence[tested] = kind.of(p[tested])
    mean = np.full(len(p), np.nan)
    if {"mean_a", "mean_b"} <= set(table):
        a, b = table["mean_a"].to_numpy(float), table["mean_b"].to_numpy(float)
        mean = (a + b) / 2
        shown = ~tested & (mean > 0)
        change = np.where(shown, np.log2(a + EPSILON) - np.log2(b + EPSILON), change)
        evidence[shown] = 0
    names = table.index.to_numpy().astype(str)
    return _Genes(_groups(table), names, change, evidence, mean, tested, tested & (rate <= level))


def _groups(table: pd.DataFrame) -> _Groups:
    named = {side: table.attrs.get(f"group_{side}", side) for side in "ab"}
    return _Groups(**{side: shorten(str(name), NAME_WIDTH, placeholder="...") for side, name in named.items()})


def _draw(ax: Axes, genes: _Genes, x: np.ndarray, y: np.ndarray) -> None:
    up, many = genes.change > 0, len(genes.names) > MANY
    sides = {
        "not tested": (~genes.tested, MISSING, "x", 0.6),
        "not called": (genes.tested & ~genes.called, MISSING, "o", 0),
        f"higher in {genes.groups.a}": (genes.called & up, TRAIN, "o", 0),
        f"higher in {genes.groups.b}": (genes.called & ~up, HELD_OUT, "o", 0),
    }
    for label, (rows, colour, marker, width) in sides.items():
        if label == "not tested" and not rows.any():
            continue
        dots: dict[str, Any] = {"s": 12, "color": colour, "marker": marker, "linewidths": width}
        ax.scatter(x[rows], y[rows], zorder=2, rasterized=many, label=f"{label} ({rows.sum():,})", **dots)


def _finished(ax: Axes, genes: _Genes, x: np.ndarray, y: np.ndarray, names: int) -> Axes:
    ax.margins(0.1, 0.12)
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax, ax.get_legend_handles_labels()[0])
    rows = np.flatnonzero(genes.called)[:names]
    _label(ax, genes.names[rows], np.stack([x[rows], y[rows]], 1))
    return ax


def _label(ax: Axes, names: np.ndarray, places: np.ndarray) -> None:
    """Write names beside their points (names, 2), each at the first place free of names and these points."""
    ax.figure.canvas.figure.draw_without_rendering()  # a layout engine only now says how large the axes are
    reach = 3 * ax.figure.dpi / 72  # points are as large as this
    centres = ax.transData.transform(places)
    taken = [Bbox([centre - reach, centre + reach]) for centre in centres]
    for name, place in zip(names, places.tolist(), strict=True):
        text = ax.annotate(name, tuple(place), (0, 0), textcoords="offset points", fontsize="x-small", zorder=4)
        text.set(parse_math=False, color=INK, path_effects=[withStroke(linewidth=2, foreground="white")])
        box = _free(text, ax.get_window_extent(), taken)
        if box is None:
            text.remove()
        else:
            taken.append(box)
            _lead(ax, text)


def _free(text: Annotation, frame: Bbox, taken: Sequence[Bbox]) -> Bbox | None:
    """Move a name around its point, near first, until it overlaps nothing; its box, or None if there is no place."""
    for x, y in _OFFSETS:
        text.set(position=(x, y), ha=_SIDES[np.sign(round(x))], va=_HEIGHTS[np.sign(round(y))])
        box = text.get_window_extent().padded(1)
        within = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
        if within and not box.count_overlaps(taken):
            return box
    return None


def _lead(ax: Axes, text: Annotation) -> None:
    """A thin line from a point to a name that is not next to it."""
    if math.hypot(*text.get_position()) > _NEAR:
        line = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "shrinkA": 0, "shrinkB": 2}
        ax.annotate("", text.xy, text.get_position(), textcoords="offset points", arrowprops=line, zorder=1)
