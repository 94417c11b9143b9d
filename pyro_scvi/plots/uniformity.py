"""Calibration figures: ranks and PIT values against the uniform distribution."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from numpy.typing import ArrayLike
from scipy.stats import binom

from pyro_scvi.errors import DataError
from pyro_scvi.plots.canvas import BAND, CALM, INK, SHADE, STRONG, given_or_new, legend_beside
from pyro_scvi.utils.checks import brief

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pyro_scvi.analysis.predictive.calibration import Calibration

LEVEL = 0.95
MOST_THRESHOLDS, SIMULATIONS = 100, 4000


def calibration(result: Calibration, ax: Axes | None = None) -> Axes:
    r"""Draw how far the ranks of each quantity are from uniform.

    .. math:: \hat F(u) - u, \qquad \hat F(u) = \frac{1}{N} \sum_n 1\{(rank_n + 1/2) / (draws + 1) \le u\}

    over N simulated cells, at up to 100 values u = k / (draws + 1), where the distribution function of discrete uniform
    ranks is exactly u. The band is simultaneous: a calibrated quantity is inside it at all of these u with probability
    95 % (Saeilynoja, Buerkner and Vehtari 2022, Sec. 2). So one calibrated quantity in twenty leaves it. Quantities
    that leave it are coloured and named; the others are grey.

    How to read it: above the band throughout, the draws are too high; below it, too low. Above it on the left and below
    it on the right, the posterior is too narrow; the reverse, too wide.

    Parameters
    ----------
    result
        Result of ``pyro_scvi.calibrate``. Quantities without any rank are left out, then simulated cells that lack a
        rank.
    ax
        Axes to draw into; None: axes of a new pyplot figure.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If it is no such result, there are no ranks, or ranks are outside 0 to ``draws``.
    ModelError
        If ``ax`` are no axes.

    Examples
    --------
    >>> ax = ps.plots.calibration(ps.calibrate(fit, 20, sampler=ps.Amortized(), draws=19, thin=1))
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('u, rank of the truth over draws', 'share of ranks up to u, less u')
    """
    curves = _curves(result)
    ax = given_or_new(ax, (7.0, 3.8))
    ax.fill_between(curves.u, curves.low, curves.high, color=BAND, linewidth=0, zorder=0)
    ax.axhline(0, color=INK, linewidth=0.8, zorder=1)
    strong = iter(colormaps["plasma"](np.linspace(0, 0.8, max(1, len(curves.outside)))))
    named: list[Any] = [Patch(color=BAND, label=f"{100 * LEVEL:.0f} % band, all u at once")]
    for name, gap in curves.gaps.items():
        left = name in curves.outside
        style = {"color": next(strong), "linewidth": 1.8, "zorder": 3} if left else {"color": CALM, "linewidth": 0.9}
        named += ax.plot(curves.u, gap, label=str(name), **style)[: int(left)]
    inside = len(curves.gaps.columns) - len(curves.outside)
    named += [Line2D([], [], color=CALM, linewidth=0.9, label=f"{inside} inside the band")] * bool(inside)
    ax.set(xlim=(0, 1), xlabel="u, rank of the truth over draws", ylabel="share of ranks up to u, less u")
    ax.spines[["top", "right"]].set_visible(False)
    legend_beside(ax, named)
    return ax


class _Curves(NamedTuple):
    """Points u in [0, 1] with the band there, the gaps (u x quantities), and which quantities leave the band."""

    u: np.ndarray
    low: np.ndarray
    high: np.ndarray
    gaps: pd.DataFrame
    outside: list[Any]


def _curves(result: Calibration) -> _Curves:
    ranks, draws = _ranks(result), result.draws
    k = np.unique(np.linspace(1, draws, min(draws, MOST_THRESHOLDS)).round().astype(int))
    u = k / (draws + 1)
    counts = (ranks.to_numpy()[..., None] < k).sum(0)  # (quantities, thresholds)
    low, high = uniform_band(len(ranks), u)
    outside = ranks.columns[((counts < low) | (counts > high)).any(1)]
    lower, upper, *gaps = (np.pad(row / len(ranks) - u, 1) for row in (low, high, *counts))  # 0 at u = 0 and 1
    table = pd.DataFrame(dict(zip(ranks.columns, gaps, strict=True)))
    return _Curves(np.r_[0, u, 1], lower, upper, table, list(outside))


def _ranks(result: Calibration) -> pd.DataFrame:
    """Ranks (simulated cells x quantities) without missing ones."""
    if not hasattr(result, "ranks") or not hasattr(result, "draws"):
        raise DataError(
            "the fields 'ranks' and 'draws' are missing: pass the result of pyro_scvi.calibrate, got "
            f"{type(result).__name__}"
        )
    ranks = result.ranks.dropna(axis=1, how="all").dropna()
    if not ranks.size:
        raise DataError("there are no ranks: pass the result of pyro_scvi.calibrate for at least one cell")
    low, high = ranks.to_numpy().min(), ranks.to_numpy().max()
    if low < 0 or high > result.draws:
        raise DataError(
            f"ranks must be from 0 to draws = {result.draws}, got {low} to {high}: pass the number of draws that they "
            "were ranked among"
        )
    return ranks


def uniform_band(n: int, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and largest counts of n uniform values up to each of ``u`` (ascending, in (0, 1)), together at 95 %.

    Each end leaves out the same pointwise binomial tail: the 5 % quantile, over simulated samples, of a sample's
    smallest tail at any u.
    """
    shares = np.diff(u, prepend=0, append=1)
    cells = np.random.default_rng(0).multinomial(n, shares, size=SIMULATIONS)
    tail = np.quantile(_tails(cells[:, :-1].cumsum(1), n, u).min(1), 1 - LEVEL, method="lower")
    tail *= 1 - 1e-9  # a count whose tail is this one, up to rounding, is inside
    return np.asarray(binom.ppf(tail, n, u)), np.asarray(n - binom.ppf(tail, n, 1 - u))


def _tails(counts: np.ndarray, n: int, u: np.ndarray) -> np.ndarray:
    """The smaller of P(C <= c) and P(C >= c), C binomial (n, u)."""
    return np.minimum(binom.cdf(counts, n, u), binom.cdf(n - counts, n, 1 - u))


def pit(values: ArrayLike, ax: Axes | None = None) -> Axes:
    """Draw the probability integral transforms: uniform where predictions are calibrated.

    The band contains each single bar's height with probability 95 %, for independent uniform values (binomial,
    pointwise: of twenty bars, one is expected outside). Values from the same cell or gene are not quite independent, so
    more bars may leave it. Those that do are coloured.

    Parameters
    ----------
    values
        Values in [0, 1] of any shape: an array, a DataArray or a Series. NaNs are left out.
    ax
        Axes to draw into; None: axes of a new pyplot figure.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If there is no value, or values are no numbers in [0, 1].
    ModelError
        If ``ax`` are no axes.

    Examples
    --------
    >>> left_out = ps.leave_one_out(fit, test.take(range(2)), samples=100, sampler=ps.Importance())
    >>> ax = ps.plots.pit(left_out.pit)
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('probability integral transform', 'density')
    """
    u = _numbers(values)
    u = u[~np.isnan(u)]
    if not u.size:
        raise DataError("pit needs at least one value in [0, 1] that is not NaN, got none")
    if u.min() < 0 or u.max() > 1:
        raise DataError(f"probability integral transforms must be in [0, 1], got values from {u.min()} to {u.max()}")
    bins = int(np.clip(u.size // 20, 5, 20))
    counts, edges = np.histogram(u, bins, range=(0, 1))
    low, high = binom.interval(LEVEL, u.size, 1 / bins)
    colours = np.where((counts < low) | (counts > high), STRONG, SHADE)
    ax = given_or_new(ax, (6.4, 3.4))
    density = bins / u.size  # of one value
    ax.bar(edges[:-1], density * counts, 1 / bins, align="edge", color=colours, edgecolor="white", linewidth=0.8)
    ax.axhspan(density * low, density * high, color=CALM, alpha=0.35, linewidth=0, zorder=2)
    ax.axhline(1, color=INK, linewidth=0.8, zorder=3)
    ax.set(xlim=(0, 1), xlabel="probability integral transform", ylabel="density")
    ax.spines[["top", "right"]].set_visible(False)
    handles: list[Any] = [
        Patch(color=CALM, alpha=0.35, label=f"{100 * LEVEL:.0f} % band of uniform,\neach bar by itself")
    ]
    legend_beside(ax, [*handles, *[Patch(color=STRONG, label="outside")] * bool((colours == STRONG).any())])
    return ax


def _numbers(values: ArrayLike) -> np.ndarray:
    try:
        return np.asarray(values, dtype=float).ravel()
    except (TypeError, ValueError) as error:  # words, objects and ragged lists
        raise DataError(
            f"pit takes numbers in [0, 1], such as leave_one_out(fit, cells).pit; got {brief(values)}"
        ) from error
