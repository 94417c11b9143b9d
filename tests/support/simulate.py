"""Simulated counts that many tests share."""

import numpy as np


def simulated_counts(n_cells=60, n_genes=20, seed=0):
    """Two groups of cells of unequal depth, overdispersed counts, a fifth of them lost."""
    rng = np.random.default_rng(seed)
    group = np.arange(n_cells) % 2
    profile = rng.gamma(1.0, 3.0, size=(2, n_genes)) + 0.3
    depth = rng.lognormal(0.0, 0.3, size=(n_cells, 1))
    counts = rng.poisson(depth * profile[group] * rng.gamma(2.0, 0.5, size=(n_cells, n_genes)))
    counts *= rng.random(counts.shape) > 0.2
    counts[:, 0] += 1  # no cell without counts
    counts[0] += 1  # no gene without counts
    return counts
