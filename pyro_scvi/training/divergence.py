"""Divergence: a loss that is not finite, where it occurred, and the cells and genes that may cause it."""

import math
from typing import Any

import numpy as np
import pyro
import torch

from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.evaluation import undisturbed
from pyro_scvi.model import SCVI

HALVINGS = 12  # of the learning rate in one run, at most


class Diverged(Exception):
    """A loss or parameter is not finite; ``trained``: steps were made since the last good state."""

    def __init__(self, what: str, *, trained: bool) -> None:
        super().__init__(what)
        self.trained = trained


def suspects(model: SCVI, guide: Guide, cells: Minibatches) -> str:
    """In words, the likely cause: non-finite parameters, prior or log probability of counts, else the largest count."""
    if lost := nonfinite_parameters(model, guide):
        return lost
    largest = (-math.inf, 0, 0)
    with undisturbed(0, model, guide):
        for rows in torch.arange(cells.n_cells, device=cells.device).split(512):
            x, gamma = cells.rows(rows)
            guided = pyro.poutine.trace(guide).get_trace(x, gamma, index=rows)
            replayed = pyro.poutine.replay(model, trace=guided)
            nodes: Any = pyro.poutine.trace(replayed).get_trace(x, gamma, index=rows).nodes
            site = nodes["x"]
            for name in guide.coordinates.local:
                if not nodes[name]["fn"].log_prob(nodes[name]["value"]).isfinite().all():
                    return f"the prior of {name} gives no finite density"
            lost = (~site["fn"].log_prob(site["value"]).isfinite()).cpu().numpy()
            if lost.any():
                return f"no finite log probability for {_named(cells, rows.cpu().numpy(), lost)}"
            top = int(x.argmax())
            largest = max(largest, (float(x.flatten()[top]), int(rows[top // x.shape[1]]), top % x.shape[1]))
    value, row, gene = largest
    return f"every count has a finite log probability; the largest is {value:,.0f}, of {_entry(cells, row, gene)}"


def nonfinite_parameters(model: SCVI, guide: Guide) -> str:
    """In words, the first parameters with values that are not finite; empty if all are finite."""
    named = [(name, value) for part in (model, guide) for name, value in part.named_parameters()]
    lost = [name for name, value in named if not value.isfinite().all()]
    return f"{', '.join(lost[:3])} {'holds' if len(lost) == 1 else 'hold'} values that are no numbers" if lost else ""


def _named(cells: Minibatches, rows: np.ndarray, lost: np.ndarray) -> str:
    entries = np.argwhere(lost)
    shown = ", ".join(_entry(cells, rows[cell], gene) for cell, gene in entries[:3])
    return shown if len(entries) <= 3 else f"{shown} and {len(entries) - 3} more entries"


def _entry(cells: Minibatches, row: int, gene: int) -> str:
    return f"gene {cells.cells.gene_names[gene]!r} in cell {cells.cells.cell_names[cells.selected[row]]!r}"
