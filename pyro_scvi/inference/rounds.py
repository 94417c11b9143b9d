"""Weighted draws in rounds: each cell's proposal takes up what its draws show, and a cell gets as many as it needs.

A draw's weight is by the proposal that it came from, which rests on earlier rounds alone. How many draws count rests
on rounds that do not: so the mean weight of those that count is an unbiased estimate of the evidence. To stop once
they look good would make it too low: weights without a large one among them have a small mean and a small error.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.inference.importance import (
    KHAT_LIMIT,
    Importance,
    Proposal,
    SamplingBudget,
    evidence_of,
    weighted_draws,
)
from pyro_scvi.inference.refinement import DensityOf
from pyro_scvi.utils.cell_streams import narrowed
from pyro_scvi.utils.precision import in_float64, put_back

MOST_PARTS, FEWEST_DRAWS = 4, 100  # of all draws of a cell: rounds these come in, and draws of a round
GOOD_SHARE = 0.5  # of effective draws in a round; a better proposal than that gains nothing by adaptation
CLIPPED = 5  # largest weights of each round, but half of the latents, that count as the next when moments are taken
SURE_KHAT = 0.5  # below it the weights have a variance, and a standard error means what it says


class _Round(NamedTuple):
    """Draws (draws, cells, size) of a round, their log joint density (draws, cells), and the proposal they are from."""

    draws: Tensor
    log_density: Tensor
    proposal: Proposal

    def of(self, cells: Tensor) -> "_Round":
        """The round of some of the cells."""
        return _Round(self.draws[:, cells], self.log_density[:, cells], Proposal(*(of[cells] for of in self.proposal)))


class _Counted:
    """The draws that count, of every cell: one part after the other, each of a round."""

    def __init__(self, like: Tensor, samples: int) -> None:
        cells = len(like)
        self.samples, self.parts = samples, min(max(samples // FEWEST_DRAWS, 1), MOST_PARTS)
        self.length = math.ceil(samples / self.parts)
        self.draws = like.repeat(self.parts, self.length, 1, 1)
        self.log_weights = torch.full_like(in_float64(self.draws[..., 0]), -math.inf)
        self.held = torch.zeros(cells, dtype=torch.long, device=like.device)

    def add(self, cells: Tensor, draws: Tensor, log_weights: Tensor) -> None:
        """Put a round of some cells, if there are any, behind what they have."""
        if not len(cells):
            return
        part = self.held[cells]
        self.draws[part, :, cells] = draws.transpose(0, 1)
        weights_at = part.to(self.log_weights.device), slice(None), cells.to(self.log_weights.device)
        self.log_weights[weights_at] = log_weights.T
        self.held[cells] += 1

    def found(self) -> Importance:
        """The result; log weights of draws that were not made are -inf."""
        draws = self.draws.flatten(0, 1)[: self.samples]
        log_weights = self.log_weights.flatten(0, 1)[: self.samples]
        columns = torch.full((4, log_weights.shape[1]), torch.nan, dtype=log_weights.dtype, device=log_weights.device)
        for parts in range(1, self.parts + 1):
            cells = (self.held == parts).nonzero().squeeze(-1).to(log_weights.device)
            if len(cells):
                columns[:, cells] = torch.stack(evidence_of(log_weights[: parts * self.length, cells]))
        log_evidence, se, ess, khat = columns
        return Importance(log_evidence, se, ess, khat, draws, log_weights)


class _Looks(NamedTuple):
    """What a round of ``draws`` shows of each cell's proposal, (cells,)."""

    draws: int
    se: Tensor
    ess: Tensor
    khat: Tensor

    def parts_needed(self, enough: float, counted: _Counted, *, last: bool) -> Tensor:
        """Parts for a standard error of ``enough``; 0 where the proposal has to be adapted once more."""
        needed = self.se.square() * self.draws / counted.length / enough**2
        needed = needed.where(self.khat <= SURE_KHAT, counted.parts).nan_to_num(counted.parts)
        return needed.ceil().clamp(1, counted.parts).where((self.khat <= KHAT_LIMIT) | last, 0).long()

    def good(self) -> Tensor:
        """Whether the proposal is kept."""
        return (self.ess >= GOOD_SHARE * self.draws) & (self.khat <= SURE_KHAT)


def drawn_in_rounds(density_of: DensityOf, proposal: Proposal, budget: SamplingBudget, block: int) -> Importance:
    """Weighted draws of every cell in rounds, at most ``budget.samples`` that count.

    A cell's first round, half as long, and those after a round with a k-hat above 0.7 only adapt the proposal, but no
    more than ``budget.rounds`` rounds do. The last of these tells how many draws are needed for a standard error of
    ``budget.enough``. Where its k-hat is above 0.5, all are made.
    """
    counted = _Counted(proposal.loc, budget.samples)
    rows = torch.arange(len(proposal.loc), device=proposal.loc.device)
    density, history = density_of(rows), list[_Round]()
    parts = torch.full_like(rows, 0 if budget.rounds else counted.parts)  # 0 while draws only adapt
    for number in range(budget.rounds + counted.parts):
        counts, length = parts > 0, counted.length if number or not budget.rounds else math.ceil(counted.length / 2)
        with narrowed(rows):
            draws, log_weights = weighted_draws(density, proposal, length, block)
        history.append(_Round(draws, log_weights + in_float64(proposal.log_prob(draws)), proposal))
        counted.add(rows[counts], draws[:, counts], log_weights[:, counts.to(log_weights.device)])
        looks = _Looks(length, *(of.to(rows.device) for of in evidence_of(log_weights)[1:]))
        last = number + 1 >= budget.rounds
        parts = torch.where(counts, parts, looks.parts_needed(budget.enough, counted, last=last))
        left = ((parts == 0) | (counted.held[rows] < parts)).nonzero().squeeze(-1)
        if not len(left):
            break
        if len(left) < len(rows):
            rows, parts, history = rows[left], parts[left], [one.of(left) for one in history]
            density = density_of(rows)
        proposal = _where(looks.good()[left], history[-1].proposal, adapted_to_all(history))
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
    u, loc, tril = in_float64(draws), in_float64(last.loc), in_float64(last.scale_tril)
    mean = torch.einsum("sc,sci->ci", weights, u)
    covariance = torch.einsum("sc,sci,scj->cij", weights, u - mean, u - mean)
    covariance = (1 - of_tril[..., None]) * covariance + of_tril[..., None] * (tril @ tril.mT)
    new_tril, failed = torch.linalg.cholesky_ex(covariance)
    kept = (failed > 0) | ~torch.isfinite(new_tril).flatten(1).all(1)
    new_loc = torch.where(kept[:, None], loc, (1 - of_loc) * mean + of_loc * loc)
    new_tril = torch.where(kept[:, None, None], tril, new_tril)
    return Proposal(put_back(new_loc, last.loc), put_back(new_tril, last.loc))


def _clipped_weights(history: list[_Round], draws: Tensor) -> tuple[Tensor, Tensor]:
    """Normalised weights (draws, cells) of all draws, the largest clipped, and which cells have any weight, 0 or 1."""
    of_rounds = [in_float64(one.proposal.log_prob(draws)) + math.log(len(one.draws)) for one in history]
    log_mixture = torch.stack(of_rounds).logsumexp(0) - math.log(len(draws))
    log_density = torch.cat([one.log_density for one in history])
    log_weights = (log_density - log_mixture).nan_to_num(nan=-math.inf, posinf=-math.inf)
    # A few draws with most of the weight say little of a covariance (Koblents and Miguez 2015).
    top = min(min(CLIPPED, draws.shape[-1] // 2) * len(history), len(draws) - 1)
    log_weights = torch.minimum(log_weights, log_weights.topk(top + 1, dim=0).values[-1])
    held = torch.isfinite(log_weights.amax(0))
    return log_weights.softmax(0).nan_to_num(1 / len(draws)), held.to(log_weights.dtype)
