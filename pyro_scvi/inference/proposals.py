"""Proposals for the posteriors of cells: starts from the guide, training cells and the prior, fitted to each cell.

A cell has one Student-t if its posterior has one mode as far as short climbs can tell, else a mixture of several.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import Joint, log_joint
from pyro_scvi.inference.evaluation import drawn_from_prior, draws_at_once
from pyro_scvi.inference.importance import (
    ImportanceResult,
    Mixture,
    Proposal,
    SamplingBudget,
    adapted,
    adapted_mixture,
    corrected_proposal,
    evidence_of,
    persistent_importance,
    refine,
    weighted_draws,
)
from pyro_scvi.inference.modes import AT_FIRST, FEW, MANY, MODES, SEVERAL, Modes, further_modes, separate_modes
from pyro_scvi.inference.refinement import DensityOf, fitted_normal
from pyro_scvi.inference.rounds import drawn_in_rounds
from pyro_scvi.inference.tailed import reaching
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.cell_streams import narrowed

CANDIDATES = 64  # prior draws that compete with the guide as a start
NARROWEST, WIDEST = 1e-3, 3.0  # standard deviations of the prior, between which a cell's scale starts
LEAST_UNIT = 1e-6  # of a climb's steps, where all candidates are one
MARGIN = 10.0  # nats by which they must win; smaller differences in density say little about where the mass is
APART = 30.0  # parts of the way to the next mode, one of which a mode is refined from as its scale, lest it reach that
EVEN = 0.2  # of the first shares of a mixture, spread evenly: Laplace's masses of modes are rough
LEAST_ROUNDS = 2  # of the adaptation of a mixture
ENTRIES = 256  # of counts that climbs of one cell start with: many starts cost little where there are few genes
SEARCHES = 4  # more, at most, where a cell has several modes; one that finds no other mode is the last
NO_MASS = -1e4  # nats; of a mode where the density is no number


class Fitted(NamedTuple):
    """Some of the cells, by row, with the log joint density of any of these, draws to evaluate at once, a proposal.

    ``heavy`` (size,) says for which coordinates draws of the proposal reach out, as their priors have heavy tails.
    """

    rows: Tensor
    density_of: DensityOf
    block: int
    proposal: Proposal | Mixture
    heavy: Tensor

    @property
    def density(self) -> LogJoint:
        """The log joint density of all of them."""
        return self.density_of(torch.arange(len(self.rows), device=self.rows.device))

    def weighted(self, samples: int) -> tuple[Tensor, Tensor]:
        """Draws (samples, cells, size) of the proposal, and their log weights (samples, cells)."""
        with narrowed(self.rows):
            return weighted_draws(self.density, reaching(self.proposal, self.heavy), samples, self.block)

    def adapted(self, rounds: int, samples: int) -> "Fitted":
        """With the proposal adapted to weighted draws; a mixture has been already."""
        proposal = self.proposal
        if isinstance(proposal, Mixture):
            return self
        with narrowed(self.rows):
            for _ in range(rounds):
                proposal = adapted(proposal, *weighted_draws(self.density, proposal, samples, self.block))
        return self._replace(proposal=proposal)

    def importance(self, budget: SamplingBudget) -> ImportanceResult:
        """Weighted draws and what they say of the evidence."""
        if not isinstance(self.proposal, Mixture):
            with narrowed(self.rows):
                return drawn_in_rounds(self.density_of, self.proposal, budget, self.block, self.heavy)
        draws, log_weights = self.weighted(budget.samples)
        several = torch.ones_like(log_weights[0], dtype=torch.bool)
        return ImportanceResult(*evidence_of(log_weights), draws, log_weights, several)


class Posteriors:
    """The posteriors of cells with counts x (cells, genes) and covariates gamma, their densities by ``joint``."""

    def __init__(self, guide: Guide, x: Tensor, gamma: Tensor, joint: Joint = log_joint) -> None:
        self.guide, self.x, self.gamma, self.joint = guide, x, gamma, joint
        self.density = self._density(joint)
        self.block = draws_at_once(x)

    def _density(self, joint: Joint) -> LogJoint:
        return joint(self.guide.model, self.x, self.gamma, self.guide.weights.medians())

    def density_of(self, rows: Tensor) -> LogJoint:
        """The log joint density of some of the cells, by rows in ascending order."""
        return self.density if len(rows) == len(self.x) else self.of(rows).density

    def of(self, rows: Tensor) -> "Posteriors":
        """Those of some of the cells; a row may occur several times."""
        return Posteriors(self.guide, self.x[rows], self.gamma[rows], self.joint)

    @torch.no_grad()
    def candidates(self) -> tuple[Tensor, Tensor]:
        """Points (n, cells, size) where modes may be, the guide's start first, and the density there, (n, cells).

        Beside the guide's are those of training cells and draws from the prior. None depends on the other cells here.
        """
        loc, _ = self.guide.start(self.x, self.gamma)
        points = torch.cat([loc[None], self.guide.landmarks_for(loc), *self._drawn_from_prior()])
        values = torch.cat([self.density(part) for part in points.split(self.block)])
        return points, values.nan_to_num(-torch.inf)

    def _drawn_from_prior(self) -> list[Tensor]:
        try:
            sites = drawn_from_prior(self.guide, self.gamma, CANDIDATES)
        except NotImplementedError:  # an improper prior has no draws
            return []
        return [self.guide.coordinates.of(sites)]

    def fitted(self, *, steps: int, rounds: int, samples: int = 500) -> list[Fitted]:
        """A proposal for every cell: the cells with one mode together, and those with several."""
        made = self.started(steps=steps, rounds=rounds, samples=samples)
        return [part.adapted(rounds, samples) for part in made]

    def started(self, *, steps: int, rounds: int, samples: int = 500, again: bool = False) -> list[Fitted]:
        """The same, before the proposals of cells with one mode are adapted to draws.

        ``again``: by gradient steps, as proposals by Newton steps have failed for these cells.
        """
        points, values = self.candidates()
        unit = torch.minimum(points.std(0), WIDEST * self._prior_scale(points)).clamp(min=LEAST_UNIT)
        modes, scale = self._modes(points, values, unit), self.scale_near(points)
        made, alone = list[Fitted](), modes.alone
        if len(alone):
            made.append(self._at_only_mode(alone, modes.places[0, alone], scale[alone], steps, again))
        if len(alone) < len(self.x):
            mixture = self._mixture(modes, scale, steps)
            made.append(self._adapted(mixture, modes.several, rounds, samples))
        return made

    def scale_near(self, points: Tensor) -> Tensor:
        """The guide's scale (cells, size), not far from that of the draws from the prior among candidates.

        An untrained guide knows no scales: gradient steps would not lead from it to those of the posterior.
        """
        _, scale = self.guide.start(self.x, self.gamma)
        prior = self._prior_scale(points)
        return scale.detach().maximum(NARROWEST * prior.nan_to_num(posinf=0.0)).minimum(WIDEST * prior)

    def _prior_scale(self, points: Tensor) -> Tensor:
        """Standard deviation (cells, size) of the draws from the prior among candidates; infinite if there are none."""
        from_prior = points[1 + len(self.guide.landmarks_for(points[0])) :]
        return from_prior.std(0) if len(from_prior) else torch.full_like(points[0], torch.inf)

    def _at_only_mode(self, rows: Tensor, loc: Tensor, scale: Tensor, steps: int, again: bool) -> Fitted:
        """The cells with one mode, each with a normal fitted to it."""
        part = self if len(rows) == len(self.x) else self.of(rows)
        with narrowed(rows):
            if again:
                proposal = corrected_proposal(part.density, loc, scale, steps=steps, rounds=0)
            else:
                proposal = fitted_normal(part.density_of, loc, scale, steps=steps, block=part.block)
        return Fitted(rows, part.density_of, part.block, proposal, self.guide.heavy_tailed)

    def _modes(self, points: Tensor, values: Tensor, unit: Tensor) -> Modes:
        """The modes that climbs find; a cell's only one is at the best candidate, unless this leads to no mass."""
        values[0] += MARGIN
        # The program itself, even where a compiled density is at hand: each new shape would be compiled.
        density = self._density(log_joint)
        starts = min(max(ENTRIES // self.x.shape[1], FEW), MANY)
        modes = MODES if starts == MANY else AT_FIRST
        found = separate_modes(density, points, values, unit, starts=starts, modes=modes, block=self.block)
        rows = (found.present.sum(0) >= SEVERAL).nonzero().squeeze(-1)
        if len(rows) and starts < MANY:
            of_rows = points[:, rows], values[:, rows], unit[rows]
            more = self.of(rows)._density(log_joint)
            found = found.with_more(rows, separate_modes(more, *of_rows, starts=MANY, modes=MODES, block=self.block))
        for _ in range(SEARCHES):
            rows = rows[found.present[:, rows].sum(0) >= SEVERAL]
            if not len(rows):
                break
            before = found.present[:, rows].sum(0)
            found = found.with_more(rows, self.of(rows)._further(rows, found.of(rows), unit[rows]))
            rows = rows[found.present[:, rows].sum(0) > before]
        return self._started(found, points, values)

    @torch.no_grad()
    def _further(self, rows: Tensor, found: Modes, unit: Tensor) -> Modes:
        """More modes of these cells, which are ``rows`` of all: from new draws of the prior, and mirrored modes."""
        with narrowed(rows):
            drawn = self._drawn_from_prior()
        centre = drawn[0].mean(0) if drawn else found.places.mean(0)
        points, density = torch.cat([found.mirrored(centre), *drawn]), self._density(log_joint)
        values = torch.cat([density(part) for part in points.split(self.block)])
        return further_modes(density, found, points, values, unit, block=self.block)

    @staticmethod
    def _started(found: Modes, points: Tensor, values: Tensor) -> Modes:
        """With the best candidate in the place of a cell's only mode, unless a climb from there leads to no mass."""
        kept = (found.start_is_low | (found.present.sum(0) > 1))[:, None]
        found.places[0] = torch.where(kept, found.places[0], _best(points, values))
        return found

    def _mixture(self, modes: Modes, scale: Tensor, steps: int) -> Mixture:
        """The mixtures of the cells with several modes: a component for each, refined as if it were a cell."""
        rows = modes.several
        cell, mode = modes.present[:, rows].T.nonzero().T
        cell = rows[cell]
        pairs = self.of(cell)
        # From a scale that does not reach the next mode.
        scale = torch.minimum(scale[cell], modes.nearest()[mode, cell][:, None] / APART)
        with narrowed(cell):
            by_pair = corrected_proposal(pairs.density, modes.places[mode, cell], scale, steps=steps, rounds=0)
        trils = torch.eye(by_pair.loc.shape[-1]).to(by_pair.loc).repeat(*modes.present.shape, 1, 1)
        modes.places[mode, cell], trils[mode, cell] = by_pair.loc, by_pair.scale_tril
        with torch.no_grad():
            heights = pairs.density(by_pair.loc[None])[0]
        heights = heights + by_pair.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        masses = torch.full_like(modes.places[..., 0], -torch.inf)
        masses[mode, cell] = heights.nan_to_num(NO_MASS)
        shares = (1 - EVEN) * masses.softmax(0) + EVEN * modes.present / modes.present.sum(0)
        return Mixture(Proposal(modes.places[:, rows], trils[:, rows]), shares[:, rows].log())

    def _adapted(self, mixture: Mixture, rows: Tensor, rounds: int, samples: int) -> Fitted:
        part = self.of(rows)
        with narrowed(rows):
            for _ in range(max(rounds, LEAST_ROUNDS)):  # without any, shares would be those of Laplace
                drawn = weighted_draws(part.density, mixture, samples, part.block)
                mixture = adapted_mixture(mixture, *drawn)
        return Fitted(rows, part.density_of, part.block, mixture, self.guide.heavy_tailed)


def start(guide: Guide, x: Tensor, gamma: Tensor, joint: Joint = log_joint) -> tuple[LogJoint, Tensor, Tensor]:
    """The log joint density of cells, by ``joint``, and location and scale (cells, size) to start from.

    The start is the guide's, except for cells where a training cell's or a draw from the prior has a much higher
    density. These are so far from the training cells that gradient steps from the guide's start may end in a mode
    without mass, which k-hat cannot detect.
    """
    cells = Posteriors(guide, x, gamma, joint)
    points, values = cells.candidates()
    values[0] += MARGIN
    return cells.density, _best(points, values), cells.scale_near(points)


def _best(points: Tensor, values: Tensor) -> Tensor:
    return points[values.argmax(0), torch.arange(points.shape[1], device=points.device)]


def normals(guide: Guide, x: Tensor, gamma: Tensor, *, steps: int) -> Proposal:
    """Normals fitted to the posteriors of cells by Newton steps, from the start."""
    cells, (_, loc, scale) = Posteriors(guide, x, gamma), start(guide, x, gamma)
    return fitted_normal(cells.density_of, loc, scale, steps=steps, block=cells.block)


@torch.enable_grad()
def refined(guide: Guide, x: Tensor, gamma: Tensor, *, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Location and scale (cells, size) of a diagonal normal, refined from the start by gradient steps on its bound."""
    return refine(*start(guide, x, gamma), steps=steps)


def weighted(
    guide: Guide, x: Tensor, gamma: Tensor, budget: SamplingBudget, *, joint: Joint = log_joint, attempts: int = 3
) -> ImportanceResult:
    """Weighted draws of every cell's latents, from a proposal fitted to that cell.

    Cells whose k-hat is above 0.7 are tried again with twice the budget, then four times; the best attempt counts.
    """
    cells = Posteriors(guide, x, gamma, joint)
    everyone = torch.arange(len(x), device=x.device)

    def run(rows: Tensor, budget: SamplingBudget) -> ImportanceResult:
        with narrowed(rows):
            return _importance(cells if rows is everyone else cells.of(rows), budget, again=rows is not everyone)

    return persistent_importance(run, everyone, budget, attempts=attempts)


def _importance(cells: Posteriors, budget: SamplingBudget, *, again: bool) -> ImportanceResult:
    options = {"steps": budget.steps, "rounds": budget.rounds, "samples": max(budget.samples // 2, 2)}
    made = cells.started(**options, again=again)
    results = [part.importance(budget) for part in made]
    return ImportanceResult(*(in_order(made, of, int(of[0].dim() > 1)) for of in zip(*results, strict=True)))


def in_order(made: list[Fitted], values: Sequence[Tensor], dim: int) -> Tensor:
    """What was found for each group of cells, in one tensor in the order of the cells, which are dimension ``dim``."""
    if len(made) == 1:
        return values[0]
    places = torch.cat([part.rows for part in made]).argsort()
    return torch.cat(list(values), dim).index_select(dim, places)
