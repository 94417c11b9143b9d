"""The evidence lower bound used in training: Pyro's mean-field estimator without unused densities."""

from typing import Any

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_scvi.utils.execution import execution


class MeanFieldELBO(TraceMeanField_ELBO):
    r"""One draw of the evidence bound, with the KL divergence of each latent in closed form if there is one.

    .. math:: \log p(x | z) - KL(q(z | x) \| p(z)), \qquad z \sim q(z | x)

    (Lopez et al. 2017, Eq. 1). The value, the gradients and the draws are those of Pyro's ``TraceMeanField_ELBO``. That
    one also evaluates densities of latents whose divergence has a closed form, and needs every parameter registered in
    every step. Only for reparameterised guides. If programs are to be checked
    (:class:`~pyro_scvi.utils.execution.Execution`), Pyro's own runs: it refuses guides that do not match the model.
    """

    def __init__(self) -> None:
        super().__init__()  # without Pyro's options, such as more than one draw

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Negative bound, nats; adds its gradients to those of the parameters."""
        if execution().check_programs:
            return super().loss_and_grads(model, guide, *args, **kwargs)
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()
        return loss.item()

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Negative bound, nats, a scalar."""
        if execution().check_programs:
            return super().differentiable_loss(model, guide, *args, **kwargs)
        guided = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        modelled = pyro.poutine.trace(pyro.poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
        loss: Any = 0.0
        for name, site in _sites(modelled):
            loss = loss - _log_prob(site) if site["is_observed"] else loss + _divergence(guided.nodes[name], site)
        for name, site in _sites(guided):
            if name not in modelled.nodes:  # an auxiliary site, which the guide alone has
                loss = loss + _log_prob(site)
        return loss


def _sites(trace: pyro.poutine.Trace) -> list[tuple[str, Any]]:
    return [
        (name, site)
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not isinstance(site["fn"], _Subsample)
    ]


def _log_prob(site: Any) -> Tensor:
    return _total(site, site["fn"].log_prob(site["value"]))


def _divergence(guided: Any, modelled: Any) -> Tensor:
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
