"""A program, and cells for which its densities are looked at before any verb computes with them."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.log_joint import cell_terms, scored
from pyro_scvi.likelihoods.library_size import Library
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.random_state import seeded


@dataclass(frozen=True)
class Look:
    """A program at given global latents, and cells: counts x (cells, genes) and covariates gamma."""

    model: SCVI
    coordinates: Coordinates
    global_latents: Mapping[str, Tensor]
    x: Tensor
    gamma: Tensor
    mode: Callable[[SCVI], AbstractContextManager[None]] = evaluation_mode

    def scored(
        self, sites: Mapping[str, Tensor], *, seed: int = 0, drawn: bool = False, **batch: Any
    ) -> pyro.poutine.Trace:
        """The program's trace at these latents of the cells; discrete ones are summed out.

        With ``drawn``, the program has no counts and draws them. ``batch`` are further arguments of it.

        Raises
        ------
        ModelError
            Naming what the program changes in place.
        """
        given = {**self.global_latents, **sites, "x": self.x, "gamma": self.gamma}
        own = {name: value.clone() for name, value in given.items()}
        x, gamma = own.pop("x"), own.pop("gamma")
        with (
            self.mode(self.model),
            seeded(seed),
            torch.no_grad(),
            pyro.poutine.block(),
            pyro.validation_enabled(False),
        ):
            trace = scored(self.model, None if drawn else x, gamma, own, self.coordinates, **batch)
        for name, value in {**own, "x": x, "gamma": gamma}.items():
            if not torch.equal(value, given[name]):
                raise ModelError(
                    f"{type(self.model).__name__} changes the value of {name!r} in place, as {name} += 1 and "
                    f"{name}.mul_(2) do, so that its density is that of another value: write {name} = {name} + 1"
                )
        return trace

    def log_joint(self, sites: Mapping[str, Tensor]) -> Tensor:
        """Log p(x, latents) (..., cells)."""
        return torch.stack(cell_terms(self.scored(sites), *sites)).sum(0)

    def log_joint_of(self, sites: Mapping[str, Tensor], rows: list[int]) -> Tensor:
        """Log p(x, latents) (cells,) of the cells in these rows, without the others, at latents of all cells."""
        part = Look(self.model, self.coordinates, self.global_latents, self.x[rows], self.gamma[rows])
        return part.log_joint({name: value[rows] for name, value in sites.items()}).reshape(len(rows))

    def require_apart(self, expected: Tensor, computed: Callable[[], Tensor]) -> None:
        """Refuse densities of cells that are not those ``expected`` when other cells, or none, come with them.

        Raises
        ------
        ModelError
            If they differ or cannot be computed.
        """
        if not gives(expected, computed):
            raise ModelError(
                f"{type(self.model).__name__}: the log density of a cell depends on the cells that come with it, on "
                "how many these are, or on its place among them, so that cells have no evidence of their own: let "
                "what cells share be a latent outside the plate 'cells' or a parameter, and what is known of each be "
                "a column of gamma"
            )


def gives(expected: Tensor, computed: Callable[[], Tensor]) -> bool:
    """Whether densities can be computed and are those expected, up to rounding."""
    try:
        found = computed()
    except ModelError:
        raise
    except (RuntimeError, IndexError, ValueError):  # of shapes that do not fit
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, equal_nan=True)


@contextmanager
def held_library(model: SCVI) -> Iterator[None]:
    """Let a library that takes a cell's total, and has a distribution of it, give what it gave at first."""
    if type(model.library).log_prob_of_total is Library.log_prob_of_total:
        yield
        return
    held: list[Any] = []

    def first(*of_call: Any) -> Any:
        held.append(of_call[-1])
        return held[0]

    handle = model.library.register_forward_hook(first)
    try:
        yield
    finally:
        handle.remove()
