"""The check that training, every verb and draws of counts run one and the same program."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.looks.look import Look, held_library
from pyro_scvi.guides.packaged import KNOWN, is_packaged
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode

Densities = Mapping[str, Tensor]

ROWS, AMONG = (41, 7, 23, 2, 30, 11), 50
"""Rows of the cells of a look in a larger data set, as a minibatch of training has them."""


@dataclass(frozen=True)
class _Other:
    """A way in which a program may be run: what may not matter, and what to do if it does."""

    on: str
    remedy: str


_INDEX = _Other(
    "index= and n_cells=, which only training gives",
    "pass both to cells_plate and to nothing else; what is known of each cell is a column of gamma",
)
_TRAINING = _Other(
    "self.training, so that fit would train another model than all verbs compute with",
    "leave it to modules of torch.nn, such as nn.Dropout",
)
_COUNTS = _Other(
    "whether there are counts, so that draws of counts would be those of another model",
    "let the program do the same where x is None",
)
_CELLS = _Other(
    "the cells that come with it or on how many these are, although all cells share it",
    "let it depend on no cells; what is known of all of them is a buffer of the model",
)


def require_one_program(model: SCVI, coordinates: Coordinates, global_latents: dict[str, Tensor]) -> None:
    """Refuse a program whose densities depend on how it is run, or whose global latents depend on the cells.

    Training runs it for minibatches whose ``index`` it gives, in training mode; verbs for any cells, in evaluation
    mode; and draws of counts without counts.

    Raises
    ------
    ModelError
        Naming the site, and on what its density depends.
    """
    if is_packaged(model):
        return
    n_cells = len(ROWS)
    drawn = {site.name: site.value for site in model.discovered(few=n_cells)}
    sites = {name: drawn[name] for name in coordinates.local}
    x = like(model).new_tensor([[1.0], [3.0], [0.0], [2.0], [1.0], [3.0]]).expand(-1, model.n_genes)
    look = Look(model, coordinates, global_latents, x, model.varied_gamma(n_cells))
    densities = _densities(look, sites)
    if model.takes("index") and model.takes("n_cells"):  # fit asks for both
        _require_same(model, densities, _as_minibatch(look, sites), _INDEX)
    _require_same(model, densities, _while_training(look, sites), _TRAINING)
    with held_library(model):
        _require_same(model, _densities(look, sites), _without_counts(look, sites), _COUNTS)
    _require_shared(look, sites, densities)


def _densities(look: Look, sites: Mapping[str, Tensor], **batch: Any) -> Densities:
    """Log density of each site at its value, without the scale that a minibatch has."""
    nodes: dict[str, Any] = look.scored(sites, **batch).nodes
    return {name: node["fn"].log_prob(node["value"]) for name, node in nodes.items() if "log_prob" in node}


def _as_minibatch(look: Look, sites: Mapping[str, Tensor]) -> Densities:
    """The same for the cells as rows of a larger data set; NaN if the program has no such rows."""
    rows = torch.tensor(ROWS, device=look.gamma.device)
    try:
        return _densities(look, sites, index=rows, n_cells=AMONG)
    except (IndexError, RuntimeError):
        return dict.fromkeys(sites, torch.full((), torch.nan))


def _while_training(look: Look, sites: Mapping[str, Tensor]) -> Densities:
    """The same in training mode. Empty for a program that notes something then, as batch norm does; it is undone."""
    held = {module: dict(module._buffers) for module in look.model.modules()}
    before = {id(one): one.clone() for buffers in held.values() for one in buffers.values() if one is not None}
    found, noted = _densities(replace(look, mode=_in_training), sites), False
    for module, buffers in held.items():
        for name, one in buffers.items():
            now = module._buffers.get(name)
            if one is not None and (now is not one or not torch.equal(one, before[id(one)])):
                noted = True
                module._buffers[name] = one
                one.copy_(before[id(one)])
    return {} if noted else found


def _without_counts(look: Look, sites: Mapping[str, Tensor]) -> Densities:
    """The same where the program draws x itself; of x at the counts of the look. Empty if it needs counts."""
    try:
        nodes: dict[str, Any] = look.scored(sites, drawn=True).nodes
    except (ModelError, TypeError, AttributeError, RuntimeError):  # said where counts are to be drawn
        return {}
    values = {name: look.x if name == "x" else node["value"] for name, node in nodes.items() if "log_prob" in node}
    return {name: nodes[name]["fn"].log_prob(value) for name, value in values.items()}


@contextmanager
def _in_training(model: SCVI) -> Iterator[None]:
    """Tell the program and parts of a user's own that they are in training; not the decoder, whose dropout may be."""
    own = [part for part in model.children() if part is not model.decoder]
    with evaluation_mode(model):
        for part in (model, *(part for part in own if not type(part).__module__.startswith(KNOWN))):
            part.training = True
        yield


def _require_same(model: SCVI, expected: Densities, found: Densities, other: _Other) -> None:
    for name in expected.keys() & found.keys():
        one, two = expected[name], found[name]
        if one.shape != two.shape or not torch.allclose(one, two, rtol=1e-4, equal_nan=True):
            raise ModelError(
                f"{type(model).__name__}: the density of the site {name!r} depends on {other.on}: {other.remedy}"
            )


def _require_shared(look: Look, sites: Mapping[str, Tensor], densities: Densities) -> None:
    """Compare densities of latents outside the plate of the cells where other cells, and fewer, are run."""
    few = [1, 2, 4]
    part = replace(look, x=look.x[few], gamma=look.gamma[few])
    of_few = _densities(part, {name: value[few] for name, value in sites.items()})
    shared = {name: value for name, value in of_few.items() if name in look.global_latents}
    _require_same(look.model, densities, shared, _CELLS)
