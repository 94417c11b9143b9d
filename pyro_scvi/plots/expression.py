"""Volcano and MA-like figures of differential expression."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox

from pyro_scvi.analysis.differential.summary import half_step
from pyro_scvi.errors import DataError
from pyro_scvi.plots.canvas import HELD_OUT, INK, MISSING, TRAIN, given_or_new, legend_beside, require
from pyro_scvi.utils.checks import brief, require_at_least

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.text import Annotation

MANY = 2000  # genes beyond which they are drawn as pixels
_COLUMNS = ["lfc_mean", "p_lfc", "fdr"]
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


def volcano(table: pd.DataFrame, ax: Axes | None = None, *, fdr: float = 0.05, names: int = 10) -> Axes:
    r"""Draw the genes of one comparison: log fold change, and log odds that two cells differ that way.

    .. math:: x = E[\log_2 (\mu_b / \mu_a)], \qquad y = \log_{10} \frac{P}{1 - P}, \qquad
        P = \max(P(lfc > \delta), P(lfc < -\delta))

    P is ``p_lfc``, over pairs of cells, one from each group. y is 0 or less if neither direction is likelier than not,
    as for every gene of two equal groups. A finite number of pairs can give a P of 0 or 1. Such a P is moved by half of
    the least distance from 0 or 1 that another gene has, at most 0.0005. The Bayes factor of w_a < w_b is not drawn,
    because it can be as large for a slight but certain change. ``fdr`` follows from P, so the genes called lie above a
    horizontal line.

    Parameters
    ----------
    table
        Result of ``pyro_scvi.differential_expression`` for one comparison. Genes with NaN are left out.
    ax
        Axes to draw into; None: axes of a new pyplot figure. Labels are placed for the figure's current size.
    fdr
        Genes up to this expected false discovery rate are called: coloured by direction, the sign of ``lfc_mean``.
    names
        Number of genes to label: the most probable of those called, larger changes first among equals. Fewer if there
        is no room.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If columns are missing, no gene is without NaN, the table holds several comparisons, or ``fdr`` is not in
        (0, 1).
    ModelError
        If ``names`` is no integer of 0 or more, or ``ax`` are no axes.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b", largest_se=0.05)
    >>> ax = ps.plots.volcano(table, names=3)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('log2 fold change, b over a', 'log10 odds of a change one way')
    """
    require(table, _COLUMNS, "the table of pyro_scvi.differential_expression")
    require_at_least(0, names=names)
    genes = _genes(table, fdr)
    ax = given_or_new(ax, (7.2, 4.6))
    up, many = genes.x > 0, len(genes.names) > MANY
    sides = {
        "not called": (~genes.called, MISSING),
        "higher in a": (genes.called & ~up, TRAIN),
        "higher in b": (genes.called & up, HELD_OUT),
    }
    for label, (rows, colour) in sides.items():
        dots: dict[str, Any] = {"s": 12, "color": colour, "linewidths": 0, "label": f"{label} ({rows.sum():,})"}
        ax.scatter(genes.x[rows], genes.y[rows], zorder=2, rasterized=many, **dots)
    ax.axvline(0, color=MISSING, linewidth=0.8, zorder=0)
    if genes.called.any():
        least = genes.y[genes.called].min()
        ax.axhline(least, color=INK, linewidth=0.8, linestyle=":", zorder=1, label=f"fdr {fdr:g}")
    ax.margins(0.1, 0.12)
    ax.set(xlabel="log2 fold change, b over a", ylabel="log10 odds of a change one way")
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax, ax.get_legend_handles_labels()[0])
    _label(ax, genes, names)
    return ax


class _Genes(NamedTuple):
    """Names, coordinates and whether called, (genes,) each, the most probable change first."""

    names: np.ndarray
    x: np.ndarray
    y: np.ndarray
    called: np.ndarray


def _genes(table: pd.DataFrame, fdr: float) -> _Genes:
    if table.index.nlevels > 1:
        groups = table.index.unique(0)
        raise DataError(
            f"volcano draws one comparison, this table holds {len(groups)}: select a group, as in "
            f"table.loc[{groups[0]!r}]"
        )
    if not isinstance(fdr, Real) or not 0 < fdr < 1:
        raise DataError(f"fdr must be between 0 and 1, such as 0.05 for one false call in twenty, got {brief(fdr)}")
    known = table.dropna(subset=_COLUMNS)
    if known.empty:
        raise DataError("every gene has NaN: pass the table of pyro_scvi.differential_expression")
    change, p = known.lfc_mean.to_numpy(float), known.p_lfc.to_numpy(float)
    order = np.lexsort((-np.abs(change), -p))  # by p, then by size
    names, called = known.index.to_numpy().astype(str), known.fdr.to_numpy(float) <= fdr
    return _Genes(names[order], change[order], _log_odds(p)[order], called[order])


def _log_odds(p: np.ndarray) -> np.ndarray:
    half = half_step(p)
    clipped = np.clip(p, half, 1 - half)
    return np.log10(clipped) - np.log10(1 - clipped)


def _label(ax: Axes, genes: _Genes, most: int) -> None:
    """Write names beside the first genes called, each at the first place free of names and these points."""
    ax.figure.canvas.figure.draw_without_rendering()  # a layout engine only now says how large the axes are
    rows = np.flatnonzero(genes.called)[:most]
    reach = 3 * ax.figure.dpi / 72  # points are as large as this
    centres = ax.transData.transform(np.stack([genes.x, genes.y], 1))[rows]
    taken = [Bbox([centre - reach, centre + reach]) for centre in centres]
    for row in rows:
        place = (genes.x[row], genes.y[row])
        text = ax.annotate(genes.names[row], place, (0, 0), textcoords="offset points", fontsize="x-small", zorder=4)
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
