"""Priors of z on the simplex: logistic normal and Dirichlet."""

import pyro.distributions as dist
from pyro.distributions import transforms

from pyro_scvi.errors import ModelError
from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_positive


class LogisticNormal(Prior):
    r"""Proportions, such as those of topics, by stick breaking of a normal.

    The normal has n_latent - 1 dimensions; K is n_latent.

    .. math:: e_{nk} \sim Normal(0, scale^2), \quad v_{nk} = logistic(e_{nk} - \log(K - k)), \quad
        z_{nk} = v_{nk} \prod_{j < k} (1 - v_{nj}), \quad z_{nK} = \prod_{j < K} (1 - v_{nj})

    Parameters
    ----------
    n_latent
        Number of proportions, 2 or more.
    scale
        Standard deviation of e, above 0.

    Raises
    ------
    ModelError
        If n_latent is below 2, or scale is not above 0.

    Examples
    --------
    >>> z = ps.priors.LogisticNormal(3)().sample((5,))
    >>> z.shape, bool(torch.allclose(z.sum(-1), torch.ones(5)))
    (torch.Size([5, 3]), True)
    """

    def __init__(self, n_latent: int, scale: float = 1.0) -> None:
        super().__init__(n_latent)
        if n_latent < 2:
            raise ModelError("LogisticNormal needs n_latent >= 2: one proportion is always 1")
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self) -> Distribution:
        """LogisticNormal(0, scale) with n_latent proportions."""
        base = dist.Normal(self.zeros[1:], self.scale * self.ones[1:]).to_event(1)
        return dist.TransformedDistribution(base, [transforms.StickBreakingTransform()])


class Dirichlet(Prior):
    r"""Proportions that sum to one, with a symmetric Dirichlet distribution.

    .. math:: p(z_n) \propto \prod_k z_{nk}^{a - 1}

    Parameters
    ----------
    n_latent
        Number of proportions, 2 or more.
    concentration
        a, above 0; below 1 favours the corners of the simplex.

    Raises
    ------
    ModelError
        If n_latent is below 2, or concentration is not above 0.

    Examples
    --------
    >>> z = ps.priors.Dirichlet(3, concentration=0.5)().sample((5,))
    >>> z.shape, bool(torch.allclose(z.sum(-1), torch.ones(5)))
    (torch.Size([5, 3]), True)
    """

    def __init__(self, n_latent: int, concentration: float = 1.0) -> None:
        super().__init__(n_latent)
        if n_latent < 2:
            raise ModelError("Dirichlet needs n_latent >= 2: one proportion is always 1")
        require_positive(concentration, "concentration")
        self.concentration = concentration

    def forward(self) -> Distribution:
        """The symmetric Dirichlet."""
        return dist.Dirichlet(self.zeros + self.concentration)
