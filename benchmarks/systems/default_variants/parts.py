"""Parts of the variants: dispersions, and decoders with a head of their own for the dispersion."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import pyro_scvi as ps
from pyro_scvi.nn.component import Component
from pyro_scvi.nn.dropout import Dropout

LOG_R = "log_inverse_dispersion"


class Deviating(Component):
    """Log r = log r_g + scale times a head of the decoder: per gene, and a deviation per cell that learns slowly.

    Adam moves every weight by about the learning rate, so a head that is multiplied by .1 moves a tenth as fast.
    """

    heads = (LOG_R,)

    def __init__(self, n_genes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.expected_genes, self.scale = n_genes, scale
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: dict[str, Tensor], gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return self.log_inverse_dispersion + self.scale * eta[LOG_R]


class OfTheMean(Component):
    """Log r = a_g + b_g times the log mean count: two numbers for a gene, and no head."""

    heads = ()

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.expected_genes = n_genes
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))
        self.slope = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: dict[str, Tensor], gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return self.log_inverse_dispersion + self.slope * eta["log_mean"]


@dataclass(frozen=True)
class OwnHead:
    """The default decoder with a head of its own for log r that starts at zero.

    Parameters
    ----------
    rank
        Width of a linear layer between the hidden units and the genes; None for none.
    dropout
        Of the hidden units before this head alone.
    before_all
        Dropout of the hidden units before all heads.
    layers, within
        Hidden layers, and dropout before each.
    """

    rank: int | None = None
    dropout: float = 0.0
    before_all: float = 0.0
    layers: int = 1
    within: float = 0.0

    def __call__(self, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> nn.Module:
        """Build the network."""
        network = ps.networks.MLPDecoder(n_layers=self.layers, dropout=self.within, head_sd=None)(
            n_latent, n_genes, heads, n_covariates
        )
        n_hidden = network.heads[LOG_R].in_features
        last = nn.Linear(self.rank or n_hidden, n_genes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        between = [nn.Linear(n_hidden, self.rank, bias=False)] if self.rank else []
        network.heads[LOG_R] = nn.Sequential(Dropout(self.dropout), *between, last)
        network.layers = Dropped(network.layers, self.before_all)
        return network


class Dropped(nn.Module):
    """Hidden layers with dropout behind the last, before the heads."""

    def __init__(self, layers: nn.Module, dropout: float) -> None:
        super().__init__()
        self.layers, self.dropout = layers, Dropout(dropout)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        """(..., cells, latents) -> (..., cells, n_hidden)."""
        return self.dropout(self.layers(z, gamma))
