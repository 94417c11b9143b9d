r"""Probabilities of counts from normal distributions of log counts: each count is a bin of width one.

A density of y = log(1 + x) is no probability of x: where counts repeat, it can be made arbitrarily large. Comparable
with a count model is the probability of the bin [x - 1/2, x + 1/2], and for a zero of everything below 1/2. In y that
is [log(x + 1/2), log(x + 3/2)]. Together the bins cover the whole line.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

VARIANCE = (2 * math.log(1.5)) ** 2 / 12  # of a uniform law on as much of the bin of 0 as lies about log(1 + 0)
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class UnitBins(NamedTuple):
    """Bins of counts (cells, genes) on the scale of log(1 + x): their ends, and where there is no lower end."""

    lower: Tensor
    upper: Tensor
    zero: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "UnitBins":
        """The bins of counts, float64 (cells, genes)."""
        return cls((x + 0.5).log(), (x + 1.5).log(), x == 0)

    def log_probability(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Log probability of every bin under Normal(loc, scale^2); the arguments broadcast against (cells, genes)."""
        return log_bin_probability((self.lower - loc) / scale, (self.upper - loc) / scale, self.zero)


def log_bin_probability(below: Tensor, above: Tensor, from_minus_infinity: Tensor) -> Tensor:
    r"""Log of :math:`\Phi(b) - \Phi(a)`, or of :math:`\Phi(b)` where the bin has no lower end; elementwise.

    A bin right of zero is reflected, so that both probabilities are small and their difference stays accurate far out
    in the tail: :math:`\log \Phi(b) + \log(1 - e^{\log \Phi(a) - \log \Phi(b)})`.
    """
    reflected = (below > 0) & ~from_minus_infinity
    a, b = torch.where(reflected, -above, below), torch.where(reflected, -below, above)
    log_b = torch.special.log_ndtr(b)
    # Open bins get finite stand-ins, or the branch that is not taken would give NaN gradients.
    log_a = torch.special.log_ndtr(torch.where(from_minus_infinity, -1.0, a))
    log_rest = (-torch.expm1(log_a - torch.where(from_minus_infinity, 0.0, log_b))).log()
    return torch.where(from_minus_infinity, log_b, log_b + log_rest)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log N(z; 0, I) summed over the last axis."""
    return -0.5 * z.square().sum(-1) - z.shape[-1] * _HALF_LOG_2PI
