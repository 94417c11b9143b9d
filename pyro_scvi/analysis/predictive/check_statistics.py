"""Statistics of data sets beside their replicas, and bands and p-values from those of simulated data sets.

The first of the sets is the observed data, the others are simulated; all are treated alike, so that the place of the
first among the others is uniform if the model is right.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.utils.precision import in_float64

PARTS = ("observed", "low", "median", "high", "p")
LEAST_VARIANCE = 1e-12
DIGITS = 10


class Values(NamedTuple):
    """A statistic (sets, rows), and what it is compared with: its mean over replicas, or 0 if there is none."""

    value: np.ndarray
    of_replicas: np.ndarray


class Statistics:
    """Sums over cells, which are added one at a time."""

    def __init__(self) -> None:
        self.n_cells, self.sums = 0, list[Tensor]()
        self.totals = list[tuple[Tensor, Tensor]]()
        self.of_moments: Tensor | None = None

    def add(self, sets: Tensor, replicas: Tensor, law: tuple[Tensor, Tensor] | None) -> None:
        """Add a cell: its counts in each data set (sets, genes), replicas of each (n, sets, genes), and its moments."""
        x, again = in_float64(sets), in_float64(replicas)
        new = [_powers(x), _powers(again), _pit(x, again)]
        if law is not None:
            mean, variance = law
            new.append((x - mean).square() / variance.clamp(min=LEAST_VARIANCE))
        self.sums = [old + one for old, one in zip(self.sums, new, strict=True)] if self.sums else new
        self.totals.append((x.sum(-1).cpu(), again.sum(-1).mean(0).cpu()))
        self.n_cells += 1

    def of_genes(self) -> dict[str, Values]:
        """By name, of every set and gene."""
        of_sets, of_replicas, *alone = (value / self.n_cells for value in self.sums)
        own, others = _described(of_sets), _described(of_replicas)
        compared = {name: Values(own[name].numpy(), _mean(others[name])) for name in own}
        # Rounded, because sums in another order of the cells differ in their last digits, and ties would be none.
        rounded = [value.cpu().numpy().round(DIGITS) for value in alone]
        names = ("pit", "variance_given_mean")
        return compared | {
            name: Values(value, np.zeros(value.shape)) for name, value in zip(names, rounded, strict=False)
        }

    def of_cells(self) -> dict[str, Values]:
        """The total, of every set and cell."""
        own, others = (torch.stack(of, 1).numpy() for of in zip(*self.totals, strict=True))
        return {"total": Values(own, others)}


def _powers(x: Tensor) -> Tensor:
    return torch.stack([(x == 0).to(x), x, x.square()])


def _described(sums: Tensor) -> dict[str, Tensor]:
    zeros, mean, square = sums.cpu()
    variance = square - mean.square()
    return {"zero_fraction": zeros, "mean": mean, "variance": variance, "dispersion": variance / mean}


def _mean(of_replicas: Tensor) -> np.ndarray:
    return of_replicas.nanmean(0).numpy()


def _pit(x: Tensor, replicas: Tensor) -> Tensor:
    """12 E (u - 1/2)^2, where u is uniform between the share of replicas below x and that of those not above it."""
    n = len(replicas) + 1
    low = in_float64((replicas < x).sum(0)) / n
    high = in_float64((replicas <= x).sum(0) + 1) / n
    return 4 * ((high - 0.5).pow(3) - (low - 0.5).pow(3)) / (high - low)


def moments(law: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and variance of counts, over draws of the latents (draws, ...), if the distribution has any."""
    try:
        mean, variance = in_float64(law.mean), in_float64(law.variance)
    except (AttributeError, NotImplementedError):
        return None
    return mean.mean(0), variance.mean(0) + mean.var(0, correction=0)


def banded(statistics: dict[str, Values], interval: float, names: pd.Index, axis: str) -> pd.DataFrame:
    """Columns (statistic, part) for each of the rows that the statistics are of."""
    columns, outside = dict[tuple[str, str], np.ndarray](), dict[str, dict[str, float]]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a statistic that no data set has: NaN says so
        for name, values in statistics.items():
            columns |= {(name, part): value for part, value in zip(PARTS, _parts(values, interval), strict=True)}
            outside[name] = _outside(values.value - values.of_replicas, interval)
    table = pd.DataFrame(columns, index=pd.Index(names, name=axis))
    table.attrs["outside"] = outside
    return table


def _parts(values: Values, interval: float) -> tuple[np.ndarray, ...]:
    excess = values.value - values.of_replicas
    levels = [(1 - interval) / 2, 0.5, (1 + interval) / 2]
    # By (n + 1) p, the expected share of a new data set below is p; 0 is below no statistic.
    places = np.nanquantile(excess[1:], levels, axis=0, method="weibull") + values.of_replicas[0]
    # Ties count half, so that discrete statistics have a mean p of 1/2 under the model.
    above = (excess[1:] > excess[0]) + 0.5 * (excess[1:] == excess[0])
    p = np.nanmean(np.where(np.isnan(excess[1:] - excess[0]), np.nan, above), 0)
    return values.value[0], *np.maximum(places, 0.0), p


def _outside(excess: np.ndarray, interval: float) -> dict[str, float]:
    """The share of rows outside the band of the others, for the observed set, and where it is for simulated ones."""
    known = excess[:, ~np.isnan(excess).any(0)]
    tail = (1 - interval) / 2 * len(excess)
    below = np.stack([(known < one).sum(0) for one in known])
    above = np.stack([(known > one).sum(0) for one in known])
    shares = ((below < tail) & (above > below) | (above < tail) & (below > above)).mean(1)
    low, high = np.quantile(shares[1:], [0.05, 0.95])
    # The observed set counts as one of those with a share as large: p is never 0.
    return {"share": shares[0], "low": low, "high": high, "p": (shares >= shares[0]).mean()}
