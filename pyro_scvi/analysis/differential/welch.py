"""The test of a difference of weighted means: Welch's t with a floor on the variances, and its table by gene."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit
from scipy.stats import false_discovery_control

from pyro_scvi.analysis.differential.designs import Design
from pyro_scvi.analysis.differential.shrinkage import shrunken
from pyro_scvi.analysis.differential.weighted_means import Strata

EPSILON = 1e-4  # molecules of a median cell, added to both means of a fold change
LEVEL = 0.975  # upper end of the interval of a fold change
NORMAL = 1.959964  # the same end of a standard normal law
TABLE = ("lfc", "lfc_se", "lfc_low", "lfc_high", "z", "p_value", "q_value")


class Side(NamedTuple):
    """A group in a comparison, (genes,) each: its mean with variance and degrees of freedom, and its counts.

    ``scale`` is the variance of the mean over the mean, by the group alone: what counting one molecule adds, at least.
    """

    mean: np.ndarray
    variance: np.ndarray
    degrees: np.ndarray
    scale: np.ndarray
    molecules: np.ndarray
    detected: np.ndarray


def sides(design: Design, a: Strata, b: Strata) -> tuple[Side, Side]:
    """Both groups of a comparison."""
    a, b, weight_a, weight_b = design.pair(a, b)
    mean_a, mean_b = weight_a @ a.mean, weight_b @ b.mean
    n_a, n_b = a.n.sum(), b.n.sum()
    # Without the floor a group in which a gene was never seen would have no error at all.
    pooled = (n_a * mean_a + n_b * mean_b) / (n_a + n_b)
    return _side(design, a, weight_a, mean_a, pooled), _side(design, b, weight_b, mean_b, pooled)


def _side(design: Design, strata: Strata, weight: np.ndarray, mean: np.ndarray, pooled: np.ndarray) -> Side:
    variance, degrees = design.variance(strata, weight, pooled)
    molecules, detected = strata.molecules.sum(0), strata.detected.sum(0) / strata.n.sum()
    counting = weight**2 @ strata.per_mean
    alone, _ = design.variance(strata.alone(), weight, np.zeros_like(pooled))
    scale = np.maximum(alone / np.maximum(mean, counting), counting)
    return Side(mean, variance, degrees, scale, molecules, detected)


def tested(a: Side, b: Side, min_detected: float, min_molecules: float) -> np.ndarray:
    """Whether there are counts enough to test a gene, (genes,)."""
    return (np.maximum(a.detected, b.detected) >= min_detected) & (a.molecules + b.molecules >= min_molecules)


def welch(a: Side, b: Side, chosen: np.ndarray) -> dict[str, np.ndarray]:
    """Columns by gene, (genes,) each, NaN where a gene is not among those ``chosen`` to be tested."""
    a, b = (Side(*(column[chosen] for column in side)) for side in (a, b))
    variance = a.variance + b.variance
    degrees = variance**2 / (a.variance**2 / a.degrees + b.variance**2 / b.degrees)
    z = (a.mean - b.mean) / np.sqrt(variance)
    p = 2 * stdtr(degrees, -np.abs(z))
    change = np.log2((a.mean + EPSILON) / (b.mean + EPSILON))
    se = np.sqrt(_relative(a) + _relative(b)) / np.log(2)
    reach = stdtrit(degrees, LEVEL) * se
    columns = dict(
        zip(TABLE, (change, se, change - reach, change + reach, z, p, false_discovery_control(p)), strict=True)
    )
    # Few degrees of freedom: as much wider as the t law is.
    a_scale, b_scale = (side.scale * np.square(stdtrit(side.degrees, LEVEL) / NORMAL) for side in (a, b))
    columns |= shrunken(a.mean / a_scale, b.mean / b_scale, np.log(b_scale) - np.log(a_scale))
    return {name: scattered(values, chosen) for name, values in columns.items()}


def _relative(side: Side) -> np.ndarray:
    """Variance of the log of a group's mean: at its own mean, or at one molecule where there is none."""
    return side.scale * np.maximum(side.mean, side.scale) / (side.mean + EPSILON) ** 2


def scattered(values: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Values of the chosen genes at their places, (genes,), NaN elsewhere."""
    every = np.full(len(chosen), np.nan)
    every[chosen] = values
    return every
