"""Neural networks: the encoder of cells, and the decoder f_w, f_h (Lopez et al. 2017, Sec. 1)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.nn.dropout import Dropout
from pyro_scvi.nn.normalization import BatchNorm, Norm
from pyro_scvi.utils.checks import brief, require_at_least, require_number, require_positive
from pyro_scvi.utils.execution import execution


def _autocast(like: Tensor) -> torch.autocast:
    dtype = execution().matrix_products
    # Where it is disabled, torch still wants a type that autocast knows.
    return torch.autocast(like.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class Layers(nn.Module):
    """Hidden layers, each dropout -> linear -> normalisation -> ReLU; gamma is concatenated to every layer's input."""

    def __init__(
        self, n_in: int, n_covariates: int, n_hidden: int, n_layers: int, dropout: float, norm: Norm | None
    ) -> None:
        super().__init__()
        require_at_least(1, n_hidden=n_hidden, n_layers=n_layers)
        require_number(dropout, "dropout", below=1.0)
        if norm is not None and (isinstance(norm, type) or not callable(norm)):
            raise ModelError(f"norm must be None or an object such as ps.networks.LayerNorm(), got {brief(norm)}")
        widths = [n_in] + [n_hidden] * n_layers
        self.dropout = Dropout(dropout)
        # Normalisation subtracts the mean: a bias before it has no effect and receives no gradient.
        self.linear = nn.ModuleList(nn.Linear(n + n_covariates, n_hidden, bias=norm is None) for n in widths[:-1])
        self.norm = nn.ModuleList(norm(n_hidden) if norm else nn.Identity() for _ in range(n_layers))

    def forward(self, hidden: Tensor, gamma: Tensor) -> Tensor:
        """(..., cells, n_in), (cells, covariates) -> (..., cells, n_hidden)."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            hidden = torch.relu(norm(linear(self.dropout(_with_covariates(hidden, gamma)))))
        return hidden


class Decoder(nn.Module):
    """f_w and f_h: shared hidden layers, and one linear head for each name in the likelihood's ``heads``.

    Maps z (..., cells, latents) and gamma (cells, covariates) to a dict of heads, each (..., cells, genes)
    (Lopez et al. 2017, Sec. 1).
    """

    def __init__(
        self,
        n_latent: int,
        n_genes: int,
        heads: Sequence[str],
        *,
        n_covariates: int = 0,
        n_hidden: int = 128,
        n_layers: int = 2,
        dropout: float = 0.0,
        norm: Norm | None = BatchNorm(),
        initial_sd: float | None = None,
        head_sd: float | None = None,
    ) -> None:
        super().__init__()
        if head_sd is not None:
            require_positive(head_sd, "head_sd")
        self.n_hidden, self.head_sd = n_hidden, head_sd
        self.layers = Layers(n_latent, n_covariates, n_hidden, n_layers, dropout, norm)
        self.heads = nn.ModuleDict({name: nn.Linear(n_hidden, n_genes) for name in heads})
        initialise(self, initial_sd)

    def head_weights(self) -> list[nn.Parameter]:
        """Weights of the heads that are trained, (genes, n_hidden) each: those with a prior are no parameters."""
        weights = (head._parameters.get("weight") for head in self.heads.modules())
        return [weight for weight in weights if weight is not None and weight.requires_grad]

    def log_prior_of_weights(self) -> Tensor:
        """Log Normal(W; 0, head_sd^2 / n_hidden) of the heads' weights W, nats of all cells; 0 without a prior."""
        precision = self._precision_of_weights()
        constant = 0.5 * math.log(precision / (2 * math.pi)) if precision else 0.0
        terms = (constant * w.numel() - 0.5 * precision * w.square().sum() for w in self.head_weights())
        return sum(terms, start=torch.zeros(()))

    def add_gradient_of_prior(self) -> None:
        """Add the gradient of minus :meth:`log_prior_of_weights` to that of the heads' weights, in few operations.

        Through autograd, so that hooks which keep a part of W as it is see it.
        """
        precision, weights = self._precision_of_weights(), self.head_weights()
        if precision and weights:
            gradients = precision * torch.cat([weight.detach() for weight in weights])
            torch.autograd.backward(weights, gradients.split([len(weight) for weight in weights]))

    def _precision_of_weights(self) -> float:
        return 0.0 if self.head_sd is None else self.n_hidden / self.head_sd**2

    def forward(self, z: Tensor, gamma: Tensor) -> dict[str, Tensor]:
        """Heads by name, each (..., cells, genes), on the log or logit scale."""
        with _autocast(z):
            hidden = self.layers(z, gamma)
            return {name: head(hidden).to(z.dtype) for name, head in self.heads.items()}


class Encoded(NamedTuple):
    """Output of the encoder: hidden units, and location and log scale of q, each (cells, ...)."""

    hidden: Tensor
    loc: Tensor
    log_scale: Tensor


class Encoder(Component):
    """The network behind q(z | x): counts (..., cells, genes) to a location and a log scale (..., cells, latents).

    Parameters
    ----------
    n_genes, n_latent
        Widths of the counts and of the (unconstrained) latent.
    n_covariates
        Number of columns of gamma that are an input, from the first on; 0 for none.
    log_input
        Whether log(1 + x) is the input instead of the raw counts.
    with_scale
        Whether there is a head for the scale; without one the scale is 0.1.
    """

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        *,
        n_covariates: int = 0,
        log_input: bool = True,
        with_scale: bool = True,
        n_hidden: int = 128,
        n_layers: int = 2,
        dropout: float = 0.0,
        norm: Norm | None = BatchNorm(),
        initial_sd: float | None = None,
    ) -> None:
        super().__init__()
        self.n_hidden, self.n_latent, self.n_covariates, self.log_input = n_hidden, n_latent, n_covariates, log_input
        self.layers = Layers(n_genes, n_covariates, n_hidden, n_layers, dropout, norm)
        self.loc = nn.Linear(n_hidden, n_latent)
        self.log_scale = nn.Linear(n_hidden, n_latent) if with_scale else None
        initialise(self, initial_sd)

    def forward(self, x: Tensor, gamma: Tensor) -> Encoded:
        """Encode counts x (..., cells, genes) with covariates gamma (cells, covariates)."""
        with _autocast(x):
            hidden = self.layers(torch.log1p(x) if self.log_input else x, gamma[..., : self.n_covariates]).to(x.dtype)
        loc = self.loc(hidden)
        log_scale = torch.full_like(loc, math.log(0.1)) if self.log_scale is None else self.log_scale(hidden)
        return Encoded(hidden, loc, log_scale)


def initialise(network: nn.Module, sd: float | None) -> None:
    """Truncated normal weights of standard deviation ``sd`` and zero biases (the authors' 0.01); None: torch's own."""
    if sd is None:
        return
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=sd, a=-2 * sd, b=2 * sd)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def _with_covariates(hidden: Tensor, gamma: Tensor) -> Tensor:
    if gamma.shape[-1] == 0:
        return hidden
    return torch.cat([hidden, gamma.expand(*hidden.shape[:-1], gamma.shape[-1])], -1)
