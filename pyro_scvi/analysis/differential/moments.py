"""Posterior moments of the expression of groups of cells, given their counts: the model's part in a comparison."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.posterior_samples import decoded
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.inference.samplers import Sampler
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.types import Theta
from pyro_scvi.utils.cell_streams import cell_streams, own_names

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

AT_ONCE = 128  # cells


@dataclass(frozen=True)
class Moments:
    """Depth of every cell, and sums over the cells of each part of E[w / l | x] and of E[(w / l)^2 | x].

    ``depth`` (cells,) is l, the total or a known size factor, as a multiple of the median over the cells that are
    compared; NaN for other cells.
    ``part`` (cells,) says in which part a cell is; ``n`` (parts,); ``first`` and ``second`` (parts, genes).
    """

    depth: np.ndarray
    part: np.ndarray
    n: np.ndarray
    first: np.ndarray
    second: np.ndarray

    def of(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of w / l over cells, (genes,) each; ``rows`` are all cells of some of the parts.

        The variance is that of E[w / l | x] over the cells plus the mean of Var[w / l | x].
        """
        parts = np.unique(self.part[rows])
        n = self.n[parts].sum()
        mean = self.first[parts].sum(0) / n
        return mean, np.maximum(self.second[parts].sum(0) / n - mean**2, 0)


def posterior_moments(
    fit: Fit, batches: Minibatches, part: np.ndarray, sampler: Sampler, samples: int, seed: int
) -> Moments:
    """Moments of every part of the cells, (cells,) codes from 0; -1: not used. Draws are of streams of the cells."""
    n_parts, n_genes = int(part.max()) + 1, batches.cells.n_genes
    depth = np.full(len(part), np.nan)
    first, second = np.zeros((n_parts, n_genes)), np.zeros((n_parts, n_genes))
    totals, names = batches.cells.totals, own_names(batches.cells.cell_names)
    for k, rows in _blocks(part, n_parts):
        x, gamma = batches.rows(torch.as_tensor(rows, device=fit.device))
        with cell_streams(seed, names[rows]):
            theta = decoded(fit, x, gamma, sampler.draw(fit.guide, x, gamma, samples))
        # The library that the guide infers may be off by a factor that differs between groups: totals cannot be.
        size = fit.model.library.depth(x.new_tensor(totals[rows], dtype=x.dtype)[:, None], gamma)
        mean, square = rate_moments(fit.model.likelihood, x, theta)
        depth[rows] = size[:, 0].cpu().numpy()
        first[k] += (mean / size).mean(0).sum(0).cpu().numpy()
        second[k] += (square / size.square()).mean(0).sum(0).cpu().numpy()
    median = np.nanmedian(depth)
    n = np.bincount(part[part >= 0], minlength=n_parts)
    return Moments(depth / median, part, n, first * median, second * median**2)


def _blocks(part: np.ndarray, n_parts: int) -> Iterator[tuple[int, np.ndarray]]:
    """The code of a part and some of its rows, a block at a time."""
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(n_parts + 1))
    for k in range(n_parts):
        rows = order[ends[k] : ends[k + 1]]
        for start in range(0, len(rows), AT_ONCE):
            yield k, rows[start : start + AT_ONCE]


def rate_moments(likelihood: Likelihood, x: Tensor, theta: Theta) -> tuple[Tensor, Tensor]:
    """E[w | x, z] and E[w^2 | x, z], counts (samples, cells, genes), by the exact Gamma conditional.

    Raises
    ------
    ModelError
        If the likelihood says nothing of w.
    """
    likelihood.require_explicit()
    mean, prior = theta["log_mean"].exp(), likelihood.rate(**theta)
    logits = likelihood.technical_zero_logits(**theta)
    if prior is None:
        return mean, mean.square()  # w = mu, technical zero or not
    seen = (prior.concentration + x) / (prior.rate + 1)
    square = seen * (seen + 1 / (prior.rate + 1))
    if logits is None:
        return seen, square
    rho = torch.sigmoid(logits) * (x == 0)
    lost = mean * (mean + 1 / prior.rate)  # a technical zero leaves w its prior
    return torch.lerp(seen, mean, rho), torch.lerp(square, lost, rho)
