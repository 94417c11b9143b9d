"""Synthetic counts with a known seed: zero-inflated negative binomial, eight groups of cells, 12 % non-zero."""

import numpy as np
from scipy import sparse

N_GROUPS, N_BATCHES = 8, 2
MEAN_LOG_RATE, SD_LOG_RATE = -2.55, 1.5  # of a gene in a cell of usual depth; set so that 12 % are not zero
SD_LOG_CHANGE, SD_LOG_DEPTH, DROPOUT = 0.8, 0.4, 0.15
AT_ONCE = 2000  # cells


def zinb_counts(n_cells: int, n_genes: int, seed: int = 0) -> sparse.csr_array:
    r"""Counts (cells, genes), int32.

    .. math:: w \sim Gamma(r_g, r_g / \mu_{ng}), \quad y \sim Poisson(w), \quad x = y\, 1[u > 0.15]

    with log mu normal over genes (sd 1.5), their changes between groups (0.8) and the depth of cells (0.4), and r
    log-normal around 1.
    """
    generator = np.random.default_rng(seed)
    log_rate = generator.normal(MEAN_LOG_RATE, SD_LOG_RATE, n_genes)
    change = generator.normal(0, SD_LOG_CHANGE, (N_GROUPS, n_genes))
    r = np.exp(generator.normal(0, 0.5, n_genes))
    group, depth = generator.integers(N_GROUPS, size=n_cells), generator.normal(0, SD_LOG_DEPTH, n_cells)
    blocks = []
    for start in range(0, n_cells, AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        mean = np.exp(log_rate + change[group[rows]] + depth[rows, None])
        counts = generator.poisson(generator.gamma(r, mean / r))
        counts *= generator.random(counts.shape) > DROPOUT
        blocks.append(sparse.csr_array(counts.astype(np.int32)))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def batch_labels(n_cells: int, seed: int = 0) -> np.ndarray:
    """A batch for every cell, at random: an array (cells,) of "a" and "b"."""
    return np.array(["a", "b"])[np.random.default_rng(seed).integers(N_BATCHES, size=n_cells)]
