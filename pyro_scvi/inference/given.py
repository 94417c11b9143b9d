"""Given: draws of the cells' latents from elsewhere, as a sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.data.names import positions_of
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.guides.global_draws import GlobalDraws, parsed_draws, require_finite
from pyro_scvi.inference.samplers import Draws, Sampler, require_sampler
from pyro_scvi.utils.cell_streams import per_cell

if TYPE_CHECKING:
    from pyro_scvi.data.cells import Cells

Rows = dict[bytes, list[int]]


class Given:
    """Draws of your own, from NUTS, a JAX sampler or anything else, in the place of a sampler.

    Every verb that takes ``sampler=`` then computes with them. They are conditional on global latents, whose medians
    the verbs take: ``fit.with_globals`` sets these. Where draws of global latents are among these draws, as after NUTS
    over everything, ``global_draws=`` of a fit ``with_globals(draws)`` computes with each of them, and with the latents
    of the cells that were drawn beside it.

    Parameters
    ----------
    draws
        Of every latent of the cells: a dict of arrays (samples, cells) and an event, in the order of the cells that the
        verb is given; or an xarray Dataset with dimensions (sample, cell, ...) or (chain, draw, cell, ...), whose cells
        are found by name. ``ps.log_density(...).constrain(u)`` has this form.

    Raises
    ------
    ModelError
        If it is neither. When it draws, if a latent is missing, of another shape, not finite or outside its support,
        if latents have different numbers of draws, or there are fewer draws than asked for.
    DataError
        When it draws, if a cell has no draws, or cells cannot be told apart by their names.

    Examples
    --------
    >>> few = test.take(range(3))
    >>> draws = ps.sample_posterior(fit, few, samples=50, sites=("z", "l"), diagnostics=False)
    >>> again = ps.sample_posterior(fit, few, samples=50, sites=("z", "l"), sampler=ps.Given(draws))
    >>> bool((again.z == draws.z).all())
    True
    """

    def __init__(self, draws: Any) -> None:
        self.sites, self.chains, self.names = parsed_draws(draws, "draws")
        self.shared = self.sites  # draws of global latents are among them, with the names of the model's
        self.rows: Rows | None = None
        self.gammas = list[bytes]()

    def __repr__(self) -> str:
        return f"Given({list(self.sites)})"

    def for_cells(self, cells: Cells) -> Given:
        """These draws for some cells; rows are found by their counts, because analyses take cells in any order."""
        bound = Given.__new__(Given)
        bound.sites, bound.chains, bound.names = self._of(cells), self.chains, self.names
        bound.shared = self.shared
        bound.rows, bound.gammas = {}, []
        for start in range(0, cells.n_cells, 1024):
            x, gamma = cells[slice(start, min(start + 1024, cells.n_cells))]
            for counts, constants in zip(x, gamma, strict=True):
                bound.rows.setdefault(_key(counts), []).append(len(bound.gammas))
                bound.gammas.append(_key(constants))
        return bound

    def _of(self, cells: Cells) -> dict[str, Tensor]:
        """Draws in the order of the cells."""
        given = cells.n_cells if self.names is None else len(self.names)
        own = {name: value for name, value in self.sites.items() if value.dim() > 1 and value.shape[1] == given}
        if not own:
            shapes = {name: tuple(value.shape) for name, value in self.sites.items()}
            raise ModelError(f"draws must have shape (samples, cells, ...) with {given} cells; got {shapes}")
        if self.names is None:
            return own
        chosen = torch.from_numpy(positions_of(cells.cell_names, pd.Index(self.names), "the draws"))
        return {name: value[:, chosen] for name, value in own.items()}

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """``samples`` of the draws of each cell, at random if there are more."""
        if self.rows is None:
            raise ModelError("there are no draws of these cells: ps.Given has draws of the cells that it was made for")
        rows = torch.tensor([self._row(*pair) for pair in zip(x, gamma, strict=True)])
        local = guide.coordinates.local
        if missing := [name for name in local if name not in self.sites]:
            raise ModelError(f"ps.Given needs draws of {list(local)}; {missing} are missing, or not of these cells")
        made = self._beside(guide, self._number(guide))
        n_draws = len(made)
        if samples > n_draws:
            beside = " made together with one draw of the global latents" if self.differs_by(guide) else ""
            raise ModelError(
                f"there are {n_draws} draws of each cell{beside}, and {samples} are asked for: give more draws, or ask "
                "for fewer, by samples= where the function has it, or by most_pairs= of RandomPairs, which takes "
                "another draw each time that a cell is in a pair"
            )
        with per_cell():  # from the stream that cells share, which is the same in each batch
            order = made if samples == n_draws else made[torch.randperm(n_draws)[:samples].sort().values]
        sites = {name: _shaped(site, self.sites[name][order][:, rows]).to(x) for name, site in local.items()}
        return Draws(sites, dict, self.chains if samples == n_draws else 1)

    def differs_by(self, guide: Guide) -> list[str]:
        """Names of the guide's global latents of which these draws hold more than one value."""
        held = [name for name in guide.weights.supports if name in self.shared]
        return [name for name in held if bool((self.shared[name] != self.shared[name][:1]).any())]

    def _number(self, guide: Guide) -> int:
        """How many draws there are; refuses different numbers of them, whose first would be taken for pairs."""
        numbers = {name: len(self.sites[name]) for name in guide.coordinates.local}
        numbers |= {name: len(self.shared[name]) for name in self.differs_by(guide)}
        if len(set(numbers.values())) > 1:
            raise ModelError(
                f"draws of all latents must be of the same number, because they were made together, got {numbers}"
            )
        return next(iter(numbers.values()))

    def _beside(self, guide: Guide, n_draws: int) -> Tensor:
        """Which draws were made with the value of the guide's global latents: all, if they are at no one draw."""
        names, weights = self.differs_by(guide), guide.weights
        if not names or not isinstance(weights, GlobalDraws) or weights.n_draws > 1:
            return torch.arange(n_draws)
        same = torch.ones(n_draws, dtype=torch.bool)
        for name, value in weights.medians().items():
            if name in names and len(self.shared[name]) == n_draws:
                same &= (self.shared[name].to(value) == value).reshape(n_draws, -1).all(1).cpu()
        if not bool(same.any()):
            raise ModelError(
                f"none of the draws was made together with these values of {names}: call fit.with_globals with the "
                "same draws"
            )
        return same.nonzero().squeeze(1)

    def _row(self, counts: Tensor, constants: Tensor) -> int:
        """The row of a cell; cells with the same counts and covariates have the same posterior."""
        rows = (self.rows or {}).get(_key(counts), [])
        same = rows if len(rows) < 2 else [row for row in rows if self.gammas[row] == _key(constants)]
        if not same:
            raise ModelError("there are no draws of a cell: ps.Given has draws of the cells that it was made for")
        return same[0]


def sampler_for(sampler: Any, cells: Cells, at_medians: Guide | None = None) -> Sampler:
    """The sampler, told of the cells if it wants to know; refuses what is none.

    ``at_medians`` is the guide at whose medians of global latents the verb computes, if it does.

    Raises
    ------
    ModelError
        If it is no sampler, has no draws of the cells, or has draws beside several values of these global latents.
    """
    require_sampler(sampler)
    if at_medians is not None:
        _require_one_value(sampler, at_medians)
    told: Any = getattr(sampler, "for_cells", None)
    bound: Sampler = sampler if told is None else told(cells)
    return bound


def _require_one_value(sampler: Any, guide: Guide) -> None:
    """Refuse draws made together with several values of global latents, where the guide's medians would be taken."""
    beside = sampler.differs_by(guide) if isinstance(sampler, Given) else []
    if beside and not (isinstance(guide.weights, GlobalDraws) and guide.weights.n_draws == 1):
        raise ModelError(
            f"these draws were made together with draws of {beside}, but their medians would be used here. Call "
            "fit.with_globals(draws) and pass global_draws= to impute, posterior_predictive or RandomPairs, which have "
            "it. For other functions, such as GroupMeans, give with_globals and ps.Given a single draw"
        )


def _key(row: Tensor) -> bytes:
    return row.detach().float().cpu().numpy().tobytes()


def _shaped(site: LocalSite, value: Tensor) -> Tensor:
    """Values (samples, cells, 1) and their event."""
    event = tuple(site.event_shape)
    if tuple(value.shape[2:]) not in (event, (1, *event)):
        raise ModelError(f"draws of {site.name!r} must be (samples, cells) and an event {event}, got {value.shape[2:]}")
    shaped = value.reshape(*value.shape[:2], 1, *event)
    require_finite(site.name, value)
    if not bool(site.support.check(shaped).all()):
        raise ModelError(f"draws of {site.name!r} lie outside its support {site.support}")
    return shaped
