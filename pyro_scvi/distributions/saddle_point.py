"""Log NB(x) and its gradients where x > 0, for arrays of NumPy or of torch.

For a few thousand numbers on one core NumPy takes half of torch's time. torch is differentiable and runs on any device.
"""

import math
from typing import Any

import numpy as np
import torch

Array = Any  # of NumPy or torch

SMALL_COUNT = 8  # for whole counts up to this, products take the place of gamma functions
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_FACTORIALS = np.array([math.factorial(x) for x in range(SMALL_COUNT + 1)], dtype=float)


def beyond_one(x: np.ndarray, mean: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Corrections of the formulas of x = 1 to log NB(x) and to its gradient by log r, for x = 2, 3, ..., 8.

    With products and sums over 0 < j < x, they are

        (x - 1) log (r + x) mu / (r + mu) + log prod (r + j) / (r + x) - log x!
        r (sum 1 / (r + j) - (x - 1) / (r + mu))

    The counts are (entries,), the parameters (leading, entries).
    """
    inverse, of_mean = 1 / (r + x), 1 / (r + mean)
    product, total = np.ones_like(r), (x - SMALL_COUNT) * inverse
    for j in range(1, SMALL_COUNT):
        a = (
            np.minimum(x, j) + r
        )  # for j >= x the factor is 1, and (x - SMALL_COUNT) * inverse cancels the terms of the sum
        total += 1 / a
        a *= inverse
        product *= a
    product /= _FACTORIALS.astype(x.dtype).take(x.astype(np.intp))
    # Multiplied by the mean last: r may be so far below 1 that another order overflows or underflows.
    value = (x - 1) * np.log(mean * (of_mean / inverse)) + np.log(product)
    return value, r * (total - (x - 1) * of_mean)


class Positive:
    """Log NB(x) in Loader's saddle-point form and its gradients; shared terms are computed once.

    With u = (x - mu) / (r + mu), v = -(r / x) u, l(t) = log1p(t) - t and d the Stirling error of the gamma function,

        log p = r l(u) + x l(v) + d(r + x) - d(r) - log1p(x / r) / 2 - d(x) - log(2 pi x) / 2
        d log p / d log mu = (x - mu) r / (r + mu)
        d log p / d log r  = r l(u) + r (psi(r + x) - psi(r) - log1p(x / r))

    The counts are (entries,), the parameters (leading, entries). ``large``: all counts are above 8.
    """

    def __init__(self, x: Array, log_mean: Array, log_r: Array, *, large: bool = False) -> None:
        xp = _namespace(x)
        self.x, self.log_x = x, xp.log(x)
        self.r, mean = xp.exp(log_r), xp.exp(log_mean)
        self.sum, self.gap, self.log_odds = self.r + mean, x - mean, xp.log1p(x / self.r)
        larger = xp.maximum(log_mean, log_r)  # log(r + mu) = larger + log1p(exp(-|log mu - log r|))
        log_sum_by_r = (larger - log_r) + xp.log1p(xp.exp(-abs(log_mean - log_r)))
        log1p_u = self.log_odds - log_sum_by_r  # not by log1p(u), which loses digits near u = -1
        u = self.gap / self.sum
        v, log1p_v = u * self.r / -x, log1p_u + log_mean - self.log_x
        self.of_u, self.of_v = log1p_minus(xp.stack((u, v)), xp.stack((log1p_u, log1p_v)))
        self.gamma = _Gamma(xp.stack((self.r, self.r + x, xp.broadcast_to(x, self.r.shape))), large)

    def log_prob(self) -> Array:
        """Log NB(x)."""
        of_r, of_sum, of_x = self.gamma.stirling_error()
        deviance = self.r * self.of_u + self.x * self.of_v
        return deviance + of_sum - of_r - of_x - 0.5 * (self.log_odds + self.log_x) - _HALF_LOG_2PI

    def by_log_mean(self) -> Array:
        """Gradient by log mu."""
        return self.gap * (self.r / self.sum)

    def by_log_r(self) -> Array:
        """Gradient by log r."""
        of_r, of_sum, _ = self.gamma.log_minus_psi()
        return self.r * (self.of_u + of_r - of_sum)


class _Gamma:
    """Asymptotic series of the gamma function at a > 0, evaluated at a + k, where they are exact to rounding.

    ``large``: all rows of ``a`` but the first are above 8, where float32 needs no shift by k.
    """

    def __init__(self, a: Array, large: bool) -> None:
        self.xp, double = _namespace(a), _is_double(a)
        self.k = 12 if double else 3
        self.low = a[:1] if large and not double else a
        self.inverse = 1 / self.xp.concatenate((self.low + self.k, a[len(self.low) :]))
        self.square = self.inverse * self.inverse
        self.log_shift = self.xp.log1p(self.k / self.low)

    def stirling_error(self) -> Array:
        """d(a) = log Gamma(a + 1) - (a + 1/2) log a + a - log(2 pi) / 2.

        Computed as s(a + k) + (a + 1/2) log1p(k / a) - k - log prod_{0 < j < k} (a + j) / (a + k), with s Stirling's
        series.
        """
        series = _series(self.square, (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188), single=5) * self.inverse
        inverse = self.inverse[: len(self.low)]
        product = math.prod(((self.low + j) * inverse for j in range(2, self.k)), start=(self.low + 1) * inverse)
        return self._plus(series, (self.low + 0.5) * self.log_shift - self.k - self.xp.log(product))

    def log_minus_psi(self) -> Array:
        """The difference log a - psi(a), with psi the digamma function."""
        series = _series(self.square, (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132), single=5) * self.square
        of_low = sum(1 / (self.low + j) for j in range(self.k)) - self.log_shift
        return self._plus(series + 0.5 * self.inverse, of_low)

    def _plus(self, series: Array, of_low: Array) -> Array:
        """Add the correction for the shift to the rows that were shifted."""
        n = len(self.low)
        return self.xp.concatenate((series[:n] + of_low, series[n:]))


def log1p_minus(t: Array, log1p_t: Array) -> Array:
    """log1p(t) - t; for small t by the series of 2 artanh(s), s = t / (2 + t), else from the given log1p(t)."""
    s = t / (2 + t)
    square = s * s
    series = _series(square, (2 / 3, 2 / 5, 2 / 7, 2 / 9, 2 / 11, 2 / 13), single=3)
    return _namespace(t).where(abs(t) < 0.1, s * (square * series - t), log1p_t - t)


def _series(t: Array, coefficients: tuple[float, ...], *, single: int) -> Array:
    """Sum of c_i t^i by Horner's scheme; float32 takes the first ``single`` terms."""
    *others, last = coefficients if _is_double(t) else coefficients[:single]
    value = t * last
    for coefficient in others[:0:-1]:
        value = (value + coefficient) * t
    return value + coefficients[0]


def _namespace(array: Array) -> Any:
    return torch if isinstance(array, torch.Tensor) else np


def _is_double(array: Array) -> bool:
    return array.dtype in (torch.float64, np.float64)
