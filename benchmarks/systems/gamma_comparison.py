"""Comparison of gamma variables, P(w_a < w_b) of pairs: by sampling w, and by this package's exact probabilities.

Both give an estimate for every gene by the mean over the same pairs; what they cost is seconds times variance.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.stopwatch import Sample, Stopwatch
from pyro_scvi.distributions.gamma_ratio import Side, less_for

AT_ONCE = 500  # pairs


class Pairs(NamedTuple):
    """Log mean of w of both cells of every pair, (pairs, genes), and log r, (genes,)."""

    log_mean_a: Tensor
    log_mean_b: Tensor
    log_r: Tensor


def pairs(n_pairs: int, n_genes: int, sd: float) -> Pairs:
    """Pairs whose log ratio of means is normal around 0 with ``sd``; log r is standard normal over genes."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = sd * torch.randn(n_pairs, n_genes, generator=generator)
    return Pairs(-log_ratio / 2, log_ratio / 2, torch.randn(n_genes, generator=generator))


def sampled(n_pairs: int, n_genes: int, sd: float) -> Callable[[], Sample]:
    """One draw of w for both cells of every pair."""
    given = pairs(n_pairs, n_genes, sd)
    generator = torch.Generator().manual_seed(1)
    r = given.log_r.exp().expand(AT_ONCE, -1).contiguous()

    def less(log_mean_a: Tensor, log_mean_b: Tensor) -> Tensor:
        n = len(log_mean_a)
        w_a, w_b = (
            log_mean.exp() * torch._standard_gamma(r[:n], generator=generator) for log_mean in (log_mean_a, log_mean_b)
        )
        return (w_a < w_b).float()

    def measure() -> Sample:
        with Stopwatch() as watch:
            parts = zip(given.log_mean_a.split(AT_ONCE), given.log_mean_b.split(AT_ONCE), strict=True)
            share = torch.cat([less(a, b).sum(0, keepdim=True) for a, b in parts]).sum(0) / n_pairs
        return watch.sample(work=1 / float((share * (1 - share)).mean()), mean=float(share.mean()))

    measure()
    return measure


def exact(n_pairs: int, n_genes: int, sd: float) -> Callable[[], Sample]:
    """The probability of every pair, as ``differential_expression`` takes it."""
    given = pairs(n_pairs, n_genes, sd)
    a, b = (Side(log_mean, given.log_r) for log_mean in (given.log_mean_a, given.log_mean_b))

    def measure() -> Sample:
        with Stopwatch() as watch:
            p = less_for(a)(a, b)
            mean = p.mean(0)
        return watch.sample(work=1 / float(p.var(0, correction=0).mean()), mean=float(mean.mean()))

    measure()
    return measure
