"""What all figures share: colours, axes, legends, and checks of the tables they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.axes import Axes

from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import require_kind

if TYPE_CHECKING:
    from matplotlib.artist import Artist

TRAIN, HELD_OUT = "#31688e", "#d1603d"
INK, SHADE, MISSING = "#1a1a1a", "#c9ced6", "#c4c4c4"
CALM, STRONG, BAND = "#8a919c", "#b2182b", "#dbe3ec"


def given_or_new(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes given, or those of a new pyplot figure of ``size`` (width, height) in inches.

    Raises
    ------
    ModelError
        If ``ax`` is something else.
    """
    if ax is not None:
        require_kind(ax, Axes, "ax", "figure.subplots()")
        return ax
    from matplotlib import pyplot  # only here: pyplot keeps global state and chooses a backend

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def legend_beside(ax: Axes, handles: Sequence[Artist]) -> None:
    """A legend to the right of the axes, so that it covers nothing; its text is plain, whatever signs it holds."""
    columns = math.ceil(len(handles) / 20)
    legend = ax.legend(
        handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, ncols=columns, fontsize="small"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def require(table: pd.DataFrame, columns: Sequence[str], source: str) -> None:
    """Raise if a table lacks ``columns`` or rows; ``source`` names the function that makes such a table.

    Raises
    ------
    DataError
        If it does; the message lists the missing columns, the present ones, and ``source``.
    """
    held = list(getattr(table, "columns", ()))
    missing = [column for column in columns if column not in held]
    if missing:
        raise DataError(f"the columns {missing} are missing: pass {source}; this has the columns {held}")
    if not len(table):
        raise DataError(f"the table has no rows: pass {source}")
