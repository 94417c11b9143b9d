"""Posterior predictive figures: observed against replicated counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D

from pyro_scvi.errors import DataError
from pyro_scvi.plots.canvas import INK, MISSING, STRONG, TRAIN, given_or_new, legend_beside, require

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DECADES = 2  # positive values that span more are drawn on logarithmic axes
MANY = 2000  # entries beyond which they are drawn as pixels
_COLUMNS = ["observed", "low", "median", "high"]
_SOURCE = "one statistic of pyro_scvi.check_predictions, as checks.genes['zero_fraction'] or checks.cells['total']"


def predictive(statistic: pd.DataFrame, ax: Axes | None = None, *, name: str = "") -> Axes:
    """Draw an observed statistic of genes or cells against its replicas.

    Each entry is a point, observed over the median of its replicas, and a vertical line, the band of its replicas.
    Points outside their band are coloured; the legend gives their share. If the model is right, this share is about one
    minus the ``interval`` of the check. Axes are logarithmic if observed values and medians are positive and span more
    than two decades.

    Parameters
    ----------
    statistic
        One statistic of ``pyro_scvi.check_predictions``, as in ``checks.genes["zero_fraction"]``: columns
        ``observed``, ``low``, ``median``, ``high``. Rows with NaN are left out.
    ax
        Axes to draw into; None: axes of a new pyplot figure.
    name
        Of the statistic, for the labels.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If columns are missing, or no row is without NaN.
    ModelError
        If ``ax`` are no axes.

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=20)
    >>> ax = ps.plots.predictive(checks.genes["mean"], name="mean")
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('mean, median of replicas', 'mean, observed')
    """
    require(statistic, _COLUMNS, _SOURCE)
    known = statistic[_COLUMNS].dropna()
    if known.empty:
        raise DataError(f"every row holds NaN: pass {_SOURCE}")
    ax = given_or_new(ax, (6.6, 4.4))
    ends = _scaled(ax, known)
    style: dict[str, Any] = {"rasterized": len(known) > MANY}
    ax.plot(ends, ends, color=INK, linewidth=0.8, zorder=1)
    bands = known[["median", "low", "median", "high"]].to_numpy(float).reshape(-1, 2, 2)
    ax.add_collection(LineCollection(list(bands), colors=MISSING, linewidths=1, zorder=2, **style), autolim=False)
    off = (known.observed < known.low) | (known.observed > known.high)
    size = float(np.clip(6000 / len(known), 4, 24))
    for rows, colour in ((~off, TRAIN), (off, STRONG)):
        x, y = known.loc[rows, "median"], known.loc[rows, "observed"]
        ax.scatter(x, y, s=size, color=colour, linewidths=0, zorder=3, **style)
    ax.set_xlabel(f"{name}, median of replicas".removeprefix(", "))
    ax.set_ylabel(f"{name}, observed".removeprefix(", "))
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax, _handles(off))
    return ax


def _scaled(ax: Axes, known: pd.DataFrame) -> np.ndarray:
    """Choose scales and limits, the same for both axes; returns the ends (2,) of the identity line."""
    shown = known.to_numpy(float)
    low, high = shown.min(), shown.max()
    points = known[["observed", "median"]].to_numpy(float)
    if points.min() > 0 and points.max() > 10**DECADES * points.min():
        ax.set(xscale="log", yscale="log")
        low = shown[shown > 0].min()  # a band may reach 0, where a logarithmic axis ends
        margin = (high / low) ** 0.03
        ends = np.array([low / margin, high * margin])
    else:
        margin = 0.03 * (high - low) or 0.5
        ends = np.array([low - margin, high + margin])
    ax.set(xlim=ends, ylim=ends)
    return ends


def _handles(off: pd.Series) -> list[Any]:
    dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 5}
    return [
        Line2D([], [], color=MISSING, linewidth=1, label="band of the replicas"),
        Line2D([], [], color=TRAIN, label=f"inside ({(~off).sum():,})", **dot),
        Line2D([], [], color=STRONG, label=f"outside ({off.sum():,}, {100 * off.mean():.1f} %)", **dot),
    ]
