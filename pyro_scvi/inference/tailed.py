"""Proposals that reach as far as priors with heavy tails do."""

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from pyro_scvi.inference.importance import Mixture, Proposal
from pyro_scvi.utils.cell_streams import per_cell

SHARE = 0.2  # of the draws, which are stretched


class Tailed(NamedTuple):
    r"""A proposal, and with a small share the same stretched, so that its tails are heavier than any power.

    .. math:: u_i = loc_i + \sigma_i \sinh((y_i - loc_i) / \sigma_i), \qquad y \sim wide

    for the coordinates that are ``heavy`` (size,), with the standard deviations sigma of ``wide``. Where the counts say
    little, a posterior has the tails of its prior. A Student-t misses these if they are heavier than its own, and k-hat
    does not show it.
    """

    core: Proposal | Mixture
    wide: Proposal
    heavy: Tensor

    def sample(self, samples: int) -> Tensor:
        """Draws of shape (samples, cells, latents)."""
        near, y = self.core.sample(samples), self.wide.sample(samples)
        with per_cell():
            uniform = torch.rand(near.shape[:2], dtype=near.dtype, device=near.device)
        sd = self._sd()
        far = self.wide.loc + torch.where(self.heavy, sd * ((y - self.wide.loc) / sd).sinh(), y - self.wide.loc)
        return torch.where((uniform < SHARE)[..., None], far, near)

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of u (samples, cells, latents), shape (samples, cells)."""
        sd = self._sd()
        distance = ((u - self.wide.loc) / sd).where(self.heavy, 0.0)
        y = torch.where(self.heavy, self.wide.loc + sd * distance.asinh(), u)
        far = self.wide.log_prob(y) - 0.5 * torch.log1p(distance.square()).sum(-1)
        return torch.logaddexp(self.log_prob_of_core(u), far + math.log(SHARE))

    def log_prob_of_core(self, u: Tensor) -> Tensor:
        """Log of the unstretched draws' share of the density."""
        return self.core.log_prob(u) + math.log1p(-SHARE)

    def _sd(self) -> Tensor:
        return self.wide.scale_tril.norm(dim=-1)


P = TypeVar("P", bound=Proposal | Mixture)


def reaching(proposal: P, heavy: Tensor) -> P | Tailed:
    """The proposal with tails for the coordinates that are ``heavy`` (size,); itself if none is."""
    if not bool(heavy.any()):
        return proposal
    wide = proposal.pooled() if isinstance(proposal, Mixture) else proposal
    return Tailed(proposal, wide, heavy.to(wide.loc.device))
