"""Samplers of a cell's posterior p(z, l | x), from cheap to exact, each with diagnostics for every cell."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_scvi.chains import Chains, bulk_ess, rank_normalised_rhat, sample_chains
from pyro_scvi.errors import ModelError
from pyro_scvi.guides import Guide
from pyro_scvi.importance import (
    LogJoint,
    Proposal,
    evidence_of,
    laplace_scale_tril,
    refine,
    weighted_draws,
)
from pyro_scvi.posterior import Effort, draws_at_once, start, weigh, weighted
from pyro_scvi.priors import Flat


class Draws(NamedTuple):
    """Sites z (samples, cells, 1, latents) and l (samples, cells, 1), and how to diagnose them.

    ``diagnose()`` gives diagnostics by name, each (cells,); some cost as much as the draws, so they wait to be asked.
    Of several ``chains``, sample = draw * chains + chain.
    """

    sites: dict[str, Tensor]
    diagnose: Callable[[], dict[str, Tensor]]
    chains: int = 1


class Sampler(Protocol):
    """Anything that draws the latents of cells."""

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """``samples`` draws for counts x (cells, genes) with covariates gamma (cells, covariates)."""
        ...


@dataclass(frozen=True)
class Amortized:
    """The guide itself. ``khat`` and ``ess`` say how far its draws are from the posterior: on real cells, far.

    The draws of a guide without a density (Point) are one point: ``khat`` infinite, ``ess`` 1.
    """

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Draw from q(z, l | x)."""
        if not guide.amortized:
            raise ModelError(
                f"{type(guide).__name__} cannot encode cells; take ps.Refined(), ps.Importance() or ps.HMC()"
            )
        sites, log_q = guide.draw(x, gamma, samples)
        if not guide.stochastic:
            ones = torch.ones_like(log_q[0])
            return Draws(sites, lambda: {"khat": ones * torch.inf, "ess": ones})
        return Draws(sites, lambda: _diagnosed(weigh(guide, x, gamma, sites, log_q)[0].double()))


@dataclass(frozen=True)
class Refined:
    """q refined for the cell by ``steps`` gradient steps, with the full covariance of a Laplace step (Student-t)."""

    steps: int = 100

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Draw from the refined proposal."""
        _require_density(guide)
        density, loc, scale = start(guide, x, gamma)
        proposal = _refined_proposal(density, loc, scale, self.steps)
        u, log_weights = weighted_draws(density, proposal, samples, draws_at_once(x))
        return Draws(guide.coordinates.sites(u), lambda: _diagnosed(log_weights))


@dataclass(frozen=True)
class Importance:
    """Draws resampled from an adapted proposal by their importance weights; trust cells with ``khat`` below 0.7.

    Cells above are tried again with twice the ``steps`` and ``rounds``.
    """

    steps: int = 100
    rounds: int = 3
    proposals: int = 1000

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Resample ``samples`` of ``proposals`` weighted draws for each cell."""
        _require_density(guide)
        found = weighted(guide, x, gamma, Effort(max(self.proposals, samples), self.steps, self.rounds))
        chosen = torch.multinomial(found.log_weights.softmax(0).T, samples, replacement=True).T  # (samples, cells)
        u = found.draws.gather(0, chosen[..., None].expand(-1, -1, found.draws.shape[-1]))
        return Draws(guide.coordinates.sites(u), lambda: {"khat": found.khat, "ess": found.ess})


@dataclass(frozen=True)
class HMC:
    """Hamiltonian Monte Carlo for every cell at once, ``chains`` chains each, in the coordinates of a Laplace step.

    Diagnostics: ``rhat`` (rank-normalised, split; the largest over latents), ``ess`` (bulk, the smallest) and
    ``divergences`` (number of draws whose energy error exceeded 1000).
    """

    chains: int = 4
    warmup: int = 200
    steps: int = 100
    leapfrog: int = 8

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Run the chains for samples / chains draws each after warm-up."""
        _require_density(guide)
        density, loc, scale = start(guide, x, gamma)
        found = sample_chains(
            density,
            _refined_proposal(density, loc, scale, self.steps),
            chains=self.chains,
            draws=max(4, -(-samples // self.chains)),
            warmup=self.warmup,
            leapfrog=self.leapfrog,
        )
        u = found.draws.flatten(0, 1)[:samples]
        return Draws(guide.coordinates.sites(u), lambda: _of_chains(found), self.chains)


def _require_density(guide: Guide) -> None:
    if isinstance(guide.model.prior, Flat):
        raise ModelError("the prior Flat has no density: there is no posterior to sample; fit with a proper prior")


@torch.enable_grad()
def _refined_proposal(density: LogJoint, loc: Tensor, scale: Tensor, steps: int) -> Proposal:
    """The start raised by gradient steps, with the covariance of a Laplace step."""
    loc, scale = refine(density, loc, scale, steps=steps)
    return Proposal(loc, laplace_scale_tril(density, loc, scale))


def _of_chains(found: Chains) -> dict[str, Tensor]:
    return {
        "rhat": rank_normalised_rhat(found.draws).amax(-1),
        "ess": bulk_ess(found.draws).amin(-1),
        "divergences": found.divergences,
    }


def _diagnosed(log_weights: Tensor) -> dict[str, Tensor]:
    _, _, ess, khat = evidence_of(log_weights)
    return {"khat": khat, "ess": ess}
