"""Amortized guides: an encoder predicts q(z, l | x); the diagonal normal of Lopez et al. (2017), Sec. 2."""

from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.nn.networks import Encoder, initialise
from pyro_scvi.nn.normalization import BatchNorm, Norm
from pyro_scvi.types import Distribution
from pyro_scvi.utils.random_state import seeded


class Code(NamedTuple):
    """Hidden units (cells, n_hidden) and normals in unconstrained coordinates: z (cells, n_z), log l (cells, 1)."""

    hidden: Tensor
    loc: Tensor
    scale: Tensor
    l_loc: Tensor
    l_scale: Tensor


class AmortizedGuide(Guide):
    """A guide whose locations and scales come from an encoder network (Lopez et al. 2017, Sec. 2).

    Parameters
    ----------
    model
        The model; the guide does not own its parameters.
    encoder
        The network for z; None: the prior's if it has one (VampPrior), else a new one with the settings below.
    encode_covariates
        Whether gamma is an input of the encoder, beside x.
    log_input
        Whether log(1 + x) is the input rather than x.
    n_hidden, n_layers, dropout, norm, initial_sd, seed
        Hidden layers of the new encoder, and the seed of its initial weights.
    """

    def __init__(
        self,
        model: SCVI,
        *,
        encoder: Encoder | None = None,
        encode_covariates: bool = False,
        log_input: bool = True,
        n_hidden: int = 128,
        n_layers: int = 2,
        dropout: float = 0.0,
        norm: Norm | None = BatchNorm(),
        initial_sd: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model)
        shared = encoder is None and hasattr(model.prior, "encoder")
        if shared and (given := self.arguments.keys() - {"model", "encoder", "seed"}):
            raise ModelError(
                f"the guide shares the encoder of {type(model.prior).__name__}, so {sorted(given)} would say nothing; "
                "set them there, or pass encoder="
            )
        with seeded(seed):
            if encoder is None and not shared:
                encoder = Encoder(
                    model.n_genes,
                    self.coordinates.n_z,
                    n_covariates=model.n_covariates if encode_covariates else 0,
                    log_input=log_input,
                    with_scale=self.stochastic,
                    n_hidden=n_hidden,
                    n_layers=n_layers,
                    dropout=dropout,
                    norm=norm,
                    initial_sd=initial_sd,
                )
            self.own_encoder = encoder
            if self.coordinates.has_library:
                self.library = nn.Linear(self.encoder.n_hidden, 2)
                initialise(self.library, initial_sd)
            self.build()

    @property
    def encoder(self) -> Encoder:
        """The network for z: this guide's, or the prior's."""
        prior: Any = self.model.prior
        return prior.encoder if self.own_encoder is None else self.own_encoder

    def build(self) -> None:
        """Make the guide's own layers beside the encoder; a hook for subclasses."""

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The encoder's normals; l is centred on the cell's total."""
        encoded = self.encoder(x, gamma)
        l_loc = l_scale = x.new_zeros(len(x), 1)
        if self.coordinates.has_library:
            shift, log_scale = self.library(encoded.hidden).split(1, -1)
            # Starts l at the total, with a sd of exp(-2) = 0.14 on the log scale.
            l_loc, l_scale = torch.log1p(x.sum(-1, keepdim=True)) + shift, (log_scale - 2).exp()
        return Code(encoded.hidden, encoded.loc, encoded.log_scale.exp(), l_loc, l_scale)

    def z_law(self, code: Code) -> Distribution:
        """Normal with diagonal covariance, on the support of z."""
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1))

    def l_law(self, code: Code, z: Tensor) -> Distribution:
        """LogNormal, independent of z."""
        return dist.LogNormal(code.l_loc, code.l_scale)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's own normals."""
        return self.joined(self.encode(x, gamma, None))

    def joined(self, code: Code) -> tuple[Tensor, Tensor]:
        """Location and scale (cells, size) of z and log l together."""
        if not self.coordinates.has_library:
            return code.loc, code.scale
        return torch.cat([code.loc, code.l_loc], -1), torch.cat([code.scale, code.l_scale], -1)


class DiagonalNormal(AmortizedGuide):
    r"""The paper's guide: independent normals, located and scaled by a network (Lopez et al. 2017, Sec. 2).

    .. math:: q(z_n | x_n) = Normal(m(x_n), diag(s(x_n)^2)), \qquad q(l_n | x_n) = LogNormal(a(x_n), b(x_n)^2)

    For a prior on the simplex the normal is that of the unconstrained coordinates of z.

    Parameters
    ----------
    model
        The model; the guide does not own its parameters.
    encoder
        The network for z; None: the prior's if it has one (VampPrior), else a new one with the settings below.
    encode_covariates
        Whether gamma is an input of the encoder, beside x.
    log_input
        Whether log(1 + x) is the input rather than x.
    n_hidden, n_layers, dropout, norm, initial_sd, seed
        Hidden layers of the new encoder, and the seed of its initial weights.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its prior is Flat, a setting of the layers is out of range, or settings of an encoder
        are given although the prior's is shared.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.DiagonalNormal(model, n_hidden=16, dropout=0.1)
    >>> ps.fit(model, cells, guide, epochs=1, progress=False).guide is guide
    True
    """
