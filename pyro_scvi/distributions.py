"""The count laws: a negative binomial stable in float32 and a wrapper that adds technical zeros, in log space only."""

from typing import Any

import torch
from pyro.distributions import Gamma, TorchDistribution
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.utils import broadcast_all
from torch.nn import functional as F

from pyro_scvi.entries import Gathered, distinct, true_places
from pyro_scvi.negative_binomial import FAR, inflated, log_negative_binomial, log_zero_inflated
from pyro_scvi.random_bits import random_bits

Law = TorchDistributionMixin  # what Pyro can sample: its own distributions and its wrappers of torch's


class NegativeBinomial(TorchDistribution):
    r"""Poisson counts whose rate is Gamma: :math:`w \sim Gamma(r, r / \mu),\; x \sim Poisson(w)`.

    .. math:: p(x) = \frac{\Gamma(r + x)}{\Gamma(r)\, x!} \Big(\frac{r}{r + \mu}\Big)^r \Big(\frac{\mu}{r + \mu}\Big)^x

    with mean :math:`\mu` and variance :math:`\mu + \mu^2 / r` (Lopez et al. 2017, Sec. 1). Counts above 8 are evaluated
    in Loader's saddle-point form (C. Loader 2000, "Fast and accurate computation of binomial probabilities"), others by
    products, with analytic gradients: torch's own negative binomial is wrong by nats in float32 once r passes 1e5.

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
        return log_negative_binomial(value, self.log_mean, self.log_inverse_dispersion)

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts of shape ``sample_shape + batch_shape``."""
        log_mean, log_r = (
            p.expand(self._extended_shape(sample_shape)) for p in (self.log_mean, self.log_inverse_dispersion)
        )
        return _counts(log_mean, log_r, torch.ones_like(log_mean))


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
        if base.batch_shape != gate_logits.shape:
            shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
            base, gate_logits = base.expand(shape), gate_logits.expand(shape)
        self.base, self.gate_logits = base, gate_logits
        super().__init__(base.batch_shape, validate_args=validate_args)

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
            return log_zero_inflated(value, base.log_mean, base.log_inverse_dispersion, self.gate_logits)
        return inflated(value, self.base.log_prob(value), self.gate_logits)

    @property
    def technical_zero_logits(self) -> Tensor:
        """Log odds that an observed zero is technical: gate_logits - log p_base(0)."""
        return self.gate_logits - self.base.log_prob(torch.zeros_like(self.gate_logits))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Counts of shape ``sample_shape + batch_shape``."""
        p_kept = torch.sigmoid(-self.gate_logits).expand(self._extended_shape(sample_shape))
        if isinstance(self.base, NegativeBinomial):
            base = self.base
            return _counts(base.log_mean.expand_as(p_kept), base.log_inverse_dispersion.expand_as(p_kept), p_kept)
        return self.base.sample(sample_shape) * torch.bernoulli(p_kept)


def _counts(log_mean: Tensor, log_r: Tensor, p_kept: Tensor) -> Tensor:
    r"""Draws of negative binomial counts, of which a share ``p_kept`` is not set to zero, all of one shape.

    y is the number of events until time 1 of a Poisson process of rate w. Every event adds 1 to r; the next comes at t
    with r log(1 + t mu / r) = e, e ~ Exponential(1), and in time if e < lambda = r log(1 + mu / r), after which
    lambda / r is less by e / r. When k have come,

    .. math:: y = k + Poisson(g\, (e^{\lambda / r} - 1)), \qquad g \sim Gamma(r, 1)

    Most counts are 0, and of the others most are 1: Gamma and Poisson variables are drawn for counts above 1 only. The
    chance of those among positive ones is exact to 2^-24.
    """
    log_mean, log_r = log_mean.clamp(-FAR, FAR), distinct(log_r).clamp(-FAR, FAR)
    r = log_r.exp()
    hazard = F.softplus(log_mean - log_r).mul_(r)  # lambda
    # 1. Which counts may be positive: 16 random bits for each, against the probability in units of 2^-16.
    p_positive = hazard.neg().expm1_().mul_(p_kept).mul_(-(2.0**16))
    bits = random_bits(p_positive)
    at = true_places(bits <= (p_positive - 2.0**15).clamp_(max=2.0**15 - 1).to(torch.int16))
    # 2. Which are: further digits decide where the bits equal the probability's, and refine the quantile elsewhere.
    uniform, p_of_these = (t.reshape(-1).index_select(0, at) for t in (bits, p_positive))
    uniform = uniform.to(p_of_these) + 2.0**15 + torch.rand_like(p_of_these)
    uniform, at = _in_time(uniform, p_of_these, at)
    # 3. The first event, at that quantile of the waiting time; these counts are 1 or more.
    r, hazard = Gathered(uniform, at, torch.Size(p_positive.shape)).of(r)[0], hazard.reshape(-1).index_select(0, at)
    r, hazard = _after_event(r, hazard, uniform)
    counts = p_positive.contiguous().mul(0)  # but NaN where a parameter is NaN
    counts.view(-1).index_fill_(0, at, 1)
    # 4. A second event, where it comes in time; these counts are 2 or more.
    uniform, at, r, hazard = _in_time(torch.rand_like(r), hazard.neg().expm1_().neg_(), at, r, hazard)
    r, hazard = _after_event(r, hazard, uniform)
    # 5. The events after the second.
    counts.view(-1).index_copy_(0, at, 2 + torch.poisson(torch._standard_gamma(r) * torch.expm1(hazard / r)))
    return counts


def _in_time(uniform: Tensor, p: Tensor, *others: Tensor) -> list[Tensor]:
    """Where ``uniform`` is below p: uniform numbers anew, as shares of p, and what belongs to these."""
    kept = true_places(uniform < p)
    uniform, p, *others_kept = (t.index_select(0, kept) for t in (uniform, p, *others))
    return [uniform / p, *others_kept]


def _after_event(r: Tensor, hazard: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """R and lambda after an event that has come in time, at the quantile ``uniform`` of its waiting time."""
    waited = torch.log1p(uniform * torch.expm1(-hazard)).neg_()
    return r + 1, (hazard - waited).clamp_(min=0) * ((r + 1) / r)
