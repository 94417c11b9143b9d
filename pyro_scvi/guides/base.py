"""Base class of guides q(z, l | x), and the normal guide of global latents."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.subsample_messenger import _Subsample
from torch import BoolTensor, Tensor, nn
from torch.distributions import biject_to

from pyro_scvi.discovery import Kind
from pyro_scvi.distributions.supports import require_coordinates, support_of
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates, theta_at, transform_distribution
from pyro_scvi.guides.supported import Latent, require_supported
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import Component
from pyro_scvi.priors.flat import Flat
from pyro_scvi.program import cells_plate, check_inputs, register
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_kind
from pyro_scvi.utils.random_state import seeded


class Guide(Component):
    r"""q(z, l | x) with the arguments and site names of :class:`~pyro_scvi.model.SCVI` (Lopez et al. 2017, Sec. 2).

    .. math:: q(z, l | x) = \prod_n q(z_n | x_n)\, q(l_n | z_n, x_n)

    A guide defines how it encodes cells, the distributions :meth:`z_law` and :meth:`l_law`, and :meth:`start`, a normal
    from which a cell's posterior can be refined. ``amortized``: it can encode cells that it has not seen.
    ``stochastic``: q has a density. Global latents have independent normals in unconstrained coordinates.

    Parameters
    ----------
    model
        The model; the guide does not own its parameters.

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
        self._model = (model,)  # in a tuple, or torch would make it a submodule: parameters have one owner
        self.coordinates = Coordinates(model)
        self.weights = GlobalNormal(model)
        self.require_prior()

    @property
    def model(self) -> SCVI:
        """The model whose posterior this approximates."""
        return self._model[0]

    def require_supported(self) -> None:
        """Refuse what the model has become if it samples other latents than this guide does, or anything beside x.

        Raises
        ------
        ModelError
            Naming the site.
        """
        require_supported(self.model, self.coordinates.latents() | self.weights.latents())

    def require_prior(self) -> None:
        """Refuse a prior with which this guide cannot be fitted."""
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
            By site: z (cells, 1, latents), l (cells, 1) if it is latent, counts per cell, and global latents.

        Raises
        ------
        ModelError
            If x is None, or genes, covariates or rows do not agree with each other or the model.
        """
        if x is None:
            raise ModelError("a guide is a law given x: pass the counts (cells, genes)")
        register(self)
        gamma = check_inputs(self.model, x, gamma)
        drawn = self.weights()
        with cells_plate(gamma, index, n_cells):
            code = self.encode(x, gamma, index)
            drawn["z"] = pyro.sample("z", self.z_law(code))
            if self.coordinates.has_library:
                drawn["l"] = pyro.sample("l", self.l_law(code, drawn["z"]))
            if not marginal:
                theta = theta_at(self.model, x, gamma, drawn)
                with pyro.plate("genes", self.model.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
                    self.model.likelihood.condition(x, theta)
        return drawn

    def encode(self, x: Tensor, gamma: Tensor, index: Tensor | None) -> Any:
        """What :meth:`z_law` and :meth:`l_law` need to know of the cells."""
        raise NotImplementedError

    def z_law(self, code: Any) -> Distribution:
        """q(z | x), batch shape (cells, 1), event shape (latents,)."""
        raise NotImplementedError

    def l_law(self, code: Any, z: Tensor) -> Distribution:
        """q(l | z, x), batch shape (..., cells, 1), counts."""
        raise NotImplementedError

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale (cells, size) of a normal near the cells' posterior, in unconstrained coordinates."""
        raise NotImplementedError

    def draw(self, x: Tensor, gamma: Tensor, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the sites z (samples, cells, 1, latents) and l, and log q of them (samples, cells)."""
        code = self.encode(x, gamma, None)
        q_z = self.z_law(code)
        sites = {"z": q_z.rsample((samples,))}  # unlike sample, rsample passes NaN on to the loss
        log_q = q_z.log_prob(sites["z"])
        if self.coordinates.has_library:
            q_l = self.l_law(code, sites["z"]).expand(log_q.shape)
            sites["l"] = q_l.rsample()
            log_q = log_q + q_l.log_prob(sites["l"])
        return sites, log_q.squeeze(-1)


class GlobalNormal(nn.Module):
    """Independent normals, in unconstrained coordinates, for the model's global latents (weights, dispersions).

    Pyro's AutoNormal would give its parameters the same names for every model of a session.
    """

    def __init__(self, model: SCVI) -> None:
        super().__init__()
        with seeded(0), pyro.poutine.trace() as traced, model.weights.drawn_into(model):
            pass
        nodes: dict[str, Any] = {name: traced.trace.nodes[name] for name in traced.trace.stochastic_nodes}
        nodes = {name: node for name, node in nodes.items() if not isinstance(node["fn"], _Subsample)}
        for name, node in nodes.items():
            require_coordinates(node["fn"], f"the law of the weights {name!r}")
        self.supports = {name: support_of(node["fn"]) for name, node in nodes.items()}
        starts = {name: model.weights.start_of(name, node["value"]) for name, node in nodes.items()}
        self.loc = nn.ParameterList(starts.values())
        # A sd of 0.05: draws start close to the initial weights.
        self.log_scale = nn.ParameterList(torch.full_like(start, -3.0) for start in starts.values())

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent."""
        drawn = {}
        for (name, support), loc, log_scale in zip(self.supports.items(), self.loc, self.log_scale, strict=True):
            base = dist.Normal(loc, log_scale.exp()).to_event(loc.dim())
            drawn[name] = pyro.sample(name, transform_distribution(base, support))
        return drawn

    def latents(self) -> dict[str, Latent]:
        """What the model must sample them as."""
        return {name: Latent(Kind.GLOBAL, support, None) for name, support in self.supports.items()}

    def medians(self) -> dict[str, Tensor]:
        """The median of every global latent under q."""
        return {
            name: biject_to(support)(loc) for (name, support), loc in zip(self.supports.items(), self.loc, strict=True)
        }
