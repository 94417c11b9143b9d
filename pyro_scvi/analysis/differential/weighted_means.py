"""Weighted means of counts per depth over cells, with their variances: the data's part in a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import numpy as np

from pyro_scvi.data.counts import Counts, dense

AT_ONCE = 2**19  # entries of a dense block of counts
MODEL_CELLS = 30  # cells that the model's variance counts for, beside those of the data
LEAST_MEAN = 1e-12  # a mean that underflowed would give an infinite weight


@dataclass(frozen=True)
class Strata:
    """Weighted means of the cells of a group in each of its strata, such as donors or batches.

    ``key`` and ``n`` (strata,): which stratum, and how many cells. The others are (strata, genes). ``mean`` and
    ``variance`` of it; ``n_eff``, the effective number of cells; ``molecules`` and ``detected`` (cells above zero). The
    model's variance of the mean is ``per_mean`` times a mean count plus ``constant``; ``own`` is the constant for the
    group's mean where that is below the model's, with the same coefficient of variation.
    """

    key: np.ndarray
    n: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    n_eff: np.ndarray
    per_mean: np.ndarray
    constant: np.ndarray
    own: np.ndarray
    molecules: np.ndarray
    detected: np.ndarray

    def counting(self, mean: np.ndarray) -> np.ndarray:
        """Variance that counting molecules alone gives each stratum's mean, were it ``mean`` (genes,)."""
        return mean * self.per_mean

    def floored(self, mean: np.ndarray) -> np.ndarray:
        """Variance of each stratum's mean, (strata, genes): that of the cells, with a floor.

        It is not below counting at ``mean`` (genes,): a gene that was never seen in some cells has no variance there.
        Where the model's variance at ``mean`` is the larger, the average with it is taken, as if it were known from
        MODEL_CELLS cells: a few cells often lack the rare ones that make a variance large.
        """
        degrees = np.maximum(self.n_eff - 1, 0)
        counting = self.counting(mean)
        averaged = (MODEL_CELLS * (counting + self.constant) + degrees * self.variance) / (MODEL_CELLS + degrees)
        return np.maximum(np.maximum(self.variance, averaged), counting)

    def alone(self) -> Strata:
        """The strata with the model's variance for the group's own means: a few molecules do not vary as many do."""
        return replace(self, constant=self.own)

    def take(self, index: np.ndarray) -> Strata:
        """Some of the strata."""
        return Strata(*(getattr(self, field.name)[index] for field in fields(self)))


def strata_of(
    counts: Counts, rows: np.ndarray, key: np.ndarray, depth: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> Strata:
    r"""Means of counts per depth, R = x / l, weighted by the inverse of the variance that the model gives them.

    .. math:: weight_n \propto \frac{1}{m / l_n + V}, \qquad \hat m = \sum_n weight_n R_n, \qquad
        \hat v = \frac{n_{eff}}{n_{eff} - 1} \sum_n weight_n^2 (R_n - \hat m)^2

    Parameters
    ----------
    counts
        (all cells, genes).
    rows, key
        Cells of the group, and the stratum of each.
    depth
        l (all cells,).
    mean, variance
        m and V (genes,) of the model for the group.
    """
    keys = np.unique(key)
    parts = [_means(counts, rows[key == k], depth, np.maximum(mean, LEAST_MEAN), variance) for k in keys]
    n = np.array([(key == k).sum() for k in keys])
    return Strata(keys, n, *(np.stack(values) for values in zip(*parts, strict=True)))


def _means(
    counts: Counts, rows: np.ndarray, depth: np.ndarray, mean: np.ndarray, variance: np.ndarray
) -> tuple[np.ndarray, ...]:
    u1, u2, u2_per_depth, u_r, u2_r, u2_r2, molecules, detected = np.zeros((8, counts.shape[1]))
    for x, per_depth in _dense(counts, rows, depth):
        u = 1 / (mean * per_depth[:, None] + variance)
        weighted = u * x * per_depth[:, None]
        u1 += u.sum(0)
        u_r += weighted.sum(0)
        u2_r += np.einsum("ng,ng->g", u, weighted)
        u2_r2 += np.einsum("ng,ng->g", weighted, weighted)
        np.square(u, out=u)
        u2 += u.sum(0)
        u2_per_depth += per_depth @ u
        molecules += x.sum(0)
        detected += (x > 0).sum(0)
    found, n_eff = u_r / u1, u1**2 / u2
    spread = np.maximum(u2_r2 - 2 * found * u2_r + found**2 * u2, 0) / u1**2
    # One cell has no spread: its variance is the model's alone.
    inflation = np.where(n_eff > 1 + 1e-9, n_eff / np.maximum(n_eff - 1, 1e-9), 0)
    constant = variance / n_eff
    own = constant * np.minimum(found / mean, 1) ** 2
    return found, spread * inflation, n_eff, u2_per_depth / u1**2, constant, own, molecules, detected


def _dense(counts: Counts, rows: np.ndarray, depth: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Counts of some of the rows, (cells, genes) float64, and 1 / l of each."""
    size = max(1, AT_ONCE // counts.shape[1])
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield dense(counts[part], np.float64), 1 / depth[part]
