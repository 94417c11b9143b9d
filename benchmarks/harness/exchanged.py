"""Counts whose differences are known: cells drawn from a fit, with the laws of some genes exchanged between groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

import pyro_scvi as ps

NULL_SHARE = 0.6  # of the genes, whose laws are exchanged
SD_LOG_DEPTH = 0.4  # over the cells of a group
SD_DONOR = 0.3  # of log means, over donors
LEAST_LEFT = 0.1  # of a cell's counts, for the genes that differ


@dataclass(frozen=True)
class Scene:
    """What is drawn: cells per group, depth of the first group over that of the second, donors per group or none."""

    name: str
    n_cells: int
    depths: float = 1.0
    n_donors: int = 0


class Laws(NamedTuple):
    """The laws of cells of two groups under a fit, each (cells, genes).

    ``share`` of a cell's counts, sum 1; ``inverse_dispersion``; ``zero``, the probability of a technical zero.
    """

    share: np.ndarray
    inverse_dispersion: np.ndarray
    zero: np.ndarray

    def mixed(self, rows: np.ndarray, others: np.ndarray, null: np.ndarray) -> Laws:
        """The laws of ``rows``; those of the genes that are ``null``, of the ``others``."""
        return Laws(*(np.where(null, values[others], values[rows]) for values in self))


class Drawn(NamedTuple):
    """Counts (cells, genes) of two groups, and what is true of them.

    ``second`` and ``donor`` (cells,): whether a cell is of the second group, and its donor. By gene: whether it is
    ``null``, its log2 fold change ``lfc``, first group over second, and the molecules ``expected`` in both groups and
    in the one that has fewer, (2, genes).
    """

    counts: np.ndarray
    second: np.ndarray
    donor: np.ndarray
    null: np.ndarray
    lfc: np.ndarray
    expected: np.ndarray


def laws_of(fit: ps.Fit, cells: ps.Cells, seed: int) -> Laws:
    """The laws of cells at one draw of their latents."""
    drawn = ps.sample_posterior(fit, cells, samples=1, sites=["z"], seed=seed, progress=False)
    z, gamma = torch.as_tensor(drawn["z"].values)[:, :, None], cells[:][1]
    with torch.no_grad():
        theta = fit.model.eval().decode(z, torch.zeros(1, cells.n_cells, 1), gamma)
    theta = {name: value.double().expand(1, cells.n_cells, cells.n_genes)[0] for name, value in theta.items()}
    zero = torch.sigmoid(theta["gate_logits"])
    share = torch.softmax(theta["log_mean"] + torch.log1p(-zero), -1)
    return Laws(share.numpy(), theta["log_inverse_dispersion"].exp().numpy(), zero.numpy())


def drawn_from(laws: Laws, second: np.ndarray, depth: float, scene: Scene, seed: int) -> Drawn:
    """Draw the cells of a scene; ``second`` says which of the laws are of the second group, ``depth`` a cell's total.

    In every cell a null gene has the law that it has in a cell of either group, as often of the one as of the other.
    The shares of the other genes are scaled so that those of a cell have sum 1: no gene changes because others do.
    """
    generator = np.random.default_rng(seed)
    null = generator.random(laws.share.shape[1]) < NULL_SHARE
    group = np.repeat([False, True], scene.n_cells)
    donor = group * scene.n_donors + np.arange(len(group)) % max(1, scene.n_donors)
    either = generator.random(len(group)) < 0.5
    rows, others = (_rows(second, of, generator) for of in (group, either))
    mixed = laws.mixed(rows, others, null)
    share = mixed.share * _donor_effects(scene, len(null), generator)[donor]
    left = np.maximum(1 - share[:, null].sum(1, keepdims=True), LEAST_LEFT)
    share[:, ~null] *= left / share[:, ~null].sum(1, keepdims=True)
    depths = depth * np.exp(generator.normal(0, SD_LOG_DEPTH, len(group)))
    mean = share * (depths * scene.depths ** np.where(group, -0.5, 0.5))[:, None]
    by_group = np.stack([mean[~group].sum(0), mean[group].sum(0)])
    expected = np.stack([by_group.sum(0), by_group.min(0)])
    return Drawn(_counts(mixed, mean, generator), group, donor, null, _truth(laws, second, null), expected)


def _rows(second: np.ndarray, wanted: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A random law of the group that is wanted for each cell."""
    of_group = [generator.choice(np.flatnonzero(second == side), len(wanted)) for side in (False, True)]
    return np.where(wanted, of_group[1], of_group[0])


def _donor_effects(scene: Scene, n_genes: int, generator: np.random.Generator) -> np.ndarray:
    """Factors with mean 1 (donors, genes); 1 where there are no donors."""
    if not scene.n_donors:
        return np.ones((2, n_genes))
    return np.exp(generator.normal(-(SD_DONOR**2) / 2, SD_DONOR, (2 * scene.n_donors, n_genes)))


def _counts(laws: Laws, mean: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Zero-inflated negative binomial counts of this mean, technical zeros included."""
    r = laws.inverse_dispersion
    w = generator.gamma(r, mean / (1 - laws.zero) / r)
    return (generator.poisson(w) * (generator.random(w.shape) >= laws.zero)).astype(np.float32)


def _truth(laws: Laws, second: np.ndarray, null: np.ndarray) -> np.ndarray:
    """The log2 fold change of each gene, first group over second, (genes,)."""
    share = laws.share / laws.share[:, ~null].sum(1, keepdims=True)
    first, other = (share[second == side].mean(0) for side in (False, True))
    return np.where(null, 0.0, np.log2(first / other))
