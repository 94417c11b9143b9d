"""Pareto-smoothed importance weights and their diagnostic k-hat (Vehtari et al. 2024)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.utils.precision import in_float64, put_back

FEWEST_IN_TAIL = 5


def pareto_khat(log_weights: Tensor) -> Tensor:
    """Tail index of every column of (samples, columns) log weights, shape (columns,).

    A generalised Pareto distribution is fitted to the largest min(S / 5, 3 sqrt(S)) weights (Zhang and Stephens 2009,
    with the weak prior of Vehtari, Simpson, Gelman, Yao and Gabry 2024, App. C). Fewer than 5 tail draws give infinity.
    """
    tail = _tail_length(len(log_weights))
    if tail < FEWEST_IN_TAIL:
        return torch.full_like(log_weights[0], math.inf)
    ordered = (log_weights - log_weights.amax(0)).sort(0).values
    return put_back(_generalised_pareto(ordered, tail).shape, log_weights)


def pareto_smoothed(log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised log weights (samples, columns), the largest replaced by quantiles of the fitted tail; and k-hat.

    Vehtari et al. 2024, Algorithm 1. With fewer than 5 tail draws nothing is replaced.
    """
    tail = _tail_length(len(log_weights))
    if tail < FEWEST_IN_TAIL:
        return log_weights.log_softmax(0), torch.full_like(log_weights[0], math.inf)
    ordered, order = (log_weights - log_weights.amax(0)).sort(0)
    tail_fit = _generalised_pareto(ordered, tail)
    level = ((torch.arange(tail, dtype=tail_fit.shape.dtype, device=tail_fit.shape.device) + 0.5) / tail)[:, None]
    excess = tail_fit.scale / tail_fit.shape * torch.expm1(-tail_fit.shape * torch.log1p(-level))
    smooth = put_back((tail_fit.cutoff + excess).log().clamp(max=0.0), ordered)  # never above the largest seen
    usable = torch.isfinite(smooth).all(0)
    ordered[-tail:] = torch.where(usable, smooth, ordered[-tail:])
    return torch.empty_like(ordered).scatter_(0, order, ordered).log_softmax(0), put_back(tail_fit.shape, log_weights)


class _GeneralisedPareto(NamedTuple):
    """Generalised Pareto distribution of the weights above a cutoff, float64 (columns,)."""

    cutoff: Tensor
    shape: Tensor
    scale: Tensor


def _tail_length(samples: int) -> int:
    return math.floor(min(0.2 * samples, 3 * math.sqrt(samples)))


def _generalised_pareto(ordered: Tensor, tail: int) -> _GeneralisedPareto:
    """Fit the ``tail`` largest of ascending log weights (samples, columns), the largest of which is 0."""
    cutoff = in_float64(ordered[-tail - 1]).exp()
    excess = (in_float64(ordered[-tail:]).exp() - cutoff).T  # (columns, tail)
    excess = excess.clamp(min=torch.finfo(excess.dtype).tiny)
    # Zhang and Stephens 2009: the mean of b under its profile likelihood, on a grid.
    grid = 30 + math.isqrt(tail)
    position = torch.arange(1, grid + 1, dtype=excess.dtype, device=excess.device)
    quartile = excess[:, int(tail / 4 + 0.5) - 1, None]
    b = (1 - (grid / (position - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[:, -1, None]  # (columns, grid)
    k = torch.stack([torch.log1p(-b[:, i, None] * excess).mean(-1) for i in range(grid)], -1)
    log_likelihood = tail * ((-b / k).log() - k - 1)
    b_mean = (b * F.softmax(log_likelihood, -1)).sum(-1, keepdim=True)
    shape = torch.log1p(-b_mean * excess).mean(-1)
    # The weak prior on k: 10 more draws with a tail index of 0.5.
    return _GeneralisedPareto(cutoff, (tail * shape + 10 * 0.5) / (tail + 10), -shape / b_mean.squeeze(-1))
