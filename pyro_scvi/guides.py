"""Guides q(z, l | x): Section 2 of Lopez et al. (2017) and its alternatives, with arguments and sites of the model."""

from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import BoolTensor, Tensor, nn
from torch.distributions import biject_to

from pyro_scvi.coordinates import Coordinates, log_joint, pushed, theta_at
from pyro_scvi.distributions import Law
from pyro_scvi.errors import ModelError, require_kind
from pyro_scvi.model import SCVI
from pyro_scvi.networks import BatchNorm, Encoder, Norm, initialise
from pyro_scvi.parts import Part
from pyro_scvi.plates import cells_plate, constants, register
from pyro_scvi.priors import Flat
from pyro_scvi.seeding import seeded

__all__ = ["DiagonalNormal", "FullRankNormal", "Guide", "InverseAutoregressiveFlow", "PerCell", "Point"]


def __dir__():
    return __all__


class Guide(Part):
    r"""q(z, l | x) with the arguments and site names of :class:`~pyro_scvi.model.SCVI` (Lopez et al. 2017, Sec. 2).

    .. math:: q(z, l | x) = \prod_n q(z_n | x_n)\, q(l_n | z_n, x_n)

    A guide says how it encodes cells and gives the laws :meth:`z_law` and :meth:`l_law`, and :meth:`start`, a normal
    from which a cell's posterior can be refined. ``amortized`` says whether it can encode cells it has not seen,
    ``stochastic`` whether q has a density. Global latents have independent normals in unconstrained coordinates.

    Parameters
    ----------
    model
        The model; its parameters stay its own.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, or its prior is Flat and q has a density. When called, if there are no counts, or
        genes, covariates or rows do not agree.

    Examples
    --------
    >>> x, gamma = test[:4]
    >>> trace = pyro.poutine.trace(fit.guide).get_trace(x, gamma)
    >>> trace.nodes["z"]["value"].shape, trace.nodes["l"]["value"].shape
    (torch.Size([4, 1, 2]), torch.Size([4, 1]))
    """

    amortized = True
    stochastic = True

    def __init__(self, model: SCVI) -> None:
        super().__init__()
        require_kind(model, SCVI, "model", "ps.SCVI(cells.n_genes)")
        self._model = (model,)  # in a tuple, so that it is no submodule: parameters have one owner
        self.coordinates = Coordinates(model)
        self.weights = GlobalNormal(model)
        self.require_prior()

    @property
    def model(self) -> SCVI:
        """The model whose posterior this approximates."""
        return self._model[0]

    def require_prior(self) -> None:
        """Refuse priors of the model that this guide cannot be fitted under."""
        if self.stochastic and isinstance(self.model.prior, Flat):
            raise ModelError("the prior Flat has no density to integrate: take the guide Point, or another prior")

    def forward(
        self,
        x: Tensor,
        gamma: Tensor | None = None,
        *,
        marginal: bool = True,
        mask: BoolTensor | bool = True,
        index: Tensor | None = None,
        n_cells: int | None = None,
    ) -> dict[str, Tensor]:
        """Sample the latents of every cell; with ``marginal=False`` also w, y and h, from their exact conditional.

        Parameters
        ----------
        x
            Counts (cells, genes).
        gamma, marginal, mask, index, n_cells
            As in the model.

        Returns
        -------
        dict
            By site: z (cells, 1, latents), l (cells, 1) where it is latent, counts per cell, and global latents.

        Raises
        ------
        ModelError
            If x is None, or genes, covariates or rows do not agree with each other or the model.
        """
        if x is None:
            raise ModelError("a guide is a law given x: pass the counts (cells, genes)")
        register(self)
        gamma = constants(self.model, x, gamma)
        drawn = self.weights()
        with cells_plate(gamma, index, n_cells):
            code = self.encode(x, gamma, index)
            drawn["z"] = pyro.sample("z", self.z_law(code))
            if self.coordinates.has_library:
                drawn["l"] = pyro.sample("l", self.l_law(code, drawn["z"]))
            if not marginal:
                theta = theta_at(self.model, x, gamma, drawn)
                with pyro.plate("genes", self.model.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
                    self.model.likelihood.explain(x, theta)
        return drawn

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Any:
        """Whatever the laws below need to know of the cells."""
        raise NotImplementedError

    def z_law(self, code: Any) -> Law:
        """q(z | x), batch shape (cells, 1), event shape (latents,)."""
        raise NotImplementedError

    def l_law(self, code: Any, z: Tensor) -> Law:
        """q(l | z, x), batch shape (..., cells, 1), counts."""
        raise NotImplementedError

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale (cells, size) of a normal near the cells' posterior, in unconstrained coordinates."""
        raise NotImplementedError

    def draw(self, x: Tensor, gamma: Tensor, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the sites z (samples, cells, 1, latents) and l, and log q of them (samples, cells)."""
        code = self.encode(x, gamma, None)
        law = self.z_law(code)
        sites = {"z": law.rsample((samples,))}  # unlike sample, it lets NaN through to the loss
        log_q = law.log_prob(sites["z"])
        if self.coordinates.has_library:
            law = self.l_law(code, sites["z"]).expand(log_q.shape)
            sites["l"] = law.rsample()
            log_q = log_q + law.log_prob(sites["l"])
        return sites, log_q.squeeze(-1)


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
        The model; its parameters stay its own.
    encoder
        The network for z; None: the prior's where it has one (VampPrior), else a new one made with what follows.
    encode_covariates
        Whether gamma enters the encoder beside x.
    log_input
        Whether log(1 + x) enters rather than x.
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
        """Make what a guide needs beside the encoder."""

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The encoder's normals; l is centred on the cell's total."""
        encoded = self.encoder(x, gamma)
        l_loc = l_scale = x.new_zeros(len(x), 1)
        if self.coordinates.has_library:
            shift, log_scale = self.library(encoded.hidden).split(1, -1)
            l_loc, l_scale = torch.log1p(x.sum(-1, keepdim=True)) + shift, (log_scale - 2).exp()
        return Code(encoded.hidden, encoded.loc, encoded.log_scale.exp(), l_loc, l_scale)

    def z_law(self, code: Code) -> Law:
        """Normal with diagonal covariance, on the support of z."""
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1))

    def l_law(self, code: Code, z: Tensor) -> Law:
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
        The model; its parameters stay its own.
    encoder
        The network for z; None: the prior's where it has one (VampPrior), else a new one made with what follows.
    encode_covariates
        Whether gamma enters the encoder beside x.
    log_input
        Whether log(1 + x) enters rather than x.
    n_hidden, n_layers, dropout, norm, initial_sd, seed
        Hidden layers of the new encoder, and the seed of its initial weights.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its prior is Flat, a setting of the layers is out of range, or settings are given that
        an encoder shared with the prior leaves without effect.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.DiagonalNormal(model, n_hidden=16, dropout=0.1)
    >>> ps.fit(model, cells, guide, epochs=1, progress=False).guide is guide
    True
    """


class FullRankNormal(AmortizedGuide):
    r"""Every covariance between the latents of a cell, L lower triangular.

    .. math:: q(z_n, \log l_n | x_n) = Normal(m(x_n), L(x_n) L(x_n)^T)

    For a prior on the simplex the normal is that of the unconstrained coordinates of z.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed
        As in :class:`DiagonalNormal`.

    Raises
    ------
    ModelError
        As in :class:`DiagonalNormal`.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.FullRankNormal(model, n_hidden=16)
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    def build(self) -> None:
        """Heads for the strict lower triangle of L and for the slope of log l on whitened z."""
        n, size = self.coordinates.n_z, self.coordinates.size
        self.lower = nn.Linear(self.encoder.n_hidden, n * (n - 1) // 2 + (size - n) * n)
        initialise(self.lower, 1e-3)

    def scale_tril(self, code: Code) -> tuple[Tensor, Tensor]:
        """L (cells, n_z, n_z) and the slope of log l (cells, n_z)."""
        n = self.coordinates.n_z
        entries, slope = self.lower(code.hidden).split([n * (n - 1) // 2, (self.coordinates.size - n) * n], -1)
        rows, columns = torch.tril_indices(n, n, -1, device=entries.device)
        lower = entries.new_zeros(len(entries), n, n)
        lower[:, rows, columns] = entries
        # The diagonal scales each row, so that entries are correlations of a kind and start near zero.
        return code.scale[:, :, None] * (lower + torch.eye(n, dtype=lower.dtype, device=lower.device)), slope

    def z_law(self, code: Code) -> Law:
        """Normal with full covariance, on the support of z."""
        tril, _ = self.scale_tril(code)
        base = dist.MultivariateNormal(code.loc[:, None], scale_tril=tril[:, None], validate_args=False)
        return self.coordinates.law(base)

    def l_law(self, code: Code, z: Tensor) -> Law:
        """LogNormal whose location is linear in z: the conditional of a joint normal."""
        tril, slope = self.scale_tril(code)
        u = z if self.coordinates.real else self.coordinates.to_z.inv(z)
        gap = (u.squeeze(-2) - code.loc)[..., None]  # (..., cells, n_z, 1)
        white = torch.linalg.solve_triangular(tril, gap, upper=False).squeeze(-1)
        loc = code.l_loc + code.l_scale * (white * slope).sum(-1, keepdim=True)
        return dist.LogNormal(loc, code.l_scale.expand(loc.shape))

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The joint normal's location and marginal scales."""
        code = self.encode(x, gamma, None)
        tril, slope = self.scale_tril(code)
        l_scale = code.l_scale * (1 + slope.square().sum(-1, keepdim=True)).sqrt()
        return self.joined(code._replace(scale=tril.square().sum(-1).sqrt(), l_scale=l_scale))


class InverseAutoregressiveFlow(AmortizedGuide):
    r"""A diagonal normal through autoregressive layers that see the cell (Kingma et al. 2016, Sec. 4).

    .. math:: u^0 \sim Normal(m(x_n), diag(s(x_n)^2)), \quad
        u^t = \sigma^t u^{t-1} + (1 - \sigma^t) \mu^t, \quad (\mu^t, \sigma^t) = f_t(u^{t-1}, x_n), \quad z_n = u^T

    with f_t autoregressive, the latents in reverse order after each of the ``n_flows`` layers; q(l | x) as in
    :class:`DiagonalNormal`. For a prior on the simplex u^T are the unconstrained coordinates of z.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed
        As in :class:`DiagonalNormal`.

    Raises
    ------
    ModelError
        As in :class:`DiagonalNormal`, and for fewer than two unconstrained latents.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.InverseAutoregressiveFlow(model, n_hidden=16)
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    n_flows = 2

    def build(self) -> None:
        """Masked autoregressive networks conditioned on the encoder's hidden units."""
        n = self.coordinates.n_z
        if n < 2:
            raise ModelError("InverseAutoregressiveFlow needs two or more latents; take DiagonalNormal for one")
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(n, self.encoder.n_hidden, [4 * n]), stable=True, sigmoid_bias=4.0
            )
            for _ in range(self.n_flows)
        )

    def z_law(self, code: Code) -> Law:
        """The pushed-forward normal, on the support of z."""
        order = torch.arange(self.coordinates.n_z - 1, -1, -1, device=code.loc.device)
        steps: list[Any] = []
        flows: Any = self.flows
        for flow in flows:
            steps += [flow.condition(code.hidden[:, None]), transforms.Permute(order)]
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1), *steps)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of draws, under a fixed seed."""
        code = self.encode(x, gamma, None)
        with seeded(0):
            z = self.z_law(code).sample((128,)).squeeze(-2)
        u = z if self.coordinates.real else self.coordinates.to_z.inv(z)
        return self.joined(code._replace(loc=u.mean(0), scale=u.std(0)))


class Point(AmortizedGuide):
    r"""z (and l) at one point per cell, the encoder's output (Lopez et al. 2017, Sec. 3.3).

    .. math:: q(z_n | x_n) = \delta(z_n - m(x_n)), \qquad q(l_n | x_n) = \delta(l_n - e^{a(x_n)})

    With the prior Flat this is the paper's autoencoder, "z_n as an unknown parameter"; with a fixed prior it is the
    MAP.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed
        As in :class:`DiagonalNormal`.

    Raises
    ------
    ModelError
        If the prior's shape is learned: its density at the points would grow without bound. Else as in
        :class:`DiagonalNormal`, but for the prior Flat.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.Point(model, n_hidden=16)
    >>> guide.amortized, guide.stochastic
    (True, False)
    """

    stochastic = False

    def require_prior(self) -> None:
        """Refuse priors that could collapse onto the points."""
        if getattr(self.model.prior, "learned", False):
            raise ModelError(
                f"{type(self.model.prior).__name__} is learned and would collapse onto the points of a Point guide; "
                "take a guide with a density, or a fixed prior"
            )

    def z_law(self, code: Code) -> Law:
        """A point mass."""
        return dist.Delta(self.coordinates.to_z(code.loc[:, None]), event_dim=1)

    def l_law(self, code: Code, z: Tensor) -> Law:
        """A point mass."""
        return dist.Delta(code.l_loc.exp())


class PerCell(Guide):
    r"""Free location and scale for every cell and no encoder: mean-field variational inference.

    .. math:: q(z_n | x_n) = Normal(m_n, diag(s_n^2)), \qquad q(l_n | x_n) = LogNormal(a_n, b_n^2)

    Knows only the ``n_cells`` cells it is fitted on, by row; other cells are refined from the nearest of those.

    Parameters
    ----------
    model
        The model; its parameters stay its own.
    n_cells
        Number of cells that it is fitted on.
    seed
        Of the initial locations.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its prior is Flat, or the seed is no integer of 0 or more. When called, if there are
        other than ``n_cells`` cells and no ``index`` says which they are.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.PerCell(model, n_cells=len(cells))
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    amortized = False

    def __init__(self, model: SCVI, n_cells: int, *, seed: int = 0) -> None:
        super().__init__(model)
        with seeded(seed):
            self.loc = nn.Parameter(0.1 * torch.randn(n_cells, self.coordinates.size))
        self.log_scale = nn.Parameter(torch.full((n_cells, self.coordinates.size), -1.0))

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Code:
        """The rows of the free parameters; l is centred on the cell's total."""
        if index is None and len(x) != len(self.loc):
            raise ModelError(f"PerCell was made for {len(self.loc)} cells, got {len(x)}; pass index= with their rows")
        rows = slice(None) if index is None else index
        loc, scale, n = self.loc[rows], self.log_scale[rows].exp(), self.coordinates.n_z
        l_loc = torch.log1p(x.sum(-1, keepdim=True)) + loc[:, n:]
        return Code(loc, loc[:, :n], scale[:, :n], l_loc, scale[:, n:])

    def z_law(self, code: Code) -> Law:
        """Normal with diagonal covariance, on the support of z."""
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1))

    def l_law(self, code: Code, z: Tensor) -> Law:
        """LogNormal, independent of z."""
        return dist.LogNormal(code.l_loc, code.l_scale)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """For each cell the fitted cell, among at most 200, whose latents explain it best."""
        with torch.no_grad():
            rows = torch.linspace(0, len(self.loc) - 1, min(200, len(self.loc)), device=x.device).long()
            known = self.loc[rows, None].expand(-1, len(x), -1).clone()  # (candidates, cells, size)
            known[..., self.coordinates.n_z :] += torch.log1p(x.sum(-1, keepdim=True))
            density = log_joint(self.model, x, gamma, self.weights.medians())
            best = torch.cat([density(part) for part in known.split(10)]).argmax(0)
            loc = known[best, torch.arange(len(x), device=x.device)]
            return loc, self.log_scale[rows][best].exp()


class GlobalNormal(nn.Module):
    """Independent normals, in unconstrained coordinates, for the model's global latents (weights, dispersions).

    Pyro's AutoNormal would do but for its parameter names, which are the same for every model of a session.
    """

    def __init__(self, model: SCVI) -> None:
        super().__init__()
        with seeded(0), pyro.poutine.trace() as traced, model.weights.drawn_into(model):
            pass
        nodes: dict[str, Any] = {name: node for name, node in traced.trace.nodes.items() if node["type"] == "sample"}
        self.supports = {name: node["fn"].support for name, node in nodes.items()}
        starts = {name: model.weights.start_of(name, node["value"]) for name, node in nodes.items()}
        self.loc = nn.ParameterList(starts.values())
        self.log_scale = nn.ParameterList(torch.full_like(start, -3.0) for start in starts.values())

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent."""
        drawn = {}
        for (name, support), loc, log_scale in zip(self.supports.items(), self.loc, self.log_scale, strict=True):
            base = dist.Normal(loc, log_scale.exp()).to_event(loc.dim())
            drawn[name] = pyro.sample(name, pushed(base, support))
        return drawn

    def medians(self) -> dict[str, Tensor]:
        """The median of every global latent under q."""
        return {
            name: biject_to(support)(loc) for (name, support), loc in zip(self.supports.items(), self.loc, strict=True)
        }
