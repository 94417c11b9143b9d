"""The neural networks: an encoder of cells and the decoder f_w, f_h, both for any leading dimensions."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError, brief, require_at_least, require_number, require_positive
from pyro_scvi.execution import execution
from pyro_scvi.opaque import opaque
from pyro_scvi.parts import Part
from pyro_scvi.random_bits import random_bits

__all__ = ["BatchNorm", "LayerNorm"]


def __dir__():
    return __all__


@dataclass(frozen=True)
class BatchNorm:
    r"""Batch normalisation of hidden units by their mean and variance over cells (Ioffe and Szegedy 2015, Alg. 1).

    .. math:: \hat u_{nj} = a_j \frac{u_{nj} - m_j}{\sqrt{v_j + eps}} + b_j

    In training m and v are those of the minibatch, in evaluation the running ones.

    Parameters
    ----------
    momentum
        Weight of each minibatch in the running m and v, above 0 to 1, as in torch; 0.01 in the authors' code, shorter
        runs want 0.05 to 0.1.
    eps
        Added to the variance, above 0.

    Raises
    ------
    ModelError
        If a number is out of range.

    Examples
    --------
    >>> ps.SCVI(20, 2, norm=ps.networks.BatchNorm(momentum=0.01))
    SCVI(n_genes=20, n_latent=2, ..., norm=BatchNorm(momentum=0.01, eps=0.001), seed=0)
    """

    momentum: float = 0.1
    eps: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(self.momentum, "momentum", most=1.0)
        require_positive(self.eps, "eps")

    def __call__(self, width: int) -> nn.Module:
        """Build a layer for ``width`` units."""
        return _RowBatchNorm(width, momentum=self.momentum, eps=self.eps)


@dataclass(frozen=True)
class LayerNorm:
    r"""Layer normalisation of hidden units by mean and variance over a cell's units (Ba, Kiros and Hinton 2016).

    .. math:: \hat u_{nj} = a_j \frac{u_{nj} - m_n}{\sqrt{v_n + eps}} + b_j

    No state, the same in training and evaluation, right for any batch size.

    Parameters
    ----------
    eps
        Added to the variance, above 0.

    Raises
    ------
    ModelError
        If eps is no finite number above 0.

    Examples
    --------
    >>> ps.SCVI(20, 2, norm=ps.networks.LayerNorm())
    SCVI(n_genes=20, n_latent=2, ..., norm=LayerNorm(eps=1e-05), seed=0)
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive(self.eps, "eps")

    def __call__(self, width: int) -> nn.Module:
        """Build a layer for ``width`` units."""
        return nn.LayerNorm(width, eps=self.eps)


Norm = Callable[[int], nn.Module]


def _autocast(like: Tensor) -> torch.autocast:
    dtype = execution().matrix_products
    return torch.autocast(like.device.type, dtype or torch.bfloat16, enabled=dtype is not None)


class _RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over all leading dimensions; a single row in training uses the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if self.training and len(rows) == 1:
            rows = nn.functional.batch_norm(
                rows, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            rows = super().forward(rows)
        return rows.reshape(input.shape)


def running_statistics(*parts: nn.Module) -> Iterator[Tensor]:
    """The running means and variances of every batch normalisation in ``parts``."""
    for part in parts:
        for module in part.modules():
            if (
                isinstance(module, nn.BatchNorm1d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                yield from (module.running_mean, module.running_var)


class Dropout(nn.Dropout):
    """Dropout by 16 random bits an entry: on a CPU torch's own masks cost three times as much.

    The share that is dropped is p to one part in 65,536, and what is kept is scaled by the share that is kept.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and 0 < self.p < 1) or input.device.type != "cpu":
            return super().forward(input)
        kept = torch.empty_like(input)
        _draw_kept(kept, min(round(self.p * 2**16), 2**16 - 1))
        return input * kept


@opaque("draw_kept", "kept")
def _draw_kept(kept: Tensor, dropped: int) -> None:
    """Set to 0 a share of ``dropped`` / 65,536 of the entries, the others to the number that keeps their mean at 1."""
    torch.ge(random_bits(kept), dropped - 2**15, out=kept)
    kept.mul_(2**16 / (2**16 - dropped))


class Layers(nn.Module):
    """Hidden layers: dropout -> linear -> normalisation -> ReLU each; gamma is concatenated to every input."""

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
        # A bias in front of a normalisation that subtracts the mean would never matter nor receive a gradient.
        self.linear = nn.ModuleList(nn.Linear(n + n_covariates, n_hidden, bias=norm is None) for n in widths[:-1])
        self.norm = nn.ModuleList(norm(n_hidden) if norm else nn.Identity() for _ in range(n_layers))

    def forward(self, hidden: Tensor, gamma: Tensor) -> Tensor:
        """(..., cells, n_in), (cells, covariates) -> (..., cells, n_hidden)."""
        for linear, norm in zip(self.linear, self.norm, strict=True):
            hidden = torch.relu(norm(linear(self.dropout(_with_covariates(hidden, gamma)))))
        return hidden


class Decoder(nn.Module):
    """f_w and f_h: hidden layers shared by both, one linear head per name that the likelihood asks for.

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
    ) -> None:
        super().__init__()
        self.layers = Layers(n_latent, n_covariates, n_hidden, n_layers, dropout, norm)
        self.heads = nn.ModuleDict({name: nn.Linear(n_hidden, n_genes) for name in heads})
        initialise(self, initial_sd)

    def forward(self, z: Tensor, gamma: Tensor) -> dict[str, Tensor]:
        """Heads by name, each (..., cells, genes), on the log or logit scale."""
        with _autocast(z):
            hidden = self.layers(z, gamma)
            return {name: head(hidden).to(z.dtype) for name, head in self.heads.items()}


class Encoded(NamedTuple):
    """What the encoder says of cells: hidden units, location and log scale of q, each (cells, ...)."""

    hidden: Tensor
    loc: Tensor
    log_scale: Tensor


class Encoder(Part):
    """The network behind q(z | x): counts (..., cells, genes) to a location and a log scale (..., cells, latents).

    Parameters
    ----------
    n_genes, n_latent
        Widths of the counts and of the (unconstrained) latent.
    n_covariates
        How many columns of gamma enter; 0 keeps them out.
    log_input
        Whether log(1 + x) enters instead of the raw counts.
    with_scale
        Whether there is a head for the scale; without one it is 0.1.
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
