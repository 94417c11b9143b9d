"""Zero-inflated distribution: a count distribution with additional technical zeros, in log space."""

from typing import Any, ClassVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from pyro_scvi.distributions.nb_log_prob import inflated, log_zero_inflated
from pyro_scvi.distributions.nb_sampling import sample_counts
from pyro_scvi.distributions.negative_binomial import NegativeBinomial


class ZeroInflated(TorchDistribution):
    r"""Counts of a base distribution, set to zero with probability :math:`\pi = \sigma(gate)`.

    .. math:: p(0) = \pi + (1 - \pi)\, p_{base}(0), \qquad p(x) = (1 - \pi)\, p_{base}(x) \quad (x > 0)

    Parameters
    ----------
    base
        A distribution of counts with an empty event shape.
    gate_logits
        logit pi, broadcastable with the base's batch shape.
    """

    arg_constraints: ClassVar[dict[str, constraints.Constraint]] = {"gate_logits": constraints.real}
    support = constraints.nonnegative_integer

    def __init__(self, base: TorchDistribution, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        if base.batch_shape != gate_logits.shape:
            shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
            base, gate_logits = base.expand(shape), gate_logits.expand(shape)
        self.base, self.gate_logits = base, gate_logits
        super().__init__(base.batch_shape, validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "ZeroInflated":
        """The same distribution with parameters expanded to ``batch_shape``."""
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
            return sample_counts(base.log_mean.expand_as(p_kept), base.log_inverse_dispersion.expand_as(p_kept), p_kept)
        return self.base.sample(sample_shape) * torch.bernoulli(p_kept)
