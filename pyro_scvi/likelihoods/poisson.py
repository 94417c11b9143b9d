"""Poisson and zero-inflated Poisson likelihoods."""

import pyro.distributions as dist
from torch import Tensor

from pyro_scvi.distributions.zero_inflated import ZeroInflated
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.types import Distribution


class Poisson(Likelihood):
    r"""Poisson counts: w = mu, no technical zeros.

    .. math:: x_{ng} | z_n \sim Poisson(\mu_{ng})

    Examples
    --------
    >>> ps.SCVI(20, 2, likelihood=ps.likelihoods.Poisson()).sites(marginal=True)[-1]
    Site(name='x', law='Poisson', shape='cells x genes')
    """

    explicit = True
    heads = ("log_mean",)

    def marginal(self, log_mean: Tensor) -> Distribution:
        """Poisson(mu)."""
        return dist.Poisson(log_mean.exp())


class ZIP(Likelihood):
    r"""Poisson counts with technical zeros: w = mu.

    .. math:: p(x_{ng} | z_n) = \pi_{ng} 1[x_{ng} = 0] + (1 - \pi_{ng})\, Poisson(x_{ng}; \mu_{ng})

    Examples
    --------
    >>> ps.SCVI(20, 2, likelihood=ps.likelihoods.ZIP()).sites(marginal=True)[-1]
    Site(name='x', law='ZeroInflated Poisson', shape='cells x genes')
    """

    explicit = True
    heads = ("log_mean", "gate_logits")

    def marginal(self, log_mean: Tensor, gate_logits: Tensor) -> Distribution:
        """Zero-inflated Poisson(mu)."""
        return ZeroInflated(dist.Poisson(log_mean.exp()), gate_logits)
