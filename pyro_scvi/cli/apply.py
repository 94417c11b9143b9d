"""The commands ``embed`` and ``impute``: apply a saved fit to the cells of a file and add the results to a copy."""

import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from anndata import AnnData

from pyro_scvi.analysis.integration import embedding, expression, spaces
from pyro_scvi.analysis.predictive import imputation
from pyro_scvi.cli.files import QueryOptions, add, load_fit, read_h5ad, record, write_h5ad
from pyro_scvi.cli.messages import say
from pyro_scvi.cli.options import (
    SPACES,
    AllowNonInteger,
    Device,
    Fill,
    FitFolder,
    Force,
    Input,
    NewBatches,
    OutFile,
    QueryLayer,
    Raw,
    Sampling,
    Seed,
    choice,
)
from pyro_scvi.cli.workspace import new_file
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError
from pyro_scvi.export.scanpy import COMPONENTS, EMBEDDING, PROVENANCE, in_genes_of
from pyro_scvi.inference.samplers import Amortized
from pyro_scvi.training.fitted import Fit
from pyro_scvi.version import __version__


def embed(
    fit_folder: FitFolder,
    file: Input,
    out: OutFile,
    layer: QueryLayer = None,
    raw: Raw = False,
    fill_missing_genes: Fill = False,
    allow_non_integer: AllowNonInteger = False,
    allow_new_batches: NewBatches = False,
    space: Annotated[Any, choice(SPACES, "Where cells are placed")] = None,
    beside: Annotated[
        Path | None,
        typer.Option(metavar="REF.h5ad", help="A reference that embed wrote: its principal axes are used."),
    ] = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Embed the cells of FILE.h5ad by a saved fit.

    OUT.h5ad is a copy of FILE with E[z | x] in obsm["X_pyro_scvi"], and with principal components of the decoded
    expression in obsm["X_pyro_scvi_expression_pca"]: take these for neighbours, UMAP and clusters. Their axes are those
    of these cells, or of REF.h5ad, so that a query lies beside its reference. With --space latent, E[z | x] alone.

    Genes are matched by name, in any order; genes that the fit does not know are kept but play no part.
    """
    if beside is not None and space is spaces.Latent:
        raise typer.BadParameter("axes are those of expression: leave --space latent out", param_hint="'--beside'")
    reading = QueryOptions(layer, raw, fill_missing_genes, allow_non_integer, allow_new_batches)
    with new_file(out, force, file, *([] if beside is None else [beside]), fit=fit_folder) as made:
        fit = load_fit(fit_folder, device)
        adata = read_h5ad(file)
        cells = reading.cells_of(fit, adata)
        say(f"embedding {cells.n_cells:,} cells")
        add(adata.obsm, EMBEDDING, embedding.embed(fit, cells, seed=seed))
        _forget_record(adata)
        if space is spaces.Latent:
            _drop_components(adata)
        else:
            _add_components(adata, fit, cells, spaces.Expression() if beside is None else _axes_of(beside), seed)
        record(adata, "pyro_scvi_embed", fit_folder, seed=seed)
        write_h5ad(adata, made.path)


def _forget_record(adata: AnnData) -> None:
    """Take what is recorded of an earlier embedding out of the copy."""
    known = adata.uns.get(PROVENANCE)
    if isinstance(known, Mapping):
        adata.uns[PROVENANCE] = {name: of for name, of in known.items() if name not in (EMBEDDING, COMPONENTS)}


def _drop_components(adata: AnnData) -> None:
    """Take components of an earlier embedding out of the copy, because z is replaced."""
    if adata.obsm.pop(COMPONENTS, None) is not None:
        told = f"{COMPONENTS!r} was there already; it is left out of the copy, because it belongs to another z"
        warnings.warn(told, UserWarning, stacklevel=2)


def _axes_of(file: Path) -> spaces.FittedSpace:
    reference = read_h5ad(file)
    try:
        return spaces.from_record(reference)
    except DataError as error:
        raise DataError(f"{file}: {error}, or a file that embed wrote") from error


def _add_components(adata: AnnData, fit: Fit, cells: Cells, space: spaces.Space, seed: int) -> None:
    """Add the principal components, and their axes where ``ps.annotate`` puts them."""
    fitted: Any = space.fitted(fit, cells, seed=seed)
    add(adata.obsm, COMPONENTS, fitted.place(fit, cells, seed=seed))
    known = adata.uns.get(PROVENANCE)
    kept = dict(known) if isinstance(known, Mapping) else {}
    adata.uns[PROVENANCE] = kept | {COMPONENTS: {"version": __version__, "pca": fitted.record()}}


def impute(
    fit_folder: FitFolder,
    file: Input,
    out: OutFile,
    no_dropout: Annotated[
        bool, typer.Option("--no-dropout", help="The mean given no dropout, mu, instead of E[w | x].")
    ] = False,
    normalized: Annotated[
        bool, typer.Option("--normalized", help="Shares of the genes per 10,000, with batches averaged, instead.")
    ] = False,
    technical_zeros: Annotated[
        bool, typer.Option("--technical-zeros", help="Add P(h = 1 | x), that a zero is technical.")
    ] = False,
    batch_as: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME", help="As if of this batch, the mean over all; takes --no-dropout or --normalized."
        ),
    ] = None,
    layer: QueryLayer = None,
    raw: Raw = False,
    fill_missing_genes: Fill = False,
    allow_non_integer: AllowNonInteger = False,
    allow_new_batches: NewBatches = False,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the latents of each cell.")] = 25,
    sampler: Sampling = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Force = False,
) -> None:
    """Add the posterior mean expression of every gene in every cell of FILE.h5ad, by a saved fit.

    OUT.h5ad is a copy of FILE with the layer "pyro_scvi_expression", E[w | x] in counts, float32. With --no-dropout its
    name is "pyro_scvi_no_dropout", with --batch-as "pyro_scvi_no_dropout_batch_swapped"; --technical-zeros adds the
    layer "pyro_scvi_technical_zero". With --normalized the layer is "pyro_scvi_normalized": the mean share of each gene
    in a cell, which sum to 10,000, averaged over all batches of the fit or over those of --batch-as.

    Genes are matched by name, in any order, and OUT keeps all genes of FILE: those that the fit does not know are NaN
    in these layers, and var["pyro_scvi_modelled"] says which are known.
    """
    name, verb = _quantity(normalized, no_dropout, batch_as)
    reading = QueryOptions(layer, raw, fill_missing_genes, allow_non_integer, allow_new_batches)
    with new_file(out, force, file, fit=fit_folder) as space:
        fit = load_fit(fit_folder, device)
        adata = read_h5ad(file)
        cells = reading.cells_of(fit, adata)
        drawing: dict[str, Any] = {"samples": samples, "sampler": (sampler or Amortized)(), "seed": seed}
        say(f"imputing {cells.n_cells:,} cells x {cells.n_genes:,} genes")
        layers = {}
        if technical_zeros:  # first: it is refused at once where the model has none
            layers["pyro_scvi_technical_zero"] = imputation.technical_zero_probability(fit, cells, **drawing)
        layers[name] = verb(fit, cells, **drawing)
        _add_layers(adata, cells, layers)
        asked = drawing | {"sampler": repr(drawing["sampler"]), "batch_as": ", ".join(batch_as or ())}
        record(adata, "pyro_scvi_impute", fit_folder, layers=", ".join(layers), **asked)
        write_h5ad(adata, space.path)


def _quantity(normalized: bool, no_dropout: bool, batch_as: list[str] | None) -> tuple[str, Callable[..., Any]]:
    """Name of the layer, and what computes it."""
    if normalized and no_dropout:
        raise typer.BadParameter(
            "--normalized gives the mean without dropout already: leave --no-dropout out", param_hint="'--no-dropout'"
        )
    if normalized:
        name = "pyro_scvi_normalized" + "_batch_swapped" * bool(batch_as)
        return name, partial(_normalized, batches=batch_as or None)
    if batch_as and not no_dropout:
        raise typer.BadParameter(
            "expression uses the counts of the cell, and nothing was observed in another batch; add --no-dropout for "
            "the mean there, or --normalized for shares",
            param_hint="'--batch-as'",
        )
    quantity = imputation.mean_given_no_dropout if no_dropout else imputation.expression
    name = ("pyro_scvi_no_dropout" if no_dropout else "pyro_scvi_expression") + "_batch_swapped" * bool(batch_as)
    return name, partial(imputation.impute, quantity=quantity, batches=batch_as or ())


def _normalized(fit: Fit, cells: Cells, **options: Any) -> np.ndarray:
    values: np.ndarray = expression.normalized_expression(fit, cells, **options).to_numpy()
    return values


def _add_layers(adata: AnnData, cells: Cells, layers: dict[str, np.ndarray]) -> None:
    """Put (cells, genes of the fit) where the file has these genes; NaN at the others."""
    modelled = adata.var_names.isin(cells.gene_names)
    for name, values in layers.items():
        add(adata.layers, name, in_genes_of(adata, cells, values))
    adata.var["pyro_scvi_modelled"] = modelled
    if not modelled.all():
        text = f"{(~modelled).sum():,} of {adata.n_vars:,} genes are unknown to the fit: NaN in the new layers"
        warnings.warn(text, UserWarning, stacklevel=2)
