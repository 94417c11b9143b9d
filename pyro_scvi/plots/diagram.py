"""Plate diagram of a model's program."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Rectangle
from pyro.infer.inspect import get_model_relations
from torch import Tensor

from pyro_scvi.guides.global_latents import GlobalNormal
from pyro_scvi.inference.evaluation import undisturbed
from pyro_scvi.model import SCVI
from pyro_scvi.plots.canvas import INK, SHADE, given_or_new
from pyro_scvi.utils.checks import require_at_least, require_kind

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RADIUS, STEP, DROP, NOTE = 0.36, 1.5, 1.3, 0.12
_LETTERS = {"l": r"\ell", "gamma": r"\gamma", "theta": r"\theta"}
_SUBSCRIPTS = {"cells": "n", "genes": "g"}
MARGINS = np.array([-0.28, 0, 0.28, 0])  # left, bottom, right, top; of a plate around an inner one


def program(model: SCVI, ax: Axes | None = None, *, n_cells: int | None = None) -> Axes:
    """Draw the explicit program of a model as a plate diagram (Lopez et al. 2017, Fig. 1).

    The diagram is read off the program itself. Circles are random variables: shaded if observed, double if
    deterministic. The square holds the covariates. An arrow from a to b means that b depends on a. Global latents
    (weights and dispersions with a prior) share one circle, theta, outside the plates.

    Parameters
    ----------
    model
        The model; it is not changed.
    ax
        Axes to draw into; None: axes of a new pyplot figure.
    n_cells
        Size of the plate of cells, which the model itself does not fix.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    ModelError
        If ``model`` is no SCVI, its likelihood has no explicit program, ``n_cells`` is below 1, or ``ax`` are no axes.

    Examples
    --------
    >>> ax = ps.plots.program(model, n_cells=60)
    >>> [text.get_text() for text in ax.texts]
    [...60...]
    """
    require_kind(model, SCVI, "model", "fit.model")
    if n_cells is not None:
        require_at_least(1, n_cells=n_cells)
    sites = _relations(model)
    places = _layout(sites)
    boxes = _boxes(sites, places, {"cells": n_cells, "genes": model.n_genes})
    corners = np.array([box.corners for box in boxes] + [(*(place - 0.6), *(place + 0.6)) for place in places.values()])
    low, high = corners[:, :2].min(0) - 0.15, corners[:, 2:].max(0) + 0.15
    high[0] += 0.62 * NOTE * max((len(note) for notes in sites.notes.values() for note in notes[:4]), default=0)
    ax = given_or_new(ax, tuple(high - low))
    ax.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    ax.set_axis_off()
    ax.figure.canvas.figure.draw_without_rendering()  # a layout engine only now says how large the axes are
    area = ax.get_window_extent()
    unit = 72 / ax.figure.dpi * min(area.width / (high - low)[0], area.height / (high - low)[1])  # points
    for box in boxes:
        _draw_plate(ax, box, unit)
    for name, parents in sites.parents.items():
        for parent in parents:
            _draw_edge(ax, f"edge:{parent}->{name}", _Node(sites, places, parent), _Node(sites, places, name), unit)
    for name in places:
        _draw_node(ax, _Node(sites, places, name), unit)
    return ax


class _Sites(NamedTuple):
    """What the program holds: parents of every site, and which are constants, observed, deterministic, in a plate."""

    parents: dict[str, list[str]]
    constants: set[str]
    observed: set[str]
    deterministic: set[str]
    plates: dict[str, list[str]]
    notes: dict[str, list[str]]


class _Box(NamedTuple):
    name: str
    label: str
    corners: np.ndarray  # left, bottom, right, top


def _relations(model: SCVI) -> _Sites:
    """The sites of the explicit program for two cells, as provenance tracking finds them."""
    device = next(chain(model.parameters(), model.buffers())).device  # all weights may be latent
    x = torch.ones(2, model.n_genes, device=device)
    z = torch.full((2, 1, model.n_latent), 1 / model.n_latent, device=device)

    def explicit(gamma: Tensor) -> None:
        if model.n_covariates:
            gamma = pyro.deterministic("gamma", gamma, event_dim=2)
        model(x, gamma, marginal=False)

    # Given values, for an improper prior cannot be sampled, and weights drawn from wide priors overflow the rates. This
    # z is legal on the real line and on the simplex.
    values = {"z": z, **GlobalNormal(model).medians()}
    with pyro.poutine.trace() as given:
        for name, value in values.items():
            pyro.sample(name, dist.Delta(value))
    with undisturbed(0, model):
        relations = get_model_relations(
            pyro.poutine.replay(explicit, trace=given.trace),
            (torch.zeros(2, model.n_covariates, device=device),),
            include_deterministic=True,
        )
    return _sites(relations)


def _sites(relations: Mapping[str, Any]) -> _Sites:
    """Sort the sites: gamma is a constant of the cells, whatever is in neither plate becomes theta."""
    parents = dict(relations["sample_sample"])
    constants = {"gamma"} & parents.keys()
    plates = {name: list(relations["plate_sample"][name]) for name in _SUBSCRIPTS}  # latents in others are global
    plates["cells"] = [*plates["cells"][:1], *constants, *plates["cells"][1:]]
    inside = {name for sites in plates.values() for name in sites}
    outside = [name for name in parents if name not in inside]
    merged = {name: [p for p in parents[name] if p not in outside] for name in parents if name in inside}
    if outside:
        for name in merged:
            merged[name] += ["theta"] * any(parent in outside for parent in parents[name])
        merged["theta"] = []
    deterministic = {name for name, law in relations["sample_dist"].items() if law == "Deterministic"} - constants
    observed = set(relations["observed"]) - deterministic - constants
    return _Sites(merged, constants, observed, deterministic, plates, {"theta": outside} if outside else {})


def _layout(sites: _Sites) -> dict[str, np.ndarray]:
    """Centres (2,): sites of cells in the first row, those of genes below, ordered by their distance in the graph."""
    genes = sites.plates["genes"]
    first = [name for name in sites.plates["cells"] if name not in genes]
    places = {name: np.array([x, 0.0]) for name, x in zip(first, _spread(len(first)), strict=True)}
    depths: dict[str, int] = {}
    for name in genes:  # in the order of the program, parents first
        depths[name] = 1 + max((depths[parent] for parent in sites.parents[name] if parent in depths), default=-1)
    for depth in range(max(depths.values()) + 1):
        row = [name for name in reversed(genes) if depths[name] == depth]  # h left of w, so that l stands above w
        above = [places[parent][0] for name in row for parent in sites.parents[name] if parent in genes]
        centre = float(np.mean(above)) if above else 0.0
        for name, x in zip(row, _spread(len(row)), strict=True):
            places[name] = np.array([centre + x, -1.35 * DROP - depth * DROP])
    if "theta" in sites.parents:
        places["theta"] = np.array([max(place[0] for place in places.values()) + 1.9, -0.45 * DROP])
    return places


def _spread(n: int) -> np.ndarray:
    return STEP * (np.arange(n) - (n - 1) / 2)


def _boxes(sites: _Sites, places: Mapping[str, np.ndarray], sizes: Mapping[str, int | None]) -> list[_Box]:
    """The plates, outermost first, each around its sites and inner plates, with a strip for its label below."""
    boxes: list[_Box] = []
    for name, members in sorted(sites.plates.items(), key=lambda plate: len(plate[1])):
        centres = [places[member] for member in members]
        corners = [np.array([*(centre - 0.62), *(centre + 0.62)]) for centre in centres]
        corners += [box.corners + MARGINS for box in boxes if set(sites.plates[box.name]) <= set(members)]
        left, bottom = np.min(corners, 0)[:2]
        right, top = np.max(corners, 0)[2:]
        label = name if sizes[name] is None else f"{sizes[name]:,} {name}"
        missing = max(0, 0.3 + 0.11 * len(label) - (right - left)) / 2
        boxes.append(_Box(name, label, np.array([left - missing, bottom - 0.34, right + missing, top])))
    return boxes[::-1]


class _Node:
    """A site on the canvas."""

    def __init__(self, sites: _Sites, places: Mapping[str, np.ndarray], name: str) -> None:
        self.name, self.centre = name, places[name]
        self.constant, self.observed = name in sites.constants, name in sites.observed
        self.deterministic, self.notes = name in sites.deterministic, sites.notes.get(name, [])
        plates = [letter for plate, letter in _SUBSCRIPTS.items() if name in sites.plates[plate]]
        letter = _LETTERS.get(name, name if len(name) == 1 else rf"\mathrm{{{name}}}")
        self.label = rf"${letter}_{{{''.join(plates)}}}$" if plates else f"${letter}$"

    def border(self, direction: np.ndarray) -> np.ndarray:
        """The point of the outline in a direction (2,) of length 1."""
        reach = 0.8 * RADIUS / np.abs(direction).max() if self.constant else RADIUS
        return self.centre + reach * direction


def _draw_node(ax: Axes, node: _Node, unit: float) -> None:
    fill = SHADE if node.observed else "white"
    style: dict[str, Any] = {"facecolor": fill, "edgecolor": INK, "linewidth": 0.02 * unit, "zorder": 3}
    half = 0.8 * RADIUS
    outline: Patch = Circle(tuple(node.centre), RADIUS, **style)
    if node.constant:
        outline = Rectangle(tuple(node.centre - half), 2 * half, 2 * half, **style)
    outline.set_gid(f"node:{node.name}")
    ax.add_patch(outline)
    if node.deterministic:
        ax.add_patch(Circle(tuple(node.centre), 0.86 * RADIUS, **{**style, "linewidth": 0.012 * unit}))
    text: dict[str, Any] = {"color": INK, "zorder": 4, "math_fontfamily": "cm"}
    x, y = node.centre
    ax.text(x, y, node.label, ha="center", va="center_baseline", fontsize=0.33 * unit, **text)
    if node.notes:
        lines = [*node.notes[:4], *[f"and {len(node.notes) - 4} more"] * (len(node.notes) > 4)]
        ax.text(x + RADIUS + 0.12, y, "\n".join(lines), va="center", fontsize=NOTE * unit, linespacing=1.5, **text)


def _draw_edge(ax: Axes, gid: str, start: _Node, end: _Node, unit: float) -> None:
    direction = (end.centre - start.centre) / math.dist(end.centre, start.centre)
    arrow = FancyArrowPatch(
        tuple(start.border(direction)),
        tuple(end.border(-direction)),
        arrowstyle="-|>,head_length=0.45,head_width=0.22",
        mutation_scale=0.32 * unit,
        shrinkA=0,
        shrinkB=0,
        linewidth=0.02 * unit,
        color=INK,
        joinstyle="miter",
        zorder=2,
    )
    arrow.set_gid(gid)
    ax.add_patch(arrow)


def _draw_plate(ax: Axes, box: _Box, unit: float) -> None:
    left, bottom, right, top = box.corners
    style = "round,pad=0,rounding_size=0.16"
    frame = FancyBboxPatch((left, bottom), right - left, top - bottom, style, fill=False)
    frame.set(gid=f"plate:{box.name}", edgecolor=INK, linewidth=0.018 * unit, zorder=1)
    ax.add_patch(frame)
    ax.text(right - 0.14, bottom + 0.13, box.label, ha="right", va="baseline", fontsize=0.17 * unit, color=INK)
