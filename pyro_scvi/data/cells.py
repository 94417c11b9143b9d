"""Cells: validated counts with covariates and annotations, and the boundary to AnnData."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData

from pyro_scvi.data.counts import Counts, Source, cell_totals, dense, n_nonzero
from pyro_scvi.data.covariates import MEAN, NONE, Covariates, Words
from pyro_scvi.data.indexing import CellIndex, positions, split_at_random
from pyro_scvi.data.lazy_counts import rows_of
from pyro_scvi.data.names import as_series, in_order_of, labelled, names_in
from pyro_scvi.data.obs_columns import categories, quoted
from pyro_scvi.data.places import Place, chosen
from pyro_scvi.data.reading import Annotations, read, table_in_place, table_of_anndata, table_of_matrix, table_of_store
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import switches_checked, warn
from pyro_scvi.utils.html_repr import table
from pyro_scvi.utils.own_memory import owned


@dataclass(frozen=True, eq=False, repr=False)
class Cells:
    """Counts x with covariates gamma, ready for a model.

    Made by ``from_anndata``, ``from_counts`` or ``from_store``.

    ``len(cells)`` is the number of cells, and ``cells[index]`` a minibatch ``(x, gamma)`` of float32 tensors,
    (cells, genes) and (cells, covariates); gamma has 0 columns without batches and covariates.

    Attributes
    ----------
    counts
        (cells, genes), counts: a CSR array if the input was sparse, else an ndarray. For a store, or a file left in
        place, a source that is indexed by rows.
    gamma
        The covariates, (cells, covariates), float32 where indexed: one-hot batches, one-hot categories, standardised
        continuous covariates, one-hot labels, log size factor. ``columns`` says where each of them is.
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
    gamma: Covariates
    schema: Schema
    obs: pd.DataFrame

    @classmethod
    @switches_checked
    def from_anndata(
        cls,
        adata: AnnData,
        *,
        layer: str | None = None,
        raw: bool = False,
        batch: str | None = None,
        categories: Sequence[str] = (),
        covariates: Sequence[str] = (),
        labels: str | None = None,
        size_factor: str | None = None,
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        allow_non_integer: bool = False,
        allow_new_batches: bool = False,
        backed: bool = False,
        copy: bool = True,
    ) -> "Cells":
        """Read an AnnData, which is not changed; errors in its counts and columns are raised here.

        Parameters
        ----------
        adata
            Raw counts, (cells, genes): dense, sparse, backed, read lazily or a view.
        layer
            Layer with the raw counts; None for the place that the schema remembers, or ``X``.
        raw
            Read the counts and genes of ``adata.raw``.
        batch
            Column of ``obs`` with a category for each cell, one-hot encoded.
        categories
            Further columns of ``obs`` with a category for each cell, each one-hot encoded after the batch.
        covariates
            Columns of ``obs`` with continuous covariates, standardised to mean 0 and sd 1.
        labels
            Column of ``obs`` with labels, such as cell types, one-hot encoded after the covariates. Cells with a
            missing value have no label: their columns are zero. A query may lack the column.
        size_factor
            Column of ``obs`` with a size factor of each cell, above 0, for ``ps.libraries.SizeFactor``. Its logarithm
            is the last column of gamma.
        schema
            ``schema`` of other cells: genes are matched by name and reordered, extra genes left out (logged),
            batches and scales taken over. ``batch``, ``categories``, ``covariates`` and ``labels`` are then its own.
        fill_missing_genes
            Count genes of the schema that ``adata`` lacks as 0, with a warning, instead of raising.
        allow_non_integer
            Accept values that are not integers, such as corrected counts.
        allow_new_batches
            Accept cells of batches that the schema does not know: gamma then holds the mean over the known ones.
            ``embed``, ``annotate``, ``normalized_expression``, ``impute`` and ``transfer_labels`` take such cells,
            ``map_query`` learns their batches, and everything else refuses them. The column of batches must be there.
        backed
            Leave the counts of a backed or lazily read AnnData, or of an ``AnnCollection``, where they are. They
            are scanned once; then every minibatch is read from the file, which must stay open. A store
            (``ps.stores.build``) gives random cells about ten times as fast.
        copy
            Whether counts are copied that would share memory with ``adata``, as those in float32 do, dense or CSR.
            False takes no memory for them, and ``adata`` must then stay as it is: what ``sc.pp.log1p(adata)`` does, it
            does to these cells.

        Raises
        ------
        DataError
            If an entry is NaN, infinite, negative or no integer, if there are no cells or genes, if a gene name
            occurs twice, a sparse matrix stores values that belong to no cell, or a column of ``obs`` cannot serve as
            batch or covariate.
        SchemaError
            If a column, a layer or ``raw`` does not exist, or genes or categories do not match the schema.

        Warns
        -----
        UserWarning
            For cells or genes without counts, counts that are implausibly large or were rounded by a type of 16 bits,
            features that are no genes, cell names that occur twice, genes that match by numbers only, batches that look
            like a slip, and covariates of a query far from those of the schema.
        """
        place = chosen(layer, raw, schema.place if isinstance(schema, Schema) else Place())
        table = table_in_place(adata, place) if backed else table_of_anndata(adata, place)
        annotations = Annotations(batch, covariates, categories, labels, size_factor)
        options = (annotations, schema, fill_missing_genes, allow_non_integer, allow_new_batches)
        counts, gamma, known = read(table, *options)
        return cls(owned(counts, table.given) if copy else counts, gamma, known, table.obs)

    @classmethod
    @switches_checked
    def from_counts(
        cls,
        counts: Any,
        *,
        gene_names: Sequence[str] | None = None,
        cell_names: Sequence[str] | None = None,
        obs: pd.DataFrame | None = None,
        batch: str | None = None,
        categories: Sequence[str] = (),
        covariates: Sequence[str] = (),
        labels: str | None = None,
        size_factor: str | None = None,
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        allow_non_integer: bool = False,
        allow_new_batches: bool = False,
        copy: bool = True,
    ) -> "Cells":
        """Take a matrix without an AnnData, validated in the same way as by :meth:`from_anndata`.

        Parameters
        ----------
        counts
            (cells, genes): NumPy, SciPy sparse, torch, dask, or a DataFrame, whose index and columns are names.
        gene_names
            (genes,); by default the columns of a DataFrame, or gene_0, gene_1, ...
        cell_names
            (cells,); by default the index of a DataFrame or of ``obs``, or cell_0, cell_1, ...
        obs
            Annotations, (cells, columns): matched by name where counts and ``obs`` have names, else in the order of the
            rows of ``counts``. An index 0, 1, 2, ... is no name.
        batch, categories, covariates, labels, size_factor, schema
            As in :meth:`from_anndata`.
        fill_missing_genes, allow_non_integer, allow_new_batches, copy
            As in :meth:`from_anndata`. An array that is mapped from a file for reading only stays there.

        Raises
        ------
        DataError, SchemaError
            As in :meth:`from_anndata`, and if lengths or names disagree.
        """
        if gene_names is None and schema is not None and names_in(labelled(counts).columns) is None:
            raise SchemaError("a schema matches genes by name: pass gene_names, or a DataFrame with columns of genes.")
        table = table_of_matrix(counts, gene_names, cell_names, obs)
        annotations = Annotations(batch, covariates, categories, labels, size_factor)
        options = (annotations, schema, fill_missing_genes, allow_non_integer, allow_new_batches)
        counts, gamma, known = read(table, *options)
        return cls(owned(counts, table.given) if copy else counts, gamma, known, table.obs)

    @classmethod
    @switches_checked
    def from_store(
        cls,
        path: str | Path,
        *,
        batch: str | None = None,
        categories: Sequence[str] = (),
        covariates: Sequence[str] = (),
        labels: str | None = None,
        size_factor: str | None = None,
        schema: Schema | None = None,
        fill_missing_genes: bool = False,
        allow_new_batches: bool = False,
        verify: bool = True,
    ) -> "Cells":
        """Read a store that ``ps.stores.build`` wrote; counts stay on disk, and memory grows only with the cells.

        Parameters
        ----------
        path
            The store.
        batch, categories, covariates, labels, size_factor, schema, fill_missing_genes, allow_new_batches
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
        annotations = Annotations(batch, covariates, categories, labels, size_factor)
        parts = read(table, annotations, schema, fill_missing_genes, True, allow_new_batches)
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
        """Number of columns of gamma: batches, further categories, continuous covariates, labels, log size factor."""
        return self.schema.n_covariates

    @property
    def columns(self) -> dict[str, slice]:
        """What each column of gamma is: the name of a column of ``obs`` -> its columns of gamma.

        Examples
        --------
        >>> ps.Cells.from_anndata(adata, batch="donor", labels="kind").columns
        {'donor': slice(0, 2, None), 'kind': slice(2, 4, None)}
        """
        return self.schema.columns

    @property
    def covariates(self) -> np.ndarray:
        """Gamma of all cells at once, (cells, covariates), float32; ``gamma[rows]`` is that of some."""
        return self.gamma[:]

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
        rows = self._rows(index)
        return torch.from_numpy(dense(self.counts[rows])), torch.from_numpy(self.gamma[rows])

    def take(self, index: CellIndex) -> "Cells":
        """Return some of the cells, with annotations, in the order of ``index``; counts on disk stay there.

        Raises
        ------
        DataError
            If no cell is left, or the index is neither integers nor a mask of the cells. A mask that is a Series is
            matched by the names of the cells.
        IndexError
            If a cell lies beyond the last.
        """
        rows = self._rows(index)
        if rows.size == 0:
            raise DataError("the index selects no cell.")
        return Cells(rows_of(self.counts, rows), self.gamma.take(rows), self.schema, self.obs.iloc[rows])

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
        ModelError
            If either part would be empty, or the seed is no integer of 0 or more.

        Warns
        -----
        UserWarning
            If all cells of a batch, category or label are held out: nothing can be learnt of it.
        """
        train, test = self.split_rows(held_out, seed=seed)
        return self.take(train), self.take(test)

    def split_rows(self, held_out: float = 0.1, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers of (train, test) as :meth:`split` takes them, without a copy of the counts.

        Raises
        ------
        ModelError
            As in :meth:`split`.
        """
        train, test = split_at_random(self.n_cells, held_out, seed)
        if len(test) <= len(train):  # else the larger part is not there to train on
            for what, name, lost in self._only_in(test, train):
                warn(
                    f"all cells of {what} {quoted(lost)} (column {name!r}) are held out, so the model cannot learn it. "
                    "Join small groups of cells, leave them out, or take another seed."
                )
        return train, test

    def warn_of_untrained(self, train: np.ndarray) -> None:
        """Warn of batches, categories and labels of the schema of which no cell is among the rows to train on.

        Warns
        -----
        UserWarning
            For each column of ``obs`` that has some, with their names.
        """
        for what, name, lost in self._only_in(None, train):
            warn(
                f"{what} {quoted(lost)} (column {name!r}) has no training cell: all are held out, or not among these "
                "cells. The model cannot learn it. Join small groups of cells, or read only the cells to train on."
            )

    def _only_in(self, rows: np.ndarray | None, others: np.ndarray) -> list[tuple[str, str, list[str]]]:
        """By column of words: what these are, its name, and those of some rows, or all known, which no others have."""
        found = []
        for what, name, levels in self.schema.words():
            codes = self.gamma.codes(name)
            here = range(len(levels)) if rows is None else np.unique(codes[rows][codes[rows] >= 0])
            if lost := [levels[code] for code in sorted({*here} - {*codes[others]})]:
                found.append((what, name, lost))
        return found

    def _rows(self, index: CellIndex) -> np.ndarray:
        """Positions of the cells that an index selects; a mask with names is matched by name."""
        if isinstance(index, Mapping):
            index = _mask(in_order_of(self.cell_names, index, "the mask"))
        index = as_series(index)
        if isinstance(index, pd.Series) and pd.api.types.is_bool_dtype(index):
            if index.isna().any():
                raise DataError(f"the mask has no value for {index.isna().sum()} cells; fill them with True or False.")
            index = in_order_of(self.cell_names, index, "the mask").to_numpy(dtype=bool)
        return positions(index, self.n_cells)

    def with_batch(self, name: Hashable) -> "Cells":
        """Return the same cells as if all were from one batch; ``obs`` keeps the recorded batches.

        Cells of an unknown batch, too: they then count as known.

        Raises
        ------
        SchemaError
            If there is no batch of this name.
        """
        codes = np.full(self.n_cells, self.schema.batch_position(name))
        batch = next(iter(self.gamma.parts))  # the first columns of gamma are those of the batches
        return replace(self, gamma=self.gamma.replaced(batch, Words.of(codes, self.n_batches)))

    def require_known_batches(self) -> None:
        """Refuse cells of batches that the schema does not know, which ``allow_new_batches`` let in.

        Raises
        ------
        SchemaError
            If there are any; names their batches.
        """
        unknown = self.of_unknown_batch
        if unknown.any():
            raise SchemaError(
                f"{unknown.sum()} cells are of batches that the fit does not know, {quoted(self.new_batches)}: "
                "ps.embed, ps.annotate, ps.normalized_expression, ps.impute and ps.transfer_labels take them; for "
                "anything else, let ps.map_query(fit, cells) learn these batches."
            )

    @property
    def of_unknown_batch(self) -> np.ndarray:
        """Which cells, (cells,), are of a batch that the schema does not know."""
        if self.schema.batch is None:
            return np.zeros(self.n_cells, dtype=bool)
        unknown: np.ndarray = self.gamma.codes(self.schema.batch) == MEAN
        return unknown

    @property
    def new_batches(self) -> tuple[str, ...]:
        """Batches of cells whose batch the schema does not know, in the order of ``obs``."""
        unknown = self.of_unknown_batch
        if self.schema.batch is None or not unknown.any():
            return ()
        found, _ = categories(self.obs[unknown], self.schema.batch)
        return tuple(word for word in found if word not in self.schema.batches)

    def without(self, name: str) -> "Cells":
        """Return the same cells without their labels, as if none had been given; ``obs`` keeps them.

        The evidence of a cell with a label may be that of its counts given the label. Without it, it is that of the
        counts alone.

        Raises
        ------
        SchemaError
            If ``name`` is not the column of the labels: only labels may be missing.
        """
        if self.schema.labels is None or name != self.schema.labels:
            raise SchemaError(
                f"only labels may be missing, and {name!r} is no column of labels; these cells have labels "
                f"{self.schema.labels!r}."
            )
        none = Words.of(np.full(self.n_cells, NONE), len(self.schema.label_names))
        return replace(self, gamma=self.gamma.replaced(name, none))

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
        if self.new_batches:
            facts["new batches"] = ", ".join(self.new_batches)
        facts |= {
            name: f"category ({', '.join(levels)})"
            for name, levels in zip(schema.categories, schema.levels, strict=True)
        }
        if schema.covariates:
            facts["covariates"] = ", ".join(schema.covariates)
        if schema.size_factor is not None:
            facts["size factor"] = schema.size_factor
        if schema.labels is not None:
            known = (self.gamma.codes(schema.labels) >= 0).sum()
            facts["labels"] = f"{schema.labels} ({', '.join(schema.label_names)}) of {known:,} cells"
        return facts

    def __repr__(self) -> str:
        return "Cells(" + "; ".join(f"{name}: {fact}" for name, fact in self._facts().items()) + ")"

    def _repr_html_(self) -> str:
        return table("Cells", self._facts())


def _mask(values: pd.Series) -> Any:
    if not pd.api.types.is_bool_dtype(values):
        raise DataError("the mask must be True or False for each name; for some of the cells pass integers.")
    return values


def _kind(counts: Counts) -> str:
    if isinstance(counts, Source):
        return counts.kind
    return "dense" if isinstance(counts, np.ndarray) else "sparse"
