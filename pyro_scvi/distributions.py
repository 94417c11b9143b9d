"""The count laws: a negative binomial stable in float32 and a wrapper that adds technical zeros, in log space only."""

import math
from typing import Any

import torch
from pyro.distributions import Gamma, TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

Law = TorchDistributionMixin  # what Pyro can sample: its own distributions and its wrappers of torch's

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_CANCELS = 16  # counts above which a difference of large logarithms loses more than a few units in the last place


class NegativeBinomial(TorchDistribution):
    r"""Poisson counts whose rate is Gamma: :math:`w \sim Gamma(r, r / \mu),\; x \sim Poisson(w)`.

    .. math:: p(x) = \frac{\Gamma(r + x)}{\Gamma(r)\, x!} \Big(\frac{r}{r + \mu}\Big)^r \Big(\frac{\mu}{r + \mu}\Big)^x

    with mean :math:`\mu` and variance :math:`\mu + \mu^2 / r` (Lopez et al. 2017, Sec. 1). Evaluated in Loader's
    saddle-point form (C. Loader 2000, "Fast and accurate computation of binomial probabilities"), with analytic
    gradients: torch's own negative binomial is wrong by nats in float32 once r passes 1e5.

    Parameters
    ----------
    log_mean
        log mu, log counts, any shape.
    log_inverse_dispersion
        log r, broadcastable with ``log_mean``.
    """

    arg_constraints = {"log_mean": constraints.real, "log_inverse_dispersion": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, log_mean: Tensor, log_inverse_dispersion: Tensor, validate_args: bool | None = None) -> None:
        self.log_mean, self.log_inverse_dispersion = broadcast_all(log_mean, log_inverse_dispersion)
        super().__init__(self.log_mean.shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "NegativeBinomial":
        """The same law with parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(NegativeBinomial, _instance)
        new.log_mean = self.log_mean.expand(batch_shape)
        new.log_inverse_dispersion = self.log_inverse_dispersion.expand(batch_shape)
        super(NegativeBinomial, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """mu, counts."""
        return self.log_mean.exp()

    @property
    def variance(self) -> Tensor:
        """Mu + mu^2 / r, counts squared."""
        return self.mean + (2 * self.log_mean - self.log_inverse_dispersion).exp()

    @property
    def rate(self) -> Gamma:
        """The law of w, the Gamma rate of the counts."""
        return Gamma(
            self.log_inverse_dispersion.exp(), (self.log_inverse_dispersion - self.log_mean).exp(), validate_args=False
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of ``value`` (counts), nats per entry."""
        if self._validate_args:
            self._validate_sample(value)
        return _NegativeBinomialLogProb.apply(*_aligned(value, self.log_mean, self.log_inverse_dispersion))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts of shape ``sample_shape + batch_shape``."""
        return torch.poisson(self.rate.sample(sample_shape))


class ZeroInflated(TorchDistribution):
    r"""Counts of a base law that are set to zero with probability :math:`\pi = \sigma(gate)`.

    .. math:: p(0) = \pi + (1 - \pi)\, p_{base}(0), \qquad p(x) = (1 - \pi)\, p_{base}(x) \quad (x > 0)

    Parameters
    ----------
    base
        A law of counts with an empty event shape.
    gate_logits
        logit pi, broadcastable with the base's batch shape.
    """

    arg_constraints = {"gate_logits": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, base: TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        self.base, self.gate_logits = base.expand(shape), gate_logits.expand(shape)
        super().__init__(shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZeroInflated":
        """The same law with parameters expanded to ``batch_shape``."""
        new = self._get_checked_instance(ZeroInflated, _instance)
        new.base, new.gate_logits = self.base.expand(batch_shape), self.gate_logits.expand(batch_shape)
        super(ZeroInflated, new).__init__(torch.Size(batch_shape), validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """(1 - pi) times the base mean, counts."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """(1 - pi) (v + pi m^2) with the base's mean m and variance v, counts squared."""
        gate = torch.sigmoid(self.gate_logits)
        return torch.sigmoid(-self.gate_logits) * (self.base.variance + gate * self.base.mean.square())

    def log_prob(self, value: Tensor) -> Tensor:
        """Log probability of ``value`` (counts), nats per entry."""
        if self._validate_args:
            self._validate_sample(value)
        if isinstance(self.base, NegativeBinomial):
            base = self.base
            inputs = _aligned(value, base.log_mean, base.log_inverse_dispersion, self.gate_logits)
            trained = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in inputs)
            return _ZeroInflatedLogProb.apply(*inputs, trained)[0]
        return _inflated(value, self.base.log_prob(value), self.gate_logits)

    @property
    def technical_zero_logits(self) -> Tensor:
        """Log odds that an observed zero is technical: gate_logits - log p_base(0)."""
        return self.gate_logits - self.base.log_prob(torch.zeros_like(self.gate_logits))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts of shape ``sample_shape + batch_shape``."""
        counts = self.base.sample(sample_shape)
        return counts * torch.bernoulli(torch.sigmoid(-self.gate_logits).expand(counts.shape))


def _inflated(value: Tensor, log_prob: Tensor, gate: Tensor) -> Tensor:
    """Log p(x) with technical zeros: (1 + p / o) pi at x = 0 and (p / o) pi above, o = exp(gate) the odds of one."""
    odds = log_prob - gate
    return torch.where(value == 0, _softplus(odds), odds) - _softplus(-gate)


def _aligned(value: Tensor, log_mean: Tensor, log_r: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Counts and parameters in one precision and of one shape, but for leading dimensions that counts may lack."""
    value = value.to(log_mean.dtype)
    shape = torch.broadcast_shapes(value.shape, log_mean.shape)
    value = value.expand(shape[max(0, len(shape) - 2) :]) if value.dim() <= 2 else value.expand(shape)
    # exp(60) is past every count; near exp(88) float32 ends and values and gradients would be NaN.
    parameters = log_mean.clamp(-60, 60), log_r.clamp(-60, 60), *others
    return value, *(parameter.expand(shape) for parameter in parameters)


class _ZeroInflatedLogProb(torch.autograd.Function):
    """Log p(x) of a zero-inflated negative binomial and its gradients, in one pass.

    With n = -r log1p(mu / r) the log probability that the base gives to 0, s its sigmoid share in an observed zero,

        x = 0:  log p = softplus(n - g) - softplus(-g),  s = sigmoid(n - g)
                d / dg = 1 - s - sigmoid(g),  d / d log mu = -s r mu / (r + mu),  d / d log r = s (n + r mu / (r + mu))
        x > 0:  log p = log NB(x) - softplus(g),  d / dg = -sigmoid(g), the others those of the base

    Returns the value, then the gradients, which are no outputs of the law but wait here for the backward pass. Second
    derivatives come from the same law composed of differentiable steps.
    """

    @staticmethod
    def forward(value: Tensor, log_mean: Tensor, log_r: Tensor, gate: Tensor, gradients: bool) -> tuple[Tensor, ...]:
        log_mean, log_r, gate = log_mean.contiguous(), log_r.contiguous(), gate.contiguous()
        x, counted = _positive(value)
        size, r, log_ratio = value.numel(), log_r.exp(), log_mean - log_r
        columns = [_columns(parameter, size, counted) for parameter in (log_mean, log_r)]
        softplus_gate = _softplus(gate)
        zero = r.mul(_softplus(log_ratio)).neg_()
        odds = zero - gate
        out = _softplus(odds).add_(gate).sub_(softplus_gate)  # - softplus(-g) = g - softplus(g)
        log_prob = _log_prob_of_positive(x, *columns) - _columns(softplus_gate, size, counted)
        out.view(-1, size).index_copy_(1, counted, log_prob)
        if not gradients:
            return (out,)
        share, rate = odds.sigmoid_(), log_ratio.sigmoid_().mul_(r)  # rate: r mu / (r + mu)
        by_mean, by_r = (share * rate).neg_(), rate.add_(zero).mul_(share)
        of_gate = torch.sigmoid(gate).neg_()
        by_gate = (of_gate + 1).sub_(share)
        at = *_gradients_of_positive(x, *columns), _columns(of_gate, size, counted)
        for dense, counts in zip((by_mean, by_r, by_gate), at, strict=True):
            dense.view(-1, size).index_copy_(1, counted, counts)
        return out, by_mean, by_r, by_gate

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs[:4], *output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        value, *parameters = ctx.saved_tensors[:4]
        if grad is None:
            return (None,) * 5
        if not torch.is_grad_enabled():
            return None, *(grad * by for by in ctx.saved_tensors[4:]), None
        log_mean, log_r, gate = parameters
        composed = _inflated(value, _NegativeBinomialLogProb.apply(value, log_mean, log_r), gate)
        return None, *torch.autograd.grad(composed, parameters, grad, create_graph=True), None


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
    def forward(value: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
        x, counted = _positive(value)
        out = (-log_r.exp() * _softplus(log_mean - log_r)).reshape(-1, value.numel())
        out[:, counted] = _log_prob_of_positive(
            x, _columns(log_mean, value.numel(), counted), _columns(log_r, value.numel(), counted)
        )
        return out.reshape(log_mean.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, log_mean, log_r = ctx.saved_tensors
        x, counted = _positive(value)
        share = torch.sigmoid(log_mean - log_r)  # mu / (r + mu), which is -u where x = 0
        by_r = log_r.exp() * _log1p_minus(-share, -_softplus(log_mean - log_r))
        by_mean = -log_r.exp() * share
        at = _gradients_of_positive(
            x, _columns(log_mean, value.numel(), counted), _columns(log_r, value.numel(), counted)
        )
        by_mean, by_r = (
            zero.reshape(-1, value.numel()).index_copy(1, counted, positive).reshape(log_mean.shape)
            for zero, positive in zip((by_mean, by_r), at, strict=True)
        )
        return None, grad * by_mean, grad * by_r


def _softplus(t: Tensor) -> Tensor:
    """log(1 + exp(t)); torch's default drops the second term from t = 20 on, an error of 2e-9 in float64."""
    return F.softplus(t, threshold=40.0)


def _positive(value: Tensor) -> tuple[Tensor, Tensor]:
    """The counts above zero and their positions in the flattened counts."""
    flat = value.reshape(-1)
    counted = flat.nonzero().squeeze(-1)
    return flat[counted], counted


def _columns(parameter: Tensor, size: int, counted: Tensor) -> Tensor:
    return parameter.reshape(-1, size)[:, counted]


def _log_prob_of_positive(x: Tensor, log_mean: Tensor, log_r: Tensor) -> Tensor:
    r, log_x = log_r.exp(), x.log()
    log_odds = torch.log1p(x / r)
    log_ratio = log_odds - _softplus(log_mean - log_r)  # log1p(u) without the rounding of u near -1
    deviance = (r + x) * log_ratio + x * (log_mean - log_x)  # r l(u) + x l(v), whose linear terms cancel
    large = (x > _CANCELS).nonzero().squeeze(-1)  # where this sum would lose digits
    deviance[:, large] = _deviance(*(t[..., large] for t in (x, log_mean, r, log_ratio, log_mean - log_x + log_ratio)))
    of_counts = torch.lgamma(x + 1) - x * log_x + x  # d(x) + log(2 pi x) / 2
    return deviance + _stirling_gap(x, r) - 0.5 * log_odds - torch.where(x > _CANCELS, _large_counts(x), of_counts)


def _gradients_of_positive(x: Tensor, log_mean: Tensor, log_r: Tensor) -> tuple[Tensor, Tensor]:
    mean, r = log_mean.exp(), log_r.exp()
    log_ratio = torch.log1p(x / r) - _softplus(log_mean - log_r)
    by_r = r * _log1p_minus((x - mean) / (r + mean), log_ratio) + r * (_log_minus_psi(r) - _log_minus_psi(r + x))
    return (x - mean) * torch.sigmoid(log_r - log_mean), by_r


def _deviance(x: Tensor, log_mean: Tensor, r: Tensor, log1p_u: Tensor, log1p_v: Tensor) -> Tensor:
    """R l(u) + x l(v), each by its series where it is small."""
    mean = log_mean.exp()
    u = (x - mean) / (r + mean)
    return r * _log1p_minus(u, log1p_u) + x * _log1p_minus(-(r / x) * u, log1p_v)


def _log1p_minus(t: Tensor, log1p_t: Tensor) -> Tensor:
    """log1p(t) - t; where t is small by the series of 2 artanh(s), s = t / (2 + t), else from the given log1p(t)."""
    s = t / (2 + t)
    square = s * s
    series = 1 / 3 + square * (1 / 5 + square * (1 / 7 + square * (1 / 9 + square * (1 / 11 + square / 13))))
    return torch.where(t.abs() < 0.1, s * (2 * square * series - t), log1p_t - t)


def _large_counts(x: Tensor) -> Tensor:
    """d(x) + log(2 pi x) / 2 by Stirling's series."""
    return _stirling_series(1 / x) + 0.5 * x.log() + _HALF_LOG_2PI


def _stirling_gap(x: Tensor, r: Tensor) -> Tensor:
    """d(r + x) - d(r), from Stirling's series after a shift by k that makes it exact to rounding.

    d(a) = s(a + k) + (a + 1/2) log1p(k / a) - k - log prod_{j < k} (a + j) / (a + k), j from 1.
    """
    (above, product_above), (below, product_below) = _shifted(r + x), _shifted(r)
    return above - below - (product_above / product_below).log()


def _shifted(a: Tensor) -> tuple[Tensor, Tensor]:
    k = _shift(a)
    inverse = 1 / (a + k)
    product = (a + 1) * inverse
    for j in range(2, k):
        product = product * ((a + j) * inverse)
    return _stirling_series(inverse) + (a + 0.5) * torch.log1p(k / a), product


def _log_minus_psi(a: Tensor) -> Tensor:
    """Log a - psi(a), by the asymptotic series of the digamma function psi after the same shift."""
    k = _shift(a)
    b = a + k
    square = 1 / (b * b)
    series = 0.5 / b + square * (1 / 12 - square * (1 / 120 - square * (1 / 252 - square * (1 / 240 - square / 132))))
    for j in range(k):
        series = series + 1 / (a + j)
    return series - torch.log1p(k / a)


def _stirling_series(inverse: Tensor) -> Tensor:
    square = inverse * inverse
    return (1 / 12 - square * (1 / 360 - square * (1 / 1260 - square * (1 / 1680 - square / 1188)))) * inverse


def _shift(a: Tensor) -> int:
    """From where five terms of the series are exact to rounding."""
    return 12 if a.dtype == torch.float64 else 3
