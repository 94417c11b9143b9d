"""Proposals for importance sampling: starts from the guide and from the prior, refined for each cell."""

import torch
from torch import Tensor

from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import Joint, log_joint
from pyro_scvi.inference.evaluation import drawn_from_prior, draws_at_once
from pyro_scvi.inference.importance import Importance, SamplingBudget, Target, persistent_importance, refine
from pyro_scvi.types import LogJoint

CANDIDATES = 64  # prior draws that compete with the guide as a start
MARGIN = 10.0  # nats by which they must win; smaller differences in density say little about where the mass is


def start(guide: Guide, x: Tensor, gamma: Tensor, joint: Joint = log_joint) -> tuple[LogJoint, Tensor, Tensor]:
    """The log joint density of cells, by ``joint``, and location and scale (cells, size) to start from.

    The start is the guide's, except for cells where a draw from the prior has a much higher density. These are so far
    from the training cells that gradient steps from the guide's start may end in a mode without mass, which k-hat
    cannot detect.
    """
    fixed = guide.weights.medians()
    density = joint(guide.model, x, gamma, fixed)
    loc, scale = guide.start(x, gamma)
    with torch.no_grad():
        candidates = torch.cat([loc[None], *_drawn_from_prior(guide, gamma)])
        values = torch.cat([density(part) for part in candidates.split(draws_at_once(x))])
        values[0] += MARGIN
        best = values.nan_to_num(-torch.inf).argmax(0)
    return density, candidates[best, torch.arange(len(x), device=x.device)], scale.detach()


def _drawn_from_prior(guide: Guide, gamma: Tensor) -> list[Tensor]:
    try:
        sites = drawn_from_prior(guide, gamma, CANDIDATES)
    except NotImplementedError:  # an improper prior has no draws
        return []
    return [guide.coordinates.of(sites)]


@torch.enable_grad()
def refined(guide: Guide, x: Tensor, gamma: Tensor, *, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Location and scale (cells, size) of a diagonal normal, refined from the start by gradient steps on its bound."""
    return refine(*start(guide, x, gamma), steps=steps)


def weighted(
    guide: Guide, x: Tensor, gamma: Tensor, budget: SamplingBudget, *, joint: Joint = log_joint, attempts: int = 3
) -> Importance:
    """Weighted draws of every cell's latents, from a proposal fitted to that cell.

    Cells whose k-hat is above 0.7 are tried again with twice the budget, then four times; the best attempt counts.
    """

    def target(rows: Tensor) -> Target:
        return Target(*start(guide, x[rows], gamma[rows], joint), draws_at_once(x[rows]))

    return persistent_importance(target, torch.arange(len(x), device=x.device), budget, attempts=attempts)
