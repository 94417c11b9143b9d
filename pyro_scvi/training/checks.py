"""Checks of the arguments of fit, and of the first training step for mistakes that Pyro accepts silently."""

import math
from collections import Counter
from collections.abc import Collection, Iterable
from numbers import Integral
from typing import Any

import pyro
import torch
from pyro.infer import ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.discovery import Kind
from pyro_scvi.distributions.supports import is_learned, support_of
from pyro_scvi.errors import ModelError, SchemaError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.enumeration import LEFT_OF_CELLS, Enumerating, is_enumerated
from pyro_scvi.guides.per_cell import PerCell
from pyro_scvi.guides.supported import is_expected, require_met, require_same_sites, require_scaled
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.inference.importance_weighted import ImportanceWeighted, require_density
from pyro_scvi.model import SCVI
from pyro_scvi.nn.closures import require_owned
from pyro_scvi.schedules import KLWeight
from pyro_scvi.utils.checks import brief, require_kind, warn

COMPARED = 50  # cells to watch, when they are looked for among those to train on


class TemperedLatents(Messenger):
    """Scale the latents of the cells by ``weight`` in guide and model, and keep how much that changes the loss.

    Both are scaled, because an analytic KL takes the scale of the guide's site and a sampled one takes both.
    ``sites`` are their names; discrete ones, which the model alone has, are summed out. Auxiliary sites of the guide
    belong to them if they are in the plate over cells; others are of global latents, which have no weight.
    """

    def __init__(self, weight: float, sites: Collection[str]) -> None:
        super().__init__()
        self.weight, self.names = weight, sites
        self.changes = list[float]()
        self._log_q, self._log_p = dict[str, Tensor](), dict[str, Tensor]()
        self._enumerates = False

    def _pyro_sample(self, msg: Any) -> None:
        if self._tempers(msg):
            msg["scale"] = msg["scale"] * self.weight

    def _pyro_post_sample(self, msg: Any) -> None:
        if self.weight == 1:
            return
        with torch.no_grad():
            if self._tempers(msg):
                # The guide runs first, and samples all latents but the discrete ones.
                self._enumerates |= is_enumerated(msg)
                of = self._log_p if msg["name"] in self._log_q or is_enumerated(msg) else self._log_q
                of[msg["name"]] = msg["fn"].log_prob(msg["value"]).squeeze(-1)
            elif msg["name"] == "x":
                self._close()

    def _tempers(self, msg: Any) -> bool:
        return msg["name"] in self.names or _is_auxiliary_of_cells(msg)

    def _close(self) -> None:
        """At the end of a run of the model: what the weight changed, averaged over particles, summed over cells."""
        log_q, log_p = (torch.stack(torch.broadcast_tensors(*of.values())).sum(0) for of in (self._log_q, self._log_p))
        if self._enumerates:
            log_p = log_p.flatten(0, -2).logsumexp(0)
        change = (1 - self.weight) * (log_q - log_p)
        self.changes.append(float(change.mean()) * change.shape[-1])
        self._log_q, self._log_p, self._enumerates = {}, {}, False

    def missing(self) -> float:
        """Untempered minus tempered loss of this step, nats over its cells; forgets it."""
        changes, self.changes = self.changes, []
        return sum(changes) / len(changes) if changes else 0.0


class OtherSite(Exception):
    """A site that the guide does not know; no ValueError, to which Pyro's traces add their shapes."""


class SameSites(Messenger):
    """Refuses a training step in which the program has other sites than the guide was made for.

    Pyro counts what the guide alone samples as it counts the guide's auxiliary sites, and what the model alone samples
    as it counts a discrete latent: the bound is then wrong without an error. ``latents`` are sampled by guide and
    model, ``enumerated`` by the model alone. A step from a recording runs no program, and is not counted.
    """

    def __init__(self, latents: Collection[str], enumerated: Collection[str]) -> None:
        super().__init__()
        self.times = Counter[str]()
        self.enumerated = enumerated
        self.expected = dict.fromkeys(latents, 2) | dict.fromkeys([*enumerated, "x"], 1)

    def __enter__(self) -> Any:
        self.times.clear()
        return super().__enter__()

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] in self.expected:
            self.times[msg["name"]] += msg["name"] not in self.enumerated or is_enumerated(msg)
        elif not (is_expected(msg, ()) or (msg["infer"] or {}).get("is_auxiliary")):
            raise OtherSite(msg["name"])

    def require(self) -> None:
        """After a step: each site was sampled as often as there were particles, in guide and model.

        Raises
        ------
        ModelError
            Naming the site.
        """
        require_met([name for name, times in self.expected.items() if self.times[name] != times * self.times["x"]])


def check_kinds(model: Any, cells: Any, guide: Any) -> None:
    """Refuse arguments that are no model, cells or guide; most often an AnnData or a class is passed.

    Raises
    ------
    ModelError
        If there is one; names the argument and what was passed.
    """
    require_kind(model, SCVI, "model", "ps.SCVI(cells.n_genes)")
    require_kind(cells, Cells, "cells", "ps.Cells.from_anndata(adata)")
    if guide is not None and callable(guide) and not isinstance(guide, Guide | type):
        raise ModelError(
            f"guide must be a ps.guides.Guide, got {brief(guide)}: fit cannot find the parameters of a function, "
            "nor the density of its draws. Write a subclass with encode, law and start, as CONTRIBUTING shows, or "
            "train the function by pyro.infer.SVI"
        )
    if guide is not None:
        require_kind(guide, Guide, "guide", "ps.guides.DiagonalNormal(model)")


def check_cells_of(guide: Guide, cells: Cells) -> None:
    """Refuse other cells than those whose rows a guide without an encoder has.

    Raises
    ------
    ModelError
        If there are more or fewer.
    SchemaError
        If they are others, or in another order.

    Warns
    -----
    UserWarning
        If they go on with a guide that was loaded, which does not know the names of its cells.
    """
    if not isinstance(guide, PerCell):
        return
    if guide.n_cells != cells.n_cells:
        made, given = guide.n_cells, cells.n_cells
        raise ModelError(f"PerCell was made for {made} cells, got {given}: make it with n_cells={given}")
    if guide.cell_names is None:
        if guide.model.trained:
            warn("this PerCell guide knows its cells by row only: they must be those of its fit, in the same order")
    elif list(guide.cell_names) != list(cells.cell_names):
        raise SchemaError(
            "PerCell has parameters for each cell of its fit, by row, and these cells are others, or in another order: "
            "pass those cells in their order, or leave guide= out, or make a guide with an encoder"
        )


def warn_if_trained_on(validation: Cells, cells: Cells) -> None:
    """Say so if cells to watch are among those to train on: have the name and the counts of one of them.

    Warns
    -----
    UserWarning
        If more than half of the first cells with a name that both have are the same. Counts are compared, too, because
        names of cells may be the numbers of rows.
    """
    rows = dict(zip(cells.cell_names, range(cells.n_cells), strict=True))
    pairs = [(i, rows[name]) for i, name in enumerate(validation.cell_names) if name in rows][:COMPARED]
    if not pairs:
        return
    watched, trained = map(list, zip(*pairs, strict=True))
    same = (validation[watched][0] == cells[trained][0]).all(1)
    if same.float().mean() > 0.5:
        warn(
            f"cells of validation= are among the training cells, {validation.cell_names[watched[0]]!r} for one: their "
            "loss is not a held-out loss. Take them out of the training cells, as in train, held_out = cells.split(0.1)"
        )


def note_cells(guide: Guide, cells: Cells) -> None:
    """Let a guide without an encoder know whose rows it has."""
    if isinstance(guide, PerCell):
        guide.cell_names = cells.cell_names


def check_run(epochs: Any, batch_size: Any, patience: Any, eps: Any) -> None:
    """Refuse lengths of a run that are not integers or below 1 (patience may be None), and an epsilon below 0.

    Raises
    ------
    ModelError
        If there is one; names the argument.
    """
    for name, value in {"epochs": epochs, "batch_size": batch_size, "patience": patience}.items():
        if name == "patience" and value is None:
            continue
        if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{name} must be an integer of 1 or more, got {brief(value)}")
    if not isinstance(eps, float | int) or not 0 <= eps < math.inf:
        raise ModelError(f"eps must be a finite number of 0 or more, got {brief(eps)}")


def check_sites(model: SCVI, guide: Guide, *args: Any, **kwargs: Any) -> None:
    """Refuse latents on one side only, sites that no verb knows, and parameters that no optimiser would see.

    Raises
    ------
    ModelError
        If there is one; names the site or the parameter.
    """
    with pyro.get_param_store().scope():
        guided = pyro.poutine.trace(guide).get_trace(*args, **kwargs)
        drawn = [site for site in model.discovered() if site.kind.latent and site.kind is not Kind.ENUMERATED]
        _require_same({site.name for site in drawn}, _latents(guided))
        guide.require_supported()
        require_scaled(model)
        summed = Enumerating(LEFT_OF_CELLS)(pyro.poutine.replay(model, trace=guided))
        modelled = pyro.poutine.trace(summed).get_trace(*args, **kwargs)
    require_same_sites(modelled, {*_latents(guided), "x"}, guide.coordinates.enumerated)
    for name in _latents(modelled):
        if is_learned(support_of(modelled.nodes[name]["fn"])):
            raise ModelError(
                f"a bound of the program's site {name!r} depends on parameters, and only constant supports can be "
                "fitted: take a distribution with a constant support, and scale its value instead"
            )
    own = (model.pyro_name + "$$$", guide.pyro_name + "$$$")  # Pyro's prefix of a registered module's parameters
    for trace in (guided, modelled):
        for name in trace.param_nodes:
            if not name.startswith(own):
                raise ModelError(
                    f"pyro.param {name!r} would not be trained: make it an nn.Parameter of a module that is part "
                    "of the model or guide"
                )
    for part, what in ((model, "model"), (guide, "guide")):
        require_owned(part, what, model, guide)


def check_elbo(guide: Guide, elbo: ELBO, kl_weight: KLWeight, epochs: int) -> None:
    """Refuse a bound that would draw discrete latents from their prior, or leave out a part of the density of q.

    Raises
    ------
    ModelError
        Naming the bound, if it does so with this guide, or cannot be weighted as is asked for.
    """
    if isinstance(elbo, MeanFieldELBO):
        return
    tempers = any(kl_weight.at(epoch, epochs) != 1 for epoch in range(epochs))
    if isinstance(elbo, ImportanceWeighted):
        require_density(guide)
        if tempers:
            raise ModelError(
                "ImportanceWeighted has no KL divergence that could be weighed: leave kl_weight= out, or elbo="
            )
        return
    if guide.auxiliary and isinstance(elbo, TraceMeanField_ELBO):
        raise ModelError(
            f"{type(elbo).__name__} leaves the log Jacobian of some latents out of the bound, because this guide draws "
            "several latents at once: leave elbo out, or pass Trace_ELBO()"
        )
    names = list(guide.coordinates.enumerated)
    if not names:
        return
    if not isinstance(elbo, TraceEnum_ELBO):
        raise ModelError(f"{type(elbo).__name__} does not sum out {names}: leave elbo out, or pass TraceEnum_ELBO()")
    if tempers:
        raise ModelError(
            f"TraceEnum_ELBO cannot weigh the KL divergence beside {names}, which it sums out: leave elbo out"
        )


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
        raise ModelError(
            f"no gradient reached {lost}: the loss does not depend on them, so they would not be trained; use them in "
            "the program, or freeze them by requires_grad_(False)"
        )


def unique_parameters(parts: Iterable[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Every parameter to train, once: a prior and a guide may share an encoder."""
    by_identity = {id(p): p for part in parts for p in part.parameters() if p.requires_grad}
    return list(by_identity.values())


def _require_same(in_model: set[str], in_guide: set[str]) -> None:
    if missing := in_model - in_guide:
        raise ModelError(f"the model samples {sorted(missing)}, which the guide does not; the bound would be wrong")
    if extra := in_guide - in_model:
        raise ModelError(f"the guide samples {sorted(extra)}, which the model does not have")


def _is_auxiliary_of_cells(msg: Any) -> bool:
    in_cells = any(frame.name == "cells" for frame in msg["cond_indep_stack"])
    return in_cells and bool((msg["infer"] or {}).get("is_auxiliary"))


def _latents(trace: pyro.poutine.Trace) -> set[str]:
    return {
        name
        for name in trace.stochastic_nodes
        if not (
            isinstance(trace.nodes[name]["fn"], _Subsample)
            or (trace.nodes[name]["infer"] or {}).get("is_auxiliary")
            or is_enumerated(trace.nodes[name])
        )
    }
