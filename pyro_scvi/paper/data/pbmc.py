"""The two sets of blood cells of Table 4: counts, known types, batches, and quality metrics of each cell."""

from __future__ import annotations

from typing import NamedTuple

import anndata
import numpy as np
from scipy import sparse

from pyro_scvi.paper.data import files

MOST_VARIABLE = 1000  # genes of the data set that has all
COMPONENTS = tuple(f"qc_pc{i}" for i in range(1, 8))
METRICS = (
    "num_umi",
    "num_reads",
    "mean_reads_per_umi",
    "std_reads_per_umi",
    "mapped_reads",
    "genome_not_gene",
    "unmapped_reads",
    "umi_corrected",
    "barcode_corrected",
)
OF_COUNTS = ("log_n_umi", "log_n_genes", "pct_mt", "pct_ribo")


class Blood(NamedTuple):
    """Cells with their known types, batches and quality.

    ``adata`` has counts (cells, genes) and in ``obs`` the columns ``gamma`` and ``batch``; ``depth`` (cells,) is the
    number of a cell's transcripts over all genes, of which ``adata`` has some; ``quality`` (cells, columns) is what an
    embedding should not know, weighted by its variances; ``metrics`` (cells, columns) are what SCONE takes components
    of; ``labels`` (cells,) are the known types, trusted where ``labelled`` (cells,).
    """

    adata: anndata.AnnData
    gamma: tuple[str, ...]
    depth: np.ndarray
    quality: np.ndarray
    metrics: np.ndarray
    labels: np.ndarray
    labelled: np.ndarray

    @property
    def batch(self) -> np.ndarray:
        """Batches, (cells,)."""
        return self.adata.obs["batch"].astype(str).to_numpy()

    @property
    def counts(self) -> np.ndarray:
        """Counts (cells, genes), dense."""
        return np.asarray(self.adata.X.toarray(), dtype=np.float64)


def read(file: str, at_most: int | None) -> Blood:
    """One of the two data sets; genes, and then cells, without a count among those read are left out."""
    adata = files.read(file, at_most)
    return _with_own_metrics(adata) if file == files.PBMC_3KA else _with_authors_metrics(_counted(adata))


def _with_authors_metrics(adata: anndata.AnnData) -> Blood:
    """The authors' seven components of nine metrics: their variance-weighted R^2 is the mean R^2 of those metrics."""
    obs = adata.obs
    labels = obs["labels"].astype(str).to_numpy()
    quality = obs[list(COMPONENTS)].to_numpy(float)
    depth = obs["num_umi"].to_numpy(float)
    return Blood(adata, COMPONENTS, depth, quality, obs[list(METRICS)].to_numpy(float), labels, np.ones(len(obs), bool))


def _with_own_metrics(adata: anndata.AnnData) -> Blood:
    """Depth and shares of transcripts, z-scored; types are trusted in one of the two batches."""
    adata = _counted(adata[:, most_variable(adata.X, MOST_VARIABLE)])
    for name in ("n_umi", "n_genes"):
        adata.obs[f"log_{name}"] = np.log(adata.obs[name].to_numpy(float))
    metrics = adata.obs[list(OF_COUNTS)].to_numpy(float)
    quality = (metrics - metrics.mean(0)) / metrics.std(0)
    labels = adata.obs["labels"].astype(str).to_numpy()
    depth = adata.obs["n_umi"].to_numpy(float)
    return Blood(adata, OF_COUNTS, depth, quality, metrics, labels, (adata.obs["batch"] == "pbmc3k").to_numpy())


def most_variable(counts: sparse.csr_matrix, n: int) -> np.ndarray:
    """Positions of the ``n`` genes whose log(1 + x) varies most over all cells, in the order of the genes."""
    logs = counts.astype(float).log1p()
    variance = np.asarray(logs.multiply(logs).mean(0) - np.square(logs.mean(0))).ravel()
    return np.sort(np.argsort(-variance, kind="stable")[:n])


def _counted(adata: anndata.AnnData) -> anndata.AnnData:
    genes = np.asarray(adata.X.sum(0)).ravel() > 0
    cells = np.asarray(adata.X[:, genes].sum(1)).ravel() > 0
    return adata[cells][:, genes].copy()
