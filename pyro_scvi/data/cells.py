"""Cells: validated counts with covariates and annotations, and the boundary to AnnData."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from pyro_scvi.data.counts import Counts, Source, cell_totals, n_nonzero
from pyro_scvi.data.indexing import CellIndex, number_held_out, positions
from pyro_scvi.data.lazy_counts import rows_of
from pyro_scvi.data.reading import read, table_in_place, table_of_anndata, table_of_matrix, table_of_store
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import require_seed
from pyro_scvi.utils.html_repr import table


@dataclass(frozen=True, eq=False, repr=False)
class Cells:
    """Counts x with covariates gamma, ready for a model; see ``from_anndata``, ``from_counts`` and ``from_store``.

    ``len(cells)`` is the number of cells, and ``cells[index]`` a minibatch ``(x, gamma)`` of float32 tensors,
    (cells, genes) and (cells, covariates); gamma has 0 columns without batches and covariates.

    Attributes
    ----------
    counts
        (cells, genes), counts: a CSR array if the input was sparse, else an ndarray. For a store, or a file left in
        place, a source that is indexed by rows.
    covariates
        (cells, covariates), float32: one-hot batches first, then standardised continuous covariates.
    schema
        The meaning of the columns; pass it to ``from_anndata`` to read a query in the same way.
    obs
        Annotations of the cells, as the AnnData had them.

    Raises
    ------
    DataError
        If an index is neither integers nor a mask of the cells; beyond the last cell it is an IndexError.

    Examples
    --------
    >>> cells = ps.Cells.from_anndata(adata, batch="donor")
    >>> cells.n_cells, cells.n_genes, cells.n_covariates
    (60, 20, 2)
    >>> x, gamma = cells[:8]
    >>> x.shape, gamma.shape
    (torch.Size([8, 20]), torch.Size([8, 2]))
    >>> train, test = cells.split(held_out=0.1, seed=0)
    >>> len(train), len(test)
    (54, 6)
    """

    counts: Counts
    covariates: np.ndarray
    schema: Schema
    obs: pd.DataFrame

    @classmethod
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        batch: str | None = None,
        covariates: Sequence[str] = (),
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        allow_non_integer: bool = False,
        backed: bool = False,
    ) -> "Cells":
        """Read an AnnData, which is not changed; errors in its counts and columns are raised here.

        Parameters
        ----------
        adata
            Raw counts, (cells, genes): dense, sparse, backed or a view.
        layer
            Layer with the raw counts; None for the schema's layer, or ``X``.
        batch
            Column of ``obs`` with a category for each cell, one-hot encoded.
        covariates
            Columns of ``obs`` with continuous covariates, standardised to mean 0 and sd 1.
        schema
            ``schema`` of other cells: genes are matched by name and reordered, extra genes left out (logged),
            batches and scales taken over. ``batch`` and ``covariates`` are then the schema's own.
        fill_missing_genes
            Count genes of the schema that ``adata`` lacks as 0, with a warning, instead of raising.
        allow_non_integer
            Accept values that are no integers, such as corrected counts.
        backed
            Leave the counts of a backed AnnData, or of an ``anndata.experimental.AnnCollection``, where they are. They
            are scanned once; then every minibatch is read from the file, which must stay open. A store
            (``ps.stores.build``) gives random cells about ten times as fast.

        Raises
        ------
        DataError
            If an entry is NaN, infinite, negative or no integer, if there are no cells or genes, if a gene name
            occurs twice, or a column of ``obs`` cannot serve as batch or covariate.
        SchemaError
            If a column or layer does not exist, or genes or categories do not match the schema.

        Warns
        -----
        UserWarning
            For cells or genes without counts, implausibly large counts, and cell names that occur twice.
        """
        layer = schema.layer if layer is None and isinstance(schema, Schema) else layer
        table = table_in_place(adata, layer) if backed else table_of_anndata(adata, layer)
        parts = read(table, batch, covariates, schema, fill_missing_genes, allow_non_integer)
        return cls(*parts, table.obs)

    @classmethod
    def from_counts(
        cls,
        counts: Any,
        *,
        gene_names: Sequence[str] | None = None,
        cell_names: Sequence[str] | None = None,
        obs: pd.DataFrame | None = None,
        batch: str | None = None,
        covariates: Sequence[str] = (),
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        allow_non_integer: bool = False,
    ) -> "Cells":
        """Take a matrix without an AnnData, validated in the same way as by :meth:`from_anndata`.

        Parameters
        ----------
        counts
            (cells, genes): NumPy, SciPy sparse or torch.
        gene_names
            (genes,); by default gene_0, gene_1, ...
        cell_names
            (cells,); by default the index of ``obs``, or cell_0, cell_1, ...
        obs
            Annotations, (cells, columns), in the order of the rows of ``counts``.
        batch, covariates, schema, fill_missing_genes, allow_non_integer
            As in :meth:`from_anndata`.

        Raises
        ------
        DataError, SchemaError
            As in :meth:`from_anndata`, and if lengths disagree.
        """
        if gene_names is None and schema is not None:
            raise SchemaError("a schema matches genes by name: pass gene_names.")
        table = table_of_matrix(counts, gene_names, cell_names, obs)
        parts = read(table, batch, covariates, schema, fill_missing_genes, allow_non_integer)
        return cls(*parts, table.obs)

    @classmethod
    def from_store(
        cls,
        path: str | Path,
        *,
        batch: str | None = None,
        covariates: Sequence[str] = (),
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        verify: bool = True,
    ) -> "Cells":
        """Read a store that ``ps.stores.build`` wrote; counts stay on disk, and memory grows only with the cells.

        Parameters
        ----------
        path
            The store.
        batch, covariates, schema, fill_missing_genes
            As in :meth:`from_anndata`.
        verify
            Whether to compare the checksum of every array, which reads the store once. Sizes are always compared.

        Raises
        ------
        StoreError
            If there is no store, or it was truncated or changed.
        DataError, SchemaError
            As in :meth:`from_anndata`.
        """
        table = table_of_store(path, verify)
        parts = read(table, batch, covariates, schema, fill_missing_genes, allow_non_integer=True)
        return cls(*parts, table.obs)

    @property
    def n_cells(self) -> int:
        """Number of cells."""
        return self.counts.shape[0]

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return self.counts.shape[1]

    @property
    def n_covariates(self) -> int:
        """Number of columns of gamma: batches, then continuous covariates."""
        return self.schema.n_covariates

    @property
    def n_batches(self) -> int:
        """Number of batches: the first columns of gamma; 0 without a batch column."""
        return self.schema.n_batches

    @property
    def gene_names(self) -> pd.Index:
        """Names of the genes, (genes,)."""
        return pd.Index(self.schema.gene_names)

    @property
    def cell_names(self) -> pd.Index:
        """Names of the cells, (cells,)."""
        return self.obs.index

    @cached_property
    def totals(self) -> np.ndarray:
        """Total count of each cell, (cells,), float64."""
        return cell_totals(self.counts)

    def __len__(self) -> int:
        return self.n_cells

    def __getitem__(self, index: CellIndex) -> tuple[torch.Tensor, torch.Tensor]:
        """Minibatch (x, gamma): float32 copies, (cells, genes) and (cells, covariates)."""
        rows = positions(index, self.n_cells)
        x = self.counts[rows]
        x = x if isinstance(x, np.ndarray) else x.toarray()
        return torch.from_numpy(x.astype(np.float32, copy=False)), torch.from_numpy(self.covariates[rows])

    def take(self, index: CellIndex) -> "Cells":
        """Return some of the cells, with annotations, in the order of ``index``; counts on disk stay there.

        Raises
        ------
        DataError
            If no cell is left, or the index is neither integers nor a mask of the cells.
        """
        rows = positions(index, self.n_cells)
        if rows.size == 0:
            raise DataError("the index selects no cell.")
        return Cells(rows_of(self.counts, rows), self.covariates[rows], self.schema, self.obs.iloc[rows])

    def split(self, held_out: float = 0.1, *, seed: int = 0) -> tuple["Cells", "Cells"]:
        """Split at random into (train, test); both keep the order of the cells.

        Parameters
        ----------
        held_out
            Fraction of the cells in test, between 0 and 1, or their number, as an int.
        seed
            Seed of a separate generator; the global random state is not changed.

        Raises
        ------
        DataError
            If either part would be empty.
        ModelError
            If the seed is no integer of 0 or more.
        """
        train, test = self.split_rows(held_out, seed=seed)
        return self.take(train), self.take(test)

    def split_rows(self, held_out: float = 0.1, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of (train, test) as :meth:`split` takes them, without a copy of the counts.

        Raises
        ------
        DataError, ModelError
            As in :meth:`split`.
        """
        require_seed(seed)
        n_test = number_held_out(held_out, self.n_cells)
        is_test = np.zeros(self.n_cells, dtype=bool)
        is_test[np.random.default_rng(seed).permutation(self.n_cells)[:n_test]] = True
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)

    def with_batch(self, name: str) -> "Cells":
        """Return the same cells as if all were from one batch; ``obs`` keeps the recorded batches.

        For cells of an unknown batch, average a prediction over
        ``cells.with_batch(name) for name in cells.schema.batches``.

        Raises
        ------
        SchemaError
            If there is no batch of this name.
        """
        covariates = self.covariates.copy()
        covariates[:, : self.n_batches] = 0.0
        covariates[:, self.schema.batch_position(name)] = 1.0
        return replace(self, covariates=covariates)

    def _facts(self) -> dict[str, str]:
        schema = self.schema
        share = n_nonzero(self.counts) / (self.n_cells * self.n_genes)
        facts = {
            "counts": f"{self.n_cells:,} cells x {self.n_genes:,} genes, {share:.1%} non-zero",
            "stored": f"{_kind(self.counts)} {self.counts.dtype}",
            "per cell": f"median total {np.median(self.totals):,.0f}",
        }
        if schema.batch is not None:
            facts["batch"] = f"{schema.batch} ({', '.join(schema.batches)})"
        if schema.covariates:
            facts["covariates"] = ", ".join(schema.covariates)
        return facts

    def __repr__(self) -> str:
        return "Cells(" + "; ".join(f"{name}: {fact}" for name, fact in self._facts().items()) + ")"

    def _repr_html_(self) -> str:
        return table("Cells", self._facts())


def _kind(counts: Counts) -> str:
    if isinstance(counts, Source):
        return counts.kind
    return "dense" if isinstance(counts, np.ndarray) else "sparse"
