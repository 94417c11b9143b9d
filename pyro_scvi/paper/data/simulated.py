"""Simulated cells, any number, from the default model fitted to the mouse brain."""

from functools import cache

import numpy as np
from scipy import sparse

from pyro_scvi.analysis.predictive.checks import prior_predictive
from pyro_scvi.data.cells import Cells
from pyro_scvi.paper import systems
from pyro_scvi.paper.data import files
from pyro_scvi.training.fitted import Fit

BLOCK = 5_000  # cells drawn together
SEEN_IN = 10  # expected cells with a count, of a gene in the fewest cells that are drawn


def counts(n_cells: int, fewest: int, at_most: int | None, epochs: int | None, seed: int) -> sparse.csr_array:
    """Counts (cells, genes), int32, of new cells that have a count.

    Parameters
    ----------
    n_cells
        How many.
    fewest
        Smallest number of cells in the comparison. Genes that would hardly be seen there are left out, so that all
        sizes have the same genes.
    at_most, epochs
        Real cells that the generator is fitted to, and for how long; None: all, as long as fit() does.
    seed
        Of the fit and of the draws.
    """
    fit = _generator(fewest, at_most, epochs, seed)
    blocks: list[sparse.csr_array] = []
    while sum(block.shape[0] for block in blocks) < n_cells:
        drawn = prior_predictive(fit.model, min(BLOCK, n_cells), seed=seed + 1 + len(blocks))
        block = sparse.csr_array(drawn.astype(np.int32))
        blocks.append(block[np.flatnonzero(block.sum(1))])
    return sparse.csr_array(sparse.vstack(blocks, format="csr")[:n_cells])


@cache
def _generator(fewest: int, at_most: int | None, epochs: int | None, seed: int) -> Fit:
    adata = files.read(files.BRAIN, at_most)
    often = np.asarray((adata.X > 0).mean(0)).ravel() >= SEEN_IN / fewest
    adata = adata[:, often]
    counted = np.asarray(adata.X.sum(1)).ravel() > 0
    return systems.fitted("scVI, default", Cells.from_anndata(adata[counted].copy()), seed=seed, epochs=epochs)
