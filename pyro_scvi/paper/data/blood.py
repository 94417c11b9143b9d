"""The blood cells of Figure 2, B against dendritic cells, and the microarrays that show which genes differ."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import numpy as np
import pandas as pd

from pyro_scvi.paper.data import files

MOST_SIGNIFICANT = 800
FEWEST_CELLS = 10  # in which a gene must be seen


@dataclass(frozen=True, eq=False)
class Blood:
    """Cells with the reference of their genes.

    ``adata`` raw counts with ``obs["labels"]``; ``groups`` the labels of B and dendritic cells, ``largest`` that of the
    most frequent type; ``batch`` a column of obs or None; ``matched`` (genes,) whether the reference has the gene;
    ``p`` and ``positive`` (matched genes,): its p-value, and whether it is among the most significant; ``other_p`` the
    p-value of a second set of arrays.
    """

    name: str
    adata: anndata.AnnData
    groups: tuple[str, str]
    largest: str
    batch: str | None
    matched: np.ndarray
    p: np.ndarray
    positive: np.ndarray
    other_p: np.ndarray

    def dense(self) -> np.ndarray:
        """Counts (cells, genes), float64."""
        return self.adata.X.toarray().astype(float)


def read_pbmc4k(folder: Path) -> Blood:
    """4k blood cells, 2,000 genes of which 263 have a reference (their names are inferred), one batch."""
    return _matched(files.PBMC_4K, folder, ("B cells", "Dendritic Cells"), None, only_reference=False)


def read_pbmc_3ka(folder: Path) -> Blood:
    """3k blood cells and donor A (labels transferred), two batches, the genes of the reference seen in 10 cells."""
    return _matched(files.PBMC_3KA, folder, ("B", "DC"), "batch", only_reference=True)


READERS: dict[str, Callable[[Path], Blood]] = {files.PBMC_4K: read_pbmc4k, files.PBMC_3KA: read_pbmc_3ka}


def read(file: str, at_most: int | None = None) -> Blood:
    """A set of blood cells of the data folder; at most so many cells, spread evenly, and the genes seen in them.

    Raises
    ------
    DataError
        If it is missing.
    """
    blood = READERS[file](files.path(file).parent)
    n_cells = blood.adata.n_obs
    if at_most is None or at_most >= n_cells:
        return blood
    adata = blood.adata[np.arange(at_most) * n_cells // at_most]
    seen = np.asarray(adata.X.sum(0)).ravel() > 0
    kept = seen[blood.matched]
    known = {name: getattr(blood, name)[kept] for name in ("p", "positive", "other_p")}
    return replace(blood, adata=adata[:, seen].copy(), matched=blood.matched[seen], **known)


def _matched(file: str, folder: Path, groups: tuple[str, str], batch: str | None, *, only_reference: bool) -> Blood:
    adata, reference = anndata.read_h5ad(folder / file), pd.read_csv(folder / files.ARRAYS, index_col="GS")
    matched = adata.var["ref_BDC_P_Value"].notna().to_numpy()
    if only_reference:
        matched &= adata.var["n_cells"].to_numpy() >= FEWEST_CELLS
        adata, matched = adata[:, matched].copy(), matched[matched]
    genes = adata.var_names[matched]
    # The most significant of the matched genes; where fewer match, those that are among the reference's own.
    ranked = reference.loc[genes] if matched.sum() > MOST_SIGNIFICANT else reference
    positive = ranked.nsmallest(MOST_SIGNIFICANT, "BDC_adj.P.Val").index
    p, other_p = (reference.loc[genes, f"{array}_P.Value"].to_numpy() for array in ("BDC", "BDC2"))
    largest = str(adata.obs["labels"].value_counts().index[0])
    name = file.removesuffix(".h5ad")
    return Blood(name, adata, groups, largest, batch, matched, p, genes.isin(positive), other_p)
