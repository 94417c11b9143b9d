"""The check that a program's densities are the same in every run, for a stack of draws, and for several cells."""

from collections.abc import Callable
from dataclasses import dataclass

import pyro
import torch
from torch import Tensor

from pyro_scvi.discovery import like
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.log_joint import cell_terms, scored
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import conditional
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.random_state import seeded

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
    for name in {name for look in looks for name in look if any(name not in other for other in looks)}:
        raise conditional(name)
    single = [{name: look[name] for name in coordinates.local} for look in looks]
    # Of gamma = 0 nothing would be seen that gamma multiplies; so each cell has each column at 1 in one of the looks.
    x, gamma = like(model).new_tensor([[1.0], [3.0]]).expand(-1, model.n_genes), model.varied_gamma(2)
    for constants in (gamma, gamma.flip(0)):
        look = _Look(model, coordinates, global_latents, x, constants)
        look.require_repeated(single[0])
        look.require_stackable(single)


@dataclass(frozen=True)
class _Look:
    """A program, and two cells for which its densities are compared."""

    model: SCVI
    coordinates: Coordinates
    global_latents: dict[str, Tensor]
    x: Tensor
    gamma: Tensor

    def require_repeated(self, sites: dict[str, Tensor]) -> None:
        """Compare the densities of all sites between two runs with random numbers of their own."""
        first, second = (self._scored(sites, slice(None), seed=seed).nodes for seed in (0, 1))
        for name, node in first.items():
            if "log_prob" in node and not torch.allclose(node["log_prob"], second[name]["log_prob"], equal_nan=True):
                raise ModelError(
                    f"{type(self.model).__name__}: the density of the site {name!r} differs between two runs at "
                    "the same latents, counts and covariates, so it depends on random numbers outside of sites "
                    "(torch.randn, dropout in evaluation mode) or on what an earlier run left behind: draw "
                    "random numbers by pyro.sample"
                )

    def require_stackable(self, single: list[dict[str, Tensor]]) -> None:
        """Compare densities at single draws with those of their stack, and of two cells with each alone."""
        stacked = {name: torch.stack([sites[name] for sites in single]) for name in single[0]}
        alone = torch.cat([self._log_joint(sites).reshape(1, -1) for sites in single])
        if not _gives(alone, lambda: self._log_joint(stacked)):
            raise ModelError(
                f"{type(self.model).__name__}: the log density of a stack of draws of {list(stacked)}, each (samples, "
                "cells, 1), is not that of each draw by itself: index from the right, as in z[..., 0, :1], and let all "
                "broadcast over leading dimensions"
            )
        self._require_cells_apart(single[0], alone[0])

    def _require_cells_apart(self, sites: dict[str, Tensor], together: Tensor) -> None:
        """Compare the log joint density of two cells ``together``, (cells,), with that of each without the other."""

        def alone() -> Tensor:
            parts = [{name: value[[n]] for name, value in sites.items()} for n in range(len(together))]
            return torch.cat([self._log_joint(part, slice(n, n + 1)).flatten() for n, part in enumerate(parts)])

        if not _gives(together, alone):
            raise ModelError(
                f"{type(self.model).__name__}: the log density of a cell depends on the cells that come with it, or on "
                "its place among them, so that cells have no evidence of their own: let what cells share be a latent "
                "outside the plate 'cells' or a parameter, and what is known of each be a column of gamma"
            )

    def _log_joint(self, sites: dict[str, Tensor], rows: slice = slice(None)) -> Tensor:
        """Log p(x, latents) (..., cells) of the cells in ``rows``."""
        trace = self._scored(sites, rows, seed=0)
        return torch.stack(cell_terms(trace, *sites)).sum(0)

    def _scored(self, sites: dict[str, Tensor], rows: slice, seed: int) -> pyro.poutine.Trace:
        given = self.global_latents | sites
        with (
            evaluation_mode(self.model),
            seeded(seed),
            torch.no_grad(),
            pyro.poutine.block(),
            pyro.validation_enabled(False),
        ):
            return scored(self.model, self.x[rows], self.gamma[rows], given, self.coordinates)


def _gives(expected: Tensor, computed: Callable[[], Tensor]) -> bool:
    """Whether densities can be computed and are those expected, up to rounding."""
    try:
        found = computed()
    except ModelError:
        raise
    except (RuntimeError, IndexError, ValueError):  # of shapes that do not fit
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, equal_nan=True)
