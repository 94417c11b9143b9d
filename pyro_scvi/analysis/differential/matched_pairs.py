"""Matched pairs of cells from two groups: draws of log means, and P(w_a < w_b) averaged over the pairs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.differential.labels import batch_of
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.covariates import Covariates
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.distributions.gamma_ratio import Less, Side, less_for
from pyro_scvi.errors import DataError
from pyro_scvi.inference.evaluation import theta_given, with_enumerated
from pyro_scvi.inference.samplers import Sampler
from pyro_scvi.types import Theta
from pyro_scvi.utils.checks import require_at_least, require_number

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

PairDraws = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]

LEVELS = 0.025, 0.975  # of the interval of a log fold change
PAIRS, AT_ONCE = 1000, 250  # pairs between looks at the standard errors, draws at a time


class Contrast(Protocol):
    """What is compared of two cells."""

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mean of w on the contrast's scale, (..., cells, genes)."""
        ...


class Estimate(NamedTuple):
    """Averages over pairs, each (genes,).

    ``p`` = P(w_a < w_b) with standard error ``se``, by as much as ``n`` independent pairs; mean, sd and quantiles of
    the log2 fold change b over a, and the larger of the shares of pairs in which it is above delta and below -delta.
    """

    p: np.ndarray
    se: np.ndarray
    n: int
    lfc_mean: np.ndarray
    lfc_sd: np.ndarray
    lfc_low: np.ndarray
    lfc_high: np.ndarray
    p_lfc: np.ndarray


@dataclass(frozen=True)
class Groups:
    """Two groups of cells, and how the latents of a cell are drawn and compared.

    ``decoding`` (cells, covariates): what to decode the cells with, where it is not what they were encoded with.
    """

    fit: Fit
    cells: Cells
    batches: Minibatches
    rows_a: np.ndarray
    rows_b: np.ndarray
    contrast: Contrast
    sampler: Sampler
    decoding: Covariates | None = None
    turns: tuple[Fit, ...] = ()  # the fit at draws of its global latents

    def turn(self, place: int) -> Groups:
        """The groups under the fit whose turn it is; the fit itself if none take turns."""
        return replace(self, fit=self.turns[place % len(self.turns)]) if self.turns else self

    def side(self, rows: np.ndarray) -> Side:
        """One draw of the latents for every row of ``rows``; a cell that comes often is encoded once."""
        names = self.cells.cell_names[rows].to_numpy(dtype=str)
        # By name, so that each cell has the same random numbers in whatever order the cells came; then by row.
        order = torch.as_tensor(np.lexsort((rows, names)))
        wanted = torch.as_tensor(rows)[order].to(self.fit.device)
        parts = [self._drawn(part) for part in wanted.split(AT_ONCE)]
        # The inverse permutation puts the draws back into the order of ``rows``.
        back = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))
        log_mean, log_r = torch.cat([part.log_mean for part in parts])[back], parts[0].log_r
        if log_r is None or parts[0].shares_dispersion:
            return Side(log_mean, log_r)
        return Side(log_mean, torch.cat([part.log_r for part in parts if part.log_r is not None])[back])

    def _drawn(self, rows: Tensor) -> Side:
        """The same for sorted rows, in their order."""
        chosen, which, times = rows.unique_consecutive(return_inverse=True, return_counts=True)
        x, gamma = self.batches.rows(chosen)
        draws = self.sampler.draw(self.fit.guide, x, gamma, int(times.max()))
        # The k-th time that a cell occurs takes the k-th of its draws, so no draw serves two pairs.
        nth = torch.arange(len(rows), device=rows.device) - (times.cumsum(0) - times)[which]
        sites = {name: value[nth, which][None] for name, value in draws.sites.items()}
        # Discrete latents are drawn given x in the batch that it came in, whatever it is decoded in.
        sites = with_enumerated(self.fit.guide, x[which], gamma[which], sites)
        if self.decoding is not None:
            gamma = torch.from_numpy(self.decoding[chosen.cpu().numpy()]).to(gamma)
        theta = theta_given(self.fit.guide, x[which], gamma[which], sites)
        log_mean, log_r = self.contrast.log_mean(theta), theta.get("log_inverse_dispersion")
        if log_r is not None:
            log_r = log_r.expand(log_mean.shape[-1]) if log_r.dim() < 2 else log_r.expand(log_mean.shape)[0]
            log_r = log_r.cpu()
        return Side(log_mean[0].cpu(), log_r)


@dataclass(frozen=True)
class MatchedPairs:
    """Every draw serves one pair; pairs are added until all standard errors are small.

    Parameters
    ----------
    largest_se
        Standard error of p, over all genes, at which to stop; 0: go on to ``most_pairs``.
    most_pairs
        Pairs at which to stop in any case.
    within_batch
        Whether both cells of a pair come from the same batch.
    """

    largest_se: float = 0.005
    most_pairs: int = 20_000
    within_batch: bool = False

    def __post_init__(self) -> None:
        require_number(self.largest_se, "largest_se")
        require_at_least(2, most_pairs=self.most_pairs)

    def estimate(self, groups: Groups, generator: np.random.Generator, delta: float) -> Estimate:
        """Averages over pairs, the standard error that of independent ones, or of draws of the global latents."""
        draw_pairs = pairs_within_batches(groups) if self.within_batch else any_pairs(groups)
        n_turns = max(1, len(groups.turns))
        at_once = min(PAIRS, self.most_pairs // n_turns)
        by_turn = list[np.ndarray]()
        total, squares, changes, n = np.zeros(()), np.zeros(()), list[np.ndarray](), 0
        less: Less | None = None
        while n < self.most_pairs:
            pairs = draw_pairs(generator, min(at_once, self.most_pairs - n))
            now = groups.turn(len(by_turn))
            a, b = (now.side(rows) for rows in pairs)
            # The table of the first pairs serves the later ones too, unless dispersions are drawn.
            less = less_for(a) if less is None or groups.turns else less
            p = less(a, b)
            by_turn.append(_sum(p) / len(p))
            total, squares, n = total + _sum(p), squares + _sum(p.square()), n + len(p)
            changes.append(((b.log_mean - a.log_mean) / np.log(2)).numpy())
            mean = total / n
            se = np.sqrt(np.maximum(squares / n - np.square(mean), 0) / n)
            if groups.turns:
                if len(by_turn) % n_turns:
                    continue  # all take turns equally often
                se = _of_turns(np.stack(by_turn), n_turns)
            no_round_left = bool(groups.turns) and n + at_once * n_turns > self.most_pairs
            if se.max() <= self.largest_se or no_round_left:
                break
        return Estimate(mean, se, n, *summary_of_changes(np.concatenate(changes), delta))


def _of_turns(means: np.ndarray, n_turns: int) -> np.ndarray:
    """Standard error of the mean over draws of the global latents, from means of pairs (rounds x draws, genes)."""
    if n_turns == 1:
        return means.std(0, ddof=1) / np.sqrt(len(means)) if len(means) > 1 else np.full(means.shape[1], np.inf)
    of_draws = means.reshape(-1, n_turns, means.shape[1]).mean(0)
    return of_draws.std(0, ddof=1) / np.sqrt(n_turns)


def _sum(values: Tensor) -> np.ndarray:
    return values.sum(0, dtype=torch.float64).numpy()


def summary_of_changes(changes: np.ndarray, delta: float) -> tuple[np.ndarray, ...]:
    """Mean, sd, quantiles and one-way share beyond delta, (genes,) each, of log2 fold changes (pairs, genes)."""
    low, high = np.quantile(changes, LEVELS, axis=0)
    one_way = np.maximum((changes > delta).mean(0), (changes < -delta).mean(0))  # both: spread would count as change
    return changes.mean(0), changes.std(0), low, high, one_way


def any_pairs(groups: Groups) -> PairDraws:
    """Pairs of any cells of the two groups."""
    return lambda generator, n: (generator.choice(groups.rows_a, n), generator.choice(groups.rows_b, n))


def pairs_within_batches(groups: Groups) -> PairDraws:
    """Pairs within a batch, batches in proportion to how many cells of both groups they hold."""
    cells, rows_a, rows_b = groups.cells, groups.rows_a, groups.rows_b
    batch = batch_of(cells, "within_batch")
    both = [(rows_a[batch[rows_a] == k], rows_b[batch[rows_b] == k]) for k in range(cells.n_batches)]
    both = [(a, b) for a, b in both if len(a) and len(b)]
    if not both:
        raise DataError("no batch holds cells of both groups; compare without within_batch")
    # Batches are weighted by the size of their smaller side, which limits how many different pairs there are.
    weights = np.array([min(len(a), len(b)) for a, b in both], dtype=float)

    def draw(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = generator.multinomial(n, weights / weights.sum())
        chosen = [(generator.choice(a, k), generator.choice(b, k)) for (a, b), k in zip(both, sizes, strict=True)]
        return np.concatenate([a for a, _ in chosen]), np.concatenate([b for _, b in chosen])

    return draw
