"""The commands that train: the demo, and a fit to a user's file."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from anndata import AnnData

from pyro_scvi import datasets, distributed, likelihoods, plots, report
from pyro_scvi.cells import Cells
from pyro_scvi.cli import findings, page
from pyro_scvi.cli.files import column, read_h5ad, write_h5ad
from pyro_scvi.cli.findings import Findings
from pyro_scvi.cli.options import (
    DISPERSIONS,
    GUIDES,
    LIBRARIES,
    LIKELIHOODS,
    PRIORS,
    Device,
    Epochs,
    Force,
    Input,
    Layer,
    Out,
    Progress,
    Seed,
    called,
    choice,
)
from pyro_scvi.cli.page import Job
from pyro_scvi.cli.workspace import FIT, PAGE, Workspace, errors_in_one_line, new_folder
from pyro_scvi.errors import FitError
from pyro_scvi.fit import Fit
from pyro_scvi.fit import fit as train_model
from pyro_scvi.guides import Guide
from pyro_scvi.indexing import number_held_out
from pyro_scvi.model import SCVI
from pyro_scvi.plots import Projection
from pyro_scvi.plots.projection import UMAP
from pyro_scvi.posterior import embed
from pyro_scvi.version import __version__

JUDGED_CELLS = 200  # at most so many held-out cells: each takes hundreds of passes through the decoder

Build = Callable[[Cells], tuple[SCVI, Guide | None]]


def demo(
    ctx: typer.Context,
    out: Out,
    epochs: Epochs = None,
    seed: Seed = 0,
    device: Device = "auto",
    progress: Progress = True,
    force: Force = False,
) -> None:
    """Fit the default model to 700 blood cells that come with scanpy; open DIR/index.html afterwards."""
    with new_folder(out, ("demo.h5ad", FIT), force) as space:
        adata = datasets.pbmc68k_reduced()
        job = Job(
            title="Demo",
            source="the 700 blood cells of Zheng et al. (2017) that scanpy ships",
            table="demo.h5ad",
            labels="bulk_labels",
            pair=("CD19+ B", "Dendritic"),
            command=called(ctx),
            seed=seed,
            training={"epochs": epochs, "device": device, "progress": progress},
        )
        cells = Cells.from_anndata(adata)
        analyse(space, adata, cells, lambda train: (SCVI(train.n_genes, seed=seed), None), job)


def fit(
    ctx: typer.Context,
    file: Input,
    out: Out,
    layer: Layer = None,
    batch: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of obs with the batch.")] = None,
    covariates: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Continuous column of obs; may be given again.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="Column of obs to colour the picture by, its two largest groups compared."),
    ] = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Cells per step.")] = 128,
    seed: Seed = 0,
    n_latent: Annotated[int, typer.Option(min=1, help="Size of z.")] = 10,
    prior: Annotated[Any, choice(PRIORS, "p(z)")] = None,
    likelihood: Annotated[Any, choice(LIKELIHOODS, "p(x | z)")] = None,
    dispersion: Annotated[Any, choice(DISPERSIONS, "Where the inverse dispersion of zinb and nb lives")] = None,
    library: Annotated[Any, choice(LIBRARIES, "Library size")] = None,
    guide: Annotated[Any, choice(GUIDES, "q(z | x)")] = None,
    device: Device = "auto",
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile the steps of training: slower to start, faster for many cells.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for the state of training, written after every epoch.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from --checkpoint, if there is one, with the same options.")
    ] = False,
    progress: Progress = True,
    force: Force = False,
) -> None:
    """Fit a model to the raw counts of FILE.h5ad; open DIR/index.html afterwards.

    DIR/annotated.h5ad is a copy of FILE with the embedding in obsm["X_pyro_scvi"] and, where umap-learn is installed,
    its UMAP in obsm["X_umap"].

    Several processes train together if torchrun starts them, each on its share of the cells; the first writes:
    torchrun --nproc-per-node 2 -m pyro_scvi fit FILE.h5ad --out DIR

    Ctrl-C or SIGTERM ends training after the running step: with --checkpoint the same command goes on with --resume,
    without it the results are those of the epochs that had ended.
    """
    if resume and checkpoint is None:
        raise typer.BadParameter("there is nothing to go on from; add --checkpoint DIR", param_hint="'--resume'")
    law = likelihood or likelihoods.ZINB
    if dispersion and not issubclass(law, likelihoods.GammaPoisson):
        raise typer.BadParameter(f"{law.__name__} has no dispersion", param_hint="'--dispersion'")

    def build(train: Cells) -> tuple[SCVI, Guide | None]:
        model = SCVI(
            train.n_genes,
            n_latent,
            train.n_covariates,
            prior=prior and prior(train, n_latent),
            likelihood=law(dispersion(train)) if dispersion else law(),
            library=library and library(),
            seed=seed,
        )
        return model, guide and guide(model, seed=seed)

    training: dict[str, Any] = {
        "epochs": epochs,
        "batch_size": batch_size,
        "device": device,
        "compiled": compiled,
        "checkpoint": checkpoint,
        "resume": resume,
        "progress": progress,
    }

    def counts_of(adata: AnnData) -> Cells:
        return Cells.from_anndata(adata, layer=layer, batch=batch, covariates=covariates or ())

    with distributed.joined() as ranks:
        training["ranks"] = ranks
        if not ranks.first:
            with errors_in_one_line(), warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # the first says them
                _train(counts_of(read_h5ad(file)), build, seed, training)
            return
        with new_folder(out, ("annotated.h5ad", FIT), force, source=file) as space:
            adata = read_h5ad(file)
            groups = None if labels is None else findings.categories(column(adata.obs, labels, "--labels"))
            cells = counts_of(adata)
            job = Job(
                title=file.name,
                source=f"the {cells.n_cells:,} cells of {file.name}",
                table="annotated.h5ad",
                labels=labels,
                pair=None if groups is None else (groups.index[0], groups.index[1]),
                command=called(ctx),
                seed=seed,
                training=training,
            )
            analyse(space, adata, cells, build, job)


def _train(cells: Cells, build: Build, seed: int, training: dict[str, Any]) -> tuple[Fit, Cells, Cells]:
    """Hold out a tenth of the cells and fit the rest: the fit, its cells and the others."""
    train, test = cells.split(held_out=0.1, seed=seed)
    model, guide = build(train)
    return train_model(model, train, guide, seed=seed, **training), train, test


def analyse(space: Workspace, adata: AnnData, cells: Cells, build: Build, job: Job) -> None:
    """Hold out a tenth of the cells, fit the rest, embed all, and write tables, pictures and the page."""
    held_out = number_held_out(0.1, cells.n_cells)
    typer.echo(f"fitting {cells.n_cells - held_out:,} cells x {cells.n_genes:,} genes, {held_out:,} cells held out")
    fitted, train, test = _train(cells, build, job.seed, job.training)
    if "interrupted" in fitted.settings and (folder := job.training.get("checkpoint")):
        stopped = f"training was interrupted by {fitted.settings['interrupted']}; {folder} holds its state"
        raise FitError(f"{stopped}: add --resume to go on, nothing was written to --out")
    fitted.save(space.path / FIT)
    latent, settings = embed(fitted, cells, seed=job.seed), page.settings_of(fitted, job)
    judged = test.split(JUDGED_CELLS, seed=job.seed)[1] if test.n_cells > JUDGED_CELLS else test
    typer.echo(f"judging the fit on {judged.n_cells:,} held-out cells")
    labels = None if job.labels is None else adata.obs[job.labels]
    found = Findings(fitted, cells, train, test, judged, latent, labels, job.seed)
    results = page.results(job, found, space.path)
    projection = plots.project(latent, seed=job.seed)
    _annotate(adata, latent, projection, settings)
    write_h5ad(adata, space.path / job.table)
    picture = findings.embedded(found, projection, space.path)
    first = ("", [page.summary(job, fitted), picture, *space.notes])
    text = report.page(f"pyro-scvi: {job.title}", [first, *results, *page.making(job, settings)])
    (space.path / PAGE).write_text(text, encoding="utf-8")


def _annotate(adata: AnnData, latent: np.ndarray, projection: Projection, settings: dict[str, Any]) -> None:
    adata.obsm["X_pyro_scvi"] = latent
    key = {UMAP: "X_umap"}.get(projection.method)
    if key:
        adata.obsm[key] = projection.coordinates
    made = {"version": __version__, "seed": settings["seed"], "settings": settings}
    adata.uns["pyro_scvi"] = {"X_pyro_scvi": made}
