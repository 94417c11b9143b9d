r"""Irreproducible discovery rate: the copula mixture of Li, Brown, Huang and Bickel (2011), by their EM.

Two rankings of the same items agree where both are right. Let u = ranks / (n + 1), and F the marginal distribution of
the mixture below:

.. math::

    z_{ir} = F^{-1}(u_{ir}), \quad (z_{i1}, z_{i2}) \sim p\, N_2((\mu, \mu),
    \sigma^2 [[1, \rho], [\rho, 1]]) + (1 - p)\, N_2(0, I), \quad F(t) = p \Phi((t - \mu) / \sigma) + (1 - p) \Phi(t)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import norm, rankdata

from pyro_scvi.data.names import in_order_of
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_at_least


class Mixture(NamedTuple):
    """p, rho, mu and sigma: weight, correlation, mean and sd of the reproducible part.

    Examples
    --------
    >>> ps.baselines.AUTHORS_START  # of Lopez et al. (2017)
    Mixture(mixture_weight=0.1, rho=0.5, mu=1.0, sigma=0.5)
    """

    mixture_weight: float
    rho: float
    mu: float
    sigma: float


AUTHORS_START = Mixture(0.1, 0.5, 1.0, 0.5)  # of Lopez et al. (2017), who take no other
STARTS = (AUTHORS_START, *(Mixture(p, 0.7, mu, 1.0) for p in (0.2, 0.5, 0.8) for mu in (1.5, 3.0)))

GRID = 1000  # points between which F is interpolated linearly, as in the authors' R package idr
EDGE = 1e-6  # least distance of p from 0 and 1 and of rho from -1 and 1, and least sigma: the density ends there
LONGEST_EM = 1000
LEAST_GAIN = 5.0  # nats over independence below which the ranks do not determine the mixture
HIGHEST_WEIGHT = 0.99  # above it the marginals are one normal law, whose mu and sigma ranks do not show


class IDRResult(NamedTuple):
    """Result of :func:`idr`: the mixture, and per item (items,) ``local_idr`` and ``idr``.

    ``mixture_weight`` is the share of reproducible items; ``local_idr`` an item's posterior probability of being
    irreproducible; ``idr`` the mean local_idr of the items that are as good or better. ``log_likelihood`` is that of
    the ranks (the copula), nats over all items.

    Examples
    --------
    >>> scores = np.random.default_rng(0).normal(size=(300, 2))
    >>> scores[:100] = 2.5 + scores[:100, :1] + 0.5 * scores[:100]  # the first hundred items are scored alike
    >>> result = ps.baselines.idr(*scores.T)
    >>> isinstance(result, ps.baselines.IDRResult), result.idr.shape
    (True, (300,))
    """

    mixture_weight: float
    rho: float
    mu: float
    sigma: float
    local_idr: np.ndarray
    idr: np.ndarray
    log_likelihood: float


def idr(
    score_1: Any, score_2: Any, *, starts: Sequence[Mixture] = STARTS, tol: float = 1e-3, max_iter: int = 20
) -> IDRResult:
    r"""Estimate which items two methods score reproducibly.

    Larger scores are more significant, such as -log p.

    This EM depends on its start. Its own objective, the likelihood of z, cannot compare two solutions, because z
    changes with the parameters. So of all starts, the fit whose copula has the largest log likelihood is kept,

    .. math:: \sum_i \log h(z_{i1}, z_{i2}) - \log f(z_{i1}) - \log f(z_{i2}), \quad f = F'

    among those with mu > 0 and rho > 0 (Li et al. 2011, Sec. 2.2), if any. ``starts=[AUTHORS_START]`` gives the
    mixture that Lopez et al. (2017) report.

    Independent ranks have a copula log likelihood of 0. If the best start gains less than 5 nats over that, the mixture
    is not determined, and the largest of several near 0 may call every item reproducible. The fit from AUTHORS_START,
    if it is among the starts, is then returned instead, with a warning. A ``mixture_weight`` above 0.99 leaves mu and
    sigma undetermined, because the ranks of a single normal distribution depend on neither; this also raises a warning.
    Perfect agreement and many ties cause it.

    Parameters
    ----------
    score_1, score_2
        (items,) each, finite; in the same order, or Series, whose names are matched. -log p of a p-value of 0 is
        infinite: drop such pairs first.
    starts
        Starting points of the EM: a sequence of :class:`Mixture`, or of its four numbers.
    tol
        Above 0. The EM at given z ends when the log likelihood L changes by less than tol (1 + abs L), and so do the
        updates of z.
    max_iter
        Most updates of z. They need not converge.

    Returns
    -------
    IDRResult
        The mixture; ``local_idr`` and ``idr`` (items,); ``log_likelihood`` of the ranks, nats over all items.

    Raises
    ------
    DataError
        If the scores are not two finite vectors of one length with different values.
    ModelError
        If there is no start or one out of range, tol is not above 0, or max_iter is not a positive integer.

    References
    ----------
    Li, Brown, Huang and Bickel 2011, "Measuring reproducibility of high-throughput experiments", Annals of Applied
    Statistics 5(3):1752, Sec. 2.2; Lopez et al. 2017, Sec. 4 (differential expression).

    Examples
    --------
    >>> shared, noise = 2.5 + rng.normal(size=(100, 1)), rng.normal(size=(300, 2))
    >>> noise[:100] = shared + 0.5 * noise[:100]  # the first hundred items are scored alike
    >>> result = ps.baselines.idr(*noise.T)
    >>> bool(result.local_idr[:100].mean() < result.local_idr[100:].mean())
    True
    """
    require_at_least(1, max_iter=max_iter)
    if not tol > 0:
        raise ModelError(f"tol must be above 0, got {tol!r}")
    chosen = _checked_starts(starts)
    uniform = np.stack(_ranks(score_1, score_2))  # (2, items)
    fits = [_fit(uniform, start, tol, max_iter) for start in chosen]
    proper = [fit for fit in fits if fit.mixture.mu > 0 and fit.mixture.rho > 0]
    if not proper:
        warnings.warn("no start of the optimiser ended at mu > 0 and rho > 0: these scores do not agree", stacklevel=2)
    best = max(proper or fits, key=lambda fit: fit.log_likelihood)
    if best.log_likelihood < LEAST_GAIN:
        best = fits[chosen.index(AUTHORS_START)] if AUTHORS_START in chosen else best
        warnings.warn(
            f"no start of the optimiser is {LEAST_GAIN:g} nats better than independent scores: the scores do not "
            "determine the mixture",
            stacklevel=2,
        )
    if best.mixture.mixture_weight > HIGHEST_WEIGHT:
        warnings.warn(
            f"mixture_weight is above {HIGHEST_WEIGHT}: the scores do not determine mu and sigma", stacklevel=2
        )
    return IDRResult(*best.mixture, best.local_idr, _running_mean(best.local_idr), best.log_likelihood)


class _Fit(NamedTuple):
    mixture: Mixture
    local_idr: np.ndarray
    log_likelihood: float


def _fit(uniform: np.ndarray, mixture: Mixture, tol: float, max_iter: int) -> _Fit:
    """Alternate between the normal scores z of the ranks and the EM at given z."""
    before = math.inf
    for _ in range(max_iter + 1):
        z = normal_scores(uniform, mixture)
        # z moves with the mixture: stop once renewing it hardly changes the likelihood.
        renewed = expectation(z, mixture)[1]
        mixture, reproducible, now = _em(z, mixture, tol)
        if abs(renewed - before) < tol * (1 + abs(before)):
            break
        before = now
    return _Fit(mixture, 1 - reproducible, _copula(uniform, mixture))


def _em(z: np.ndarray, mixture: Mixture, tol: float) -> tuple[Mixture, np.ndarray, float]:
    """The mixture at the end, the posterior probabilities (items,) that it was computed from, and its L in nats."""
    before = math.inf
    reproducible, _ = expectation(z, mixture)
    for _ in range(LONGEST_EM):
        mixture = maximisation(z, reproducible)
        renewed, now = expectation(z, mixture)
        if abs(now - before) < tol * (1 + abs(before)):
            break
        reproducible, before = renewed, now
    return mixture, reproducible, now


def expectation(z: np.ndarray, mixture: Mixture) -> tuple[np.ndarray, float]:
    """Posterior probability of being reproducible (items,), and the log likelihood of z (2, items), nats."""
    p, rho, mu, sigma = mixture
    x, y = (z - mu) / sigma
    square = (x**2 - 2 * rho * x * y + y**2) / (1 - rho**2)
    log_h1 = -0.5 * square - 2 * math.log(sigma) - 0.5 * math.log(1 - rho**2) + math.log(p)
    log_h0 = -0.5 * (z**2).sum(0) + math.log(1 - p)
    log_h = np.logaddexp(log_h1, log_h0)
    return np.exp(log_h1 - log_h), float(log_h.sum()) - z.shape[1] * math.log(2 * math.pi)


def maximisation(z: np.ndarray, reproducible: np.ndarray) -> Mixture:
    """The mixture that maximises the expected log likelihood of z (2, items) at these probabilities (items,)."""
    reproducible = np.maximum(reproducible, 1e-200)  # none of opposite rankings may be left
    weight = reproducible.sum()
    mu = (reproducible * z).sum() / (2 * weight)
    x, y = z - mu
    square = (reproducible * (x**2 + y**2)).sum()
    rho = 2 * (reproducible * x * y).sum() / square
    p = np.clip(reproducible.mean(), EDGE, 1 - EDGE)
    sigma = max(math.sqrt(square / (2 * weight)), EDGE)
    return Mixture(float(p), float(np.clip(rho, EDGE - 1, 1 - EDGE)), float(mu), sigma)


def normal_scores(uniform: np.ndarray, mixture: Mixture) -> np.ndarray:
    """F^-1(u), same shape, by linear interpolation; constant beyond the grid."""
    p, _, mu, sigma = mixture
    grid = np.linspace(min(-3, mu - 3 * sigma), max(3, mu + 3 * sigma), GRID)
    return np.interp(uniform, p * norm.cdf(grid, mu, sigma) + (1 - p) * norm.cdf(grid), grid)


def _copula(uniform: np.ndarray, mixture: Mixture) -> float:
    """Log likelihood of the ranks, nats."""
    p, _, mu, sigma = mixture
    z = normal_scores(uniform, mixture)
    # Both marginals have the same density: the copula's is the joint one over their product.
    marginal = np.logaddexp(math.log(p) + norm.logpdf(z, mu, sigma), math.log(1 - p) + norm.logpdf(z))
    return expectation(z, mixture)[1] - float(marginal.sum())


def _running_mean(local_idr: np.ndarray) -> np.ndarray:
    """Mean of the local_idr that are no larger, (items,)."""
    # Tied items share one value: all of them count.
    no_larger = rankdata(local_idr, "max").astype(int)
    return np.cumsum(np.sort(local_idr))[no_larger - 1] / no_larger


def _ranks(first: Any, second: Any) -> list[np.ndarray]:
    """Number of items that score no higher, divided by n + 1, for each vector of scores."""
    if isinstance(second, pd.Series) and len(second) == np.size(first):  # further items would be left out unseen
        second = in_order_of(getattr(first, "index", None), second, "score_2")
    vectors = [np.asarray(score, dtype=np.float64) for score in (first, second)]
    shapes = [vector.shape for vector in vectors]
    if len(shapes[0]) != 1 or shapes[0] != shapes[1]:
        raise DataError(f"the scores must be two vectors of one length, got shapes {shapes[0]} and {shapes[1]}")
    for number, vector in enumerate(vectors, 1):
        wrong = np.flatnonzero(~np.isfinite(vector))
        if wrong.size:
            raise DataError(
                f"score_{number} has {wrong.size} values that are not finite, the first of them {vector[wrong[0]]} of "
                f"item {wrong[0]}; drop these items from both scores"
            )
        if np.unique(vector).size < 2:
            raise DataError(f"score_{number} has fewer than two different values: it ranks nothing")
    return [rankdata(vector, "max") / (vector.size + 1) for vector in vectors]


def _checked_starts(starts: Sequence[Mixture]) -> list[Mixture]:
    if isinstance(starts, Mixture):
        raise ModelError(f"starts must be a sequence of Mixture, got a single one; pass [{starts}]")
    try:
        mixtures = [Mixture(*map(float, start)) for start in starts]
    except (TypeError, ValueError) as error:
        raise ModelError(f"starts must be a sequence of Mixture or of its 4 numbers, got {starts!r}") from error
    if not mixtures:
        raise ModelError("starts must have at least one Mixture, such as AUTHORS_START")
    for p, rho, mu, sigma in mixtures:
        if not (0 < p < 1 and -1 < rho < 1 and math.isfinite(mu) and 0 < sigma < math.inf):
            raise ModelError(
                f"a start needs 0 < mixture_weight < 1, -1 < rho < 1, sigma > 0 and finite mu; got "
                f"{Mixture(p, rho, mu, sigma)}"
            )
    return mixtures
