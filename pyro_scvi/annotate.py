"""What a fit says of cells, written into their AnnData where scanpy looks for it, with how it was made."""

from __future__ import annotations

import json
import time
from collections.abc import MutableMapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_scvi.cells import Cells
from pyro_scvi.errors import DataError
from pyro_scvi.imputation import impute, technical_zero_probability
from pyro_scvi.posterior import embed

if TYPE_CHECKING:
    from pyro_scvi.fit import Fit

EMBEDDING, EXPRESSION, TECHNICAL, PROVENANCE = (
    "X_pyro_scvi",
    "pyro_scvi_expression",
    "pyro_scvi_technical_zero",
    "pyro_scvi",
)


def annotate(
    adata: AnnData,
    fit: Fit,
    *,
    expression: bool = False,
    technical_zeros: bool = False,
    samples: int = 25,
    seed: int = 0,
    overwrite: bool = False,
    fill_missing_genes: bool = False,
) -> None:
    """Write the embedding of the cells, and on request their expression, into ``adata``; raw counts are not touched.

    ``obsm["X_pyro_scvi"]`` holds E[z | x], (cells, latents); ``layers["pyro_scvi_expression"]`` E[w | x], counts, and
    ``layers["pyro_scvi_technical_zero"]`` P(h = 1 | x), (cells, genes) each, NaN for genes that the fit does not know;
    ``uns["pyro_scvi"]`` the package's version, seed, samples, settings of the fit, its schema (JSON) and the seconds.
    ``scanpy.pp.neighbors(adata, use_rep="X_pyro_scvi")`` goes on from there.

    Parameters
    ----------
    adata
        Raw counts in the layer of the fit; genes are matched by name, in any order.
    fit
        The fit.
    expression, technical_zeros
        Which layers to add.
    samples, seed
        Draws of z and l for the layers, and the seed.
    overwrite
        Replace what an earlier call wrote.
    fill_missing_genes
        Count genes that ``adata`` lacks as zero, with a warning, instead of raising.

    Raises
    ------
    DataError
        If ``adata`` is a view, a name is taken and ``overwrite`` is False, or an entry is no count; nothing is written
        then.
    SchemaError
        If genes, batches or covariates are not those of the fit.
    ModelError
        If ``technical_zeros`` or ``expression`` are asked of a model that has none, or ``samples`` is below 1.

    Examples
    --------
    >>> annotated = adata.copy()
    >>> ps.annotate(annotated, fit)
    >>> annotated.obsm["X_pyro_scvi"].shape, sorted(annotated.uns["pyro_scvi"])[:3]
    ((60, 2), ['guide', 'model', 'samples'])
    """
    started = time.perf_counter()
    if adata.is_view:
        raise DataError("adata is a view of another AnnData; annotate a copy: adata = adata.copy()")
    layers = [EXPRESSION] * expression + [TECHNICAL] * technical_zeros
    taken = [f"obsm[{EMBEDDING!r}]"] * (EMBEDDING in adata.obsm) + [f"uns[{PROVENANCE!r}]"] * (PROVENANCE in adata.uns)
    taken += [f"layers[{name!r}]" for name in layers if name in adata.layers]
    if taken and not overwrite:
        raise DataError(f"adata has {', '.join(taken)} already; pass overwrite=True to replace, or annotate a copy")
    cells = Cells.from_anndata(adata, schema=fit.schema, fill_missing_genes=fill_missing_genes)
    found = {}
    if expression:
        found[EXPRESSION] = impute(fit, cells, samples=samples, seed=seed)
    if technical_zeros:
        found[TECHNICAL] = technical_zero_probability(fit, cells, samples=samples, seed=seed)
    adata.obsm[EMBEDDING] = embed(fit, cells, seed=seed)
    for name, values in found.items():
        adata.layers[name] = in_genes_of(adata, cells, values)
    adata.uns[PROVENANCE] = _provenance(fit, samples, seed) | {"seconds": time.perf_counter() - started}


def in_genes_of(adata: AnnData, cells: Cells, values: np.ndarray) -> np.ndarray:
    """Values (cells, genes of the fit) at the genes of ``adata``: float32, NaN where the fit does not know a gene."""
    places = adata.var_names.get_indexer(cells.gene_names)
    known = places >= 0  # the others were filled in
    layer = np.full(adata.shape, np.nan, dtype=np.float32)
    layer[:, places[known]] = values[:, known]
    return layer


def add_rank_genes_groups(
    adata: AnnData, table: pd.DataFrame, groupby: str, *, key: str = "rank_genes_groups", overwrite: bool = False
) -> None:
    r"""Write a table of differential expression where scanpy's ``pl.rank_genes_groups`` plots find it.

    ``scores`` are the natural log odds that the gene is higher in the group than in the rest, ``logfoldchanges`` the
    posterior means of log2 of group over rest, genes ordered by score. scanpy has no place for Bayesian quantities:
    ``pvals`` hold P(\|lfc\| <= delta), ``pvals_adj`` the expected false discovery rate of all genes up to this one.

    Parameters
    ----------
    adata
        Where to write, into ``uns[key]``.
    table
        Of :func:`pyro_scvi.differential_expression` without ``group_a`` and ``group_b``: every group against the rest.
    groupby
        The column of ``adata.obs`` that was compared by.
    key, overwrite
        Where in ``uns``, and whether to replace what is there.

    Raises
    ------
    DataError
        If the table is of one pair, ``adata`` has no such column, or ``uns[key]`` is taken.

    Examples
    --------
    >>> annotated = adata.copy()
    >>> table = ps.differential_expression(fit, cells, groupby="kind", largest_se=0.05)
    >>> ps.add_rank_genes_groups(annotated, table, "kind")
    >>> annotated.uns["rank_genes_groups"]["names"].dtype.names
    ('a', 'b')
    """
    if table.index.names != ["group", "gene"]:
        raise DataError(
            "the table must hold every group against the rest: differential_expression(fit, cells, groupby=...) "
            f"without group_a; this one is indexed by {table.index.names}"
        )
    if groupby not in adata.obs:
        raise DataError(f"adata.obs has no column {groupby!r}; it has {', '.join(map(str, adata.obs)) or 'none'}")
    if key in adata.uns and not overwrite:
        raise DataError(f"adata.uns has {key!r} already; pass another key=, or overwrite=True to replace it")
    ranked = {
        str(group): part.droplevel("group").sort_values("log_bayes_factor", kind="stable")
        for group, part in table.groupby(level="group", sort=False)
    }
    columns: dict[str, dict[str, Any]] = {
        "names": {group: part.index.to_numpy(dtype=object) for group, part in ranked.items()},
        "scores": {group: -part.log_bayes_factor.to_numpy() for group, part in ranked.items()},
        "logfoldchanges": {group: -part.lfc_mean.to_numpy() for group, part in ranked.items()},
        "pvals": {group: 1 - part.p_lfc.to_numpy() for group, part in ranked.items()},
        "pvals_adj": {group: part.fdr.to_numpy() for group, part in ranked.items()},
    }
    records = {name: pd.DataFrame(values).to_records(index=False) for name, values in columns.items()}
    params = {"groupby": groupby, "reference": "rest", "method": "pyro_scvi", "use_raw": False, "layer": None}
    target: MutableMapping[str, Any] = adata.uns
    target[key] = {"params": params, **records}


def _provenance(fit: Fit, samples: int, seed: int) -> dict[str, Any]:
    return {
        "version": version("pyro-scvi"),
        "seed": seed,
        "samples": samples,
        "model": repr(fit.model),
        "guide": type(fit.guide).__name__,
        "settings": json.dumps(fit.settings),
        "schema": json.dumps(fit.schema.to_dict()),
    }
