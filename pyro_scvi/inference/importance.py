"""Adaptive importance sampling of many small posteriors at once, with a Pareto k-hat for each.

Everything here needs only a log joint density ``log_joint(u)`` or log weights. u has shape (samples, cells, latents) in
unconstrained coordinates, the value has shape (samples, cells), and cells do not influence each other.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_scvi.inference.pareto_khat import pareto_khat
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.precision import in_float64, put_back
from pyro_scvi.utils.random_state import seeded

Run = Callable[[Tensor, "SamplingBudget"], "ImportanceResult"]  # weighted draws of the cells in given rows

KHAT_LIMIT = 0.7  # above it an importance-sampling estimate is unreliable (Vehtari et al. 2024)
LEAST_SHARE = 0.1  # of a mixture proposal's draws, spread evenly over its components
DEGREES_OF_FREEDOM = 7.0  # of the Student-t proposal: tails heavier than the posterior's, finite fourth moment


class Proposal(NamedTuple):
    """A multivariate Student-t per cell: loc (cells, latents), scale_tril (cells, latents, latents)."""

    loc: Tensor
    scale_tril: Tensor

    def sample(self, samples: int) -> Tensor:
        """Draws of shape (samples, cells, latents)."""
        half = torch.full_like(self.loc[:, :1], 0.5)
        with per_cell():
            normal = torch.randn(samples, *self.loc.shape, dtype=self.loc.dtype, device=self.loc.device)
            chi2 = torch.distributions.Gamma(DEGREES_OF_FREEDOM * half, half).sample((samples,))
        step = torch.einsum("cij,scj->sci", self.scale_tril, normal) * (DEGREES_OF_FREEDOM / chi2).sqrt()
        return self.loc + step

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of u (samples, cells, latents), shape (samples, cells)."""
        n, latents = DEGREES_OF_FREEDOM, self.loc.shape[-1]
        columns = (u - self.loc).permute(1, 2, 0)  # (cells, latents, samples)
        white = torch.linalg.solve_triangular(self.scale_tril, columns, upper=False)
        log_det = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = math.lgamma((n + latents) / 2) - math.lgamma(n / 2) - latents / 2 * math.log(n * math.pi)
        return constant - log_det - (n + latents) / 2 * torch.log1p(white.square().sum(1).T / n)


class Mixture(NamedTuple):
    """A mixture of Student-t: ``parts`` (modes, cells, ...) and ``log_shares`` (modes, cells), -inf for none."""

    parts: Proposal
    log_shares: Tensor

    @property
    def loc(self) -> Tensor:
        """Of the component with the largest share, (cells, latents)."""
        return self.of(self.log_shares.argmax(0, keepdim=True)).loc[0]

    def of(self, chosen: Tensor) -> Proposal:
        """The components ``chosen`` (n, cells) of every cell, (n, cells, ...)."""
        cells = torch.arange(chosen.shape[-1], device=chosen.device)
        return Proposal(self.parts.loc[chosen, cells], self.parts.scale_tril[chosen, cells])

    def pooled(self) -> Proposal:
        """One Student-t at the largest component, with the mean covariance within components."""
        tril = in_float64(self.parts.scale_tril)
        within = (in_float64(self.log_shares).softmax(0)[..., None, None] * (tril @ tril.mT)).sum(0)
        return Proposal(self.loc, put_back(torch.linalg.cholesky(within), self.loc))

    def sample(self, samples: int) -> Tensor:
        """Draws of shape (samples, cells, latents)."""
        upto = self.log_shares.softmax(0).cumsum(0)[:-1]
        with per_cell():
            uniform = torch.rand(samples, *self.log_shares.shape[1:], dtype=upto.dtype, device=upto.device)
        own = self.of((uniform[:, None] > upto).sum(1))
        eye = torch.eye(own.loc.shape[-1], dtype=own.loc.dtype, device=own.loc.device)
        standard = Proposal(torch.zeros_like(own.loc[0]), eye.expand_as(own.scale_tril[0])).sample(samples)
        return own.loc + (own.scale_tril @ standard[..., None]).squeeze(-1)

    def log_prob_by_part(self, u: Tensor) -> Tensor:
        """Log share times density of u (samples, cells, latents), (modes, samples, cells)."""
        of_parts = [Proposal(*part).log_prob(u) for part in zip(*self.parts, strict=True)]
        return torch.stack(of_parts) + self.log_shares.log_softmax(0)[:, None]

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of u (samples, cells, latents), shape (samples, cells)."""
        return self.log_prob_by_part(u).logsumexp(0)


class SamplingBudget(NamedTuple):
    """Effort for a cell's proposal: weighted draws, gradient steps, rounds of adaptation."""

    samples: int
    steps: int
    rounds: int

    def doubled(self) -> "SamplingBudget":
        """Twice the steps and rounds, for cells whose proposal did not fit."""
        return SamplingBudget(self.samples, 2 * self.steps, 2 * self.rounds)


class ImportanceResult(NamedTuple):
    """Result of :func:`adaptive_importance`: per cell (cells,), with the weighted draws it rests on.

    ``log_evidence`` in nats per cell, ``se`` its standard error (delta method), ``ess`` the effective number of
    draws, ``khat`` the Pareto tail index of the weights: above 0.7 the estimate is unreliable. ``draws``
    (samples, cells, latents), ``log_weights`` (samples, cells). ``several``: whether the proposal has several modes.
    """

    log_evidence: Tensor
    se: Tensor
    ess: Tensor
    khat: Tensor
    draws: Tensor
    log_weights: Tensor
    several: Tensor

    def of(self, cells: Tensor) -> "ImportanceResult":
        """The result for some of the cells."""
        # The dimension of cells is the second where draws come first. Draws may be on another device than weights.
        return ImportanceResult(
            *(of_all.index_select(int(of_all.dim() > 1), cells.to(of_all.device)) for of_all in self)
        )

    def replace(self, cells: Tensor, others: "ImportanceResult") -> None:
        """Put the result of ``others`` in the place of these cells'."""
        for kept, new in zip(self, others, strict=True):
            kept.index_copy_(int(kept.dim() > 1), cells.to(kept.device), new)


def adaptive_importance(
    log_joint: LogJoint,
    loc: Tensor,
    scale: Tensor,
    *,
    samples: int = 1000,
    seed: int = 0,
    steps: int = 100,
    rounds: int = 2,
    block: int = 50,
) -> ImportanceResult:
    """Estimate log integral exp(log_joint(u)) du for every cell, by ``samples`` draws of :func:`corrected_proposal`."""
    with seeded(seed):
        proposal = corrected_proposal(
            log_joint, loc, scale, steps=steps, rounds=rounds, samples=max(samples // 2, 2), block=block
        )
        draws, log_weights = weighted_draws(log_joint, proposal, samples, block)
    several = torch.zeros_like(log_weights[0], dtype=torch.bool)
    return ImportanceResult(*evidence_of(log_weights), draws, log_weights, several)


def persistent_importance(run: Run, rows: Tensor, budget: SamplingBudget, *, attempts: int = 3) -> ImportanceResult:
    """``run`` for the cells in ``rows``, again for cells whose k-hat is above 0.7.

    These get twice the budget, then four times; the best attempt counts.
    """
    result = run(rows, budget)
    failed = (~(result.khat <= KHAT_LIMIT)).nonzero().squeeze(-1)  # written so that NaN fails, too
    if attempts == 1 or not len(failed):
        return result
    again = persistent_importance(run, rows[failed], budget.doubled(), attempts=attempts - 1)
    better = (~(again.khat >= result.khat[failed])).nonzero().squeeze(-1)
    result.replace(failed[better], again.of(better))
    return result


def corrected_proposal(
    log_joint: LogJoint, loc: Tensor, scale: Tensor, *, steps: int, rounds: int, samples: int = 500, block: int = 50
) -> Proposal:
    """A Student-t for every cell, made to fit its density.

    First, a diagonal normal started at (loc, scale), each (cells, latents), is refined by ``steps`` gradient steps on
    its own bound. Second, its covariance is replaced by that of a Laplace step. Third, ``rounds`` times, the Student-t
    takes the mean and covariance of ``samples`` weighted draws of its own. At most ``block`` draws are evaluated at
    once.
    """
    with torch.enable_grad():
        loc, scale = refine(log_joint, loc.detach(), scale.detach(), steps=steps)
        proposal = Proposal(loc, laplace_scale_tril(log_joint, loc, scale))
    for _ in range(rounds):
        draws, log_weights = weighted_draws(log_joint, proposal, samples, block)
        proposal = adapted(proposal, draws, log_weights)
    return proposal


def refine(log_joint: LogJoint, loc: Tensor, scale: Tensor, *, steps: int, draws: int = 4) -> tuple[Tensor, Tensor]:
    """Raise every cell's bound E_q log joint + H(q) over a diagonal normal q by ``steps`` of Adam.

    The step is in units of the starting scale, so that wide and narrow latents move at the same relative rate.
    """
    shift = torch.zeros_like(loc, requires_grad=True)
    log_stretch = torch.zeros_like(scale, requires_grad=True)
    optimiser = torch.optim.Adam([shift, log_stretch], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(steps, 1), eta_min=0.005)
    for _ in range(steps):
        with per_cell():
            half = torch.randn(draws // 2, *loc.shape, dtype=loc.dtype, device=loc.device)
        noise = torch.cat([half, -half])  # antithetic pairs: the gradient by loc has less noise
        u = loc + scale * (shift + log_stretch.exp() * noise)
        loss = -(log_joint(u).mean(0) + log_stretch.sum(-1)).sum()
        # Where the density overflows its slope is no number: the draws of the next step are others.
        slopes = (of.nan_to_num(0.0, 0.0, 0.0) for of in torch.autograd.grad(loss, [shift, log_stretch]))
        shift.grad, log_stretch.grad = slopes
        optimiser.step()
        schedule.step()
    return (loc + scale * shift).detach(), (scale * log_stretch.exp()).detach()


def laplace_scale_tril(log_joint: LogJoint, loc: Tensor, scale: Tensor) -> Tensor:
    """Cholesky factor of the inverse negative Hessian of log_joint at loc, shape (cells, latents, latents).

    By central differences of the gradient over half a posterior standard deviation, not by second derivatives: those of
    a ReLU network do not exist at its kinks and miss them elsewhere.
    """
    latents = loc.shape[-1]
    step = 0.5 * scale  # (cells, latents)
    offsets = torch.einsum("kj,cj->kcj", torch.eye(latents, dtype=loc.dtype, device=loc.device), step)
    u = torch.cat([loc + offsets, loc - offsets]).requires_grad_()
    (gradient,) = torch.autograd.grad(log_joint(u).sum(), u)
    difference = gradient[:latents] - gradient[latents:]  # (step along k, cells, latents)
    # In units of the scale, where the matrix is well conditioned: S H S with S = diag(scale).
    curvature = -difference.permute(1, 0, 2) / (2 * step[:, :, None]) * scale[:, :, None] * scale[:, None, :]
    curvature = in_float64(curvature + curvature.mT).nan_to_num(0.0, 0.0, 0.0) / 2
    values, vectors = torch.linalg.eigh(curvature)
    # The floor bounds the variance along directions without curvature, at 10 times the scale squared.
    covariance = (vectors / values.clamp(min=0.1)[:, None, :]) @ vectors.mT
    return scale[:, :, None] * put_back(torch.linalg.cholesky(covariance), loc)


class Source(Protocol):
    """What draws come from: their density is known."""

    def sample(self, samples: int) -> Tensor:
        """Draws of shape (samples, cells, latents)."""
        ...

    def log_prob(self, u: Tensor) -> Tensor:
        """Log density of u (samples, cells, latents), shape (samples, cells)."""
        ...


@torch.no_grad()
def weighted_draws(log_joint: LogJoint, proposal: Source, samples: int, block: int) -> tuple[Tensor, Tensor]:
    """Draws (samples, cells, latents) from the proposal and their float64 log weights (samples, cells)."""
    draws = proposal.sample(samples)
    log_density = torch.cat([log_joint(part) for part in draws.split(block)])
    log_weights = in_float64(log_density - proposal.log_prob(draws))
    return draws, log_weights.nan_to_num(nan=-math.inf, posinf=-math.inf)  # an overflow gets no weight


def adapted(proposal: Proposal, draws: Tensor, log_weights: Tensor) -> Proposal:
    """The proposal with mean and covariance of the weighted draws, shrunk to the old one if few draws count."""
    weights = log_weights.softmax(0).nan_to_num(1 / len(log_weights))  # (samples, cells); NaN if none has weight
    ess = 1 / weights.square().sum(0)
    kept = (draws.shape[-1] / (draws.shape[-1] + ess))[:, None]  # share of the old proposal
    # Of each latent by itself: their scales may differ by many orders of magnitude.
    return with_moments(proposal, draws, weights, kept, kept, jitter=1e-8)


def with_moments(
    old: Proposal, draws: Tensor, weights: Tensor, of_loc: Tensor, of_tril: Tensor, *, jitter: float = 0.0
) -> Proposal:
    """Mean and covariance of draws (draws, cells, size) by normalised weights (draws, cells), in float64.

    ``of_loc`` and ``of_tril`` (cells, 1) are the shares of the old proposal in them. It is kept as it is where draws
    are so far apart that their covariance has no factor. ``jitter`` is relative to each variance.
    """
    u, loc, tril = in_float64(draws), in_float64(old.loc), in_float64(old.scale_tril)
    mean = torch.einsum("sc,sci->ci", weights, u)
    centred = u - mean
    covariance = torch.einsum("sc,sci,scj->cij", weights, centred, centred)
    covariance = (1 - of_tril[..., None]) * covariance + of_tril[..., None] * (tril @ tril.mT)
    jittered = covariance + (jitter * covariance.diagonal(dim1=-2, dim2=-1)).diag_embed()
    new_tril, failed = torch.linalg.cholesky_ex(jittered)
    lost = (failed > 0) | ~torch.isfinite(new_tril).flatten(1).all(1)
    new_loc = torch.where(lost[:, None], loc, (1 - of_loc) * mean + of_loc * loc)
    new_tril = torch.where(lost[:, None, None], tril, new_tril)
    return Proposal(put_back(new_loc, old.loc), put_back(new_tril, old.loc))


def adapted_mixture(mixture: Mixture, draws: Tensor, log_weights: Tensor) -> Mixture:
    """Shares, means and covariances of weighted draws (Cappé et al. 2008, Sec. 3).

    Each draw counts for a component by the component's share in the density there, so that components stay apart.
    """
    by_part = in_float64(mixture.log_prob_by_part(draws))
    weights_of_parts = log_weights + by_part - by_part.logsumexp(0)
    held = torch.isfinite(in_float64(mixture.log_shares))
    shares = weights_of_parts.logsumexp(1).nan_to_num(-math.inf).softmax(0).nan_to_num(0.0)
    # A floor: a mode that no draw has reached in this round may be reached in the next.
    shares = torch.where(held, (1 - LEAST_SHARE) * shares + LEAST_SHARE / held.sum(0), 0.0)
    log_shares = put_back(shares.log(), mixture.log_shares)
    parts = [
        adapted(Proposal(*part), draws, weights)
        for *part, weights in zip(*mixture.parts, weights_of_parts, strict=True)
    ]
    return Mixture(Proposal(*(torch.stack(of) for of in zip(*parts, strict=True))), log_shares)


def evidence_of(log_weights: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log mean weight, its standard error, effective sample size and k-hat, from (samples, cells) to (cells,)."""
    samples = log_weights.shape[0]
    log_mean = log_weights.logsumexp(0) - math.log(samples)
    ess = 1 / log_weights.softmax(0).square().sum(0)
    se = ((1 / ess - 1 / samples).clamp(min=0) * samples / max(samples - 1, 1)).sqrt()
    return log_mean, se, ess, pareto_khat(log_weights)
