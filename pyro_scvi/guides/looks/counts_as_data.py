"""The check that a program reads counts by conditioning on them alone, and that each cell's density is its own."""

from dataclasses import replace
from typing import Any

import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.looks.look import Look, held_library
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.model import SCVI

COUNTS = (1, 0, 3, 9, 30, 100, 1000)
"""Counts of the cells of a look. A condition on counts holds for some of them, and not for others."""

LOOKED_AT = 2 * len(COUNTS)
"""How many cells are given other counts."""

FEW, FEWEST = 30, 3
"""The largest count of a large batch, as some programs sum up to the largest; and of programs that take no more."""

CELLS, ENTRIES = 130, 500_000
"""How many cells a large batch has, more than those of ``fit`` and the verbs; fewer if it had more entries than so."""


def require_counts_as_data(model: SCVI, coordinates: Coordinates, global_latents: dict[str, Tensor]) -> None:
    """Refuse a program whose distributions depend on the counts that it is given, or on the cells that come with one.

    Such a density is no probability of the counts: it does not sum to 1 over them, and evidence can be any number.

    Raises
    ------
    ModelError
        Naming the site.
    """
    if is_packaged(model):
        return
    n_cells = max(LOOKED_AT + 2, min(CELLS, ENTRIES // model.n_genes))
    drawn = {site.name: site.value for site in model.discovered(few=n_cells)}
    sites = {name: drawn[name] for name in coordinates.local}
    look = Look(model, coordinates, global_latents, _counts(model, n_cells), model.varied_gamma(n_cells))
    if not _can_be_run(look, sites):
        look = replace(look, x=look.x.clamp(max=FEWEST))
    _require_conditioning(look, sites)
    _require_apart(replace(look, x=look.x.clamp(max=FEW)), sites)


def _counts(model: SCVI, n_cells: int) -> Tensor:
    """Counts (cells, genes): first cells whose genes have nearly the same, then an order of each gene's own.

    Of the first, some are deep; of the others, no function of two genes is the same in all cells.
    """
    levels, of = like(model).new_tensor(COUNTS), torch.Generator().manual_seed(0)
    alike = levels[:, None] + torch.arange(model.n_genes, device=levels.device) % 2
    orders = [torch.rand(len(COUNTS), model.n_genes, generator=of).argsort(0) for _ in range(n_cells // len(COUNTS))]
    return torch.cat([alike, *(levels[order.to(levels.device)] for order in orders)])[:n_cells]


def _can_be_run(look: Look, sites: dict[str, Tensor]) -> bool:
    """Whether the program takes all these counts; some look them up in tables that end."""
    try:
        look.log_joint_of(sites, list(range(LOOKED_AT)))
    except ModelError:
        raise
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


def _require_conditioning(look: Look, sites: dict[str, Tensor]) -> None:
    """Compare the densities of all sites at one value of each, where the program is given other counts."""
    look = replace(look, x=look.x[:LOOKED_AT], gamma=look.gamma[:LOOKED_AT])
    sites, x = {name: value[:LOOKED_AT] for name, value in sites.items()}, look.x
    # Other counts in each cell; and few in all of them, below what a condition on the largest asks for.
    with held_library(look.model):
        given, *others = (replace(look, x=one).scored(sites).nodes for one in (x, x.roll(1, 0), x.clamp(max=1)))
    _require_counts_observed(look.model, given["x"], x)
    for other in others:
        for name, node in given.items():
            if "log_prob" in node and not _same(_log_p(node, x), _log_p(other[name], x)):
                raise ModelError(
                    f"{type(look.model).__name__}: the density of the site {name!r} depends on the counts that the "
                    "program is given, otherwise than by conditioning on them, so log p(x) is no probability of "
                    "counts and does not sum to 1. Give x to observe(x, theta) or obs= and to nothing else; what is "
                    "known of a cell, such as its total, can be a column of gamma, or a library "
                    "(ps.libraries.ObservedLibrary, SizeFactor)"
                )


def _require_counts_observed(model: SCVI, node: Any, x: Tensor) -> None:
    """Refuse a site x that is observed at something else than the counts."""
    observed = node["value"]
    if observed.shape != x.shape or not torch.equal(observed.to(x), x):
        raise ModelError(
            f"{type(model).__name__} observes a function of the counts as 'x', and results would compare its draws "
            "with the counts themselves: pass x as it is to observe(x, theta) or obs="
        )


def _log_p(node: Any, x: Tensor) -> Tensor:
    """Log density of a traced site at its value, x at these counts, as it is weighed there."""
    density = node["fn"].log_prob(x if node["name"] == "x" else node["value"])
    weighed: Tensor = scale_and_mask(density, node["scale"], node["mask"])
    return weighed


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True)


def _require_apart(look: Look, sites: dict[str, Tensor]) -> None:
    """Compare densities of cells in a large batch with those in the opposite order, in small batches, and alone."""
    together, n_cells = look.log_joint(sites).reshape(-1), len(look.x)
    backwards = list(reversed(range(n_cells)))
    look.require_apart(together[backwards], lambda: look.log_joint_of(sites, backwards))
    for rows in ([2, 3, 0, 1], [1], [4]):
        look.require_apart(together[rows], lambda rows=rows: look.log_joint_of(sites, rows))  # type: ignore[misc]
