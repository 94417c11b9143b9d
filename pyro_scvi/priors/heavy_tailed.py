"""Heavy-tailed priors of z: Student's t and Laplace."""

import pyro.distributions as dist

from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_positive


class StudentT(Prior):
    r"""Heavier tails than the normal: outlying cells are shrunk less.

    .. math:: z_{nk} \sim StudentT(df, 0, 1)

    Parameters
    ----------
    n_latent
        Number of latents.
    df
        Degrees of freedom, above 0.

    Raises
    ------
    ModelError
        If n_latent is below 1, or df is not above 0.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.StudentT(2, df=3.0)).sites()[0]
    Site(name='z', law='StudentT', shape='cells x 2')
    """

    def __init__(self, n_latent: int, df: float = 4.0) -> None:
        super().__init__(n_latent)
        require_positive(df, "df")
        self.df = df

    def forward(self) -> Distribution:
        """StudentT(df, 0, 1) on every latent."""
        return dist.StudentT(self.zeros + self.df, self.zeros, self.ones).to_event(1)


class Laplace(Prior):
    r"""A peak at zero and heavy tails, for sparse latents.

    .. math:: z_{nk} \sim Laplace(0, 1), \qquad p(z_{nk}) = \tfrac12 e^{-|z_{nk}|}

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
    >>> ps.SCVI(20, 2, prior=ps.priors.Laplace(2)).sites()[0]
    Site(name='z', law='Laplace', shape='cells x 2')
    """

    def forward(self) -> Distribution:
        """Laplace(0, 1) on every latent."""
        return dist.Laplace(self.zeros, self.ones).to_event(1)
