"""Results in AnnData, where scanpy expects them, with a record of how they were made."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_scvi.analysis.differential.summary import half_step
from pyro_scvi.analysis.inputs import require_fit
from pyro_scvi.analysis.integration.embedding import embed
from pyro_scvi.analysis.integration.spaces import Expression, FittedSpace, Latent, require_space
from pyro_scvi.analysis.predictive.imputation import impute, technical_zero_probability
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import label_of, quoted
from pyro_scvi.data.places import Place, chosen, parts_of_mudata
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.export.records import records_of, unwritable
from pyro_scvi.inference.samplers import Amortized, Sampler, require_sampler
from pyro_scvi.utils.checks import brief, require_at_least, require_seed, switches_checked, warn
from pyro_scvi.utils.disk.publishing import signals_deferred
from pyro_scvi.version import __version__

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

EMBEDDING, COMPONENTS, EXPRESSION, TECHNICAL, PROVENANCE = (
    "X_pyro_scvi",
    "X_pyro_scvi_expression_pca",
    "pyro_scvi_expression",
    "pyro_scvi_technical_zero",
    "pyro_scvi",
)


@switches_checked
def annotate(
    adata: AnnData,
    fit: Fit,
    *,
    space: Expression | FittedSpace | None = Expression(),
    expression: bool = False,
    technical_zeros: bool = False,
    layer: str | None = None,
    raw: bool = False,
    samples: int = 25,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    fill_missing_genes: bool = False,
    allow_non_integer: bool = False,
    allow_new_batches: bool = False,
) -> None:
    """Write the embedding, and on request expression, into ``adata``.

    Raw counts stay unchanged.

    ``obsm["X_pyro_scvi"]`` holds E[z | x], (cells, latents); ``obsm["X_pyro_scvi_expression_pca"]`` principal
    components of the expression decoded from it, (cells, components); ``layers["pyro_scvi_expression"]`` E[w | x],
    counts, and ``layers["pyro_scvi_technical_zero"]`` P(h = 1 | x), (cells, genes) each, NaN for genes that the fit
    does not know. ``uns["pyro_scvi"]`` records how each was made, under its name: the package's version, seed, the
    layer that was read, model, guide, settings of the fit, its schema (JSON) and the seconds of the call; for layers
    also samples and sampler, for the components their axes. Continue with
    ``scanpy.pp.neighbors(adata, use_rep="X_pyro_scvi_expression_pca")``.

    Parameters
    ----------
    adata
        Raw counts in the layer of the fit; genes are matched by name, in any order.
    fit
        The fit.
    space
        What the principal components are of. The axes are those of these cells. For a query, pass the space of the
        reference, so that both lie in one space: ``ps.spaces.from_record(reference)`` after
        ``ps.annotate(reference, fit)``. None: E[z | x] alone is written.
    expression, technical_zeros
        Which layers to add.
    layer
        Layer with the raw counts; None: the layer that the fit was made from, or ``X``. Needed if ``X`` was normalised
        after the fit and the counts were kept in a layer.
    raw
        Whether to read the counts of ``adata.raw``, for ``X`` that was normalised after the fit. Layers have the genes
        of ``X``; genes that only ``raw`` has are told.
    samples, sampler, batch_size
        Draws of z and l for the layers, as in ``impute``.
    seed
        Of all draws.
    overwrite
        Whether to replace the results of an earlier call. An earlier layer that this call does not write stays, and so
        does its record in ``uns["pyro_scvi"]``.
    fill_missing_genes
        Whether to count genes that ``adata`` lacks as zero, with a warning, instead of raising.
    allow_non_integer
        Whether to accept values that are not integers, for a fit made from such values.
    allow_new_batches
        Whether to accept cells of batches that the fit does not know; ``technical_zeros`` refuses them.

    Raises
    ------
    DataError
        If ``adata`` is no AnnData or a view, a name is taken and ``overwrite`` is False, or an entry is no count.
        Nothing is then written.
    SchemaError
        If genes, batches or covariates are not those of the fit, or there is no such layer.
    ModelError
        If ``fit`` is no Fit, the model has no ``technical_zeros`` or ``expression``, a number is below 1, or an
        argument has the wrong type. If ``space`` cannot be had of this fit and these cells: pass ``space=None``.

    Examples
    --------
    >>> annotated = adata.copy()
    >>> ps.annotate(annotated, fit)
    >>> annotated.obsm["X_pyro_scvi"].shape, annotated.obsm["X_pyro_scvi_expression_pca"].shape
    ((60, 2), (60, 19))
    >>> sorted(annotated.uns["pyro_scvi"]["X_pyro_scvi"])[:3]
    ['guide', 'layer', 'model']
    """
    started = time.perf_counter()
    _require_own(adata, "annotate(adata, fit)")
    require_fit(fit)
    require_sampler(sampler)
    require_seed(seed)
    require_at_least(1, samples=samples, batch_size=batch_size)
    wanted: dict[str, Callable[..., np.ndarray]] = {EXPRESSION: impute} if expression else {}
    wanted |= {TECHNICAL: technical_zero_probability} if technical_zeros else {}
    if space is not None:
        require_space(space)
    if isinstance(space, Latent):
        raise ModelError("ps.spaces.Latent has no components: pass space=None, which writes E[z | x] alone")
    taken = [f"obsm[{name!r}]" for name in (EMBEDDING, COMPONENTS) if name in adata.obsm] + [f"uns[{PROVENANCE!r}]"] * (
        PROVENANCE in adata.uns
    )
    taken += [f"layers[{name!r}]" for name in wanted if name in adata.layers]
    if taken and not overwrite:
        raise DataError(f"adata has {', '.join(taken)} already; pass overwrite=True to replace, or annotate a copy")
    cells = Cells.from_anndata(
        adata,
        layer=layer,
        raw=raw,
        schema=fit.schema,
        fill_missing_genes=fill_missing_genes,
        allow_non_integer=allow_non_integer,
        allow_new_batches=allow_new_batches,
        copy=False,
    )
    drawing: dict[str, Any] = {"samples": samples, "sampler": sampler, "seed": seed, "batch_size": batch_size}
    results = {name: verb(fit, cells, **drawing) for name, verb in wanted.items()}
    latent = embed(fit, cells, seed=seed)
    components = {} if space is None else _components(fit, cells, space, seed)
    layers = {name: in_genes_of(adata, cells, values) for name, values in results.items()}
    made = _provenance(fit, seed, chosen(layer, raw, fit.schema.place)) | {"seconds": time.perf_counter() - started}
    drawn = made | {"samples": samples, "sampler": repr(sampler)}
    places = {EMBEDDING: latent} | ({COMPONENTS: components.pop("values")} if components else {})
    placed = {COMPONENTS: made | components} if components else {}
    with signals_deferred():  # all of them are written, or none
        adata.obsm.pop(COMPONENTS, None)  # of an earlier call, whose z is replaced
        adata.obsm.update(places)
        adata.layers.update(layers)
        adata.uns[PROVENANCE] = _kept(adata) | {EMBEDDING: made} | placed | dict.fromkeys(results, drawn)


def _components(fit: Fit, cells: Cells, space: Any, seed: int) -> dict[str, Any]:
    """Coordinates of the cells, and the axes that place others beside them."""
    try:
        fitted = space.fitted(fit, cells, seed=seed)
        return {"values": fitted.place(fit, cells, seed=seed), "pca": fitted.record()}
    except ModelError as error:
        raise ModelError(f"{error}; annotate(space=None) writes E[z | x] alone") from error


def in_genes_of(adata: AnnData, cells: Cells, values: np.ndarray) -> np.ndarray:
    """Values (cells, genes of the fit) at the genes of ``adata``: float32, NaN where the fit does not know a gene.

    Warns
    -----
    UserWarning
        If genes of the fit are in ``adata.raw`` only, where there are no layers.
    """
    places = adata.var_names.get_indexer(cells.gene_names)
    known = places >= 0  # the others were filled in, or are in raw only
    of_raw = pd.Index([]) if adata.raw is None else adata.raw.var_names
    if len(lost := cells.gene_names[~known & cells.gene_names.isin(of_raw)]):
        warn(
            f"{len(lost)} of the {cells.n_genes} genes of the fit are in adata.raw only, and layers have the genes of "
            f"adata.X: nothing is written for {quoted(lost)}. To have all of them, pass adata.raw.to_adata() instead."
        )
    layer = np.full(adata.shape, np.nan, dtype=np.float32)
    layer[:, places[known]] = values[:, known]
    return layer


@switches_checked
def add_rank_genes_groups(
    adata: AnnData, table: pd.DataFrame, groupby: str, *, key: str = "rank_genes_groups", overwrite: bool = False
) -> None:
    r"""Write a table of differential expression where scanpy's plots look for it.

    These are ``pl.rank_genes_groups`` and its relatives.

    Of a table of :class:`~pyro_scvi.differential.GroupMeans`, ``scores`` hold ``z``, ``logfoldchanges`` ``lfc``,
    ``pvals`` ``p_value`` and ``pvals_adj`` ``q_value``. Genes that were not tested have a score and a fold change of 0
    and a p value of 1, as scanpy writes for genes without variation. Genes are ordered by score.

    Of a table of :class:`~pyro_scvi.differential.RandomPairs`, ``scores`` are the natural log odds that the gene is
    higher in the group than in the rest, ``logfoldchanges`` are ``lfc``. scanpy has no place for probabilities of
    pairs, so ``pvals`` hold 1 - ``p_lfc``, and ``pvals_adj`` hold ``expected_false_share``. Both are shares of a finite
    number of pairs and can be 0, but scanpy takes their logarithm. They are therefore at least half of the smallest
    distance from 0 or 1 that a ``p_lfc`` of the group has, and this half is at most 0.0005.

    Parameters
    ----------
    adata
        AnnData to write to, in ``uns[key]``. It has all groups and genes of the table, and may have more genes.
    table
        Result of :func:`pyro_scvi.differential_expression` without ``group_a`` and ``group_b``: every group in turn.
    groupby
        Column of ``adata.obs`` with the groups that were compared.
    key, overwrite
        Key in ``uns``, and whether to replace what it holds.

    Raises
    ------
    DataError
        If ``adata`` is no AnnData or a view. If ``table`` is no such table, compares one pair only, or lacks columns or
        genes of a group. If its genes are not in ``adata``, its groups are not those of the column, or there is no such
        column. If ``uns[key]`` is taken. Nothing is then written.
    ModelError
        If ``key`` is no word.

    Notes
    -----
    A table of groups with ":" in their names is written to zarr without compression, since format 2 fails with it. Once
    it was read from a file, write it by ``anndata.io.write_zarr(path, adata, compressor=None)``.

    Examples
    --------
    >>> annotated = adata.copy()
    >>> table = ps.differential_expression(fit, cells, groupby="kind")
    >>> ps.add_rank_genes_groups(annotated, table, "kind")
    >>> annotated.uns["rank_genes_groups"]["names"].dtype.names
    ('a', 'b')
    """
    _require_own(adata, "add_rank_genes_groups(adata, table, groupby)")
    if not isinstance(key, str):
        raise ModelError(f"key must be a word, such as 'rank_genes_groups'; got {brief(key)}")
    written = _require_table(table)
    _require_match(adata, table, groupby)
    if key in adata.uns and not overwrite:
        raise DataError(f"adata.uns has {key!r} already; pass another key=, or overwrite=True to replace it")
    ranked = {
        label_of(group): written(part.droplevel("group")).sort_values("scores", ascending=False, kind="stable")
        for group, part in table.groupby(level="group", sort=False)
    }
    columns: dict[str, dict[str, Any]] = {
        "names": {group: part.index.to_numpy(dtype=object) for group, part in ranked.items()}
    }
    for name in ("scores", "logfoldchanges", "pvals", "pvals_adj"):
        columns[name] = {group: part[name].to_numpy() for group, part in ranked.items()}
    records = {name: records_of(values) for name, values in columns.items()}
    reference = "each other group" if "against" in table else "rest"
    params = {"groupby": groupby, "reference": reference, "method": "pyro_scvi", "use_raw": False, "layer": None}
    if groups := unwritable(ranked):
        _tell_of_zarr(groups)
    target: MutableMapping[str, Any] = adata.uns
    target[key] = {"params": params, **records}


def _require_own(adata: Any, call: str) -> None:
    """Raise unless ``adata`` is an AnnData and no view: writing into a view makes a copy unseen by the caller."""
    if not isinstance(adata, AnnData):
        raise DataError(f"{call} takes an AnnData first, got {type(adata).__name__}{parts_of_mudata(adata)}")
    if adata.is_view:
        raise DataError("adata is a view of another AnnData; annotate a copy: adata = adata.copy()")


def _of_means(table: pd.DataFrame) -> pd.DataFrame:
    p, q = (table[name].clip(lower=np.finfo(float).tiny) for name in ("p_value", "q_value"))  # scanpy takes logarithms
    columns = {"scores": table.z, "logfoldchanges": table.lfc, "pvals": p, "pvals_adj": q}
    return pd.DataFrame(columns).fillna({"scores": 0.0, "logfoldchanges": 0.0, "pvals": 1.0, "pvals_adj": 1.0})


def _of_pairs(table: pd.DataFrame) -> pd.DataFrame:
    least = half_step(table.p_lfc.to_numpy())
    return pd.DataFrame(
        {
            "scores": -table.log_bayes_factor,
            "logfoldchanges": table.lfc,
            "pvals": (1 - table.p_lfc).clip(lower=least),
            "pvals_adj": table.expected_false_share.clip(lower=least),
        }
    )


_WRITTEN = {
    ("z", "lfc", "p_value", "q_value"): _of_means,
    ("log_bayes_factor", "lfc", "p_lfc", "expected_false_share"): _of_pairs,
}


def _require_table(table: Any) -> Callable[[pd.DataFrame], pd.DataFrame]:
    """What scanpy's columns hold of such a table; raises if it is none that covers every group."""
    if not isinstance(table, pd.DataFrame):
        raise DataError(f"the table must be the DataFrame of differential_expression, got {type(table).__name__}")
    if table.index.names != ["group", "gene"]:
        raise DataError(
            "the table must hold every group in turn: differential_expression(fit, cells, groupby=...) "
            f"without group_a; this one is indexed by {table.index.names}"
        )
    lacking = {written: [column for column in columns if column not in table] for columns, written in _WRITTEN.items()}
    written = min(lacking, key=lambda each: len(lacking[each]))
    if lacking[written]:
        raise DataError(
            f"the columns {lacking[written]} are missing: pass the table of differential_expression as it came"
        )
    genes = table.index.get_level_values("gene")
    n_groups = len({label_of(group) for group in table.index.unique("group")})  # 1 and "1" would be one
    if not len(table) or table.index.has_duplicates or len(table) != genes.nunique() * n_groups:
        raise DataError(
            "the table must hold every gene once for each group, as it comes from differential_expression; scanpy "
            "leaves genes out by its own options"
        )
    return written


def _require_match(adata: AnnData, table: pd.DataFrame, groupby: str) -> None:
    """Raise if ``adata`` lacks some of the genes, or the groups are not those of its column."""
    if not isinstance(groupby, str) or groupby not in adata.obs:
        raise DataError(f"adata.obs has no column {groupby!r}; it has {', '.join(map(str, adata.obs)) or 'none'}")
    compared = {label_of(group) for group in table.index.unique("group")}
    there = {label_of(group) for group in adata.obs[groupby].dropna().unique()}
    if compared != there:
        raise DataError(
            f"the groups of the table, {quoted(sorted(compared))}, are not those of adata.obs[{groupby!r}], "
            f"{quoted(sorted(there))}: pass the column and the cells that were compared"
        )
    unknown = table.index.unique("gene").difference(adata.var_names, sort=False)
    if len(unknown):
        raise DataError(
            f"{len(unknown)} genes of the table are not in adata.var_names: {quoted(unknown)}; pass the AnnData whose "
            "cells were compared"
        )


def _tell_of_zarr(groups: list[str]) -> None:
    warn(
        f"groups have ':' in their names ({quoted(groups)}). In memory and in .h5ad that is no problem, but "
        "adata.write_zarr fails with it in format 2: use anndata.io.write_zarr(path, adata, compressor=None)"
    )


def _provenance(fit: Fit, seed: int, read: Place) -> dict[str, Any]:
    return {
        "version": __version__,
        "seed": seed,
        "layer": "raw.X" if read.raw else read.layer or "X",
        "model": repr(fit.model),
        "guide": type(fit.guide).__name__,
        "settings": json.dumps(fit.settings),
        "schema": json.dumps(fit.schema.to_dict()),
    }


def _kept(adata: AnnData) -> dict[str, Any]:
    """Records of earlier calls on layers that are still there."""
    earlier = adata.uns.get(PROVENANCE)
    known = earlier if isinstance(earlier, Mapping) else {}
    return {name: known[name] for name in (EXPRESSION, TECHNICAL) if name in known and name in adata.layers}
