"""Log probabilities of negative binomial counts and their gradients, to float32's last digits and in one pass."""

import math
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.nn import functional as F

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_FAR = 44  # exp(44) is past every count, and its square is a float32 yet


def log_negative_binomial(x: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
    """Log NB(x; mu, r), differentiable twice; counts broadcast against parameters."""
    x, *parameters = _aligned(x, log_mean, log_r)
    return _NegativeBinomialLogProb.apply(x, *(parameter.clamp(-_FAR, _FAR) for parameter in parameters))


def log_zero_inflated(x: Tensor, log_mean: Tensor, log_r: Tensor, gate: Tensor) -> Tensor:
    """Log of pi 1[x = 0] + (1 - pi) NB(x; mu, r) with logit pi = ``gate``, differentiable twice."""
    inputs = _aligned(x, log_mean, log_r, gate)
    trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in inputs)
    return _ZeroInflatedLogProb.apply(*inputs, trained)


def inflated(x: Tensor, log_prob: Tensor, gate: Tensor) -> Tensor:
    """Log p(x) with technical zeros: (1 + p / o) pi at x = 0 and (p / o) pi above, o = exp(gate) the odds of one."""
    odds = log_prob - gate
    return torch.where(x == 0, _softplus(odds), odds) - _softplus(-gate)


def _aligned(x: Tensor, log_mean: Tensor, log_r: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Counts and parameters in one precision and of one shape, but for leading dimensions that counts may lack."""
    dtype = reduce(torch.promote_types, (parameter.dtype for parameter in (log_mean, log_r, *others)))
    x, *parameters = (t.to(dtype) for t in (x, log_mean, log_r, *others))
    if all(parameter.shape == x.shape for parameter in parameters):
        return x, *parameters
    shape = torch.broadcast_shapes(x.shape, log_mean.shape)
    x = x.expand(shape[max(0, len(shape) - 2) :]) if x.dim() <= 2 else x.expand(shape)
    return x, *(parameter.expand(shape) for parameter in parameters)


class _ZeroInflatedLogProb(torch.autograd.Function):
    """Log p(x) of a zero-inflated negative binomial and its gradients, in one pass.

    With m = mu / (r + mu), n = r log(1 - m) the log probability that the base gives to 0 and s its share in a zero,

        x = 0:  log p = softplus(n - g) - softplus(-g),  s = sigmoid(n - g)
                d / dg = 1 - s - sigmoid(g),  d / d log mu = -s r m,  d / d log r = s (n + r m)
        x = 1:  log p = n + log mu + log(1 - m) - softplus(g),
                d / dg = -sigmoid(g),  d / d log mu = 1 - m - r m,  d / d log r = n + r m + m
        x > 1:  log p = log NB(x) - softplus(g),  d / dg = -sigmoid(g), the others those of the base

    Most counts of a cell are 0 or 1: they need no gamma function and are computed everywhere, with s = 1 above zero and
    the gradients by g and log mu = (x - s mu) (1 - m) right for every count. What is more than one is gathered for
    the rest. Second derivatives come from the same law composed of differentiable steps.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mean: Tensor, log_r: Tensor, gate: Tensor, gradients: bool) -> Tensor:
        inputs = x, log_mean, log_r, gate
        log_mean, gate = log_mean.contiguous().clamp(-_FAR, _FAR), gate.contiguous()
        log_r = _distinct(log_r).clamp(-_FAR, _FAR)
        seen = x.sign()
        mean, r, softplus_gate = log_mean.exp(), log_r.exp(), _softplus(gate)
        odds_of_mean = mean / r
        log_odds = torch.log1p(odds_of_mean)  # - log(1 - m)
        zero = log_odds.mul(r).neg_()
        odds = zero - gate
        out = _softplus(odds).lerp_(odds, seen)
        out.add_(gate).sub_(softplus_gate)  # - softplus(-g) = g - softplus(g)
        out.addcmul_(log_mean, seen).addcmul_(log_odds, seen, value=-1)
        if not gradients:
            _write_several(x, log_mean, log_r, softplus_gate, out)
            return out
        share = torch.maximum(odds.sigmoid_(), seen)
        rest = odds_of_mean.add_(1).reciprocal_()  # 1 - m
        by_gate = gate.neg().sigmoid_().sub_(share)  # 1 - sigmoid(g) = sigmoid(-g)
        by_mean = torch.addcmul(x, share, mean, value=-1).mul_(rest)
        rate = mean.mul_(rest)  # r m
        by_r = zero.add_(rate).mul_(share).add_(seen).addcmul_(rest, seen, value=-1)
        write = _write_several_unseen if x.device.type == "cpu" and _recording() else _write_several
        write(x, log_mean, log_r, softplus_gate, out, by_r)
        ctx.save_for_backward(*inputs, by_mean, by_r, by_gate)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors[:4]
        if not torch.is_grad_enabled():
            return None, *(grad * by for by in ctx.saved_tensors[4:]), None
        log_mean, log_r, gate = parameters
        base = _NegativeBinomialLogProb.apply(x, log_mean.clamp(-_FAR, _FAR), log_r.clamp(-_FAR, _FAR))
        return None, *torch.autograd.grad(inflated(x, base, gate), parameters, grad, create_graph=True), None


def _write_several(
    x: Tensor, log_mean: Tensor, log_r: Tensor, softplus_gate: Tensor, out: Tensor, by_r: Tensor | None = None
) -> None:
    """Set log p(x) and its gradient by log r where counts are neither 0 nor 1."""
    several = _selected(x, _unequal(x, x.sign()))
    log_r = log_r.expand(torch.broadcast_shapes(log_r.shape, x.shape))  # once, where draws share it
    positive = _Positive(several.x, several.of(log_mean), several.of(log_r))
    several.write(positive.log_prob() - several.of(softplus_gate), out)
    if by_r is not None:
        several.write(positive.by_log_r(), by_r)


@torch.library.custom_op("pyro_scvi::write_several", mutates_args=("out", "by_r"))
def _write_several_unseen(
    x: Tensor, log_mean: Tensor, log_r: Tensor, softplus_gate: Tensor, out: Tensor, by_r: Tensor
) -> None:
    """The same, as one operation of a recording: how many entries there are differs from step to step."""
    _write_several(x, log_mean, log_r, softplus_gate, out, by_r)


class _NegativeBinomialLogProb(torch.autograd.Function):
    """Value in the forward pass, closed-form gradients in the backward pass (which can be differentiated again).

    With u = (x - mu) / (r + mu), v = -(r / x) u, l(t) = log1p(t) - t and d the Stirling error of the gamma function,

        x = 0:  log p = -r log1p(mu / r)
        x > 0:  log p = r l(u) + x l(v) + d(r + x) - d(r) - log1p(x / r) / 2 - d(x) - log(2 pi x) / 2
        d log p / d log mu = (x - mu) r / (r + mu)
        d log p / d log r  = r l(u) + r (psi(r + x) - psi(r) - log1p(x / r))

    The counts may lack leading dimensions of the parameters; what depends on them alone is computed once.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
        ctx.save_for_backward(x, log_mean, log_r)
        counted = _counted(x)
        out = (-log_r.exp() * _softplus(log_mean - log_r)).contiguous()
        counted.write(_Positive(counted.x, counted.of(log_mean), counted.of(log_r)).log_prob(), out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, log_mean, log_r = ctx.saved_tensors
        counted = _counted(x)
        share = torch.sigmoid(log_mean - log_r)  # mu / (r + mu), which is -u where x = 0
        by_r = log_r.exp() * _log1p_minus(-share, -_softplus(log_mean - log_r))
        by_mean = -log_r.exp() * share
        positive = _Positive(counted.x, counted.of(log_mean), counted.of(log_r))
        of_counted = positive.by_log_mean(), positive.by_log_r()
        by_mean, by_r = (
            counted.replaced(values, dense) for values, dense in zip(of_counted, (by_mean, by_r), strict=True)
        )
        return None, grad * by_mean, grad * by_r


class _Positive:
    """Log NB(x) and its gradients at counts above zero, with what they have in common computed once.

    The counts are (entries,), the parameters (leading, entries).
    """

    def __init__(self, x: Tensor, log_mean: Tensor, log_r: Tensor) -> None:
        self.x, self.log_r, self.log_ratio, self.log_x = x, log_r, log_mean - log_r, x.log()
        self.r, mean = log_r.exp(), log_mean.exp()
        self.gap, self.log_odds = x - mean, torch.log1p(x / self.r)
        log1p_u = self.log_odds - _softplus(self.log_ratio)  # without the rounding of u near -1
        u = self.gap / (self.r + mean)
        v, log1p_v = u * self.r / -x, log1p_u + log_mean - self.log_x
        self.of_u, self.of_v = _log1p_minus(torch.stack((u, v)), torch.stack((log1p_u, log1p_v)))
        self.gamma = _Shifted(torch.stack((self.r, self.r + x, x.expand_as(self.r))))

    def log_prob(self) -> Tensor:
        """Log NB(x)."""
        of_r, of_sum, of_x = self.gamma.stirling_error()
        deviance = self.r * self.of_u + self.x * self.of_v
        return deviance + of_sum - of_r - of_x - 0.5 * (self.log_odds + self.log_x) - _HALF_LOG_2PI

    def by_log_mean(self) -> Tensor:
        """Gradient by log mu."""
        return self.gap * torch.sigmoid(-self.log_ratio)

    def by_log_r(self) -> Tensor:
        """Gradient by log r."""
        of_r, of_sum = self.gamma.log_minus_psi(slice(2))
        return self.r * (self.of_u + of_r - of_sum)


def _log1p_minus(t: Tensor, log1p_t: Tensor) -> Tensor:
    """log1p(t) - t; where t is small by the series of 2 artanh(s), s = t / (2 + t), else from the given log1p(t)."""
    s = t / (2 + t)
    square = s * s
    series = _polynomial(square, (1 / 3, 1 / 5, 1 / 7, 1 / 9, 1 / 11, 1 / 13))
    small = (t.abs() < 0.1).to(t.dtype)
    return torch.lerp(log1p_t - t, s * (2 * square * series - t), small)


class _Shifted:
    """What the gamma function's asymptotic series need at a > 0, taken at a + k where they are exact to rounding."""

    def __init__(self, a: Tensor) -> None:
        self.a, self.k = a, 12 if a.dtype == torch.float64 else 3
        self.inverse = 1 / (a + self.k)
        self.square = self.inverse * self.inverse
        self.log_shift = torch.log1p(self.k / a)

    def stirling_error(self) -> Tensor:
        """d(a) = log Gamma(a + 1) - (a + 1/2) log a + a - log(2 pi) / 2.

        As s(a + k) + (a + 1/2) log1p(k / a) - k - log prod_{j < k} (a + j) / (a + k), j from 1, s Stirling's series.
        """
        series = _polynomial(self.square, (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)) * self.inverse
        product = math.prod(((self.a + j) * self.inverse for j in range(2, self.k)), start=(self.a + 1) * self.inverse)
        return series + (self.a + 0.5) * self.log_shift - self.k - product.log()

    def log_minus_psi(self, chosen: slice) -> Tensor:
        """Log a - psi(a) at some of the a, psi the digamma function."""
        a, inverse, square, log_shift = (t[chosen] for t in (self.a, self.inverse, self.square, self.log_shift))
        series = _polynomial(square, (1 / 12, -1 / 120, 1 / 252, -1 / 240, 1 / 132)) * square + 0.5 * inverse
        return series - log_shift + sum(1 / (a + j) for j in range(self.k))


def _polynomial(t: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Sum of c_i t^i."""
    value = t * coefficients[-1]
    for coefficient in coefficients[-2:0:-1]:
        value = (value + coefficient) * t
    return value + coefficients[0]


class _Gathered(NamedTuple):
    """Some entries of the counts, gathered: their values and their positions ``at`` in the flattened counts.

    Parameters may have leading dimensions that the counts lack; theirs are (leading, entries).
    """

    x: Tensor
    at: Tensor
    size: int

    def __bool__(self) -> bool:
        return len(self.at) > 0

    def of(self, dense: Tensor) -> Tensor:
        """These entries of a tensor."""
        return _flat(dense, self.size).index_select(1, self.at)

    def write(self, values: Tensor, dense: Tensor) -> None:
        """Set these entries of a contiguous tensor."""
        _flat(dense, self.size).scatter_(1, self.at.expand(values.shape), values)

    def fill(self, value: float, dense: Tensor) -> None:
        """Set these entries of a contiguous tensor to one value."""
        self.write(dense.new_tensor(value).expand(dense.numel() // max(self.size, 1), len(self.at)), dense)

    def replaced(self, values: Tensor, dense: Tensor) -> Tensor:
        """A tensor with these entries set, differentiable by both."""
        return _flat(dense, self.size).index_copy(1, self.at, values).reshape(dense.shape)


class _Masked(NamedTuple):
    """Some entries of the counts, left in their places: everything is computed everywhere, with x = 1 elsewhere.

    For devices that compute faster than they can tell the host how many entries there are.
    """

    x: Tensor
    mask: Tensor

    def __bool__(self) -> bool:
        return True

    def of(self, dense: Tensor) -> Tensor:
        """All entries of a tensor."""
        return _flat(dense, len(self.mask))

    def write(self, values: Tensor, dense: Tensor) -> None:
        """Set the entries of the mask in a contiguous tensor."""
        flat = _flat(dense, len(self.mask))
        torch.where(self.mask, values, flat, out=flat)

    def fill(self, value: float, dense: Tensor) -> None:
        """Set the entries of the mask in a contiguous tensor to one value."""
        _flat(dense, len(self.mask)).masked_fill_(self.mask, value)

    def replaced(self, values: Tensor, dense: Tensor) -> Tensor:
        """A tensor with the entries of the mask set, differentiable by both."""
        return torch.where(self.mask, values, _flat(dense, len(self.mask))).reshape(dense.shape)


_Entries = _Gathered | _Masked


def _flat(dense: Tensor, size: int) -> Tensor:
    """A tensor as (leading, size), a view where it is contiguous; also where there is nothing in it."""
    return dense.reshape(dense.numel() // max(size, 1), size)


def _gathers(device: torch.device) -> bool:
    """Whether to gather entries: on a CPU, where NumPy finds them several times faster than torch does."""
    return device.type == "cpu" and not _recording()


def _recording() -> bool:
    """Whether operations are written down rather than run."""
    return get_proxy_mode() is not None


def _selected(x: Tensor, mask: Tensor) -> _Entries:
    x, mask = x.reshape(-1), mask.reshape(-1)
    if not _gathers(x.device):
        return _Masked(torch.where(mask, x, 1.0), mask)
    at = torch.from_numpy(np.flatnonzero(mask.numpy()))
    return _Gathered(x.index_select(0, at), at, len(x))


def _counted(x: Tensor) -> _Entries:
    """The entries above zero."""
    return _selected(x, _unequal(x, torch.zeros_like(x)))


def _unequal(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors differ; NumPy compares several times faster than torch."""
    return torch.from_numpy(np.asarray(a.numpy() != b.numpy())) if _gathers(a.device) else a != b


def _distinct(parameter: Tensor) -> Tensor:
    """A tensor without the repetitions that an expansion gave it: one entry along those dimensions."""
    for dim, stride in enumerate(parameter.stride()):
        if stride == 0:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter


def _softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)); torch's default drops the second term from t = 20 on, an error of 2e-9 in float64."""
    return F.softplus(t, threshold=40.0)
