"""Checks of the arguments of fit, and of the first training step for mistakes that Pyro accepts silently."""

import math
from collections.abc import Iterable
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.nn.closures import require_owned
from pyro_scvi.utils.checks import brief, require_kind


class TemperedZ(Messenger):
    """Scale z by ``weight`` in guide and model, and keep the untempered log q(z) and log p(z).

    Both are scaled, because an analytic KL takes the scale of the guide's site and a sampled one takes both.
    """

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight, self.log_densities = weight, list[Tensor]()

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "z":
            msg["scale"] = msg["scale"] * self.weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "z" and self.weight != 1:
            with torch.no_grad():
                log_density = msg["fn"].log_prob(msg["value"])  # (particles, cells, 1) or (cells, 1)
                self.log_densities.append(log_density.mean() * log_density.shape[-2])

    def missing(self) -> float:
        """Untempered minus tempered loss of this step, nats over its cells; forgets the densities."""
        if not self.log_densities:
            return 0.0
        # Guide and model alternate, once per particle.
        log_q, log_p = self.log_densities[0::2], self.log_densities[1::2]
        self.log_densities = []
        return (1 - self.weight) * float(sum(log_q) - sum(log_p)) / len(log_q)


def check_kinds(model: Any, cells: Any, guide: Any) -> None:
    """Refuse arguments that are no model, cells or guide; most often an AnnData or a class is passed.

    Raises
    ------
    ModelError
        If there is one; names the argument and what was passed.
    """
    require_kind(model, SCVI, "model", "ps.SCVI(cells.n_genes)")
    require_kind(cells, Cells, "cells", "ps.Cells.from_anndata(adata)")
    if guide is not None:
        require_kind(guide, Guide, "guide", "ps.guides.DiagonalNormal(model)")


def check_run(epochs: Any, batch_size: Any, patience: Any, eps: Any) -> None:
    """Refuse lengths of a run that are no integers or below 1 (patience may be None), and an epsilon below 0.

    Raises
    ------
    FitError
        If there is one; names the argument.
    """
    for name, value in {"epochs": epochs, "batch_size": batch_size, "patience": patience}.items():
        if name == "patience" and value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise FitError(f"{name} must be an integer of 1 or more, got {brief(value)}")
    if not isinstance(eps, float | int) or not 0 <= eps < math.inf:
        raise FitError(f"eps must be a finite number of 0 or more, got {brief(eps)}")


def check_sites(model: SCVI, guide: Guide, *args: Any, **kwargs: Any) -> None:
    """Refuse latents on one side only, sites that no verb knows, and parameters that no optimiser would see.

    Raises
    ------
    ModelError
        If there is one; names the site or the parameter.
    """
    with pyro.get_param_store().scope():
        guided = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        _require_same({site.name for site in model.discovered() if site.kind.latent}, _latents(guided))
        guide.require_supported()
        modelled = pyro.poutine.trace(pyro.poutine.replay(model, trace=guided)).get_trace(*args, **kwargs)
    _require_same(_latents(modelled), _latents(guided))
    own = (model.pyro_name + "$$$", guide.pyro_name + "$$$")  # Pyro's prefix of a registered module's parameters
    for trace in (guided, modelled):
        for name in trace.param_nodes:
            if not name.startswith(own):
                raise ModelError(
                    f"pyro.param {name!r} would never be trained: make it an nn.Parameter of a module that is part of "
                    "the model or guide"
                )
    for part, what in ((model, "model"), (guide, "guide")):
        require_owned(part, what, model, guide)


def check_gradients(*parts: torch.nn.Module) -> None:
    """Refuse parameters that the first step left without a gradient.

    Raises
    ------
    ModelError
        If there are any; names them.
    """
    named = [(name, parameter) for part in parts for name, parameter in part.named_parameters()]
    lost = [name for name, parameter in named if parameter.requires_grad and parameter.grad is None]
    if lost:
        raise ModelError(f"no gradient reached {lost}: they take no part in the loss and would never be trained")


def unique_parameters(parts: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Every parameter to train, once: a prior and a guide may share an encoder."""
    by_identity = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    return list(by_identity.values())


def _require_same(in_model: set[str], in_guide: set[str]) -> None:
    if missing := in_model - in_guide:
        raise ModelError(f"the model samples {sorted(missing)}, which the guide does not; the bound would be wrong")
    if extra := in_guide - in_model:
        raise ModelError(f"the guide samples {sorted(extra)}, which the model does not have")


def _latents(trace: pyro.poutine.Trace) -> set[str]:
    return {
        name
        for name in trace.stochastic_nodes
        if not (
            isinstance(trace.nodes[name]["fn"], _Subsample) or (trace.nodes[name]["infer"] or {}).get("is_auxiliary")
        )
    }
