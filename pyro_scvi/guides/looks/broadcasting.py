"""The check that a program's densities are the same in every run, for a stack of draws, and for several cells."""

import torch
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.looks.look import Look, gives
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import require_met
from pyro_scvi.model import SCVI

DRAWS = 3
"""Another number than the two cells of a look, lest one be taken for the other."""


def require_broadcasting(model: SCVI, coordinates: Coordinates, global_latents: dict[str, Tensor]) -> None:
    """Refuse a program whose densities differ between runs, between single draws and a stack, or with other cells.

    What is random and no site is drawn anew whenever a density is evaluated, and nothing integrates over it. Training
    gives latents of shape (cells, 1), other verbs (samples, cells, 1): code that counts dimensions from the left takes
    draws for cells there. Cells come in batches of any kind: a density that depends on what is beside a cell is none of
    the cell.

    Raises
    ------
    ModelError
        If they differ, or cannot be computed for a stack or for one cell.
    """
    if is_packaged(model):
        return
    looks = [{site.name: site.value for site in model.discovered(seed=seed)} for seed in range(DRAWS)]
    require_met({name for look in looks for name in look if any(name not in other for other in looks)})
    single = [{name: look[name] for name in coordinates.local} for look in looks]
    # Of gamma = 0 nothing would be seen that gamma multiplies; so each cell has each column at 1 in one of the looks.
    x, gamma = like(model).new_tensor([[1.0], [3.0]]).expand(-1, model.n_genes), model.varied_gamma(2)
    for constants in (gamma, gamma.flip(0)):
        look = Look(model, coordinates, global_latents, x, constants)
        _require_repeated(look, single[0])
        _require_stackable(look, single)


def _require_repeated(look: Look, sites: dict[str, Tensor]) -> None:
    """Compare the densities of all sites between two runs with random numbers of their own."""
    first, second = (look.scored(sites, seed=seed).nodes for seed in (0, 1))
    for name, node in first.items():
        if "log_prob" in node and not torch.allclose(node["log_prob"], second[name]["log_prob"], equal_nan=True):
            raise ModelError(
                f"{type(look.model).__name__}: the density of the site {name!r} differs between two runs at "
                "the same latents, counts and covariates, so it depends on random numbers outside of sites "
                "(torch.randn, dropout in evaluation mode) or on what an earlier run left behind: draw "
                "random numbers by pyro.sample"
            )


def _require_stackable(look: Look, single: list[dict[str, Tensor]]) -> None:
    """Compare densities at single draws with those of their stack, and of two cells with each alone."""
    stacked = {name: torch.stack([sites[name] for sites in single]) for name in single[0]}
    alone = torch.cat([look.log_joint(sites).reshape(1, -1) for sites in single])
    if not gives(alone, lambda: look.log_joint(stacked)):
        raise ModelError(
            f"{type(look.model).__name__}: the log density of a stack of draws of {list(stacked)}, each (samples, "
            "cells, 1), is not that of each draw by itself: index from the right, as in z[..., 0, :1], and let all "
            "broadcast over leading dimensions"
        )
    look.require_apart(alone[0], lambda: torch.cat([look.log_joint_of(single[0], [n]) for n in range(len(alone[0]))]))
