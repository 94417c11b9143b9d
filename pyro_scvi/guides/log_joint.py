"""The program's log joint density by cell, with discrete latents summed out, and draws of these."""

from collections.abc import Callable, Iterator
from math import prod
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.enumeration import LEFT_OF_DRAWS, Enumerating, enumerated_sites, log_sum_over_values
from pyro_scvi.guides.supported import require_same_sites
from pyro_scvi.model import SCVI
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.execution import executing

LogTerms = Callable[[Tensor], tuple[Tensor, Tensor]]
Joint = Callable[[SCVI, Tensor, Tensor, dict[str, Tensor]], LogJoint]  # log_joint, or a compiled form of it


def scored(
    model: SCVI, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor], coordinates: Coordinates, **batch: Any
) -> pyro.poutine.Trace:
    """The marginalised program's trace with the latents in ``sites`` and its log densities.

    Sites have shape (samples, cells, 1) and their events. Discrete latents that are summed out take all their values,
    along dimensions left of these. ``coordinates`` tell which sites the program had when they were made; ``batch`` are
    further arguments of the program.

    Raises
    ------
    ModelError
        Naming a site that it does not have for these cells, or has besides, or on another support.
    """
    given = pyro.poutine.condition(model, data=sites)
    with pyro.get_param_store().scope(), executing(register_parameters=False):
        trace = pyro.poutine.trace(Enumerating(LEFT_OF_DRAWS)(given)).get_trace(x, gamma, **batch)
        require_same_sites(trace, {*sites, "x"}, coordinates.enumerated)
        coordinates.require_same(trace)
        trace.compute_log_prob()
    return trace


def cell_terms(trace: pyro.poutine.Trace, *names: str) -> tuple[Tensor, Tensor]:
    """Log p of the latents ``names``, and log p(x) given them, (samples, cells) each; enumerated sites summed out."""
    enumerated = enumerated_sites(trace)
    of_latents, of_x = by_cell(trace, *names, *enumerated), by_cell(trace, "x")
    of_latents, of_x = torch.broadcast_tensors(of_latents, of_x)  # no latent of the cells may be in the law of x
    if not enumerated:
        return of_latents, of_x
    joint, of_latents = log_sum_over_values(of_latents + of_x), log_sum_over_values(of_latents)
    return of_latents, joint - of_latents


def latent_terms(trace: pyro.poutine.Trace, *names: str) -> dict[str, Tensor]:
    """Log density (samples, cells) of each latent given those before it in the program; enumerated sites summed out."""
    enumerated = enumerated_sites(trace)
    in_order = [name for name in trace.nodes if name in names]
    if not enumerated:
        return {name: by_cell(trace, name) for name in in_order}
    tables = [by_cell(trace, *in_order[: i + 1], *enumerated) for i in range(len(in_order))]
    up_to = [log_sum_over_values(table) for table in tables]
    before = [torch.zeros_like(up_to[0]), *up_to]
    return {name: after - before[i] for i, (name, after) in enumerate(zip(in_order, up_to, strict=True))}


def global_terms(
    model: SCVI,
    x: Tensor,
    gamma: Tensor,
    sites: dict[str, Tensor],
    drawn: dict[str, Tensor],
    coordinates: Coordinates,
) -> dict[str, Tensor]:
    """Log density (samples,) of each global latent, given those before it, at ``drawn`` (samples, ...), nats.

    A program with weights among them runs for one draw at a time: at ``sites``, the latents of any cells.
    """
    terms: dict[str, list[Tensor]] = {name: [] for name in drawn}
    for values in zip(*drawn.values(), strict=True):
        trace = scored(model, x, gamma, sites | dict(zip(drawn, values, strict=True)), coordinates)
        for name, of_draws in terms.items():
            of_draws.append(trace.nodes[name]["log_prob"].sum())
    return {name: torch.stack(of_draws) for name, of_draws in terms.items()}


def entry_terms(trace: pyro.poutine.Trace, *names: str) -> Tensor:
    """Log p(x_ng | latents ``names``), (samples, cells, genes), with enumerated sites summed out given the latents."""
    of_entries: Tensor = trace.nodes["x"]["log_prob"]
    enumerated = enumerated_sites(trace)
    if not enumerated or of_entries.dim() < 4:
        return of_entries.expand(*by_cell(trace, *names).shape[-2:], -1) if of_entries.dim() < 3 else of_entries
    weights = by_cell(trace, *names, *enumerated)
    weights = weights - log_sum_over_values(weights)
    return log_sum_over_values(of_entries + weights[..., None], kept=3)


def by_cell(trace: pyro.poutine.Trace, *names: str) -> Tensor:
    """Sum over genes of the log densities of the named sites of a scored trace, (..., cells)."""
    terms = {name: trace.nodes[name]["log_prob"] for name in names}
    place = trace.nodes["x"]["log_prob"].device  # some of Pyro's laws give a log density on the CPU wherever they are
    sums = [(term.sum(-1) if name == "x" else term.squeeze(-1)).to(place) for name, term in terms.items()]
    return torch.stack(torch.broadcast_tensors(*sums)).sum(0)


def log_joint(model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]) -> LogJoint:
    """Log p(x, latents) in coordinates u (samples, cells, size), nats, (samples, cells), at given global latents."""
    terms = log_terms(model, x, gamma, global_latents)
    return lambda u: torch.stack(terms(u)).sum(0)


def log_terms(model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]) -> LogTerms:
    """Log p(latents) and log p(x | latents), the parts of :func:`log_joint`."""
    coordinates = Coordinates(model)
    return lambda u: log_terms_at(u, coordinates, model, x, gamma, global_latents)


def log_terms_at(
    u: Tensor, coordinates: Coordinates, model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Log p(latents) and log p(x | latents) at u, (samples, cells) each."""
    trace = scored(model, x, gamma, {**global_latents, **coordinates.sites(u)}, coordinates)
    of_latents, of_x = cell_terms(trace, *coordinates.local)
    # A program with constants in double precision has such densities, and what samples is in the model's.
    return (of_latents + coordinates.log_abs_det(u)).to(u.dtype), of_x.to(u.dtype)


class EnumeratedValues(NamedTuple):
    """Log densities (values of the last discrete latent, ..., of the first, samples, cells), and their traced sites."""

    table: Tensor
    nodes: dict[str, Any]

    def drawn(self) -> dict[str, Tensor]:
        """Draws of the discrete latents (samples, cells, 1), each value in proportion to its density."""
        chosen = torch.distributions.Categorical(logits=self.table.flatten(0, -3).movedim(0, -1)).sample()
        return self._sites(torch.unravel_index(chosen, self.table.shape[:-2]))

    def each(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        """Each combination of values (samples, cells, 1), and its log density (samples, cells)."""
        *counts, samples, cells = self.table.shape
        for place, log_p in zip(range(prod(counts)), self.table.flatten(0, -3), strict=True):
            everywhere = torch.full((samples, cells), place, device=self.table.device)
            yield self._sites(torch.unravel_index(everywhere, counts)), log_p

    def _sites(self, places: tuple[Tensor, ...]) -> dict[str, Tensor]:
        """The discrete latents at places (samples, cells) in the list of values of each."""
        return {name: _taken(node, places[node["infer"]["_enumerate_dim"] + 3]) for name, node in self.nodes.items()}


def enumerated_values(
    model: SCVI,
    x: Tensor,
    gamma: Tensor,
    global_latents: dict[str, Tensor],
    sites: dict[str, Tensor],
    coordinates: Coordinates,
    block: int,
    *,
    with_x: bool,
) -> EnumeratedValues:
    r"""Log densities of ``sites`` and discrete latents, ``with_x`` also of x, at all values of the discrete latents.

    With x, these are their exact conditional given x and the other latents, up to a constant:

    .. math:: P(c_n = k | x_n, z_n) \propto p(c_n = k)\, p(z_n | c_n = k)\, p(x_n | z_n, c_n = k)

    ``sites`` have shape (samples, cells, 1) and their events; ``block`` samples are scored at a time.
    """
    tables, nodes = [], dict[str, Any]()
    for start in range(0, len(next(iter(sites.values()))), block):
        part = {name: value[start : start + block] for name, value in sites.items()}
        trace = scored(model, x, gamma, {**global_latents, **part}, coordinates)
        nodes = {name: trace.nodes[name] for name in enumerated_sites(trace)}
        tables.append(by_cell(trace, *sites, *nodes, *(["x"] if with_x else [])))
    return EnumeratedValues(torch.cat(tables, -2), nodes)


def _taken(node: Any, places: Tensor) -> Tensor:
    """The values of one site at places (samples, cells) in the list of its values."""
    event = node["fn"].event_shape
    values: Tensor = node["value"].reshape(-1, *event)
    return values[places].reshape(*places.shape, 1, *event)
