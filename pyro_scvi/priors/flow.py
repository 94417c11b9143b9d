"""Normalising-flow prior of z."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.random_state import seeded


class Autoregressive(transforms.AffineAutoregressive):
    """Pyro's stable affine autoregressive layer, with an inverse as precise as its argument."""

    def __init__(self, network: AutoRegressiveNN) -> None:
        super().__init__(network, stable=True)

    def _inverse_stable(self, y: Tensor) -> Tensor:
        x, logit = list(torch.zeros_like(y).unbind(-1)), y
        for i in self.arn.permutation:
            mean, logit = self.arn(torch.stack(x, -1))
            inverse_scale = 1 + torch.exp(-logit[..., i] - self.sigmoid_bias)
            x[i] = inverse_scale * y[..., i] + (1 - inverse_scale) * mean[..., i]
        self._cached_log_scale = self.logsigmoid(logit + self.sigmoid_bias)
        return torch.stack(x, -1)


class Flow(Prior):
    r"""A standard normal transformed by learned masked autoregressive layers T.

    See Papamakarios et al. (2017), Sec. 3.

    .. math:: z_n = T(e_n), \quad e_n \sim Normal(0, I), \qquad
        \log p(z) = \log Normal(T^{-1}(z); 0, I) + \log |\det \partial T^{-1} / \partial z|

    The density of a given z costs one pass; drawing z costs one pass per latent.

    Parameters
    ----------
    n_latent
        Number of latents, 2 or more.
    layers, n_hidden
        Number of autoregressive layers, and of hidden units in each; the order of the latents is reversed after each.
    seed
        Of the initial weights.

    Raises
    ------
    ModelError
        If n_latent is below 2, another size below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> prior = ps.priors.Flow(2, layers=1, n_hidden=4)
    >>> prior().log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    learned = True

    def __init__(self, n_latent: int, layers: int = 2, n_hidden: int = 32, *, seed: int = 0) -> None:
        super().__init__(n_latent)
        require_at_least(1, layers=layers, n_hidden=n_hidden)
        if n_latent < 2:
            raise ModelError("Flow needs n_latent >= 2; take GaussianMixture for one latent")
        with seeded(seed):
            self.layers = nn.ModuleList(Autoregressive(AutoRegressiveNN(n_latent, [n_hidden])) for _ in range(layers))

    def forward(self) -> Distribution:
        """The transformed normal."""
        order = torch.arange(self.n_latent - 1, -1, -1, device=self.zeros.device)
        steps: list[Any] = []
        for layer in self.layers:
            # Inverted, so that the density of a given z takes one pass and sampling one per latent.
            steps += [layer.inv, transforms.Permute(order)]
        return dist.TransformedDistribution(dist.Normal(self.zeros, self.ones).to_event(1), steps)
