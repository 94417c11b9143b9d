"""Numerical accuracy of the likelihood in float32, against 60 digits over a grid of extreme parameters."""

from collections.abc import Callable, Sequence
from functools import cache
from itertools import product

import mpmath
import numpy as np
import torch

from benchmarks.harness.stopwatch import Sample, Stopwatch
from pyro_scvi.likelihoods.negative_binomial import ZINB

INVERSE_DISPERSIONS = [10.0**k for k in range(-6, 9)]
MEANS = [10.0**k for k in range(-8, 6)]
GATES = [-100.0, -30.0, -10.0, -3.0, 0.0, 3.0, 10.0, 30.0, 100.0]
COUNTS = [0.0, 1.0, 2.0, 5.0, 17.0, 100.0, 1e3, 1e4, 1e5]


def errors(thinned: int = 1) -> Callable[[], Sample]:
    """Largest errors of value and gradients, |d| / (1 + |truth|), and how many figures are not finite.

    ``thinned`` takes every so many means only.
    """

    def measure() -> Sample:
        with Stopwatch() as watch:
            points = list(product(INVERSE_DISPERSIONS, MEANS[::thinned], COUNTS))
            log_r, log_mean = (torch.tensor([np.log(p[i]) for p in points], dtype=torch.float32) for i in (0, 1))
            x = torch.tensor([p[2] for p in points])
            values = evaluated(x, log_mean, log_r)
            exact = truth(x.tolist(), log_mean.tolist(), log_r.tolist())
        error = np.abs(values - exact) / (1 + np.abs(exact))
        finite = np.isfinite(values)
        value, gradient = (float(error[..., part][finite[..., part]].max()) for part in (slice(1), slice(1, None)))
        worst = {"value": value, "gradient": gradient}
        return watch.sample(work=1, points=len(points) * len(GATES), non_finite=int((~finite).sum()), **worst)

    return measure


def evaluated(x: torch.Tensor, log_mean: torch.Tensor, log_r: torch.Tensor) -> np.ndarray:
    """Log p(x) and its gradients by log mean, log r and the gate in float32, (gates, points, 4)."""
    shape = (len(GATES), len(x))
    gate = torch.tensor(GATES)[:, None].expand(shape)
    inputs = [t.expand(shape).clone().requires_grad_() for t in (log_mean, log_r, gate)]
    law = ZINB().marginal(log_mean=inputs[0], log_inverse_dispersion=inputs[1], gate_logits=inputs[2])
    value = law.log_prob(x.expand(shape))
    gradients = torch.autograd.grad(value.sum(), inputs)
    return torch.stack([value, *gradients], -1).detach().double().numpy()


def truth(x: Sequence[float], log_mean: Sequence[float], log_r: Sequence[float]) -> np.ndarray:
    """The same in exact arithmetic at the same float32 inputs."""
    with mpmath.workdps(60):
        gates = [1 / (1 + mpmath.exp(-mpmath.mpf(gate))) for gate in GATES]
        rows = [_at(*point, gates) for point in zip(x, log_mean, log_r, strict=True)]
    return np.array(rows, dtype=float).swapaxes(0, 1)


_LGAMMA, _PSI = cache(mpmath.loggamma), cache(mpmath.digamma)


def _at(k: float, log_mean: float, log_r: float, gates: Sequence[mpmath.mpf]) -> list[list[mpmath.mpf]]:
    mu, r = mpmath.exp(log_mean), mpmath.exp(log_r)
    log_p = mpmath.log(r / (r + mu))
    base = _LGAMMA(r + k) - _LGAMMA(r) - _LGAMMA(k + 1) + r * log_p + k * mpmath.log(mu / (r + mu))
    by_mean = (k - mu) * r / (r + mu)
    by_r = r * (_PSI(r + k) - _PSI(r) + log_p + (mu - k) / (r + mu))
    if k > 0:
        return [[base + mpmath.log(1 - pi), by_mean, by_r, -pi] for pi in gates]
    p0 = mpmath.exp(base)
    rows = []
    for pi in gates:
        total = pi + (1 - pi) * p0
        share = (1 - pi) * p0 / total
        rows.append([mpmath.log(total), share * by_mean, share * by_r, pi * (1 - pi) * (1 - p0) / total])
    return rows
