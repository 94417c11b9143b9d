"""The cortex data, split as the paper's authors did."""

from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
from sklearn.model_selection import train_test_split

from benchmarks.harness.paths import DATA

DEFAULT_DATA = DATA / "cortex_558.h5ad"


class Task(NamedTuple):
    """One experiment: all cells as an AnnData, the row numbers to fit and to score, the evidence sampler's draws."""

    data: anndata.AnnData
    train: np.ndarray
    test: np.ndarray
    samples: int

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Raw counts (cells, genes) to fit and to score."""
        x = self.data.X
        x = x.toarray() if hasattr(x, "toarray") else np.asarray(x)
        return x[self.train], x[self.test]


def read_task(path: Path, *, samples: int) -> Task:
    """Read the data and split it as the paper's authors did: 75 / 25, random state 0."""
    data = anndata.read_h5ad(path)
    train, test = train_test_split(np.arange(data.n_obs), test_size=0.25, random_state=0)
    return Task(data, train, test, samples)
