"""Methods that scale cells to a common depth: each takes and returns counts (cells, genes).

Each cell has one factor. The factors of edgeR (TMM, RLE, upper quartile) correct the total: cell n is divided by its
total times its factor. All cells are then multiplied by the mean of these products, as in SCONE (Cole et al. 2019).
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy.stats import rankdata

from pyro_scvi.errors import DataError


class Scaling(Protocol):
    """A method that scales cells to a common depth."""

    @property
    def name(self) -> str:
        """As in tables."""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Scaled counts of counts (cells, genes)."""


@dataclass(frozen=True)
class NoScaling:
    """The counts as they are.

    Examples
    --------
    >>> x = np.array([[2.0, 4.0], [1.0, 1.0]])
    >>> bool((ps.baselines.NoScaling()(x) == x).all())
    True
    """

    name: str = "none"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The counts."""
        return x


@dataclass(frozen=True)
class TotalScaling:
    """Divide by the total: SCONE's SUM.

    Raises
    ------
    DataError
        When it scales, if a cell has no count.

    Examples
    --------
    >>> ps.baselines.TotalScaling()(np.array([[2.0, 4.0], [1.0, 1.0]])).tolist()
    [[1.33..., 2.66...], [2.0, 2.0]]
    """

    name: str = "total"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Counts per mean total."""
        return _divided(x, _totals(x))


@dataclass(frozen=True)
class RLE:
    r"""Relative log expression: the median ratio to the geometric mean cell.

    See Anders and Huber (2010), Eq. 5.

    .. math:: \log s_n = median_{g: x_{ng} > 0} \big(\log x_{ng} - \tfrac1N \sum_{m: x_{mg} > 0} \log x_{mg}\big)

    The sums run over positive counts (DESeq2's poscounts). In single-cell data nearly every gene has a zero in some
    cell, so its geometric mean over all cells would be 0.

    Raises
    ------
    DataError
        When it scales, if a cell has no count.

    Examples
    --------
    >>> ps.baselines.RLE()(np.array([[2.0, 4.0], [1.0, 2.0]])).round(3).tolist()
    [[1.5, 3.0], [1.5, 3.0]]
    """

    name: str = "RLE"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Counts per median ratio."""
        _totals(x)
        log_mean = np.log(np.where(x > 0, x, 1)).mean(0)
        log_ratio = np.where(x > 0, np.log(np.where(x > 0, x, 1)) - log_mean, np.nan)
        return _divided(x, np.exp(np.nanmedian(log_ratio, axis=1)))


@dataclass(frozen=True)
class UpperQuartile:
    """Divide by the upper quartile of the cell's positive counts (Bullard et al. 2010).

    The quartile of all counts may be 0.

    Raises
    ------
    DataError
        When it scales, if a cell has no count.

    Examples
    --------
    >>> ps.baselines.UpperQuartile()(np.array([[2.0, 2.0, 0.0], [4.0, 4.0, 0.0]])).tolist()
    [[3.0, 3.0, 0.0], [3.0, 3.0, 0.0]]
    """

    name: str = "upper quartile"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Counts per mean upper quartile."""
        _totals(x)
        return _divided(x, np.nanquantile(np.where(x > 0, x, np.nan), 0.75, axis=1))


@dataclass(frozen=True)
class TMM:
    r"""Trimmed mean of M values against a reference cell (Robinson and Oshlack 2010).

    For cell n and reference r with totals N, over genes with counts in both,

    .. math:: M = \log_2 \frac{x_n / N_n}{x_r / N_r}, \quad A = \tfrac12 \log_2 \frac{x_n x_r}{N_n N_r}, \quad
              w^{-1} = \frac{N_n - x_n}{N_n x_n} + \frac{N_r - x_r}{N_r x_r}, \quad
              \log_2 f_n = \frac{\sum w M}{\sum w}

    without the outer ``trim_m`` of M and ``trim_a`` of A at each end. The reference is the cell whose upper quartile,
    as a share of its total, is nearest to the mean of these.

    Raises
    ------
    DataError
        When it scales, if a cell has no count.

    Examples
    --------
    >>> scaled = ps.baselines.TMM()(counts)
    >>> scaled.shape
    (60, 20)
    """

    trim_m: float = 0.3
    trim_a: float = 0.05
    name: str = "TMM"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Counts per effective total."""
        totals = _totals(x)
        quartiles = np.quantile(x, 0.75, axis=1) / totals
        reference = int(np.argmin(np.abs(quartiles - quartiles.mean())))
        against = x[reference], totals[reference]
        log_factor = np.array([self._log_factor(*cell, *against) for cell in zip(x, totals, strict=True)])
        return _divided(x, totals * np.exp(log_factor))

    def _log_factor(self, x: np.ndarray, total: float, reference: np.ndarray, total_reference: float) -> float:
        both = (x > 0) & (reference > 0)
        x, reference = x[both], reference[both]
        share, share_reference = x / total, reference / total_reference
        m, a = np.log(share / share_reference), 0.5 * np.log(share * share_reference)
        kept = _inner(m, self.trim_m) & _inner(a, self.trim_a)
        # Inverse variances of M by the delta method (Robinson and Oshlack 2010).
        weight = 1 / ((1 - share) / x + (1 - share_reference) / reference)[kept]
        return float(weight @ m[kept] / weight.sum()) if kept.any() and np.isfinite(weight).all() else 0.0


@dataclass(frozen=True)
class FullQuantile:
    """Give every cell the same distribution, the mean over cells of the k-th largest values.

    See Bolstad et al. (2003).

    Equal counts in a cell stay equal: they take the interpolated value at their mean rank.

    Examples
    --------
    >>> ps.baselines.FullQuantile()(np.array([[2.0, 4.0], [3.0, 1.0]])).tolist()
    [[1.5, 3.5], [3.5, 1.5]]
    """

    name: str = "full quantile"

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """The mean law's values by rank."""
        law = np.sort(x, axis=1).mean(0)
        ranks = rankdata(x, method="average", axis=1)
        return np.interp(ranks, np.arange(1, x.shape[1] + 1), law)


def _totals(x: np.ndarray) -> np.ndarray:
    totals = x.sum(1)
    if (empty := np.flatnonzero(totals == 0)).size:
        raise DataError(f"{empty.size} cells have no count, the first of them cell {empty[0]}; drop them")
    return totals


def _divided(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x * (scale.mean() / scale)[:, None]


def _inner(values: np.ndarray, trim: float) -> np.ndarray:
    """Whether each value is outside the lowest and the highest share ``trim``."""
    n = len(values)
    ranks, outside = rankdata(values), np.floor(n * trim)
    return (ranks >= outside + 1) & (ranks <= n - outside)
