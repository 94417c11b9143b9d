"""Simulated counts with a known seed: zero-inflated or plain negative binomial, in memory or as a large file."""

from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from benchmarks.harness.stopwatch import Sample, Stopwatch

N_GROUPS, N_BATCHES = 8, 2
MEAN_LOG_RATE, SD_LOG_RATE = -2.55, 1.5  # of a gene in a cell of usual depth; set so that 12 % are not zero
SD_LOG_CHANGE, SD_LOG_DEPTH, DROPOUT = 0.8, 0.4, 0.15
AT_ONCE = 2000  # cells
GROUPED_LOG_RATE = -3.2, 1.2  # mean and sd for grouped_counts: one entry in ten is not zero
GROUPS = "a", "b", "c", "d"
COPIED = 20_000  # cells, of which a large file has as many copies as it needs


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


def write(path: str, n_cells: int, n_genes: int) -> Callable[[], Sample]:
    """Write an h5ad file of ``n_cells``, CSR of uint16 counts, made of copies of 20,000 simulated cells."""

    def measure() -> Sample:
        with Stopwatch() as watch:
            block = zinb_counts(min(n_cells, COPIED), n_genes).astype(np.uint16)
            copies = -(-n_cells // block.shape[0])
            data = np.tile(block.data, copies)
            starts = np.arange(copies)[:, None] * block.nnz + block.indptr[:-1]
            indptr = np.append(starts.ravel(), copies * block.nnz)[: n_cells + 1]
            nnz = indptr[-1]
            indices = np.tile(block.indices, copies)[:nnz]
            counts = sparse.csr_matrix((data[:nnz], indices, indptr.astype(np.int32)), shape=(n_cells, n_genes))
            names = pd.DataFrame(index=np.arange(n_cells).astype(str))
            anndata.AnnData(counts, obs=names).write_h5ad(path)
        return watch.sample(work=1, nnz=int(nnz), megabytes=Path(path).stat().st_size / 1e6)

    return measure


def grouped_counts(n_cells: int, n_genes: int, seed: int) -> anndata.AnnData:
    """AnnData of sparse counts, negative binomial with four groups of cells that differ in a tenth of the genes."""
    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(*GROUPED_LOG_RATE, n_genes))
    change = np.where(generator.random((len(GROUPS), n_genes)) < 0.1, 4.0, 1.0)
    group = generator.integers(len(GROUPS), size=n_cells)
    depth = np.exp(generator.normal(0, 0.4, n_cells))
    blocks = []
    for rows in np.array_split(np.arange(n_cells), -(-n_cells // 1000)):
        mean = depth[rows, None] * rate * change[group[rows]]
        blocks.append(sparse.csr_matrix(generator.poisson(generator.gamma(2.0, mean / 2.0)).astype(np.int32)))
    data = anndata.AnnData(sparse.vstack(blocks, format="csr"))
    data.obs_names, data.var_names = data.obs_names.astype(str), data.var_names.astype(str)
    data.obs["group"] = np.array(GROUPS)[group]
    return data
