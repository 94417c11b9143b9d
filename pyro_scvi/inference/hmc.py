"""Hamiltonian Monte Carlo for many cells and chains in one tensor, and convergence diagnostics."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.inference.importance import Mixture, Proposal, weighted_draws
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.precision import in_float64

MAX_ENERGY_ERROR = 1000.0  # nats; a larger error is counted as a divergence, as in Stan


class Chains(NamedTuple):
    """Draws (draws, chains, cells, latents), divergences (cells,), mean acceptance (cells,), step size (cells,)."""

    draws: Tensor
    divergences: Tensor
    acceptance: Tensor
    step_size: Tensor


def sample_chains(
    log_joint: LogJoint,
    proposal: Proposal | Mixture,
    *,
    chains: int,
    draws: int,
    warmup: int,
    leapfrog: int = 8,
    target: float = 0.9,
) -> Chains:
    """Sample every cell's density exp(log_joint(u)) in coordinates v, u = loc + L v, of the proposal.

    Each cell has its own step size, adapted in ``warmup`` by dual averaging towards an acceptance of ``target``
    (Hoffman and Gelman 2014, Sec. 3.2). The length of a trajectory is random, so that no chain is periodic. Chains
    start at draws of the proposal, resampled by their weights. Without resampling one might start far out in the heavy
    tails, where the density is steep and a step that suits the other chains may never be accepted. Those of a mixture
    start in its components in turn, and jump between these by draws of the mixture.
    """
    density = Whitened(log_joint, proposal.pooled() if isinstance(proposal, Mixture) else proposal)
    state = density.at(density.inverse(_starts(log_joint, proposal, chains)))
    step = _DualAveraging(torch.full_like(state.value[0], 0.5), target)
    kept, divergences, acceptance = [], torch.zeros_like(step.size), torch.zeros_like(step.size)
    for iteration in range(warmup + draws):
        state, log_ratio = transition(density, state, step.size, leapfrog)
        probability = log_ratio.clamp(max=0).exp().mean(0)
        if isinstance(proposal, Mixture):
            state = _jumped(density, proposal, state)
        if iteration < warmup:
            step.update(probability, last=iteration == warmup - 1)
        else:
            kept.append(density.coordinates(state.v))
            divergences += (log_ratio < -MAX_ENERGY_ERROR).sum(0)
            acceptance += probability / draws
    return Chains(torch.stack(kept), divergences, acceptance, step.size)


def _starts(log_joint: LogJoint, proposal: Proposal | Mixture, chains: int) -> Tensor:
    """Starting points (chains, cells, latents): draws of the proposal, resampled by their weights.

    Those from a mixture are at its components, however small: chains that do not mix then show in R-hat.
    """
    if isinstance(proposal, Mixture):
        held = torch.isfinite(proposal.log_shares)
        ordered = held.int().argsort(dim=0, descending=True, stable=True)  # the components that a cell has, first
        turn = torch.arange(chains, device=held.device)[:, None] % held.sum(0)
        return proposal.of(ordered.gather(0, turn)).loc
    draws, log_weights = weighted_draws(log_joint, proposal, 10 * chains, chains)
    weights = log_weights.softmax(0).nan_to_num(1.0)  # equal ones if no draw has any weight
    with per_cell():
        uniform = torch.rand(chains, weights.shape[1], dtype=weights.dtype, device=weights.device)
    upto = weights.cumsum(0)
    chosen = (uniform[:, None] * upto[-1] > upto).sum(1).clamp(max=len(draws) - 1)
    return draws.gather(0, chosen[..., None].expand(-1, -1, draws.shape[-1]).to(draws.device))


class State(NamedTuple):
    """Whitened positions (chains, cells, latents), log density there (chains, cells), and its gradient."""

    v: Tensor
    value: Tensor
    slope: Tensor


class Whitened:
    """A density in a proposal's own coordinates v, u = loc + L v."""

    def __init__(self, log_joint: LogJoint, proposal: Proposal) -> None:
        self.log_joint, self.proposal = log_joint, proposal

    def at(self, v: Tensor) -> State:
        """The density and its gradient at v (chains, cells, latents)."""
        with torch.enable_grad():
            v = v.detach().requires_grad_()
            value = self.log_joint(self.coordinates(v))
            (slope,) = torch.autograd.grad(value.sum(), v)
        return State(v.detach(), value.detach(), slope)

    def coordinates(self, v: Tensor) -> Tensor:
        """Coordinates u of v."""
        return self.proposal.loc + torch.einsum("cij,scj->sci", self.proposal.scale_tril, v)

    def inverse(self, u: Tensor) -> Tensor:
        """Coordinates v of u."""
        columns = (u - self.proposal.loc).permute(1, 2, 0)
        return torch.linalg.solve_triangular(self.proposal.scale_tril, columns, upper=False).permute(2, 0, 1)


def transition(density: Whitened, state: State, size: Tensor, leapfrog: int) -> tuple[State, Tensor]:
    """One draw of every chain with step sizes (cells,): the next state, and the log acceptance ratio (chains, cells).

    The number of leapfrog steps is uniform on 1 to 2 ``leapfrog`` - 1, and the step size varies by a tenth.
    """
    with per_cell():
        start = torch.randn(state.v.shape, dtype=state.v.dtype, device=state.v.device)
        jitter = 1 + 0.1 * (2 * _uniform(state.value) - 1)
        count = int(torch.randint(1, 2 * leapfrog, ()))
    new, momentum = _leap(density, state, start, (size * jitter)[..., None], count)
    log_ratio = new.value - state.value + 0.5 * (start.square() - momentum.square()).sum(-1)
    log_ratio = log_ratio.nan_to_num(-torch.inf)  # a trajectory that left the numbers is rejected
    with per_cell():
        accepted = _uniform(log_ratio).log() < log_ratio
    return _chosen(accepted, new, state), log_ratio


def _uniform(like: Tensor) -> Tensor:
    return torch.rand(like.shape, dtype=like.dtype, device=like.device)


def _jumped(density: Whitened, mixture: Mixture, state: State) -> State:
    """The state after a draw of the mixture is accepted or rejected for every chain.

    See Tierney (1994), Sec. 2.3.
    """
    u = mixture.sample(len(state.v))
    new = density.at(density.inverse(u))
    log_ratio = new.value - mixture.log_prob(u) - state.value + mixture.log_prob(density.coordinates(state.v))
    with per_cell():
        accepted = _uniform(log_ratio).log() < log_ratio.nan_to_num(-torch.inf)
    return _chosen(accepted, new, state)


def _chosen(accepted: Tensor, new: State, old: State) -> State:
    pairs = zip(new, old, strict=True)
    return State(*(torch.where(accepted[..., None] if a.dim() > 2 else accepted, a, b) for a, b in pairs))


def _leap(density: Whitened, state: State, momentum: Tensor, size: Tensor, count: int) -> tuple[State, Tensor]:
    for _ in range(count):
        momentum = momentum + 0.5 * size * state.slope
        state = density.at(state.v + size * momentum)
        momentum = momentum + 0.5 * size * state.slope
    return state, momentum


class _DualAveraging:
    """Dual averaging of log step sizes (cells,); t0 = 10, gamma = 0.05, kappa = 0.75.

    See Hoffman and Gelman (2014).
    """

    def __init__(self, size: Tensor, target: float) -> None:
        self.size, self.target, self.time = size, target, 0
        self.centre, self.gap, self.averaged = (10 * size).log(), torch.zeros_like(size), torch.zeros_like(size)

    def update(self, probability: Tensor, last: bool) -> None:
        self.time += 1
        weight = 1 / (self.time + 10)
        self.gap = (1 - weight) * self.gap + weight * (self.target - probability)
        log_size = self.centre - self.time**0.5 / 0.05 * self.gap
        share = self.time**-0.75
        self.averaged = share * log_size + (1 - share) * self.averaged
        self.size = (self.averaged if last else log_size).exp().clamp(1e-4, 3.0)


def rank_normalised_rhat(draws: Tensor) -> Tensor:
    """Split R-hat of (draws, chains, ...), on ranks and on folded ranks, the larger of both.

    Vehtari, Gelman, Simpson, Carpenter and Buerkner 2021, Sec. 4.
    """
    split = _split(draws)
    folded = (split - _median(split.flatten(0, 1))).abs()
    return torch.maximum(_rhat(_rank_normalised(split)), _rhat(_rank_normalised(folded)))


def bulk_ess(draws: Tensor) -> Tensor:
    """Effective number of draws for the bulk of (draws, chains, ...), from rank-normalised split chains.

    Geyer's initial monotone sequence of autocorrelations (Vehtari et al. 2021, Sec. 3).
    """
    z = _rank_normalised(_split(draws))
    n, m = z.shape[:2]
    centred = z - z.mean(0)
    spectrum = torch.fft.rfft(centred, n=2 * n, dim=0)
    covariance = torch.fft.irfft(spectrum.abs().square(), n=2 * n, dim=0)[:n] / n
    within = covariance[0].mean(0) * n / (n - 1)
    total = within * (n - 1) / n + z.mean(0).var(0)
    rho = 1 - (within - covariance.mean(1)) / total  # (lags, ...)
    rho[0] = 1
    pairs = rho[: n - n % 2].unflatten(0, (n // 2, 2)).sum(1)
    positive = (pairs > 0).cumprod(0)  # 1 up to the first negative pair
    monotone = pairs.cummin(0).values * positive
    tau = (2 * monotone.sum(0) - 1).clamp(min=1 / math.log10(n * m))
    return n * m / tau


def _split(draws: Tensor) -> Tensor:
    half = len(draws) // 2
    return torch.cat([draws[:half], draws[-half:]], 1)


def _median(flat: Tensor) -> Tensor:
    ordered = flat.sort(0).values  # torch.median takes the lower of the two middle values
    return (ordered[(len(flat) - 1) // 2] + ordered[len(flat) // 2]) / 2


def _rank_normalised(draws: Tensor) -> Tensor:
    """Normal scores of the ranks, float64."""
    columns = draws.reshape(draws.shape[0] * draws.shape[1], -1).T.contiguous()  # (..., draws of all chains)
    ordered = columns.sort(-1).values
    # A rejected proposal repeats a draw: equal draws share their mean rank.
    below, upto = torch.searchsorted(ordered, columns), torch.searchsorted(ordered, columns, right=True)
    ranks = in_float64(below + upto + 1) / 2
    return torch.special.ndtri((ranks - 0.375) / (columns.shape[-1] + 0.25)).T.reshape(draws.shape)


def _rhat(z: Tensor) -> Tensor:
    n = len(z)
    within = z.var(0).mean(0)
    between = z.mean(0).var(0)
    return ((within * (n - 1) / n + between) / within).sqrt()
