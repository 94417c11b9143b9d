"""P(w_a < w_b) of two Gamma variables: by the incomplete beta function, or from a table where they share a shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CACHED = 2**18  # entries processed at a time, so that successive operations find them in the cache
NEARLY_NORMAL = 1e8  # for larger r the distribution of t is normal to rounding, and float64 could not hold its constant


class Side(NamedTuple):
    """One cell per pair: log mean of w (pairs, genes), and log r.

    ``log_r`` is (genes,) if all cells share it, else (pairs, genes); None if w equals its mean exactly.
    """

    log_mean: Tensor
    log_r: Tensor | None

    @property
    def shares_dispersion(self) -> bool:
        """Whether every cell has the same r."""
        return self.log_r is not None and self.log_r.dim() == 1


Less = Callable[[Side, Side], Tensor]


def less_for(side: Side) -> Less:
    """The fastest function of two such sides that gives P(w_a < w_b): a table if all cells share r, else exact."""
    return SharedDispersion(side.log_r) if side.log_r is not None and side.shares_dispersion else probability_less


def probability_less(a: Side, b: Side) -> Tensor:
    r"""P(w_a < w_b), float64 (pairs, genes); if w equals its mean, this is 1, 0, or 1/2 for equal means.

    .. math:: P(w_a < w_b) = I_{b_a / (b_a + b_b)}(r_a, r_b), \qquad b = r / \mu

    (the regularised incomplete beta function; Lopez et al. 2017, Sec. 4, with the integral over w exact).
    """
    from scipy.special import betainc, expit  # 35 ms, which only comparisons need

    gap = b.log_mean.double() - a.log_mean.double()
    if a.log_r is None or b.log_r is None:
        return 0.5 * (1 + gap.sign())
    log_r_a, log_r_b = a.log_r.double(), b.log_r.double()
    log_odds = log_r_a - log_r_b + gap  # of b_a against b_b, with log b = log r - log mu
    # From the smaller of the two shares: near 1 float64 has too few digits for a small r.
    swapped = log_odds > 0
    first, second = torch.where(swapped, log_r_b, log_r_a).exp(), torch.where(swapped, log_r_a, log_r_b).exp()
    lower = torch.from_numpy(betainc(first.numpy(), second.numpy(), expit(-log_odds.abs().numpy())))
    return torch.where(swapped, 1 - lower, lower)


class SharedDispersion:
    r"""P(w_a < w_b) if both cells have the gene's r, by linear interpolation in a table of |t| per gene.

    .. math:: P = I_{\sigma(gap)}(r, r), \qquad gap = \log \mu_b - \log \mu_a = t \sqrt{2 \psi_1(r)}

    With :math:`\psi_1` the trigamma function, t is the gap in standard deviations of log (w_b / w_a). Its distribution
    goes from Laplace (r to 0) to normal (r to infinity). The table is the integral of the density of t,
    :math:`\propto \cosh(t \sqrt{\psi_1 / 2})^{-2 r}`, from 0, by Simpson's rule.

    The error is at most 1e-5. Interpolation over steps of 1/128 costs at most (1/128)^2 / 8 times the largest slope of
    the density, which is 1 for Laplace: 7.6e-6. Beyond t = 8 P is held constant, which misses at most the tail of
    Laplace, 6.1e-6.

    Parameters
    ----------
    log_r
        Log r, (genes,).
    """

    ERROR = 1e-5
    REACH, STEPS = 8.0, 1024

    def __init__(self, log_r: Tensor) -> None:
        from scipy.special import polygamma

        r = log_r.detach().double().cpu().clamp(-60, 60).exp()  # keeps the trigamma function finite
        scale = torch.from_numpy(polygamma(1, r.numpy())).mul(2).sqrt()
        self.per_unit = (self.STEPS / self.REACH / scale).float()  # table steps per unit of the gap, (genes,)
        genes = CACHED // self.STEPS // 8
        parts = zip(r.split(genes), scale.split(genes), strict=True)
        table = torch.cat([_above_half(*part, self.REACH, self.STEPS) for part in parts])
        # The last entry twice: interpolation at |t| = REACH reads one further.
        self.table = torch.cat([table, table[:, -1:]], 1).reshape(-1)
        self.start = torch.arange(len(r), dtype=torch.int32) * (self.STEPS + 2)

    def __call__(self, a: Side, b: Side) -> Tensor:
        """P(w_a < w_b), float32 (pairs, genes)."""
        pairs = max(1, CACHED // b.log_mean.shape[-1])
        parts = zip(a.log_mean.split(pairs), b.log_mean.split(pairs), strict=True)
        return torch.cat([self.at(of_b - of_a) for of_a, of_b in parts])

    def at(self, gap: Tensor) -> Tensor:
        """P at log mu_b - log mu_a, (..., genes)."""
        position = (gap.float() * self.per_unit).abs_().clamp_(max=self.STEPS)
        below = position.int().clamp_(min=0)  # NaN has no integer; the fraction below stays NaN
        position.sub_(below)
        index = below.add_(self.start).reshape(-1)
        low, high = self.table.index_select(0, index), self.table.index_select(0, index + 1)
        return torch.lerp(low, high, position.reshape(-1)).view(gap.shape).copysign_(gap).add_(0.5)


def _above_half(r: Tensor, scale: Tensor, reach: float, steps: int) -> Tensor:
    """P - 1/2 at t = 0 ... ``reach``, (genes, steps + 1)."""
    from scipy.special import betaln

    r, scale = r.clamp(max=NEARLY_NORMAL), torch.maximum(scale, torch.tensor(math.sqrt(2 / NEARLY_NORMAL)).double())
    gap = scale[:, None] * torch.linspace(0, reach, 2 * steps + 1, dtype=torch.float64)
    log_density = (scale.log() - torch.from_numpy(betaln(r.numpy(), r.numpy())))[:, None]
    density = (log_density - r[:, None] * (gap + 2 * (-gap).exp().log1p())).exp()
    # Simpson's rule over each step, with its midpoint.
    parts = (density[:, :-1:2] + 4 * density[:, 1::2] + density[:, 2::2]) * (reach / steps / 6)
    return torch.nn.functional.pad(parts.cumsum(1).float(), (1, 0))
