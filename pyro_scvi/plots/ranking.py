"""Forest plot of a model comparison."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.plots.canvas import INK, MISSING, SHADE, TRAIN, given_or_new, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DOUBTFUL = 0.1  # share of cells with a k-hat above the limit from which on a marker is hollow
_COLUMNS = ("difference", "difference_se", "refit_sd", "khat_bad")
_KHAT = rf"$\hat{{k}} > {KHAT_LIMIT}$"


def comparison(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the difference in log evidence of each model from the best, in nats per cell.

    A line spans two standard errors of the difference either way, paired by cell. A paler, wider bar spans two standard
    deviations over refits, if a model was fitted more than once. The share of cells whose Pareto k-hat is too large is
    given beside each row. Above 10 % the marker is hollow, because the evidence itself is then unreliable.

    Parameters
    ----------
    table
        Result of ``pyro_scvi.compare``, or some of its rows.
    ax
        Axes to draw into; None: axes of a new pyplot figure.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If columns are missing, or there are no rows.
    ModelError
        If ``ax`` are no axes.

    Examples
    --------
    >>> ax = ps.plots.comparison(ps.compare({"one": fit, "two": fit}, test.take(range(4)), samples=50))
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['one', 'two']
    """
    require(table, _COLUMNS, "the table of pyro_scvi.compare")
    ax = given_or_new(ax, (6.4, 1.4 + 0.36 * len(table)))
    rows, gaps = np.arange(len(table)), table.difference.to_numpy(float)
    hollow = table.khat_bad.to_numpy(float) > DOUBTFUL
    ax.axvline(0, color=MISSING, linewidth=1, zorder=0)
    refitted = _bars(ax, rows, gaps, 2 * table.refit_sd.to_numpy(float), SHADE, 8)
    _bars(ax, rows, gaps, 2 * table.difference_se.to_numpy(float), TRAIN, 1.8)
    ax.scatter(gaps, rows, s=38, c=np.where(hollow, "white", TRAIN), edgecolors=TRAIN, linewidths=1.5, zorder=3)
    _khat_column(ax, rows, table.khat_bad)
    ax.set_yticks(rows, [str(name) for name in table.index], parse_math=False)
    ax.set_ylim(len(table) - 0.5, -0.5)
    ax.set_xlabel("\n".join(_meaning(refitted, bool(hollow.any()))))
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _bars(ax: Axes, rows: np.ndarray, centres: np.ndarray, halves: np.ndarray, colour: str, width: float) -> bool:
    """Bars of ``halves`` either way, where both numbers are there; whether there are any."""
    known = np.isfinite(centres) & np.isfinite(halves)
    low, high = (centres - halves)[known], (centres + halves)[known]
    ax.hlines(rows[known], low, high, colors=colour, linewidth=width, zorder=1)
    return bool(known.any())


def _khat_column(ax: Axes, rows: np.ndarray, shares: pd.Series) -> None:
    place: dict[str, Any] = {"ha": "center", "fontsize": "small", "color": INK}
    ax.text(1.07, 1.0, _KHAT, va="bottom", transform=ax.transAxes, **place)
    for row, share in zip(rows, shares, strict=True):
        text = "\N{EN DASH}" if pd.isna(share) else f"{100 * share:.1f} %"
        ax.text(1.07, row, text, va="center", transform=ax.get_yaxis_transform(), **place)


def _meaning(refitted: bool, hollow: bool) -> list[str]:
    return [
        "log evidence less that of the best, nats per cell",
        "line: ± 2 paired standard errors" + "; pale bar: ± 2 sd of refits" * refitted,
        *[f"hollow: {_KHAT} in more than {100 * DOUBTFUL:.0f} % of cells"] * hollow,
    ]
