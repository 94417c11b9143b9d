"""Training curves: the loss of training and held-out cells by epoch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.ticker import MaxNLocator

from pyro_scvi.analysis.inputs import require_fit
from pyro_scvi.errors import ModelError
from pyro_scvi.plots.canvas import HELD_OUT, TRAIN, given_or_new
from pyro_scvi.training.fitted import Fit

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def loss(fit: Fit, ax: Axes | None = None) -> Axes:
    """Draw the loss of training and held-out cells, in nats per cell, against the epoch.

    The first epochs may lie outside the axes, because their loss is far larger.

    Parameters
    ----------
    fit
        The fit whose history is drawn.
    ax
        Axes to draw into; None: axes of a new pyplot figure.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    ModelError
        If ``fit`` is no Fit or has no history, or ``ax`` are no axes.

    Examples
    --------
    >>> ps.plots.loss(fit).get_xlabel()
    'epoch'
    """
    require_fit(fit)
    if not {"train_loss", "held_out_loss"} <= set(fit.history) or fit.history.empty:
        raise ModelError("the fit has no history of losses: it was not trained by ps.fit")
    ax = given_or_new(ax, (6.0, 3.8))
    history = fit.history
    lines = {"training cells": ("train_loss", TRAIN), "held-out cells": ("held_out_loss", HELD_OUT)}
    shown = {label: (history[column], colour) for label, (column, colour) in lines.items()}
    shown = {label: line for label, line in shown.items() if line[0].notna().any()}
    for label, (values, colour) in shown.items():
        ax.plot(history.index, values, color=colour, label=label, marker="." if len(history) < 10 else "")
    settled = np.concatenate([values.iloc[len(values) // 10 :] for values, _ in shown.values()])
    low, high = np.nanmin(settled), np.nanmax(settled)
    if high > low:
        ax.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    ax.set_xlabel("epoch")
    ax.set_ylabel("loss, nats per cell")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False)
    return ax
