"""Reading an AnnData or a bare matrix: validated counts, covariates and schema."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_scvi.data.count_checks import check_counts
from pyro_scvi.data.counts import Counts, canonical, cell_totals, expressed_genes
from pyro_scvi.data.lazy_counts import Backed, Collection, genes_of
from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.data.schema import Schema
from pyro_scvi.data.stores import CountStore
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import brief, warn

_OF_ZEROS = {
    "cell": "Results for such cells are mostly the prior's; sc.pp.filter_cells(adata, min_counts=1) leaves them out.",
    "gene": "A fit learns of such genes that they are rare; sc.pp.filter_genes(adata, min_counts=1) leaves them out.",
}


class Table(NamedTuple):
    """Counts with the names of their rows and columns, before validation."""

    counts: Counts  # (cells, genes)
    genes: pd.Index
    obs: pd.DataFrame  # one row per cell, indexed by cell name
    source: str  # name of the counts in errors
    hint: str  # where raw counts may be instead
    layer: str | None


def table_of_anndata(adata: AnnData, layer: str | None) -> Table:
    """Take the counts of ``X`` or of a layer."""
    if not isinstance(adata, AnnData):
        raise DataError(f"from_anndata takes an AnnData, got {type(adata).__name__}; from_counts takes matrices.")
    names = layer_names(adata)
    layers = ", ".join(map(repr, names)) or "none"
    if layer is not None and (not isinstance(layer, str) or layer not in names):
        raise SchemaError(
            f"there is no layer {layer!r}; the layers are: {layers}. If X holds the raw counts, "
            f"adata.layers[{layer!r}] = adata.X.copy() gives them that name."
        )
    hint = f"Pass layer= with raw counts (layers: {layers})."
    if adata.raw is not None:
        hint += " There is adata.raw, too: if it holds the raw counts, pass adata.raw.to_adata()."
    source = "X" if layer is None else f"layer {layer!r}"
    matrix = _matrix(adata, layer, source)
    if matrix is None:
        raise DataError(f"{source} is None: there are no counts to read. {hint}")
    return Table(
        canonical(matrix, source), pd.Index(list(map(str, adata.var_names))), adata.obs.copy(), source, hint, layer
    )


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; from version 0.13 on, anndata lists ``X`` among them, as None."""
    return [name for name in adata.layers if name is not None]


def _matrix(adata: AnnData, layer: str | None, source: str) -> Any:
    try:
        return adata.X if layer is None else adata.layers[layer]
    except Exception as error:  # what anndata, h5py and SciPy raise for a closed file, or a view that they cannot read
        raise DataError(f"{source} cannot be read: {error}; is its file open? adata.to_memory() may help.") from error


def table_in_place(adata: Any, layer: str | None) -> Table:
    """Leave the counts of a backed AnnData or of an AnnCollection where they are."""
    source, hint = ("X" if layer is None else f"layer {layer!r}"), "Pass raw counts."
    if isinstance(adata, AnnData):
        if layer is not None or adata.is_view:
            raise DataError(
                "backed=True reads X of a whole file: anndata loads layers and views into memory. Use Cells.take for "
                "some of the cells, and ps.stores.build(file, path, layer=...) for a layer."
            )
        return Table(
            Backed(adata.X, source), pd.Index(list(map(str, adata.var_names))), adata.obs.copy(), source, hint, layer
        )
    from anndata.experimental import AnnCollection

    if not isinstance(adata, AnnCollection):
        raise DataError(f"backed=True takes a backed AnnData or an AnnCollection, got {type(adata).__name__}.")
    counts = Collection(adata, layer, source)
    return Table(counts, pd.Index(list(map(str, adata.var_names))), adata.obs.copy(), source, hint, layer)


def table_of_store(path: str | Path, verify: bool) -> Table:
    """Take the counts of a store, which were validated when it was built."""
    store = CountStore(path, verify=verify)
    annotations = store.annotations()
    return Table(store, annotations.var_names, annotations.obs, f"the store {path}", "", store.schema.plan["layer"])


def table_of_matrix(
    matrix: Any, gene_names: Sequence[str] | None, cell_names: Sequence[str] | None, obs: pd.DataFrame | None
) -> Table:
    """Take a matrix; names that are not given are numbered."""
    if obs is not None and not isinstance(obs, pd.DataFrame):
        raise DataError(f"obs must be a DataFrame with a row for each cell, got {brief(obs)}.")
    counts = canonical(matrix, "counts")
    n_cells, n_genes = counts.shape
    genes = pd.Index(_checked_names(gene_names, "gene", n_genes))
    obs = pd.DataFrame(index=pd.Index(_checked_names(cell_names, "cell", n_cells))) if obs is None else obs.copy()
    if len(obs) != n_cells:
        raise DataError(f"obs has {len(obs)} rows, counts have {n_cells} cells.")
    if cell_names is not None:
        obs.index = pd.Index(_checked_names(cell_names, "cell", n_cells))
    return Table(counts, genes, obs, "counts", "Pass the raw counts.", None)


def read(
    table: Table,
    batch: str | None,
    covariates: Sequence[str],
    schema: Schema | None,
    fill_missing_genes: bool,
    allow_non_integer: bool,
) -> tuple[Counts, np.ndarray, Schema]:
    """Validate a table, and match it with a schema or learn one.

    Returns
    -------
    counts
        (cells, genes), genes in the order of the schema.
    covariates
        (cells, covariates), float32.
    schema
        The one given, or learnt.
    """
    if schema is not None and not isinstance(schema, Schema):
        raise SchemaError(f"schema must be that of other cells, as in fit.schema, got {brief(schema)}.")
    _check_names(table)
    counts, genes, learning = table.counts, table.genes, schema is None
    if schema is None:
        schema = Schema.learn(genes, table.obs, table.layer, batch, covariates)
    else:
        schema.check_columns(batch, covariates)
        counts = genes_of(counts, schema.gene_positions(genes, fill_missing=fill_missing_genes))
        genes = pd.Index(schema.gene_names)
    counts = check_counts(counts, genes, table.obs.index, table.source, table.hint, allow_non_integer=allow_non_integer)
    _warn_of_zeros("cell", table.obs.index[cell_totals(counts) == 0])
    if learning:  # a query may lack a gene without harm: the model is already trained
        _warn_of_zeros("gene", genes[~expressed_genes(counts)])
    return counts, schema.encode(table.obs), schema


def _check_names(table: Table) -> None:
    doubled = table.genes[table.genes.duplicated()].unique()
    if len(doubled):
        raise DataError(
            f"gene names must be unique; {quoted(doubled)} occur more than once (adata.var_names_make_unique())."
        )
    doubled = table.obs.index[table.obs.index.duplicated()].unique()
    if len(doubled):
        warn(
            f"cell names occur more than once: {quoted(doubled)}. Tables and messages cannot tell these cells apart; "
            "adata.obs_names_make_unique() gives each its own name."
        )


def _warn_of_zeros(kind: str, names: pd.Index) -> None:
    if len(names):
        subject = f"1 {kind} has" if len(names) == 1 else f"{len(names)} {kind}s have"
        warn(f"{subject} no counts: {quoted(names)}. {_OF_ZEROS[kind]}")


def _checked_names(names: Any, kind: str, n: int) -> list[str]:
    if names is None:
        return [f"{kind}_{i}" for i in range(n)]
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise DataError(f"{kind}_names must be {n} names in a list, got {brief(names)}.")
    names = list(names)
    if len(names) != n:
        raise DataError(f"there are {len(names)} {kind} names for {n} {kind}s.")
    return [str(name) for name in names]
