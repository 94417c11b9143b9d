"""The same cells for both sides: simulated ones by seed, real ones by file, train and test split by a fixed seed."""

from functools import lru_cache

import anndata
import numpy as np
import pandas as pd

from benchmarks.harness.simulation import batch_labels, zinb_counts

SIMULATED_CELLS = 20_000  # of which a row takes the first ones
SPLIT_SEED, HELD_OUT = 0, 0.1


@lru_cache(maxsize=2)
def simulated(n_cells: int, n_genes: int) -> anndata.AnnData:
    """The first ``n_cells`` of the seeded cells, with two batches in ``obs.batch``."""
    counts = zinb_counts(max(n_cells, SIMULATED_CELLS if n_cells > 1000 else 0), n_genes)[:n_cells]
    obs = pd.DataFrame({"batch": batch_labels(n_cells)}, index=np.arange(n_cells).astype(str))
    return anndata.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"gene {g}" for g in range(n_genes)]))


@lru_cache(maxsize=2)
def real(path: str, n_cells: int | None = None) -> anndata.AnnData:
    """A file's cells that have counts, its first ``n_cells`` where given, genes without counts left out."""
    data = anndata.read_h5ad(path)[:n_cells].copy()
    totals = np.asarray(data.X.sum(1)).reshape(-1)
    data = data[totals > 0].copy()
    return data[:, np.asarray(data.X.sum(0)).reshape(-1) > 0].copy()


def split(data: anndata.AnnData) -> tuple[anndata.AnnData, anndata.AnnData]:
    """Training and held-out cells (a tenth), by a fixed seed and the same for both sides.

    The held-out ones come in random order: files are sorted by cell type, and some judges take the first few.
    """
    order = np.random.default_rng(SPLIT_SEED).permutation(data.n_obs)
    held_out, train = np.split(order, [round(HELD_OUT * data.n_obs)])
    return data[np.sort(train)].copy(), data[held_out].copy()


def dense(data: anndata.AnnData) -> np.ndarray:
    """Counts (cells, genes) as a dense float32 array."""
    return np.asarray(data.X.toarray(), dtype=np.float32)
