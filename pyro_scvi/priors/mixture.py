"""Mixture priors of z: Gaussian mixture and VampPrior."""

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.networks import Encoder
from pyro_scvi.nn.normalization import LayerNorm
from pyro_scvi.priors.base import Prior
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import brief, require_at_least
from pyro_scvi.utils.random_state import seeded


class GaussianMixture(Prior):
    r"""A mixture of diagonal normals with learned weights, means and scales.

    .. math:: z_n \sim \sum_c \pi_c\, Normal(m_c, diag(s_c^2))

    Parameters
    ----------
    n_latent
        Number of latents.
    components
        Number of normals.
    seed
        Of the initial means, standard normal; weights start equal and scales at 1.

    Raises
    ------
    ModelError
        If n_latent or components is below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.GaussianMixture(2, components=4)).sites()[0]
    Site(name='z', law='mixture of 4 Normal', shape='cells x 2')
    """

    learned = True

    def __init__(self, n_latent: int, components: int = 8, *, seed: int = 0) -> None:
        super().__init__(n_latent)
        require_at_least(1, components=components)
        with seeded(seed):
            self.loc = nn.Parameter(torch.randn(components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(components, n_latent))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> Distribution:
        """A mixture of diagonal normals."""
        return _mixture(self.logits, self.loc, self.log_scale)


class VampPrior(Prior):
    r"""The aggregate posterior at learned pseudo-cells u_c, with learned weights.

    See Tomczak and Welling (2018).

    .. math:: z_n \sim \sum_c \pi_c\, q(z | u_c)

    The guide shares this prior's ``encoder``, so that q(z | u_c) is the guide's own distribution. The encoder has layer
    normalisation: with batch normalisation the prior would differ between training and evaluation.

    Parameters
    ----------
    n_genes, n_latent
        As in the model, which refuses other numbers.
    components
        Number of pseudo-cells.
    pseudo_cells
        Start of u, counts (components, genes), for example some training cells; by default small random counts.
    n_hidden, n_layers, seed
        Hidden layers of the encoder; seed of its weights and of the default pseudo-cells.

    Raises
    ------
    ModelError
        If ``pseudo_cells`` is no matrix of that shape, a size is below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> x, gamma = cells[:6]
    >>> prior = ps.priors.VampPrior(20, 2, components=6, pseudo_cells=x)
    >>> model = ps.SCVI(20, 2, prior=prior)
    >>> ps.guides.DiagonalNormal(model).encoder is prior.encoder
    True
    """

    learned = True

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        components: int = 50,
        *,
        pseudo_cells: Tensor | None = None,
        n_hidden: int = 128,
        n_layers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(n_latent)
        require_at_least(1, n_genes=n_genes, components=components)
        self.expected_genes = n_genes
        with seeded(seed):
            self.encoder = Encoder(n_genes, n_latent, n_hidden=n_hidden, n_layers=n_layers, norm=LayerNorm())
            start = torch.rand(components, n_genes) if pseudo_cells is None else _counts(pseudo_cells)
        if start.shape != (components, n_genes):
            raise ModelError(f"pseudo_cells must have shape {(components, n_genes)}, got {tuple(start.shape)}")
        self.log_counts = nn.Parameter(start.clamp(min=0.01).log())  # a count of 0 has no logarithm
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> Distribution:
        """A mixture of the guide's normals at the pseudo-cells."""
        encoded = self.encoder(self.log_counts.exp(), self.log_counts.new_zeros(len(self.log_counts), 0))
        return _mixture(self.logits, encoded.loc, encoded.log_scale)


def _mixture(logits: Tensor, loc: Tensor, log_scale: Tensor) -> Distribution:
    components = dist.Normal(loc, log_scale.exp()).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


def _counts(pseudo_cells: Any) -> Tensor:
    try:
        return torch.as_tensor(pseudo_cells).float()
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for strings, objects and ragged lists
        raise ModelError(f"pseudo_cells must be numbers, as in cells[:50][0]; got {brief(pseudo_cells)}") from error
