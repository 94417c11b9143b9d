"""Decoders as parts of a model: the network of the paper, and a linear map with loadings."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.networks import Decoder, initialise
from pyro_scvi.nn.normalization import BatchNorm, Norm
from pyro_scvi.utils.checks import brief

DecoderPart = Callable[[int, int, Sequence[str], int], nn.Module]
"""Makes a decoder from the numbers of latents and genes, the names of its heads, and the number of covariates."""


@dataclass(frozen=True)
class MLPDecoder:
    r"""Shared hidden layers and a linear head for each parameter of the likelihood.

    See Lopez et al. (2017), Sec. 1.

    .. math:: \eta_n = W\, h(z_n, \gamma_n) + b

    Parameters
    ----------
    n_hidden, n_layers, dropout, norm, initial_sd
        The hidden layers, and the sd of their initial weights, as in ``ps.SCVI``, whose default this is.
    head_sd
        Prior of the weights W of the heads, of which ``ps.fit`` finds the mode, each Normal(0, head_sd^2 / n_hidden),
        so that about this is the standard deviation over cells of a log mean, or of another head. It counts as much for
        few cells as for many, and so keeps a fit to few cells from overfitting. Losses and evidence are without it.
        Biases have none, nor have frozen weights or those in ``weight_priors``. None: no prior. In SVI of one's own,
        add ``-model.decoder.log_prior_of_weights()`` to the loss, which is of all cells.

    Examples
    --------
    >>> ps.SCVI(20, 2, decoder=ps.networks.MLPDecoder(n_hidden=32)).decoder.heads["log_mean"].in_features
    32
    """

    n_hidden: int = 128
    n_layers: int = 2
    dropout: float = 0.0
    norm: Norm | None = BatchNorm()
    initial_sd: float | None = None
    head_sd: float | None = 1.0

    def __call__(self, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> nn.Module:
        """Build the network."""
        return Decoder(
            n_latent,
            n_genes,
            heads,
            n_covariates=n_covariates,
            n_hidden=self.n_hidden,
            n_layers=self.n_layers,
            dropout=self.dropout,
            norm=self.norm,
            initial_sd=self.initial_sd,
            head_sd=self.head_sd,
        )


@dataclass(frozen=True)
class LinearDecoder:
    r"""Every parameter of the likelihood is linear in z and gamma, on the log or logit scale.

    See Svensson et al. (2020).

    .. math:: \eta_n = W z_n + C \gamma_n + b

    The loadings W (genes, latents) are the parameter ``decoder.heads.log_mean.weight``, C is
    ``decoder.heads.log_mean.covariates`` and b is ``decoder.heads.log_mean.bias``; other heads likewise.
    ``ps.loadings`` shows W, and ``weight_priors`` may have a prior on it. Where the library size is distributed over
    the genes, a constant added to the loadings of all genes on a latent has no effect.

    Parameters
    ----------
    initial_sd
        Standard deviation of the initial W; None: torch's for linear layers. C starts at zero.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, decoder=ps.networks.LinearDecoder())
    >>> model.decoder.heads["log_mean"].weight.shape
    torch.Size([20, 2])
    """

    initial_sd: float | None = None

    def __call__(self, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> nn.Module:
        """Build the linear maps."""
        made = _Linear(n_latent, n_genes, heads, n_covariates)
        initialise(made, self.initial_sd)
        return made


class _LinearHead(nn.Linear):
    """W z + C gamma + b; C is a parameter of its own, so that a prior on the loadings is on nothing else."""

    covariates: Tensor | None

    def __init__(self, n_latent: int, n_genes: int, n_covariates: int) -> None:
        super().__init__(n_latent, n_genes)
        start = nn.Parameter(torch.zeros(n_genes, n_covariates)) if n_covariates else None
        self.register_parameter("covariates", start)

    def with_gamma(self, z: Tensor, gamma: Tensor) -> Tensor:
        eta = self(z)
        return eta if self.covariates is None else eta + gamma @ self.covariates.T


class _Linear(nn.Module):
    """A linear head for each parameter of the likelihood."""

    def __init__(self, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> None:
        super().__init__()
        self.heads: Any = nn.ModuleDict({name: _LinearHead(n_latent, n_genes, n_covariates) for name in heads})

    def forward(self, z: Tensor, gamma: Tensor) -> dict[str, Tensor]:
        """Heads by name, each (..., cells, genes)."""
        return {name: head.with_gamma(z, gamma) for name, head in self.heads.items()}

    def loadings(self, head: str) -> Tensor:
        """W (genes, latents) of a head."""
        weight: Tensor = self.heads[head].weight
        return weight


def require_decoder(decoder: Any) -> None:
    """Refuse what makes no decoder, such as a network of fixed sizes or a class.

    Raises
    ------
    ModelError
        If it is refused; names what was passed.
    """
    settings = isinstance(decoder, type) and not issubclass(decoder, nn.Module)
    if settings or isinstance(decoder, nn.Module) or not callable(decoder):
        raise ModelError(
            "decoder must be what makes a network from (n_latent, n_genes, heads, n_covariates), such as "
            f"ps.networks.LinearDecoder(), got {brief(decoder)}"
        )


@torch.no_grad()
def require_heads(network: Any, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> None:
    """Refuse a network of one's own that does not map z and gamma to the likelihood's heads.

    Raises
    ------
    ModelError
        If it is no module, or gives other heads or shapes.
    """
    if not isinstance(network, nn.Module):
        raise ModelError(f"decoder must make a torch.nn.Module, got {brief(network)}")
    if type(network).__module__.startswith("pyro_scvi."):
        return
    given = network(torch.zeros(2, n_latent), torch.zeros(2, n_covariates))
    found = {name: tuple(value.shape) for name, value in given.items()} if isinstance(given, dict) else brief(given)
    if found != dict.fromkeys(heads, (2, n_genes)):
        raise ModelError(
            f"the decoder must return a dict of {list(heads)}, each (..., cells, {n_genes}); for 2 cells it returned "
            f"{found}"
        )
