"""Quantiles of mixtures of Gamma distributions, by the inverse of their distribution function."""

import math

import torch
from torch import Tensor

LOWEST = -80.0  # log of the smallest quantile that is told from 0
ERROR = 1e-5  # of the probability below a quantile
STEPS = 40  # at most; halving alone needs as many
AT_ONCE = 2**20  # terms (components x variables), a few megabytes


def gamma_mixture_quantiles(shape: Tensor, rate: Tensor, weight: Tensor, p: float) -> Tensor:
    r"""The number (variables,) below which a mixture of Gamma distributions has probability p.

    .. math:: \sum_k w_k\, P(a_k, b_k t) = p

    with P the regularised incomplete gamma function; shape a, rate b and weight w (components, variables), weights with
    the sum 1. It is solved by Newton's steps in log t, by halving where these leave what is known to hold the root.
    """
    if not 0 < p < 1:
        return shape.new_full(shape.shape[1:], 0.0 if p <= 0 else math.inf)
    blocks = (of.split(max(1, AT_ONCE // len(shape)), 1) for of in (shape, rate, weight))
    return torch.cat([_solved(a, b, w, p) for a, b, w in zip(*blocks, strict=True)])


def _solved(shape: Tensor, rate: Tensor, weight: Tensor, p: float) -> Tensor:
    log_t, found = _start(shape, rate, weight, p), torch.empty_like(shape[0])
    low, high = torch.full_like(log_t, LOWEST), ((shape + 10 * shape.sqrt() + 50) / rate).amax(0).log()
    constant, open_ = shape * rate.log() - torch.lgamma(shape), torch.arange(len(log_t), device=shape.device)
    for _ in range(STEPS):
        gap = (weight * torch.special.gammainc(shape, rate * log_t.exp())).sum(0) - p
        slope = (weight * (constant + shape * log_t - rate * log_t.exp()).exp()).sum(0)
        low, high = torch.where(gap < 0, log_t, low), torch.where(gap < 0, high, log_t)
        found[open_] = log_t.exp()
        left = ((gap.abs() > ERROR) & (high - low > 1e-6)).nonzero().squeeze(-1)
        if not len(left):
            break
        step = log_t - gap / slope
        log_t = torch.where((step > low) & (step < high), step, (low + high) / 2)
        open_, log_t, low, high = open_[left], log_t[left], low[left], high[left]
        shape, rate, weight, constant = (of[:, left] for of in (shape, rate, weight, constant))
    return found


def _start(shape: Tensor, rate: Tensor, weight: Tensor, p: float) -> Tensor:
    """Log of the quantile of one Gamma distribution with the mixture's mean and variance.

    See Wilson and Hilferty (1931).
    """
    mean = (weight * shape / rate).sum(0)
    square = (weight * shape * (shape + 1) / rate.square()).sum(0)
    k = mean.square() / (square - mean.square()).clamp(min=1e-12)
    normal = torch.special.ndtri(torch.tensor(p, dtype=mean.dtype, device=mean.device))
    root = 1 - 1 / (9 * k) + normal / (3 * k.sqrt())
    return (mean.log() + 3 * root.clamp(min=1e-2).log()).clamp(min=LOWEST)
