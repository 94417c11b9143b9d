"""Log probabilities of negative binomial counts to float32's last digits, and their gradients in one pass."""

from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.distributions.saddle_point import SMALL_COUNT, Positive, beyond_one, log1p_minus
from pyro_scvi.distributions.selected_entries import (
    Entries,
    Gathered,
    Masked,
    above_zero,
    distinct,
    neither_zero_nor_one,
)
from pyro_scvi.utils.custom_ops import opaque

FAR = 43  # bound of |log mu| and |log r|: exp(43) exceeds every count, and every torch has a finite log1p of its square


def log_negative_binomial(x: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
    """Log NB(x; mu, r), differentiable twice; counts broadcast against parameters."""
    x, log_mean, log_r = _aligned(x, log_mean, log_r)
    return _LogProb.apply(x, log_mean, log_r, None, _trained(log_mean, log_r))


def log_zero_inflated(x: Tensor, log_mean: Tensor, log_r: Tensor, gate: Tensor) -> Tensor:
    """Log of pi 1[x = 0] + (1 - pi) NB(x; mu, r) with logit pi = ``gate``, differentiable twice."""
    inputs = _aligned(x, log_mean, log_r, gate)
    return _LogProb.apply(*inputs, _trained(*inputs))


def inflated(x: Tensor, log_prob: Tensor, gate: Tensor) -> Tensor:
    """Log p(x) with technical zeros: (1 + q / o) pi at x = 0, (q / o) pi above; q the base's p(x), o = exp(gate)."""
    odds = log_prob - gate
    return torch.where(x == 0, _softplus(odds), odds) - _softplus(-gate)


def _aligned(x: Tensor, log_mean: Tensor, log_r: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Counts and parameters with one type and one shape, except that counts may lack leading dimensions."""
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in (log_mean, log_r, *others)))
    x, *parameters = (t.to(dtype) for t in (x, log_mean, log_r, *others))
    if all(parameter.shape == x.shape for parameter in parameters):
        return x, *parameters
    shape = torch.broadcast_shapes(x.shape, log_mean.shape)
    x = x.expand(shape[max(0, len(shape) - 2) :]) if x.dim() <= 2 else x.expand(shape)
    return x, *(parameter.expand(shape) for parameter in parameters)


def _trained(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in inputs)


class _LogProb(torch.autograd.Function):
    """Log p(x) of a negative binomial, zero-inflated where there is a gate g, and its gradients, in one pass.

    With m = mu / (r + mu), n = r log(1 - m) the base's log probability of 0, and s the base's share in a zero:

        x = 0:  log p = log(exp(n) + exp(g)) - softplus(g),  s = sigmoid(n - g)
                d / dg = 1 - s - sigmoid(g),  d / d log mu = -s r m,  d / d log r = s (n + r m)
        x = 1:  log p = n + log mu + log(1 - m) - softplus(g),
                d / dg = -sigmoid(g),  d / d log mu = 1 - m - r m,  d / d log r = n + r m + m
        x > 1:  log p = log NB(x) - softplus(g),  d / dg = -sigmoid(g), the others as for the base

    Without a gate log p(0) = n and s = 1. Most counts of a cell are 0 or 1. These need no gamma function, and their
    formulas are computed for all entries, with s = 1 above zero; the gradients by g and log mu, (x - s mu) (1 - m), are
    then right for every count. Counts above 1 are gathered for the rest. The error of n + r m is mu times the rounding
    of 1, which is large relative to n + r m where r is far above mu. Second derivatives come from the same density
    written in differentiable operations.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mean: Tensor, log_r: Tensor, gate: Tensor | None, gradients: bool) -> Tensor:
        inputs = x, log_mean, log_r, gate
        log_mean = log_mean.contiguous().clamp(-FAR, FAR)
        log_r = distinct(log_r).clamp(-FAR, FAR)
        # Parameters may have leading dimensions that the counts lack; r then needs them, too.
        if any(n > 1 for n in log_r.shape[: log_mean.dim() - x.dim()]):
            log_r = log_r.expand_as(log_mean)
        seen = x.sign()
        mean, r = log_mean.exp(), log_r.exp()
        odds_of_mean = mean / r
        log_odds = torch.log1p(odds_of_mean)  # - log(1 - m)
        zero = log_odds * -r
        if gate is None:
            out, softplus_gate = zero.clone(), None
        else:
            gate = gate.contiguous().clamp(max=1e30)  # an infinite gate would give infinity - infinity
            softplus_gate = _softplus(gate)
            out = torch.logaddexp(zero, gate).lerp_(zero, seen).sub_(softplus_gate)  # where x > 0, n without the gate
        out.addcmul_(log_mean, seen).addcmul_(log_odds, seen, value=-1)
        if not gradients:
            _write_several(x, log_mean, log_r, softplus_gate, out, None)
            return out
        rest = odds_of_mean.add_(1).reciprocal_()  # 1 - m
        if gate is None:
            by_gate = None
            by_mean = (x - mean).mul_(rest)
            by_r = zero.addcmul_(mean, rest)  # n + r m
        else:
            share = torch.maximum((zero - gate).sigmoid_(), seen)
            by_gate = gate.neg().sigmoid_().sub_(share)  # 1 - sigmoid(g) = sigmoid(-g)
            by_mean = torch.addcmul(x, share, mean, value=-1).mul_(rest)
            by_r = zero.addcmul_(mean, rest).mul_(share)
        by_r.add_(seen).addcmul_(rest, seen, value=-1)
        _write_several(x, log_mean, log_r, softplus_gate, out, by_r)
        ctx.save_for_backward(*inputs, by_mean, by_r, by_gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():  # no second derivatives are wanted: forward has computed the first
            return None, *(None if by is None else grad * by for by in ctx.saved_tensors[4:]), None
        x, *parameters = ctx.saved_tensors[:4]
        log_mean, log_r, gate = parameters
        value = _TwiceDifferentiable.apply(x, log_mean.clamp(-FAR, FAR), log_r.clamp(-FAR, FAR))
        value = value if gate is None else inflated(x, value, gate)
        wanted = ctx.needs_input_grad[1:4]
        trained = [parameter for parameter, one in zip(parameters, wanted, strict=True) if one]
        gradients = iter(torch.autograd.grad(value, trained, grad, create_graph=True))
        return None, *(next(gradients) if one else None for one in wanted), None


@opaque("write_several", "out", "by_r")
def _write_several(
    x: Tensor, log_mean: Tensor, log_r: Tensor, softplus_gate: Tensor | None, out: Tensor, by_r: Tensor | None
) -> None:
    """Correct log p(x) and its gradient by log r, set by the formulas of x = 1, where counts are neither 0 nor 1."""
    several = neither_zero_nor_one(x)
    if isinstance(several, Gathered):
        small, several = several.split((several.x <= SMALL_COUNT) & (several.x == several.x.floor()))
        _correct_small(small, log_mean, log_r, out, by_r)
    value, gradient = _at_positive(several, log_mean, log_r, by_r is not None)
    several.write(value if softplus_gate is None else value - several.of(softplus_gate), out)
    if by_r is not None and gradient is not None:
        several.write(gradient, by_r)


def _correct_small(small: Gathered, log_mean: Tensor, log_r: Tensor, out: Tensor, by_r: Tensor | None) -> None:
    """Correct the formulas of x = 1 for counts of 2 to ``SMALL_COUNT``."""
    with np.errstate(all="ignore"):  # parameters may be NaN or infinite
        corrections = beyond_one(small.x.numpy(), *(small.of(t).exp_().numpy() for t in (log_mean, log_r)))
    for correction, dense in zip(corrections, (out, by_r), strict=True):
        if dense is not None:
            small.write(small.of(dense).add_(torch.from_numpy(correction)), dense)


def _at_positive(entries: Entries, log_mean: Tensor, log_r: Tensor, gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Log NB(x) of counts above zero, and its gradient by log r."""
    given = entries.x, entries.of(log_mean), entries.of(log_r)
    if isinstance(entries, Masked):
        positive = Positive(*given)
        return positive.log_prob(), positive.by_log_r() if gradient else None
    with np.errstate(all="ignore"):
        positive = Positive(*(t.numpy() for t in given), large=bool((entries.x > SMALL_COUNT).all()))
        by_r = torch.from_numpy(positive.by_log_r()) if gradient else None
        return torch.from_numpy(positive.log_prob()), by_r


class _TwiceDifferentiable(torch.autograd.Function):
    """Log NB(x) whose gradients can be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
        ctx.save_for_backward(x, log_mean, log_r)
        counted = above_zero(x)
        out = (-log_r.exp() * _softplus(log_mean - log_r)).contiguous()
        counted.write(Positive(counted.x, counted.of(log_mean), counted.of(log_r)).log_prob(), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log_mean, log_r = ctx.saved_tensors
        counted = above_zero(x)
        share = torch.sigmoid(log_mean - log_r)  # mu / (r + mu), which is -u where x = 0
        by_r = log_r.exp() * log1p_minus(-share, -_softplus(log_mean - log_r))
        by_mean = -log_r.exp() * share
        positive = Positive(counted.x, counted.of(log_mean), counted.of(log_r))
        of_counted = positive.by_log_mean(), positive.by_log_r()
        by_mean, by_r = (
            counted.replaced(values, dense) for values, dense in zip(of_counted, (by_mean, by_r), strict=True)
        )
        return None, grad * by_mean, grad * by_r


def _softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)); torch's default drops the second term from t = 20 on, an error of 2e-9 in float64."""
    return F.softplus(t, threshold=40.0)
