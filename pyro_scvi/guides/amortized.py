"""Amortized guides: an encoder predicts q(z, l | x); the diagonal normal of Lopez et al. (2017), Sec. 2."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.guides.global_latents import GlobalGuide
from pyro_scvi.model import SCVI
from pyro_scvi.nn.networks import Encoder, initialise
from pyro_scvi.nn.normalization import BatchNorm, Norm
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import switches_checked
from pyro_scvi.utils.random_state import seeded


class Code(NamedTuple):
    """Hidden units (cells, n_hidden), and by site location and scale (cells, size) in unconstrained coordinates."""

    hidden: Tensor
    loc: dict[str, Tensor]
    scale: dict[str, Tensor]


class AmortizedGuide(Guide):
    """A guide whose locations and scales come from an encoder network.

    See Lopez et al. (2017), Sec. 2.

    The network's own head is for z, or for the first latent of the program if there is no z; for the library size only
    if this is the only one. Every other latent has a linear head on the hidden units.

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
    global_guide
        As in :class:`Guide`.
    """

    @switches_checked
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
        global_guide: GlobalGuide | None = None,
    ) -> None:
        super().__init__(model, global_guide=global_guide, seed=seed)
        shared = encoder is None and hasattr(model.prior, "encoder")
        if shared and (given := self.arguments.keys() - {"model", "encoder", "seed", "global_guide"}):
            raise ModelError(
                f"the guide shares the encoder of {type(model.prior).__name__}, so {sorted(given)} would have no "
                "effect. Set them there, or pass encoder="
            )
        with seeded(seed):
            if encoder is None and not shared:
                encoder = Encoder(
                    model.n_genes,
                    self.coordinates.local[self.encoded].size,
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
            if self._library_has_head:
                self.library = nn.Linear(self.encoder.n_hidden, 2)
                initialise(self.library, initial_sd)
            self.heads = nn.ModuleList(self._head(site, initial_sd) for site in self._others())
            self.build()

    @property
    def encoded(self) -> str:
        """The latent that the network's own head is for."""
        names = [name for name, site in self.coordinates.local.items() if site is not self.coordinates.library]
        return names[0] if names else "l"

    @property
    def _library_has_head(self) -> bool:
        """Whether the library size has a layer of its own, because the network is for another latent."""
        return self.coordinates.library is not None and self.encoded != "l"

    def _others(self) -> list[LocalSite]:
        own = (self.encoded, "l" if self.coordinates.library else None)
        return [site for site in self.coordinates.local.values() if site.name not in own]

    def _head(self, site: LocalSite, initial_sd: float | None) -> nn.Linear:
        head = nn.Linear(self.encoder.n_hidden, 2 * site.size)
        initialise(head, initial_sd)
        return head

    @property
    def encoder(self) -> Encoder:
        """The network for z: this guide's, or the prior's."""
        prior: Any = self.model.prior
        return prior.encoder if self.own_encoder is None else self.own_encoder

    def build(self) -> None:
        """Make the guide's own layers beside the encoder; a hook for subclasses."""

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The normals of the network and of the heads; l is centred on the cell's total."""
        encoded = self.encoder(x, gamma)
        loc, scale = {self.encoded: encoded.loc}, {self.encoded: encoded.log_scale.exp()}
        if self.coordinates.library:
            shift, log_scale = self.library(encoded.hidden).split(1, -1) if self._library_has_head else encoded[1:]
            # Starts l at the total, with a sd of exp(-2) = 0.14 on the log scale.
            loc["l"], scale["l"] = torch.log1p(x.sum(-1, keepdim=True)) + shift, (log_scale - 2).exp()
        for site, head in zip(self._others(), self.heads, strict=True):
            loc[site.name], log_scale = head(encoded.hidden).chunk(2, -1)
            scale[site.name] = log_scale.exp()
        return Code(encoded.hidden, loc, scale)

    def law(self, site: LocalSite, code: Code, drawn: dict[str, Tensor]) -> Distribution:
        """Independent normals of the coordinates."""
        return site.normal(code.loc[site.name], code.scale[site.name])

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's own normals."""
        return self.joined(self.encode(x, gamma, None))

    def joined(self, code: Code) -> tuple[Tensor, Tensor]:
        """Location and scale (cells, size) of all latents together."""
        return self.coordinates.joined(code.loc), self.coordinates.joined(code.scale)


class DiagonalNormal(AmortizedGuide):
    r"""The paper's guide: independent normals whose mean and scale an encoder computes.

    See Lopez et al. (2017), Sec. 2.

    .. math:: q(z_n | x_n) = Normal(m(x_n), diag(s(x_n)^2)), \qquad q(l_n | x_n) = LogNormal(a(x_n), b(x_n)^2)

    Every other latent of the cells has such a normal, too. Where a support is not all of R^n, as with a prior on the
    simplex, the normal is that of the unconstrained coordinates.

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
    global_guide
        What makes q of the global latents (weights, dispersions): a class of ``pyro.infer.autoguide``, such as
        AutoMultivariateNormal, or a ``functools.partial`` of one, see :class:`Guide`. None: independent normals.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its prior is Flat, a setting of the layers is out of range, or settings of an encoder
        are given although the prior's is shared.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.DiagonalNormal(model, n_hidden=16, dropout=0.1)
    >>> made = ps.fit(model, cells, guide, epochs=1, progress=False)
    >>> made.guide is guide, made.guide.model is made.model  # trained copies, made together
    (False, True)
    """
