"""Weighted draws in rounds, between which each cell's proposal takes up what its draws show.

A draw's weight is by the proposal that it came from, which rests on earlier rounds alone: so the mean weight of the
draws that count is an unbiased estimate of the evidence. How many count does not depend on how they look. To stop once
they look good would make the estimate too low, and would call certain what rests on draws without a large weight.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.inference.importance import (
    ImportanceResult,
    Proposal,
    SamplingBudget,
    evidence_of,
    weighted_draws,
    with_moments,
)
from pyro_scvi.inference.refinement import DensityOf
from pyro_scvi.inference.tailed import Tailed, reaching
from pyro_scvi.utils.cell_streams import narrowed
from pyro_scvi.utils.precision import in_float64

MOST_PARTS, FEWEST_DRAWS = 4, 100  # of all draws of a cell: rounds these come in, and draws of a round
GOOD_SHARE = 0.5  # of effective draws in a round; a better proposal than that gains nothing by adaptation
CLIPPED = 5  # largest weights of each round, but half of the latents, that count as the next when moments are taken
SURE_KHAT = 0.5  # below it the weights have a variance


class _Round(NamedTuple):
    """Draws (draws, cells, size) of a round, their log joint density (draws, cells), and the proposal they are from.

    Draws reach out along the coordinates that are ``heavy``, (size,).
    """

    draws: Tensor
    log_density: Tensor
    proposal: Proposal
    heavy: Tensor

    def of(self, cells: Tensor) -> "_Round":
        """The round of some of the cells."""
        proposal = Proposal(*(of[cells] for of in self.proposal))
        return self._replace(draws=self.draws[:, cells], log_density=self.log_density[:, cells], proposal=proposal)

    @property
    def source(self) -> Proposal | Tailed:
        """What the draws are from."""
        return reaching(self.proposal, self.heavy)

    def log_share(self, u: Tensor) -> Tensor:
        """Log of the share of draws at u (draws, cells, size) that are from the proposal itself."""
        source = self.source
        of_core = source.log_prob_of_core(u) - source.log_prob(u) if isinstance(source, Tailed) else u.new_zeros(())
        return in_float64(of_core)


class _Counted:
    """The draws that count, of every cell: one part after the other, each of a round."""

    def __init__(self, like: Tensor, samples: int) -> None:
        cells = len(like)
        self.samples, self.parts = samples, min(max(samples // FEWEST_DRAWS, 1), MOST_PARTS)
        self.length = math.ceil(samples / self.parts)
        self.draws = like.repeat(self.parts, self.length, 1, 1)
        self.log_weights = in_float64(self.draws[..., 0]).clone()  # what is in float64 already is not copied
        self.held = torch.zeros(cells, dtype=torch.long, device=like.device)

    def add(self, cells: Tensor, draws: Tensor, log_weights: Tensor) -> None:
        """Put a round of some cells behind what they have."""
        part = self.held[cells]
        self.draws[part, :, cells] = draws.transpose(0, 1)
        at = self.log_weights.device
        self.log_weights[part.to(at), :, cells.to(at)] = log_weights.T
        self.held[cells] += 1

    def lack(self, cells: Tensor) -> Tensor:
        """Whether some cells have too few."""
        return self.held[cells] < self.parts

    def found(self) -> ImportanceResult:
        """The result, when no cell lacks any."""
        draws, log_weights = (of.flatten(0, 1)[: self.samples] for of in (self.draws, self.log_weights))
        several = torch.zeros_like(log_weights[0], dtype=torch.bool)
        return ImportanceResult(*evidence_of(log_weights), draws, log_weights, several)


def drawn_in_rounds(
    density_of: DensityOf, proposal: Proposal, budget: SamplingBudget, block: int, heavy: Tensor | None = None
) -> ImportanceResult:
    """Weighted draws of every cell in rounds, ``budget.samples`` that count.

    A cell's first round, half as long, and those after a round with a k-hat above 0.5 only adapt the proposal, but no
    more than ``budget.rounds`` rounds do. Draws reach out along the coordinates that are ``heavy``, (size,).
    """
    heavy = torch.zeros_like(proposal.loc[0], dtype=torch.bool) if heavy is None else heavy
    counted = _Counted(proposal.loc, budget.samples)
    rows = torch.arange(len(proposal.loc), device=proposal.loc.device)
    density, history = density_of(rows), list[_Round]()
    counts = torch.full_like(rows, budget.rounds == 0, dtype=torch.bool)
    for number in range(budget.rounds + counted.parts):
        length = counted.length if number or not budget.rounds else math.ceil(counted.length / 2)
        with narrowed(rows):
            source = reaching(proposal, heavy)
            draws, log_weights = weighted_draws(density, source, length, block)
        history.append(_Round(draws, log_weights + in_float64(source.log_prob(draws)), proposal, heavy))
        if bool(counts.any()):
            counted.add(rows[counts], draws[:, counts], log_weights[:, counts.to(log_weights.device)])
        _, _, ess, khat = evidence_of(log_weights)
        counts |= (khat <= SURE_KHAT).to(rows.device) | (number + 1 >= budget.rounds)
        good = ((ess >= GOOD_SHARE * length) & (khat <= SURE_KHAT)).to(rows.device)
        left = counted.lack(rows).nonzero().squeeze(-1)
        if not len(left):
            break
        if len(left) < len(rows):
            rows, counts, history = rows[left], counts[left], [one.of(left) for one in history]
            density = density_of(rows)
        proposal = _where(good[left], history[-1].proposal, adapted_to_all(history))
    return counted.found()


def _where(cells: Tensor, these: Proposal, others: Proposal) -> Proposal:
    loc = torch.where(cells[:, None], these.loc, others.loc)
    return Proposal(loc, torch.where(cells[:, None, None], these.scale_tril, others.scale_tril))


def adapted_to_all(history: list[_Round]) -> Proposal:
    """The last proposal, with the mean and covariance of all rounds' draws as far as these can tell.

    The draws are weighed by the mixture of the proposals that they came from (Cornuet et al. 2012). What they say of
    each parameter counts by their effective number, and the last proposal counts as one draw for each parameter.
    """
    last = history[-1].proposal
    draws = torch.cat([one.draws for one in history])
    weights, held = _clipped_weights(history, draws)
    size, ess = draws.shape[-1], (held / weights.square().sum(0))[:, None]
    of_loc, of_tril = size / (size + ess), size * (size + 3) / (size * (size + 3) + 2 * ess)
    return with_moments(last, draws, weights, of_loc, of_tril)


def _clipped_weights(history: list[_Round], draws: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised weights (draws, cells) of all draws, the largest clipped, and which cells have any weight, 0 or 1."""
    of_rounds = [in_float64(one.source.log_prob(draws)) + math.log(len(one.draws)) for one in history]
    log_mixture = torch.stack(of_rounds).logsumexp(0) - math.log(len(draws))
    log_density = torch.cat([one.log_density for one in history])
    log_weights = log_density - log_mixture + history[-1].log_share(draws)
    log_weights = log_weights.nan_to_num(nan=-math.inf, posinf=-math.inf)
    # A few draws with most of the weight say little of a covariance (Koblents and Miguez 2015).
    top = min(min(CLIPPED, draws.shape[-1] // 2) * len(history), len(draws) - 1)
    log_weights = torch.minimum(log_weights, log_weights.topk(top + 1, dim=0).values[-1])
    held = torch.isfinite(log_weights.amax(0))
    return log_weights.softmax(0).nan_to_num(1 / len(draws)), held.to(log_weights.dtype)
