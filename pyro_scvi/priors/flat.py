"""Flat prior of z, which is improper."""

import pyro.distributions as dist
from pyro.distributions import constraints
from torch import Tensor

from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution


class ImproperUniform(dist.ImproperUniform):
    """Pyro's law of this name, with its log density on the device of the value: Pyro's lies on the CPU."""

    def log_prob(self, value: Tensor) -> Tensor:
        """Zeros, one for each event."""
        return value.new_zeros(super().log_prob(value).shape)


class Flat(Prior):
    r"""No prior: z is a parameter of the cell. Only the guide Point can be fitted.

    See Lopez et al. (2017), Sec. 3.3.

    .. math:: p(z_n) \propto 1

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1. Guides with a density, samplers other than Amortized, ``evidence`` and everything else
        that needs a proper prior raise the same error.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, prior=ps.priors.Flat(2))
    >>> points = ps.fit(model, cells, ps.guides.Point(model), epochs=1, progress=False)
    >>> ps.embed(points, cells).shape
    (60, 2)
    """

    def forward(self) -> Distribution:
        """A density of 1 everywhere, which cannot be sampled."""
        return ImproperUniform(constraints.real_vector, (), self.zeros.shape)
