"""One step of the EM algorithm of zero-inflated factor analysis, from sums over cells."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from pyro_scvi.baselines.zifa.model import Parameters, Posterior

LEAST_VARIANCE = 1e-8  # a gene whose counts are all alike where seen drives sigma^2 to 0 and the likelihood to infinity


class Seen(NamedTuple):
    """Sums of y over cells that EM needs once: number of zeros, y and y^2 per gene (genes,), and the number of cells.

    ``squares`` and ``multiplicity`` (distinct,): the distinct y^2 > 0 and how often each occurs. Counts are integers,
    so a few hundred values stand for all entries.
    """

    n_lost: Tensor
    y: Tensor
    y2: Tensor
    n_cells: int
    squares: np.ndarray
    multiplicity: np.ndarray

    @classmethod
    def of(cls, y: Tensor) -> Seen:
        """Sum over all cells of y (cells, genes)."""
        values, multiplicity = torch.unique(y[y > 0], return_counts=True)
        squares = values.square().cpu().numpy()
        return cls((y == 0).sum(0).to(y), y.sum(0), y.square().sum(0), len(y), squares, multiplicity.cpu().numpy())

    def log_kept(self, decay: float) -> float:
        """Sum of log_kept over all cells, nats."""
        return float(self.multiplicity @ np.log(-np.expm1(-decay * self.squares)))

    def decay(self, lost_square: float, start: float) -> float:
        """The lambda that maximises log_kept(lambda) - lambda * lost_square, which is concave."""

        def slope(log_decay: float) -> float:
            u = np.exp(log_decay) * self.squares
            return float(self.multiplicity @ (u * np.exp(-u) / -np.expm1(-u))) - np.exp(log_decay) * lost_square

        # The function is concave, so its slope has one root: bracket it from the last lambda.
        low = high = math.log(start)
        while slope(low) < 0:
            low -= 1
        while slope(high) > 0:
            high += 1
        return math.exp(brentq(slope, low, high, xtol=1e-14, rtol=1e-14))


class Sums(NamedTuple):
    """Sums of the posterior over cells that the M-step needs; an entry per cell, gene and latent is never held.

    ``z`` (latents,), ``zz`` (latents, latents); over the cells where a gene is lost ``lost_z`` (genes, latents) and
    ``lost_zz`` (genes, latents * latents); ``yz`` (genes, latents).
    """

    z: Tensor
    zz: Tensor
    lost_z: Tensor
    lost_zz: Tensor
    yz: Tensor

    @classmethod
    def of(cls, y: Tensor, latents: Posterior) -> Sums:
        """Sum over the cells of y (cells, genes)."""
        lost, second = (y == 0).to(y), latents.second_moment
        return cls(
            latents.mean.sum(0), second.sum(0), lost.T @ latents.mean, lost.T @ second.flatten(1), y.T @ latents.mean
        )

    def __add__(self, other: Sums) -> Sums:  # type: ignore[override]
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def maximised(sums: Sums, seen: Seen, old: Parameters) -> Parameters:
    r"""M-step (Pierson and Yau 2015, Algorithm 1): the parameters that maximise the expected complete log likelihood.

    .. math::

        (a_j, \mu_j) = B^{-1} r_j, \quad B = \sum_n E[\tilde z_n \tilde z_n^T], \quad
        r_j = \sum_n E[u_{nj} \tilde z_n], \quad
        \sigma_j^2 = \tfrac1N (\sum_n E[u_{nj}^2] - r_j^T B^{-1} r_j)

    with z~ = (z, 1).
    """
    a, mu, c = old.loadings, old.mean, old.shrinkage
    lost_zz = sums.lost_zz.unflatten(1, sums.zz.shape)
    lost_za = (lost_zz @ a[:, :, None]).squeeze(-1)  # sum of E[z z^T] a over lost entries, (genes, latents)
    lost_eta2 = (lost_za * a).sum(1) + 2 * mu * (sums.lost_z * a).sum(1) + mu.square() * seen.n_lost
    lost_u2 = c * old.scale.square() * seen.n_lost + c.square() * lost_eta2
    uz = sums.yz + c[:, None] * (lost_za + mu[:, None] * sums.lost_z)
    u = seen.y + c * ((sums.lost_z * a).sum(1) + mu * seen.n_lost)
    right = torch.cat([uz, u[:, None]], 1)  # (genes, latents + 1)
    new = torch.linalg.solve(_with_ones(sums, seen.n_cells), right.T).T
    variance = (seen.y2 + lost_u2 - (right * new).sum(1)) / seen.n_cells
    decay = seen.decay(float(lost_u2.sum()), float(old.decay))
    scale = variance.clamp(min=LEAST_VARIANCE).sqrt()
    return Parameters(new[:, :-1], new[:, -1], scale, torch.as_tensor(decay).to(scale))


def _with_ones(sums: Sums, n_cells: int) -> Tensor:
    """B (latents + 1, latents + 1)."""
    top = torch.cat([sums.zz, sums.z[:, None]], 1)
    return torch.cat([top, torch.cat([sums.z, sums.z.new_tensor([n_cells])])[None]])
