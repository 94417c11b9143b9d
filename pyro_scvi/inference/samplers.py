"""Posterior samplers for a cell's latents, from fast to exact, with diagnostics for every cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.evaluation import weigh
from pyro_scvi.inference.hmc import Chains, bulk_ess, rank_normalised_rhat, sample_chains
from pyro_scvi.inference.importance import SamplingBudget, evidence_of
from pyro_scvi.inference.proposals import Posteriors, in_order, weighted
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.cell_streams import narrowed, per_cell
from pyro_scvi.utils.checks import brief, require_at_least
from pyro_scvi.utils.precision import in_float64

POOL = 500  # weighted draws of a cell, at least, from which Refined takes its draws


class Draws(NamedTuple):
    """The latents of the cells, such as z (samples, cells, 1, latents) and l (samples, cells, 1), and their diagnosis.

    ``diagnose()`` gives diagnostics by name, each (cells,). Some cost as much as the draws, so they are computed on
    request. With several ``chains``, sample = draw * chains + chain. ``log_weights`` (samples, cells) say how much each
    draw counts; None where all count alike.
    """

    sites: dict[str, Tensor]
    diagnose: Callable[[], dict[str, Tensor]]
    chains: int = 1
    log_weights: Tensor | None = None


class Sampler(Protocol):
    """Anything that draws the latents of cells."""

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """``samples`` draws for counts x (cells, genes) with covariates gamma (cells, covariates)."""
        ...


@runtime_checkable
class Weighting(Protocol):
    """A sampler whose draws come from a proposal with tails heavier than the posterior's, each with its weight."""

    def weigh(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """At least ``samples`` draws of the proposal, before they are resampled."""
        ...


def weighted_by(sampler: Sampler, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
    """At least ``samples`` draws: weighted ones of the sampler's proposal if it has one, else of the posterior."""
    make = sampler.weigh if isinstance(sampler, Weighting) else sampler.draw
    return make(guide, x, gamma, samples)


def require_sampler(sampler: Any) -> None:
    """Refuse a class or a string in the place of a sampler.

    Raises
    ------
    ModelError
        If it is no sampler; names what was passed.
    """
    if isinstance(sampler, type) or not callable(getattr(sampler, "draw", None)):
        raise ModelError(f"sampler must be an object such as ps.Importance() or ps.HMC(), got {brief(sampler)}")


class _Pool(NamedTuple):
    """Draws u (draws, cells, size) of a proposal, their log weights (draws, cells), and what diagnoses them."""

    u: Tensor
    log_weights: Tensor
    diagnose: Callable[[], dict[str, Tensor]]

    def weighted(self, guide: Guide) -> Draws:
        """All of them, with their weights."""
        return Draws(guide.coordinates.sites(self.u), self.diagnose, log_weights=self.log_weights)

    def resampled(self, guide: Guide, samples: int) -> Draws:
        """``samples`` of them that follow the posterior."""
        return Draws(guide.coordinates.sites(resampled(self.u, self.log_weights, samples)), self.diagnose)


@dataclass(frozen=True)
class Amortized:
    r"""The guide itself: draws from q(z, l | x).

    .. math:: z^s, l^s \sim q(z, l | x_n), \qquad weight_s = p(x_n, z^s, l^s) / q(z^s, l^s | x_n)

    ``khat`` and ``ess`` of the weights measure how far the draws are from the posterior; on real cells they are far
    (Vehtari, Simpson, Gelman, Yao and Gabry 2024). The draws of a guide without a density (Point) are one point, with
    an infinite ``khat`` and an ``ess`` of 1.

    Raises
    ------
    ModelError
        When it draws, for a guide that cannot encode cells (PerCell).

    Examples
    --------
    >>> draws = ps.sample_posterior(fit, test, samples=50, sampler=ps.Amortized())
    >>> draws.khat.dims, draws.ess.dims
    (('cell',), ('cell',))
    """

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Draw from q(z, l | x)."""
        if not guide.amortized:
            raise ModelError(
                f"{type(guide).__name__} cannot encode cells; take ps.Refined(), ps.Importance() or ps.HMC()"
            )
        with per_cell():
            sites, log_q = guide.draw(x, gamma, samples)
        if not guide.stochastic:
            ones = torch.ones_like(log_q[0])
            return Draws(sites, lambda: {"khat": ones * torch.inf, "ess": ones})
        return Draws(sites, lambda: _weight_diagnostics(in_float64(weigh(guide, x, gamma, sites, log_q)[0])))


@dataclass(frozen=True)
class Refined:
    """The guide refined for each cell by Newton steps on its own bound.

    q is a Student-t with the mean and covariance of the normal that the steps lead to.

    A cell for which climbs from the guide, training cells and the prior find several modes gets one for each, with the
    shares of weighted draws. At least 500 draws of the proposal are made and resampled by their weights.

    ``khat`` and ``ess`` are those of the weights p(x, z, l) / q(z, l), as for :class:`Amortized`.

    Parameters
    ----------
    steps
        Gradient steps; where a cell has one mode, each Newton step counts as 13, and four are the fewest.

    Raises
    ------
    ModelError
        If ``steps`` is no integer of 0 or more; when it draws, for a prior without a density (Flat).

    Examples
    --------
    >>> draws = ps.sample_posterior(fit, test.take(range(3)), samples=50, sampler=ps.Refined(steps=20))
    >>> draws.z.dims, draws.z.shape
    (('sample', 'cell', 'latent'), (50, 3, 2))
    """

    steps: int = 100

    def __post_init__(self) -> None:
        require_at_least(0, steps=self.steps)

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Draw from the refined proposal."""
        return self._pool(guide, x, gamma, samples).resampled(guide, samples)

    def weigh(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """At least 500 weighted draws of the refined proposal."""
        return self._pool(guide, x, gamma, samples).weighted(guide)

    def _pool(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> _Pool:
        require_proper(guide.model, "there is no posterior to sample")
        made = Posteriors(guide, x, gamma).fitted(steps=self.steps, rounds=0)
        drawn = [part.weighted(max(samples, POOL)) for part in made]
        u, log_weights = (in_order(made, of, 1) for of in zip(*drawn, strict=True))
        return _Pool(u, log_weights, lambda: _weight_diagnostics(log_weights))


@dataclass(frozen=True)
class Importance:
    r"""Draws from an adapted proposal, resampled by importance weights.

    They are reliable for cells with ``khat`` below 0.7.

    .. math:: P(s) \propto p(x_n, z^s, l^s) / q_n(z^s, l^s)

    with q_n a Student-t in unconstrained coordinates. It is refined as for :class:`Refined`, or a mixture where
    there are several modes; it then takes the mean and covariance of its own weighted draws, in rounds. Cells whose
    ``khat`` (Vehtari, Simpson, Gelman, Yao and Gabry 2024) stays above 0.7 are tried again with twice the ``steps``
    and ``rounds``, then with four times as many.

    Parameters
    ----------
    steps, rounds
        Gradient steps of the refinement, where each Newton step counts as 13; and the most rounds of draws that only
        adapt the proposal, as they do while their k-hat is above 0.5.
    proposals
        Weighted draws of a cell; at least as many as the draws asked for are made.

    Raises
    ------
    ModelError
        If ``steps`` or ``rounds`` is no integer of 0 or more, or ``proposals`` none of 2 or more; when it draws, for a
        prior without a density (Flat).

    Examples
    --------
    >>> draws = ps.sample_posterior(fit, test.take(range(3)), samples=50, sampler=ps.Importance())
    >>> bool((draws.khat < 0.7).all())
    True
    """

    steps: int = 100
    rounds: int = 3
    proposals: int = 1000

    def __post_init__(self) -> None:
        require_at_least(0, steps=self.steps, rounds=self.rounds)
        require_at_least(2, proposals=self.proposals)

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Resample ``samples`` of ``proposals`` weighted draws for each cell."""
        return self._pool(guide, x, gamma, samples).resampled(guide, samples)

    def weigh(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """``proposals`` weighted draws, or ``samples`` if these are more."""
        return self._pool(guide, x, gamma, samples).weighted(guide)

    def _pool(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> _Pool:
        require_proper(guide.model, "there is no posterior to sample")
        made = weighted(guide, x, gamma, SamplingBudget(max(self.proposals, samples), self.steps, self.rounds))
        return _Pool(made.draws, made.log_weights, lambda: {"khat": made.khat, "ess": made.ess})


@dataclass(frozen=True)
class HMC:
    r"""Hamiltonian Monte Carlo for every cell at once, in the coordinates v of a fitted proposal.

    See Neal (2011).

    .. math:: H(v, m) = -\log p(x_n, u(v)) + \tfrac12 m^T m, \qquad u = loc + L v

    The proposal is that of :class:`Refined`, adapted in ``rounds`` to the mean and covariance of its weighted
    draws. Each cell has its own step size, adapted by dual averaging (Hoffman and Gelman 2014, Sec. 3.2). Where
    there are several modes, chains start in different ones, and after each draw a draw from the proposal is
    accepted or rejected, so that chains change modes (an independence sampler, Tierney 1994, Sec. 2.3).

    Diagnostics: ``rhat`` (rank-normalised, split; the largest over latents), ``ess`` (bulk, the smallest; Vehtari,
    Gelman, Simpson, Carpenter and Buerkner 2021, Secs. 3 and 4) and ``divergences`` (number of draws whose energy error
    exceeded 1000). They use all draws that were made: each chain has at least ``least`` draws, and if fewer are asked
    for, evenly spaced ones are returned. R-hat and ``ess`` are NaN for chains that never moved.

    Parameters
    ----------
    chains
        Chains of each cell.
    warmup
        Draws of each chain that adapt the step size and are dropped.
    steps, rounds
        Gradient steps of the proposal, and rounds of adaptation.
    leapfrog
        Mean number of leapfrog steps of a draw.
    least
        Fewest draws of a chain after warm-up.

    Raises
    ------
    ModelError
        If ``chains`` or ``leapfrog`` is no integer of 1 or more, ``warmup``, ``steps`` or ``rounds`` none of 0 or more,
        or ``least`` none of 4 or more; when it draws, for a prior without a density (Flat).

    Examples
    --------
    >>> sampler = ps.HMC(chains=2, warmup=10, steps=5, rounds=1, leapfrog=4, least=20)  # far fewer than the default
    >>> draws = ps.sample_posterior(fit, test.take(range(2)), samples=20, sampler=sampler)
    >>> sorted(draws.data_vars)
    ['divergences', 'ess', 'rhat', 'z']
    """

    chains: int = 4
    warmup: int = 200
    steps: int = 100
    rounds: int = 2
    leapfrog: int = 8
    least: int = 200

    def __post_init__(self) -> None:
        require_at_least(1, chains=self.chains, leapfrog=self.leapfrog)
        require_at_least(0, warmup=self.warmup, steps=self.steps, rounds=self.rounds)
        require_at_least(4, least=self.least)

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Run the chains for samples / chains draws each after warm-up, but at least ``least``."""
        require_proper(guide.model, "there is no posterior to sample")
        length = -(-samples // self.chains)
        options = {"chains": self.chains, "warmup": self.warmup, "leapfrog": self.leapfrog}
        made = Posteriors(guide, x, gamma).fitted(steps=self.steps, rounds=self.rounds)
        runs = []
        for part in made:
            with narrowed(part.rows):
                runs.append(sample_chains(part.density, part.proposal, draws=max(self.least, length), **options))
        chains = Chains(*(in_order(made, of, of[0].dim() - 1 - (of[0].dim() > 1)) for of in zip(*runs, strict=True)))
        kept = torch.linspace(0, len(chains.draws) - 1, length).round().long()
        u = chains.draws[kept.to(chains.draws.device)].flatten(0, 1)[:samples]
        return Draws(guide.coordinates.sites(u), lambda: _chain_diagnostics(chains), self.chains)


def resampled(draws: Tensor, log_weights: Tensor, samples: int) -> Tensor:
    """``samples`` of the weighted draws (draws, cells, latents), by systematic resampling.

    See Kitagawa (1996), Appendix.

    With equal weights every draw comes once, or as often as every other.
    """
    upto = log_weights.softmax(0).nan_to_num(1.0).cumsum(0).T.contiguous()  # (cells, draws)
    with per_cell():
        first = torch.rand(len(upto), 1, dtype=upto.dtype, device=upto.device)
    places = (first + torch.arange(samples, device=upto.device)) / samples * upto[:, -1:]
    chosen = torch.searchsorted(upto, places).clamp(max=len(draws) - 1).T
    return draws.gather(0, chosen[..., None].expand(-1, -1, draws.shape[-1]).to(draws.device))


def _chain_diagnostics(chains: Chains) -> dict[str, Tensor]:
    return {
        "rhat": rank_normalised_rhat(chains.draws).amax(-1),
        "ess": bulk_ess(chains.draws).amin(-1),
        "divergences": chains.divergences,
    }


def _weight_diagnostics(log_weights: Tensor) -> dict[str, Tensor]:
    _, _, ess, khat = evidence_of(log_weights)
    return {"khat": khat, "ess": ess}
