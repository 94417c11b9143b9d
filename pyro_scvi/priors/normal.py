"""Normal priors of z: standard, and with a learned variance for each latent."""

import pyro.distributions as dist
import torch
from torch import nn

from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution


class StandardNormal(Prior):
    r"""The paper's prior, independent standard normals (Lopez et al. 2017, Sec. 1).

    .. math:: z_n \sim Normal(0, I)

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1.

    Examples
    --------
    >>> ps.priors.StandardNormal(2)().event_shape
    torch.Size([2])
    >>> ps.SCVI(20, 2, prior=ps.priors.StandardNormal(2)).sites()[0]
    Site(name='z', law='Normal', shape='cells x 2')
    """

    def forward(self) -> Distribution:
        """Normal(0, 1) on every latent."""
        return dist.Normal(self.zeros, self.ones).to_event(1)


class ARDNormal(Prior):
    r"""Normal with a learned scale for each latent, so that latents that are not needed shrink.

    This is automatic relevance determination (Neal 1996).

    .. math:: z_{nk} \sim Normal(0, s_k^2)

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.ARDNormal(2)).prior
    ARDNormal(n_latent=2)
    """

    learned = True

    def __init__(self, n_latent: int) -> None:
        super().__init__(n_latent)
        self.log_scale = nn.Parameter(torch.zeros(n_latent))

    def forward(self) -> Distribution:
        """Normal(0, s_k) on latent k."""
        return dist.Normal(self.zeros, self.log_scale.exp()).to_event(1)
