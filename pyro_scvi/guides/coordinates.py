"""Unconstrained coordinates of a cell's latents, and the model's log joint density in them."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.runtime import NonlocalExit
from torch import Tensor
from torch.distributions import biject_to

from pyro_scvi.discovery import Kind
from pyro_scvi.distributions.supports import require_coordinates, support_of
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.supported import Latent, overrides_forward, require_conditioned
from pyro_scvi.model import SCVI
from pyro_scvi.program import cells_plate
from pyro_scvi.types import Distribution, LogJoint, Theta
from pyro_scvi.utils.execution import executing
from pyro_scvi.utils.random_state import seeded

LogTerms = Callable[[Tensor], tuple[Tensor, Tensor]]
Joint = Callable[[SCVI, Tensor, Tensor, dict[str, Tensor]], LogJoint]  # log_joint, or a compiled form of it


class Coordinates:
    """Unconstrained coordinates u of a cell's latents: those that a bijection maps to z, then log l.

    ``size`` is their number; the first ``n_z`` are those of z.
    """

    def __init__(self, model: SCVI) -> None:
        with seeded(0), pyro.get_param_store().scope(), pyro.poutine.block():
            prior = model.prior()
        require_coordinates(prior, "the prior of z")
        self.support, self.event_shape = support_of(prior), torch.Size([model.n_latent])
        self.real, self.to_z = is_real(self.support), biject_to(self.support)
        self.n_z = self.to_z.inverse_shape(self.event_shape)[-1]
        self.has_library = model.library.latent
        self.size = self.n_z + int(self.has_library)

    def latents(self) -> dict[str, Latent]:
        """What the sites z and, where it is latent, l must be for these to be their coordinates."""
        z = {"z": Latent(Kind.LOCAL, self.support, tuple(self.event_shape))}
        return z | {"l": Latent(Kind.LOCAL, constraints.positive, ())} if self.has_library else z

    def sites(self, u: Tensor) -> dict[str, Tensor]:
        """Sites z (..., cells, 1, latents) and l (..., cells, 1) at u (..., cells, size)."""
        sites = {"z": self.to_z(u[..., None, : self.n_z])}
        return sites | {"l": u[..., self.n_z :].exp()} if self.has_library else sites

    def of(self, sites: dict[str, Tensor]) -> Tensor:
        """Coordinates u (..., cells, size) of sites: the inverse of :meth:`sites`."""
        z = self.to_z.inv(sites["z"]).squeeze(-2)
        return torch.cat([z, sites["l"].log()], -1) if self.has_library else z

    def log_abs_det(self, u: Tensor) -> Tensor:
        """Log of |d(z, l) / du|, (..., cells)."""
        z, log_l = u[..., : self.n_z], u[..., self.n_z :]
        total = log_l.sum(-1)  # dl / d log l = l
        if self.real:
            return total
        return total + self.to_z.log_abs_det_jacobian(z, self.to_z(z)).reshape(*total.shape, -1).sum(-1)

    def law(self, base: Distribution, *steps: Any) -> Distribution:
        """The distribution of z if its unconstrained coordinates are ``base``, transformed by ``steps``."""
        return transform_distribution(base, self.support, *steps)


def is_real(support: Any) -> bool:
    """Whether a support is all of the real line or space, where coordinates need no transform."""
    return isinstance(
        getattr(support, "base_constraint", support), type(constraints.real)
    )  # by type: a copied model has a copy of it


def transform_distribution(base: Distribution, support: Any, *steps: Any) -> Distribution:
    """``base`` transformed by ``steps`` and mapped onto ``support``; ``base`` itself if neither changes it."""
    steps = steps if is_real(support) else (*steps, biject_to(support))
    return dist.TransformedDistribution(base, list(steps)) if steps else base


def cell_terms(trace: pyro.poutine.Trace, *names: str) -> Tensor:
    """Sum over genes of the log densities of the named sites of a scored trace, (..., cells)."""
    terms = {name: trace.nodes[name]["log_prob"] for name in names}
    sums = [term.sum(-1) if name == "x" else term.squeeze(-1) for name, term in terms.items()]
    return torch.stack(torch.broadcast_tensors(*sums)).sum(0)


def scored(model: SCVI, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> pyro.poutine.Trace:
    """The marginalised program's trace with the latents in ``sites`` and its log densities."""
    with pyro.get_param_store().scope(), executing(register_parameters=False):
        trace = pyro.poutine.trace(pyro.poutine.condition(model, data=sites)).get_trace(x, gamma)
        require_conditioned(trace, sites)
        trace.compute_log_prob()
    return trace


def theta_at(model: SCVI, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor]) -> Theta:
    """The likelihood's parameters (..., cells, genes) at the local and global latents in ``sites``."""
    with pyro.poutine.block(), pyro.poutine.condition(data=sites), model.weights.drawn_into(model):
        return model.decode(sites["z"], model.library(x, gamma), gamma)


def prior_sites(model: SCVI, gamma: Tensor, global_latents: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """Sites z (n, cells, 1, latents) and, if it is latent, l (n, cells, 1), drawn from the prior of each cell.

    From the program where ``forward`` is overridden. Raises NotImplementedError if the prior is improper.
    """
    if overrides_forward(model):
        return _drawn_by_program(model, gamma, global_latents, n)
    with (
        pyro.get_param_store().scope(),
        pyro.poutine.trace() as traced,
        pyro.poutine.condition(data=global_latents),
        model.weights.drawn_into(model),
        pyro.plate("draws", n, dim=-3),
        cells_plate(gamma, None, None),
    ):
        pyro.sample("z", model.prior())
        model.library(None, gamma)
    nodes: dict[str, Any] = traced.trace.nodes
    return {name: nodes[name]["value"] for name in ("z", "l") if name in nodes}


def _drawn_by_program(model: SCVI, gamma: Tensor, global_latents: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """The same from a run of the program for n copies of the cells, which ends where it comes to x."""
    ended = pyro.poutine.escape(model, escape_fn=lambda msg: msg["name"] == "x")
    with (
        pyro.get_param_store().scope(),
        executing(register_parameters=False),
        pyro.poutine.trace() as traced,
        pyro.poutine.condition(data=global_latents),
        suppress(NonlocalExit),
    ):
        try:
            ended(None, gamma.repeat(n, 1))
        except (AttributeError, TypeError) as error:  # what None gives where a tensor is expected
            raise ModelError(
                f"{type(model).__name__}.forward cannot be run without counts, as prior draws need it: x=None must "
                f"draw them ({error})"
            ) from error
    nodes: dict[str, Any] = traced.trace.nodes
    drawn = {name: nodes[name]["value"] for name in ("z", "l") if name in nodes}
    return {name: value.reshape(n, len(gamma), *value.shape[1:]) for name, value in drawn.items()}


def log_joint(model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]) -> LogJoint:
    """Log p(x, z, l) in coordinates u (samples, cells, size), nats, (samples, cells), at given global latents."""
    terms = log_terms(model, x, gamma, global_latents)
    return lambda u: torch.stack(terms(u)).sum(0)


def log_terms(model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]) -> LogTerms:
    """Log p(z, l) and log p(x | z, l), the parts of :func:`log_joint`."""
    coordinates = Coordinates(model)
    return lambda u: log_terms_at(u, coordinates, model, x, gamma, global_latents)


def log_terms_at(
    u: Tensor, coordinates: Coordinates, model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Log p(z, l) and log p(x | z, l) at u, (samples, cells) each."""
    latents = ("z", "l") if coordinates.has_library else ("z",)
    trace = scored(model, x, gamma, {**global_latents, **coordinates.sites(u)})
    return cell_terms(trace, *latents) + coordinates.log_abs_det(u), cell_terms(trace, "x")
