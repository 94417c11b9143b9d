"""The evidence lower bound used in training: Pyro's mean-field estimator without unused densities."""

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.util import check_fully_reparametrized, is_validation_enabled
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape, warn_if_nan
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_scvi.distributions.supports import unwrapped
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.enumeration import LEFT_OF_CELLS, Enumerating, is_enumerated
from pyro_scvi.utils.execution import execution

DEPTH = 2
"""Plates inside each other: cells and genes."""


class ByLoss:
    """What Pyro asks of a bound, by its differentiable loss."""

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Negative bound, nats, a scalar."""
        raise NotImplementedError

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Negative bound, nats."""
        return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Negative bound, nats; adds its gradients to those of the parameters."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        if execution().check_programs:
            warn_if_nan(loss.detach(), "loss")
        return loss.item()


class MeanFieldELBO(ByLoss, TraceMeanField_ELBO):
    r"""One draw of the evidence bound, with the KL divergence of each latent in closed form where there is one.

    .. math:: \log p(x | z) - KL(q(z | x) \| p(z)), \qquad z \sim q(z | x)

    (Lopez et al. 2017, Eq. 1). Discrete latents that ask for it, by ``infer={"enumerate": "parallel"}``, are summed out
    of the program, cell by cell.

    The value, the gradients and the draws are those of Pyro's ``TraceMeanField_ELBO``, with three exceptions: that one
    knows no discrete latents; it takes the closed form also where a latent's prior depends on another that the guide
    draws after it, where it is wrong; and it leaves out the change of volume of latents that are functions of an
    auxiliary draw, as in Pyro's AutoMultivariateNormal. It also evaluates densities of latents whose divergence has a
    closed form, and needs every parameter registered in every step. Only for reparameterised guides. If programs are to
    be checked (:class:`~pyro_scvi.utils.execution.Execution`), they are by Pyro, which refuses guides that do not match
    the model.
    """

    def __init__(self) -> None:
        super().__init__()  # without Pyro's options, such as more than one draw

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Negative bound, nats, a scalar."""
        guided = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        depth = _depth(guided)
        summed = Enumerating(LEFT_OF_CELLS + DEPTH - depth)(pyro.poutine.replay(model, trace=guided))
        modelled = pyro.poutine.trace(summed).get_trace(*args, **kwargs)
        if execution().check_programs and is_validation_enabled():
            _check(guided, modelled, depth)
        return _negative_bound(guided, modelled)


def _depth(guided: pyro.poutine.Trace) -> int:
    """Dimensions of plates: of cells and genes, and those left of them, in which global latents may be."""
    frames = (frame for _, site in _sites(guided) for frame in site["cond_indep_stack"] if frame.vectorized)
    return max([DEPTH, *(-frame.dim for frame in frames)])


def _check(guided: pyro.poutine.Trace, modelled: pyro.poutine.Trace, depth: int) -> None:
    """Pyro's checks: that the same sites are sampled, in shapes that their plates say, from reparameterised laws.

    Raises
    ------
    ModelError
        If the guide samples a site that the model does not have, and does not call it auxiliary.
    """
    enumerates = any(is_enumerated(site) for _, site in _sites(modelled))
    check_model_guide_match(modelled, guided, depth if enumerates else math.inf)
    for name, site in _sites(guided):
        if name not in modelled.nodes and not site["infer"].get("is_auxiliary"):
            raise ModelError(f"the guide samples {name!r}, which the model does not have; the bound would be wrong")
    modelled, guided = prune_subsample_sites(modelled), prune_subsample_sites(guided)
    modelled.compute_log_prob()
    guided.compute_score_parts()
    for name, site in (*_sites(modelled), *_sites(guided)):
        nested: Any = depth if enumerates and site["log_prob"].dim() > depth else math.inf
        check_site_shape(site, nested)
        if name in guided.nodes and not site["is_observed"]:
            check_fully_reparametrized(guided.nodes[name])


def _negative_bound(guided: pyro.poutine.Trace, modelled: pyro.poutine.Trace) -> Tensor:
    loss: Any = 0.0
    order = [name for name, _ in _sites(guided)]
    before, tables, values = set[str](), list[Any](), _value_dims(modelled)
    for name, site in _sites(modelled):
        if is_enumerated(site) or _differs_along(values, site):
            tables.append(site)
            loss = loss if name not in order else loss + _log_prob(guided.nodes[name])
        elif site["is_observed"]:
            loss = loss - _log_prob(site)
        else:
            closed = before <= set(order[: order.index(name)])
            loss = loss + _divergence(guided.nodes[name], site, closed)
        if not (site["is_observed"] or is_enumerated(site)):
            before.add(name)
    for name, site in _sites(guided):
        if name not in modelled.nodes:  # an auxiliary site, which the guide alone has
            loss = loss + _log_prob(site)
    return loss - _log_evidence_of(tables) if tables else loss


def _sites(trace: pyro.poutine.Trace) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def _value_dims(trace: pyro.poutine.Trace) -> list[int]:
    """The dimensions along which the values of discrete latents lie."""
    return [site["infer"]["_enumerate_dim"] for _, site in _sites(trace) if is_enumerated(site)]


def _differs_along(dims: list[int], site: Any) -> bool:
    """Whether the law of a latent or of x differs between values of discrete latents."""
    shape = site["fn"].batch_shape
    in_cells = any(frame.name == "cells" for frame in site["cond_indep_stack"])
    return in_cells and any(len(shape) >= -dim and shape[dim] > 1 for dim in dims)


def _log_evidence_of(sites: list[Any]) -> Tensor:
    """Sum over cells of log p of latents and of x given these, of the sites that differ by discrete latents' values.

    Each is summed over these values, then scaled: the two have scales of their own where the KL divergence has a
    weight.
    """
    _require_one_weight(sites)
    latents = _table([site for site in sites if not site["is_observed"]])
    of_latents = latents.flatten(0, -2).logsumexp(0)
    total = of_latents.sum() * sites[0]["scale"]
    for observed in (site for site in sites if site["is_observed"]):
        joint = _table([*sites]).flatten(0, -2).logsumexp(0)
        total = total + (joint - of_latents).sum() * observed["scale"]
    return total


def _require_one_weight(sites: list[Any]) -> None:
    """Refuse latents that are summed over one after the other with unlike weights of their KL divergences."""
    scales = {site["name"]: site["scale"] for site in sites if not site["is_observed"]}
    first, *others = scales
    for name in others:
        if scales[name] is not scales[first] and bool(scales[name] != scales[first]):
            raise ModelError(
                f"the KL divergence of {first!r} has a weight and that of {name!r}, whose distribution depends on "
                "it, has none: leave kl_weight= out, or give them distributions that do not depend on each other"
            )


def _table(sites: list[Any]) -> Tensor:
    """Sum of the log densities of sites, (values of discrete latents, ..., cells)."""
    return torch.stack(torch.broadcast_tensors(*map(_by_cell, sites))).sum(0)


def _by_cell(site: Any) -> Tensor:
    """Log density (..., cells) of a site that is in the plate of the cells, and perhaps in that of the genes."""
    terms: Tensor = site["fn"].log_prob(site["value"])
    if site["mask"] is False:
        return torch.zeros_like(terms).sum(-1)
    if isinstance(site["mask"], Tensor):
        terms = torch.where(site["mask"], terms, 0.0)
    return terms.sum(-1)


def _log_prob(site: Any) -> Tensor:
    return _total(site, site["fn"].log_prob(site["value"]))


def _divergence(guided: Any, modelled: Any, closed: bool) -> Tensor:
    """Log q - log p at the draw, or its mean over the latent alone: if its prior is known before it is drawn.

    What is a function of an auxiliary draw has a change of volume for a density, which the closed form leaves out.
    """
    if not closed or isinstance(unwrapped(guided["fn"]), dist.Delta):
        return _log_prob(guided) - _log_prob(modelled)
    try:
        return _total(guided, kl_divergence(guided["fn"], modelled["fn"]))
    except NotImplementedError:
        return _log_prob(guided) - _log_prob(modelled)


def _total(site: Any, terms: Tensor) -> Tensor:
    """Sum over the plates, with the site's mask and scale; a scalar scale multiplies the sum, which is cheaper."""
    if site["mask"] is False:
        return terms.new_zeros(())
    if isinstance(site["mask"], Tensor):
        terms = torch.where(site["mask"], terms, 0.0)
    if isinstance(site["scale"], Tensor) and site["scale"].dim():
        return (terms * site["scale"]).sum()
    return terms.sum() * site["scale"]


class Bound(nn.Module):
    """An evidence bound as a module, which functional_call and DistributedDataParallel need."""

    def __init__(self, elbo: Any, model: nn.Module, guide: nn.Module) -> None:
        super().__init__()
        self.elbo, self.model, self.guide = elbo, model, guide

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Negative bound, nats, a scalar."""
        loss: Tensor = self.elbo.differentiable_loss(self.model, self.guide, *args, **kwargs)
        return loss
