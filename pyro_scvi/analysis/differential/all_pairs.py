"""P(w_a < w_b) averaged over all pairs of cells from two groups, by convolution of histograms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.differential.matched_pairs import LEVELS, Estimate, Groups
from pyro_scvi.distributions.gamma_ratio import SharedDispersion
from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_at_least

AT_ONCE = 64  # genes, so that their histograms stay within the cache


@dataclass(frozen=True, kw_only=True)
class AllPairs:
    r"""Pair every draw of one group with every draw of the other, for the least variance.

    .. math:: \hat p = \frac{1}{S^2} \sum_{i, j} F(b_j - a_i), \qquad
        se^2 = \frac{var_i\, \hat p_i + var_j\, \hat p_j}{S}

    F is that of :class:`~pyro_scvi.distributions.gamma_ratio.SharedDispersion`. a_i and b_j are the log means of S
    draws of either group, with cells drawn with replacement. p_i and p_j are averages over the pairs of one draw. Draws
    are independent but pairs are not, hence this standard error (Hoeffding 1948; DeLong, DeLong and Clarke-Pearson
    1988).

    Each log mean is split between the two nearest of ``bins`` equidistant points, d apart, which span the log means of
    the gene. Let s = sqrt(2 psi_1(r)), the standard deviation of log (w_b / w_a). Binning then changes p by at most (d
    / s)^2 / 4, and for any r by no more than moving every log mean by up to d would. The table of F adds an error of
    1e-5. The fold change's interval is exact to 2 d; its mean, sd and p_lfc are those of all pairs.

    Needs one dispersion per gene for all cells (``likelihoods.PerGene``).

    Parameters
    ----------
    samples
        S, draws per group.
    bins
        Points of the histograms.

    Raises
    ------
    ModelError
        If ``samples`` or ``bins`` is no integer of 2 or more; or, when estimating, if cells differ in dispersion or w
        has none.

    Examples
    --------
    >>> per_gene = ps.SCVI(20, 2, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(20)))
    >>> made = ps.fit(per_gene, cells, epochs=1, progress=False)
    >>> pairs = ps.differential.RandomPairs(pairing=ps.differential.AllPairs(samples=100))
    >>> len(ps.differential_expression(made, cells, groupby="kind", group_a="a", group_b="b", estimand=pairs))
    20
    """

    samples: int = 1000
    bins: int = 2048

    def __post_init__(self) -> None:
        require_at_least(2, samples=self.samples, bins=self.bins)

    def estimate(self, groups: Groups, generator: np.random.Generator, delta: float) -> Estimate:
        """Averages over all pairs; ``n`` is S, the number of pairs that share no draw.

        Raises
        ------
        ModelError
            If cells differ in dispersion, or w has none.
        """
        a, b = (groups.side(generator.choice(rows, self.samples)) for rows in (groups.rows_a, groups.rows_b))
        if a.log_r is None or not a.shares_dispersion:
            raise ModelError(
                f"AllPairs needs one dispersion per gene for all cells, which {groups.fit.model.likelihood!r} does not "
                "have; leave pairing out, or fit with likelihoods.ZINB(likelihoods.PerGene(n_genes))"
            )
        return over_all_pairs(a.log_mean, b.log_mean, a.log_r, delta, self.bins)


def over_all_pairs(a: Tensor, b: Tensor, log_r: Tensor, delta: float, bins: int) -> Estimate:
    """The estimate from log means (draws of a, genes) and (draws of b, genes) and log r (genes,)."""
    # Genes are independent of each other here, so they can be taken in parts.
    parts = zip(a.split(AT_ONCE, 1), b.split(AT_ONCE, 1), log_r.split(AT_ONCE), strict=True)
    estimates = [_of_genes(*part, delta, bins) for part in parts]
    p, se, *of_change = (torch.cat(column).numpy() for column in zip(*estimates, strict=True))
    return Estimate(p, se, min(len(a), len(b)), *of_change)


def _of_genes(a: Tensor, b: Tensor, log_r: Tensor, delta: float, bins: int) -> tuple[Tensor, ...]:
    a, b = (values.T.contiguous().sort(1).values for values in (a, b))  # (genes, draws)
    one_way = _share_one_way(a, b, delta * math.log(2))
    a, b = a.double(), b.double()
    low, high = torch.minimum(a.amin(1), b.amin(1)), torch.maximum(a.amax(1), b.amax(1))
    width = ((high - low) / (bins - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    on_a, on_b = (_Shared.out((values - low[:, None]) / width[:, None], bins) for values in (a, b))
    excess = SharedDispersion(log_r).at(torch.arange(bins)[:, None] * width).T - 0.5  # F - 1/2 (genes, bins), odd
    # F - 1/2 is odd: its negative half is the positive one mirrored. Padding to 2 bins keeps the convolution linear.
    kernel = torch.cat([excess, -excess[:, :1], -excess[:, 1:].flip(1)], 1).double()
    transform, transform_a, transform_b = (
        torch.fft.rfft(values, 2 * bins) for values in (kernel, on_a.bins, on_b.bins)
    )
    of_a = on_a.read(0.5 - torch.fft.irfft(transform_b * transform)[:, :bins])
    of_b = on_b.read(0.5 + torch.fft.irfft(transform_a * transform)[:, :bins])
    # Hoeffding 1948: the draws of a and of b are independent, the pairs are not.
    se = (of_a.var(1) / of_a.shape[1] + of_b.var(1) / of_b.shape[1]).sqrt()
    gaps = torch.fft.irfft(transform_a.conj() * transform_b).roll(bins, 1)  # of b - a = -bins ... bins - 1
    quantiles = [(_quantile(gaps, level) - bins) * width for level in LEVELS]
    mean, sd = b.mean(1) - a.mean(1), (a.var(1, correction=0) + b.var(1, correction=0)).sqrt()
    log2 = [value / math.log(2) for value in (mean, sd, *quantiles)]
    return of_a.mean(1), se, *log2, one_way


class _Shared(NamedTuple):
    """Values split between neighbouring bins (genes, bins), sum 1 per gene; the place of each value (genes, draws)."""

    bins: Tensor
    below: Tensor
    share: Tensor

    @classmethod
    def out(cls, position: Tensor, bins: int) -> _Shared:
        below = position.long().clamp(0, bins - 2)
        share = position - below
        index = (below + bins * torch.arange(len(position))[:, None]).reshape(-1)
        weights, size = share.reshape(-1) / position.shape[1], len(position) * bins
        total = torch.bincount(index, 1 / position.shape[1] - weights, size) + torch.bincount(index + 1, weights, size)
        return cls(total.view(-1, bins), below, share)

    def read(self, function: Tensor) -> Tensor:
        """A function on the bins (genes, bins), interpolated at every value (genes, draws)."""
        return torch.lerp(function.gather(1, self.below), function.gather(1, self.below + 1), self.share)


def _quantile(mass: Tensor, level: float) -> Tensor:
    """Position of a quantile of (genes, bins), the mass of each spread evenly around it."""
    total = mass.clamp(min=0).cumsum(1)
    above = torch.searchsorted(total, level * total[:, -1:])
    reached = total.gather(1, above)
    return (above + 0.5 - (reached - level * total[:, -1:]) / mass.gather(1, above)).squeeze(1)


def _share_one_way(a: Tensor, b: Tensor, delta: float) -> Tensor:
    """The larger of the shares of pairs with b - a > delta and with b - a < -delta, from ascending (genes, draws)."""
    # b is sorted, so the position of a -+ delta in it counts the pairs beyond delta.
    below, up_to = torch.searchsorted(b, a - delta), torch.searchsorted(b, a + delta, right=True)
    down, up = (counts.double().mean(1) / b.shape[1] for counts in (below, b.shape[1] - up_to))
    return torch.maximum(down, up)
