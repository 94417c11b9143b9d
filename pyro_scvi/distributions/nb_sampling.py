"""Sampling of (zero-inflated) negative binomial counts."""

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.distributions.nb_log_prob import FAR
from pyro_scvi.distributions.selected_entries import Gathered, distinct, true_places
from pyro_scvi.utils.cell_streams import each_cell
from pyro_scvi.utils.random_bits import random_bits


def sample_counts(log_mean: Tensor, log_r: Tensor, p_kept: Tensor) -> Tensor:
    r"""Draw negative binomial counts, each set to zero with probability 1 - ``p_kept``; arguments have one shape.

    y is the number of events until time 1 of a Poisson process of rate w ~ Gamma(r, r / mu). The first event comes at
    time t with r log(1 + t mu / r) = e, e ~ Exponential(1): in time if e < lambda = r log(1 + mu / r). After an event
    lambda / r is smaller by e / r and r is larger by 1, and the next event follows the same rule. After k events,

    .. math:: y = k + Poisson(g\, (e^{\lambda / r} - 1)), \qquad g \sim Gamma(r, 1)

    Most counts are 0, and most of the others are 1. Gamma and Poisson variables are drawn for counts above 1 only. The
    probability of these among positive counts is exact to 2^-24. Where cells have random streams of their own, each is
    drawn alone.
    """
    return each_cell(_sampled, log_mean, log_r, p_kept)


def _sampled(log_mean: Tensor, log_r: Tensor, p_kept: Tensor) -> Tensor:
    log_mean, log_r = log_mean.clamp(-FAR, FAR), distinct(log_r).clamp(-FAR, FAR)
    r = log_r.exp()
    hazard = F.softplus(log_mean - log_r).mul_(r)  # lambda
    # 1. Which counts may be positive: 16 random bits for each, against the probability in units of 2^-16.
    p_positive = hazard.neg().expm1_().mul_(p_kept).mul_(-(2.0**16))
    bits = random_bits(p_positive)
    at = true_places(bits <= (p_positive - 2.0**15).clamp_(max=2.0**15 - 1).to(torch.int16))
    # 2. Which are positive: further digits decide where the bits equal the probability's, else refine the quantile.
    uniform, p_of_these = (t.reshape(-1).index_select(0, at) for t in (bits, p_positive))
    uniform = uniform.to(p_of_these) + 2.0**15 + torch.rand_like(p_of_these)
    uniform, at = _in_time(uniform, p_of_these, at)
    # 3. The first event, at that quantile of the waiting time; these counts are 1 or more.
    r, hazard = Gathered(uniform, at, torch.Size(p_positive.shape)).of(r)[0], hazard.reshape(-1).index_select(0, at)
    r, hazard = _after_event(r, hazard, uniform)
    counts = p_positive.contiguous().mul(0)  # zeros, but NaN where a parameter is NaN
    counts.view(-1).index_fill_(0, at, 1)
    # 4. A second event, where it comes in time; these counts are 2 or more.
    uniform, at, r, hazard = _in_time(torch.rand_like(r), hazard.neg().expm1_().neg_(), at, r, hazard)
    r, hazard = _after_event(r, hazard, uniform)
    # 5. The events after the second.
    counts.view(-1).index_copy_(0, at, 2 + torch.poisson(torch._standard_gamma(r) * torch.expm1(hazard / r)))
    return counts


def _in_time(uniform: Tensor, p: Tensor, *others: Tensor) -> list[Tensor]:
    """Select where ``uniform`` is below p: ``uniform`` / p, uniform again, and the same entries of ``others``."""
    kept = true_places(uniform < p)
    uniform, p, *others_kept = (t.index_select(0, kept) for t in (uniform, p, *others))
    return [uniform / p, *others_kept]


def _after_event(r: Tensor, hazard: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Update r and lambda after an event in time, at the quantile ``uniform`` of its waiting time."""
    waited = torch.log1p(uniform * torch.expm1(-hazard)).neg_()
    return r + 1, (hazard - waited).clamp_(min=0) * ((r + 1) / r)
