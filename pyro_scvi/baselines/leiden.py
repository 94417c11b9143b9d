"""Clusters as in Seurat: Leiden communities in a graph of nearest neighbours, through scanpy."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from pyro_scvi.baselines.inputs import dense_counts, missing_extra
from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.random_state import global_state_kept

LEAST_JACCARD = 1 / 15  # Seurat's prune.SNN
UNTIL_STABLE = -1


class LeidenClusters(ClusterMixin, BaseEstimator):
    r"""Cluster cells by the steps of a Seurat analysis; the numbers differ from Seurat's own.

    Counts are scaled to the cells' median total, transformed by log(1 + .), restricted to highly variable genes and
    projected on principal components. Cells are linked by the number of nearest neighbours they share. Leiden's
    algorithm, through scanpy and igraph, cuts this graph at the largest modularity for ``resolution``. The number of
    clusters depends mostly on the resolution. There is no ``transform``: only the cells of the fit are clustered.

    .. math:: A_{ij} = \frac{|N_i \cap N_j|}{|N_i \cup N_j|}, \qquad
        Q = \frac{1}{2m} \sum_{ij} \Big(A_{ij} - resolution\, \frac{k_i k_j}{2m}\Big) 1[c_i = c_j]

    N_i are the nearest neighbours of cell i, including itself. Values of A below 1/15 are set to 0; k are its row sums
    and 2m its total. The clusters c make the modularity Q large.

    Parameters
    ----------
    resolution
        Larger values give more clusters.
    n_variable_genes
        Highly variable genes to keep; more if some tie, all if there are fewer.
    n_components
        Principal components.
    n_neighbors
        Neighbours of a cell in the graph, including itself.
    seed
        Of Leiden's algorithm and the principal components.

    Attributes
    ----------
    labels_
        (cells,): 0 for the largest cluster, then in order of size.

    References
    ----------
    Lopez et al. 2017, Sec. 4 (Seurat's clusters of the PBMC data); Traag, Waltman and van Eck 2019, "From Louvain to
    Leiden", Scientific Reports 9:5233.

    Examples
    --------
    >>> ps.baselines.LeidenClusters(n_components=3, n_neighbors=10).fit(counts).labels_.shape
    (60,)
    """

    def __init__(
        self,
        *,
        resolution: float = 0.8,
        n_variable_genes: int = 2000,
        n_components: int = 20,
        n_neighbors: int = 20,
        seed: int = 0,
    ) -> None:
        self.resolution = resolution
        self.n_variable_genes = n_variable_genes
        self.n_components = n_components
        self.n_neighbors = n_neighbors
        self.seed = seed

    def fit(self, counts: Any, y: None = None) -> LeidenClusters:
        """Cluster raw counts (cells, genes); ``y`` is ignored.

        Raises
        ------
        DataError
            If a count is negative or not finite.
        ModelError
            If there are too few cells for the neighbours or too few genes for the components, or a setting is out of
            range.
        ImportError
            Without scanpy or igraph, naming the extra that brings them.
        """
        scanpy = _package()
        x = dense_counts(counts)
        self._check(x)
        with _undisturbed():
            cells = normalised(scanpy, x, self.n_variable_genes)
            points = PCA(self.n_components, random_state=self.seed).fit_transform(cells)
            data = scanpy.AnnData(obs=pd.DataFrame(index=[str(cell) for cell in range(len(x))]))
            graph = shared_neighbours(points, self.n_neighbors)
            settings = {"resolution": self.resolution, "random_state": self.seed, "adjacency": graph}
            scanpy.tl.leiden(data, flavor="igraph", directed=False, n_iterations=UNTIL_STABLE, **settings)
        self.labels_ = _by_size(data.obs["leiden"].cat.codes.to_numpy())
        return self

    def _check(self, x: np.ndarray) -> None:
        require_at_least(1, n_variable_genes=self.n_variable_genes, n_components=self.n_components)
        require_at_least(2, n_neighbors=self.n_neighbors)
        if not 0 < self.resolution < math.inf:
            raise ModelError(f"resolution must be a positive number, got {self.resolution}")
        if self.n_neighbors > len(x):
            raise ModelError(f"n_neighbors must be at most the number of cells, {len(x)}; got {self.n_neighbors}")
        most = min(len(x), self.n_variable_genes, x.shape[1])
        if self.n_components > most:
            raise ModelError(f"n_components must be at most {most}, cells or variable genes; got {self.n_components}")


def _package() -> Any:
    try:
        with _undisturbed():
            import igraph  # noqa: F401  # scanpy imports it late, and would name no extra
            import scanpy
    except ImportError as error:
        raise missing_extra("scanpy or igraph", error) from error
    return scanpy


def normalised(scanpy: Any, x: np.ndarray, n_variable_genes: int) -> np.ndarray:
    """log(1 + .) of counts scaled to the median total, of the highly variable genes: (cells, kept genes)."""
    data = scanpy.AnnData(x.copy())
    scanpy.pp.normalize_total(data)
    scanpy.pp.log1p(data)
    if n_variable_genes < data.n_vars:
        scanpy.pp.highly_variable_genes(data, n_top_genes=n_variable_genes, flavor="seurat", subset=True)
    return data.X


def shared_neighbours(points: np.ndarray, n_neighbors: int) -> sparse.csr_matrix:
    """Seurat's graph: the Jaccard index of two cells' neighbourhoods (cells, cells), links below 1/15 cut."""
    near = NearestNeighbors(n_neighbors=n_neighbors).fit(points).kneighbors_graph(points)  # a cell is its own neighbour
    shared = (near @ near.T).tocsr()
    shared.data /= 2 * n_neighbors - shared.data
    shared.data[shared.data < LEAST_JACCARD] = 0
    shared.setdiag(0)
    shared.eliminate_zeros()
    return shared


def _by_size(labels: np.ndarray) -> np.ndarray:
    """The labels, renamed so that 0 is the largest cluster."""
    order = np.argsort(-np.bincount(labels), kind="stable")
    return np.argsort(order)[labels]


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Keep the global random state and the number of threads, and hide the packages' warnings about each other."""
    with global_state_kept(), warnings.catch_warnings():
        for category in (FutureWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)
        yield
