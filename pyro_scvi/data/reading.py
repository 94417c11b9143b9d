"""Reading an AnnData or a bare matrix: validated counts, covariates and schema."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from anndata import AnnData, Raw

from pyro_scvi.data.compressed import require_whole
from pyro_scvi.data.count_checks import FEATURE_TYPES, check_counts, warn_of_features
from pyro_scvi.data.counts import (
    NO_LIMIT,
    Counts,
    TypeLimit,
    canonical,
    cell_totals,
    expressed_genes,
    is_chunked,
    limit_of,
)
from pyro_scvi.data.covariates import Covariates
from pyro_scvi.data.lazy_counts import Backed, Chunked, Collection, genes_of
from pyro_scvi.data.links import check_links
from pyro_scvi.data.names import in_order_of, labelled, names_in, texts, warn_of_swapped_names
from pyro_scvi.data.obs_columns import categories, native, numbers, quoted
from pyro_scvi.data.places import Place, hint_of, parts_of_mudata
from pyro_scvi.data.scales import warn_of_mixed_units
from pyro_scvi.data.schema import Schema
from pyro_scvi.data.stores import CountStore
from pyro_scvi.data.stores.layout import SCHEMA, files_of
from pyro_scvi.errors import DataError, ModelError, SchemaError, StoreError
from pyro_scvi.utils.checks import brief, items_of, warn
from pyro_scvi.utils.disk.unreadable import errors_named

LEAST_CELLS, EQUAL = 20, 1e-3
"""So many cells do not happen to have totals that differ by such a share only."""

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
    place: Place = Place()
    limit: TypeLimit = NO_LIMIT  # of the type in which the counts came
    var: pd.DataFrame | None = None  # annotations of the genes, if there are any
    given: Any = None  # the matrix of the caller that the counts may share memory with
    raw: Any = None  # that of the AnnData, if there is one and the counts are not its own
    files: np.ndarray | None = None  # (cells,): which file or part each cell is of, if there are several


class Annotations(NamedTuple):
    """Which columns of ``obs`` are columns of gamma."""

    batch: str | None
    covariates: Sequence[str]
    categories: Sequence[str]
    labels: str | None
    size_factor: str | None


def table_of_anndata(adata: AnnData, place: Place) -> Table:
    """Take the counts of ``X``, of a layer or of ``raw``."""
    _require_anndata(adata)
    _require_place(adata, place)
    hint = _hint(adata, place)
    matrix = given = _matrix(adata, place)
    if adata.is_view:  # what is broken in the whole matrix does not show in some of its rows
        given = _matrix(adata._adata_ref, place)
        require_whole(given, place.name)
    if matrix is None:
        raise DataError(f"{place.name} is None: there are no counts to read. {hint}")
    counts = canonical(matrix, place.name)
    var = _var(adata, place)
    limit, genes, raw = limit_of(matrix.dtype), texts(var.index), _raw(adata, place)
    return Table(counts, genes, _obs(adata), place.name, hint, place, limit, var, given, raw)


def _require_place(adata: AnnData, place: Place) -> None:
    if place.layer is not None and place.layer not in layer_names(adata):
        raise SchemaError(
            f"there is no layer {place.layer!r}; the layers are: {_listed(adata)}. If X holds the raw counts, "
            f"adata.layers[{place.layer!r}] = adata.X.copy() gives them that name."
        )
    if place.raw and adata.raw is None:
        raise SchemaError(
            f"there is no adata.raw to read; the layers are: {_listed(adata)}. If X holds the raw counts, adata.raw = "
            "adata gives them that name."
        )


def _source(adata: AnnData, place: Place) -> str:
    return f"{place.name} of {adata.filename}" if adata.isbacked else place.name


def _hint(adata: AnnData, place: Place) -> str:
    """Where raw counts may be instead, for messages."""
    return hint_of(_listed(adata), adata.raw is not None and not place.raw)


def _listed(adata: AnnData) -> str:
    return ", ".join(map(repr, layer_names(adata))) or "none"


def layer_names(adata: AnnData) -> list[str]:
    """Names of the layers; from version 0.13 on, anndata lists ``X`` among them, as None."""
    return [name for name in adata.layers if name is not None]


def _require_anndata(adata: Any) -> None:
    if isinstance(adata, AnnData):
        return
    if told := parts_of_mudata(adata):
        raise DataError(f"from_anndata takes an AnnData, got {type(adata).__name__}{told}.")
    if isinstance(adata, Raw):
        raise DataError("from_anndata takes an AnnData, got its raw; pass the AnnData itself with raw=True.")
    if _is_collection(adata):
        raise DataError("from_anndata reads an AnnCollection where it is: pass backed=True.")
    _require_no_part(adata)
    if isinstance(adata, str | Path):
        raise DataError("from_anndata takes an AnnData, got the name of a file: pass anndata.read_h5ad(file).")
    raise DataError(f"from_anndata takes an AnnData, got {type(adata).__name__}; from_counts takes matrices.")


def _is_collection(adata: Any) -> bool:
    from anndata.experimental import AnnCollection  # only few need it

    return isinstance(adata, AnnCollection)


def _require_no_part(adata: Any) -> None:
    if _is_collection(getattr(adata, "reference", None)):
        raise DataError(
            f"from_anndata takes an AnnCollection, got a part of one ({type(adata).__name__}). Read the whole with "
            "backed=True, and take these cells of the result: Cells.from_anndata(collection, backed=True).take(rows)."
        )


def _matrix(adata: AnnData, place: Place) -> Any:
    try:
        if place.raw:
            return None if adata.raw is None else adata.raw.X
        return adata.X if place.layer is None else adata.layers[place.layer]
    except Exception as error:  # what anndata, h5py and SciPy raise for a closed file, or a view that they cannot read
        raise DataError(
            f"{_source(adata, place)} cannot be read: {error}; is its file open? adata.to_memory() may help."
        ) from error


def _obs(adata: Any) -> pd.DataFrame:
    """Annotations of the cells, a copy."""
    return native(_table_of(adata.obs))


def _table_of(annotations: Any) -> pd.DataFrame:
    """Annotations of cells or genes; those of a lazily read AnnData are read now."""
    return annotations if isinstance(annotations, pd.DataFrame) else annotations.to_memory()


def _var(adata: AnnData, place: Place) -> pd.DataFrame:
    return _table_of(adata.raw.var if place.raw else adata.var)


def _raw(adata: AnnData, place: Place) -> Any:
    return None if place.raw else adata.raw


def table_in_place(adata: Any, place: Place) -> Table:
    """Leave the counts of a backed or lazily read AnnData, or of an AnnCollection, where they are."""
    if isinstance(adata, AnnData):
        return _table_of_anndata_in_place(adata, place)
    if not _is_collection(adata):
        _require_no_part(adata)
        told = f"{type(adata).__name__}{parts_of_mudata(adata)}"
        raise DataError(f"backed=True takes a backed AnnData or an AnnCollection, got {told}.")
    if place.raw:
        raise DataError("an AnnCollection has no raw; pass one of adata.raw.to_adata() for each of its parts.")
    collection = Collection(adata, place.layer, place.name)
    genes = texts(adata.var_names)
    # Of parts of several types, the narrowest is that which may have changed counts.
    limit = min(map(limit_of, collection.types), key=lambda each: each.value)
    var = _features_of([part.var for part in adata.adatas], genes)
    files = np.repeat(np.arange(len(adata.adatas)), [part.n_obs for part in adata.adatas])
    obs, hint = adata.obs.copy(), "Pass raw counts."
    return Table(collection, genes, obs, place.name, hint, place, limit, var, files=files)


def _features_of(parts: list[pd.DataFrame], genes: pd.Index) -> pd.DataFrame | None:
    """What kinds of features the genes of a collection are, by the first part that says so."""
    told = next((var for var in parts if FEATURE_TYPES in var), None)
    if told is None:
        return None
    kinds = pd.Series(told[FEATURE_TYPES].to_numpy(dtype=object), texts(told.index))
    return pd.DataFrame({FEATURE_TYPES: kinds[~kinds.index.duplicated()].reindex(genes)})


def _table_of_anndata_in_place(adata: AnnData, place: Place) -> Table:
    _require_place(adata, place)
    if adata.isbacked:
        check_links(Path(adata.filename))
    lazy = not adata.isbacked and is_chunked(_matrix(adata, place))
    if not lazy and (place.layer is not None or adata.is_view):
        raise DataError(
            "backed=True reads X or raw of a whole file: anndata loads layers and views into memory. Use Cells.take "
            "for some of the cells, and ps.stores.build(file, path, layer=...) for a layer."
        )
    matrix, var, obs = _matrix(adata, place), _var(adata, place), _obs(adata)
    source = _source(adata, place)
    counts = Chunked(matrix, source) if lazy else Backed(matrix, source)
    if counts.shape != (len(obs), len(var)):  # anndata does not compare them with a file
        raise DataError(f"{source} has the shape {counts.shape}, but there are {len(obs)} cells and {len(var)} genes.")
    limit, hint = limit_of(counts.dtype), _hint(adata, place)
    return Table(counts, texts(var.index), obs, source, hint, place, limit, var, raw=_raw(adata, place))


def table_of_store(path: str | Path, verify: bool) -> Table:
    """Take the counts of a store, which were validated when it was built."""
    store = CountStore(path, verify=verify)
    annotations = store.annotations()
    source, files = f"the store {path}", files_of(annotations)
    return Table(store, annotations.var_names, native(annotations.obs), source, "", _place_of(store), files=files)


def _place_of(store: CountStore) -> Place:
    file = store.path / SCHEMA
    with errors_named(str(file), kind=StoreError):
        layer, raw = store.schema.plan["layer"], store.schema.plan.get("raw", False)
    if not isinstance(layer, str | None) or not isinstance(raw, bool):
        raise StoreError(f"{file} does not say where the counts are: layer {brief(layer)}, raw {brief(raw)}")
    return Place(layer, raw)


def table_of_matrix(
    matrix: Any, gene_names: Sequence[str] | None, cell_names: Sequence[str] | None, obs: pd.DataFrame | None
) -> Table:
    """Take a matrix; names that are neither given nor those of a DataFrame are numbered."""
    if isinstance(matrix, AnnData):
        raise DataError("from_counts takes a matrix, got an AnnData, which from_anndata reads.")
    if told := parts_of_mudata(matrix):
        raise DataError(f"from_counts takes a matrix, got {type(matrix).__name__}{told}, to from_anndata.")
    if obs is not None and not isinstance(obs, pd.DataFrame):
        raise ModelError(f"obs must be a DataFrame with a row for each cell, got {brief(obs)}.")
    matrix, rows, columns = labelled(matrix)
    counts = canonical(matrix, "counts")
    n_cells, n_genes = counts.shape
    genes = _agreed(_checked_names(gene_names, "gene", n_genes), names_in(columns), "gene")
    cells = _agreed(_checked_names(cell_names, "cell", n_cells), names_in(rows), "cell")
    if genes is None:
        genes = pd.Index([f"gene_{i}" for i in range(n_genes)])
    limit, annotations = limit_of(getattr(matrix, "dtype", None)), _obs_of(obs, cells, rows, counts.shape)
    return Table(counts, genes, annotations, "counts", "Pass the raw counts.", limit=limit, given=matrix)


def _obs_of(
    obs: pd.DataFrame | None, cells: pd.Index | None, numbers: pd.Index | None, shape: tuple[int, int]
) -> pd.DataFrame:
    """Annotations in the order of the cells, under their names; of cells without names, by the numbers they have."""
    n_cells, n_genes = shape
    if obs is None:
        return pd.DataFrame(index=pd.Index([f"cell_{i}" for i in range(n_cells)]) if cells is None else cells)
    if len(obs) != n_cells:
        turned = " Are cells and genes swapped in the counts?" if len(obs) == n_genes else ""
        raise DataError(f"obs has {len(obs)} rows, counts have {n_cells} cells.{turned}")
    known = numbers if cells is None else cells
    ordered = in_order_of(known, native(obs), "obs")
    ordered.index = ordered.index if cells is None else cells
    return ordered


def _agreed(given: pd.Index | None, own: pd.Index | None, kind: str) -> pd.Index | None:
    """The names that were passed, or those of the matrix.

    Raises
    ------
    DataError
        If there are both, and they differ.
    """
    if given is not None and own is not None and not given.equals(own):
        raise DataError(
            f"{kind}_names are {quoted(given, 3)}, but the counts name their {kind}s {quoted(own, 3)}. Leave "
            f"{kind}_names out, or pass the counts without names, as .to_numpy() gives them."
        )
    return own if given is None else given


def read(
    table: Table,
    annotations: Annotations,
    schema: Schema | None,
    fill_missing_genes: bool,
    allow_non_integer: bool,
    allow_new_batches: bool = False,
) -> tuple[Counts, Covariates, Schema]:
    """Validate a table, and match it with a schema or learn one.

    Returns
    -------
    counts
        (cells, genes), genes in the order of the schema.
    gamma
        (cells, covariates).
    schema
        The one given, or learnt.
    """
    if schema is not None and not isinstance(schema, Schema):
        raise ModelError(f"schema must be that of other cells, as in fit.schema, got {brief(schema)}.")
    if allow_new_batches and schema is None:
        raise ModelError("allow_new_batches is for a query of a fit: pass schema=fit.schema with it.")
    _check_names(table)
    counts, genes, learning, complete = table.counts, table.genes, schema is None, True
    if schema is None:
        warn_of_features(table.var)
        warn_of_swapped_names(genes, table.obs.index)
        schema = Schema.learn(genes, table.obs, table.place, *annotations)
    else:
        schema.check_columns(*annotations)
        places = _gene_positions(table, schema, fill_missing_genes)
        counts, complete = genes_of(counts, places), bool((places >= 0).all())
        genes = pd.Index(schema.gene_names)
    counts = check_counts(
        counts,
        genes,
        table.obs.index,
        table.source,
        table.hint,
        allow_non_integer=allow_non_integer,
        limit=table.limit,
    )
    totals = cell_totals(counts)
    _warn_of_zeros("cell", table.obs.index[totals == 0])
    if learning and not allow_non_integer:
        _warn_of_one_total(totals, table)
    if learning:  # a query may lack a gene without harm: the model is already trained
        _warn_of_zeros("gene", genes[~expressed_genes(counts)])
        schema = schema.with_sizes(table.obs, totals)
    elif complete:
        schema.check_sizes(table.obs, totals)
    gamma = schema.encode(table.obs, allow_new_batches=allow_new_batches)
    _warn_of_mixed_units(table, schema)
    return counts, gamma, schema


def _gene_positions(table: Table, schema: Schema, fill_missing: bool) -> np.ndarray:
    """As the schema gives them; where genes are missing, says if ``raw`` has them, which X may be a selection of."""
    try:
        return schema.gene_positions(table.genes, fill_missing=fill_missing)
    except SchemaError as error:
        if table.raw is None or len(pd.Index(schema.gene_names).difference(texts(_table_of(table.raw.var).index))):
            raise
        raise SchemaError(
            f"{error} adata.raw has all of them: if it holds the raw counts, pass raw=True, or pass "
            "adata.raw.to_adata()."
        ) from error


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


def _warn_of_mixed_units(table: Table, schema: Schema) -> None:
    """Warn of covariates in another unit in some of the files or batches."""
    ways = {} if table.files is None else {"file": table.files}
    if schema.batch in table.obs:
        labels, codes = categories(table.obs, str(schema.batch))
        ways["batch"] = np.array(labels, dtype=object)[codes]
    for name in schema.covariates:
        for what, parts in ways.items():
            warn_of_mixed_units(name, numbers(table.obs, name), parts, what)


def _warn_of_one_total(totals: np.ndarray, table: Table) -> None:
    """Warn of cells that were normalised to one total and rounded; counts that were thinned to one have it exactly."""
    spread, by_rounding = np.ptp(totals), len(table.genes)  # half a count per gene up or down
    if len(totals) >= LEAST_CELLS and 0 < spread < min(EQUAL * totals.mean(), by_rounding):
        warn(
            f"all {len(totals)} cells have a total of {totals.min():.0f} to {totals.max():.0f} in {table.source}, "
            "as where values were normalised and then rounded. Rounding does not turn them into counts. "
            f"{table.hint}"
        )


def _warn_of_zeros(kind: str, names: pd.Index) -> None:
    if len(names):
        subject = f"1 {kind} has" if len(names) == 1 else f"{len(names)} {kind}s have"
        warn(f"{subject} no counts: {quoted(names)}. {_OF_ZEROS[kind]}")


def _checked_names(names: Any, kind: str, n: int) -> pd.Index | None:
    if names is None:
        return None
    listed = items_of(names)
    if listed is None:
        raise ModelError(f"{kind}_names must be {n} names in a list, got {brief(names)}.")
    if len(listed) != n:
        raise DataError(f"there are {len(listed)} {kind} names for {n} {kind}s.")
    return texts(listed)
