"""What model and guide share: the plate over cells, checked arguments, and the list of a program's sites."""

from itertools import chain
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import biject_to

from pyro_scvi.distributions.zero_inflated import ZeroInflated
from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component, constructor_parameters, evaluation_mode
from pyro_scvi.utils.execution import execution
from pyro_scvi.utils.html_repr import grid
from pyro_scvi.utils.random_state import seeded


class Site(NamedTuple):
    """A random variable of a program: its name, its distribution (``law``) and its shape, in words."""

    name: str
    law: str
    shape: str


def sites_of(program: nn.Module, *args: Any, **kwargs: Any) -> list[Site]:
    """List the sample sites of a program in the order in which it draws them.

    A dimension is shown by the name of its plate, or by its size if it has none: "cells x genes", "cells x 10".
    """
    with (
        evaluation_mode(program),
        seeded(0),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        torch.no_grad(),
        pyro.poutine.trace() as traced,
        _InitToFeasible(),
    ):
        program(*args, **kwargs)
    # Each plate adds a site of its own, for the subsample of rows.
    nodes: list[Any] = [node for node in traced.trace.nodes.values() if node["type"] == "sample"]
    return [
        Site(node["name"], _distribution_name(node["fn"]), _shape(node))
        for node in nodes
        if not isinstance(node["fn"], _Subsample)
    ]


class Program(Component):
    """A model of cells that lists its own sites."""

    n_genes: int
    n_covariates: int
    likelihood: Any

    def require_genes(self) -> None:
        """Refuse parts that were made for another number of genes.

        Raises
        ------
        ModelError
            If there is one; names the part and both numbers.
        """
        for part in self.modules():
            expected = part.expected_genes if isinstance(part, Component) else None
            if expected not in (None, self.n_genes):
                raise ModelError(f"{part!r} is for {expected} genes, the model has n_genes={self.n_genes}")

    def sites(self, *, marginal: bool = False) -> list[Site]:
        """List the random variables of the explicit program, or of the one with w, y and h integrated out."""
        device = next(chain(self.parameters(), self.buffers())).device  # all weights may be latent
        return sites_of(self, None, torch.zeros(2, self.n_covariates, device=device), marginal=marginal)

    def shown(self) -> dict[str, Any]:
        """All arguments, also defaults, so that a printed model shows the sizes of its networks."""
        defaults = {name: one.default for name, one in constructor_parameters(type(self)).items()}
        return defaults | self.config()

    def _repr_html_(self) -> str:
        return super()._repr_html_() + grid(Site._fields, self.sites(marginal=not self.likelihood.explicit))


class _InitToFeasible(Messenger):
    """Sets global latents, and latents that cannot be sampled, to a feasible value (Pyro's ``init_to_feasible``).

    Weights drawn from wide priors can overflow the rates of the counts. An improper prior cannot be sampled.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["value"] is not None or isinstance(msg["fn"], _Subsample):
            return
        draw = _draw_or_none(msg["fn"])
        if draw is None:
            msg["value"] = _feasible_value(msg["fn"])
        elif not msg["cond_indep_stack"]:
            msg["value"] = _feasible_value(msg["fn"]).to(draw)


def _draw_or_none(fn: Any) -> torch.Tensor | None:
    try:
        return fn.sample()
    except NotImplementedError:  # an improper prior
        return None


def _feasible_value(fn: Any) -> torch.Tensor:
    """The point of the support whose unconstrained coordinates are all 0."""
    transform = biject_to(fn.support)
    return transform(torch.zeros(transform.inverse_shape(fn.shape())))


def _unwrapped(fn: Any) -> Any:
    while isinstance(fn, dist.Independent | dist.MaskedDistribution | dist.ExpandedDistribution):
        fn = fn.base_dist
    return fn


def _distribution_name(fn: Any) -> str:
    """Name a distribution without the wrappers that only reshape it; a mixture or transform also names its base."""
    fn = _unwrapped(fn)
    name = type(fn).__name__
    if isinstance(fn, dist.Delta):
        return "a function of those above"
    if isinstance(fn, ZeroInflated):
        return f"{name} {_distribution_name(fn.base)}"
    if isinstance(fn, dist.MixtureSameFamily):
        return f"mixture of {fn.mixture_distribution.logits.shape[-1]} {_distribution_name(fn.component_distribution)}"
    if name == "TransformedDistribution":  # subclasses such as LogNormal have a name of their own
        return f"transformed {_distribution_name(fn.base_dist)}"
    return name


def _shape(node: Any) -> str:
    shape, n_event = tuple(node["value"].shape), len(node["fn"].event_shape)
    if isinstance(_unwrapped(node["fn"]), dist.Delta):  # deterministic sites call all their dimensions events
        n_event = 0
    plates = {frame.dim: frame.name for frame in node["cond_indep_stack"]}
    batch, event = shape[: len(shape) - n_event], shape[len(shape) - n_event :]
    named = [(plates.get(place - len(batch)), size) for place, size in enumerate(batch)]
    return " x ".join([name or str(size) for name, size in named if name or size > 1] + list(map(str, event))) or "1"


def register(program: Component) -> None:
    """Register a program's parameters with Pyro, so that Pyro's own SVI can train them."""
    if execution().register_parameters:
        pyro.module(program.pyro_name, program)


def cells_plate(gamma: Tensor, index: Tensor | None, n_cells: int | None) -> pyro.plate:
    """The plate over cells, dimension -2 (genes are -1), for rows ``index`` of ``n_cells`` or for all of them."""
    rows = torch.arange(len(gamma), device=gamma.device) if index is None else index
    return pyro.plate("cells", n_cells or len(gamma), subsample=rows, dim=-2)


def check_inputs(model: "Program", x: Tensor | None, gamma: Tensor | None) -> Tensor:
    """Check x and gamma against the model; return gamma (cells, covariates), with 0 columns if the model has none.

    Raises
    ------
    ModelError
        If genes, covariates or rows do not agree.
    """
    if gamma is None:
        if x is None or model.n_covariates:
            raise ModelError(f"the model needs gamma of shape (cells, {model.n_covariates}) beside x")
        gamma = x.new_zeros(len(x), 0)
    if gamma.shape[-1] != model.n_covariates:
        raise ModelError(f"gamma must have {model.n_covariates} columns, got {gamma.shape[-1]}")
    if x is not None and x.shape[-1] != model.n_genes:
        raise ModelError(f"x must have {model.n_genes} genes, got {x.shape[-1]}")
    if x is not None and len(x) != len(gamma):
        raise ModelError(f"x and gamma must have the same rows, one per cell; got {len(x)} and {len(gamma)}")
    return gamma
