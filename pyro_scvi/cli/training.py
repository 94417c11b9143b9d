"""The commands ``demo`` and ``fit``: train a model on example cells or on a user's file."""

import warnings
from pathlib import Path
from typing import Any

import typer

from pyro_scvi.cli.files import read_h5ad
from pyro_scvi.cli.fit_options import (
    Batch,
    BatchSize,
    Checkpoint,
    Compiled,
    CountOptions,
    Covariates,
    DispersionName,
    GuideName,
    Labels,
    LatentSize,
    LibraryName,
    LikelihoodName,
    ModelOptions,
    PriorName,
    Resume,
)
from pyro_scvi.cli.messages import errors_in_one_line, warnings_as_notes
from pyro_scvi.cli.options import (
    AllowNonInteger,
    Device,
    Epochs,
    Force,
    Input,
    Layer,
    Out,
    Progress,
    Raw,
    Seed,
    called,
)
from pyro_scvi.cli.page import Job
from pyro_scvi.cli.pipeline import fit_and_report, largest_groups, train
from pyro_scvi.cli.workspace import FIT, new_folder
from pyro_scvi.data import datasets
from pyro_scvi.data.cells import Cells
from pyro_scvi.likelihoods.negative_binomial import ZINB
from pyro_scvi.model import SCVI
from pyro_scvi.training import distributed


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
        fit_and_report(space, adata, cells, lambda train: (SCVI(train.n_genes, seed=seed), None), job)


def fit(
    ctx: typer.Context,
    file: Input,
    out: Out,
    layer: Layer = None,
    raw: Raw = False,
    batch: Batch = None,
    covariates: Covariates = None,
    allow_non_integer: AllowNonInteger = False,
    labels: Labels = None,
    epochs: Epochs = None,
    batch_size: BatchSize = 128,
    seed: Seed = 0,
    n_latent: LatentSize = 10,
    prior: PriorName = None,
    likelihood: LikelihoodName = None,
    dispersion: DispersionName = None,
    library: LibraryName = None,
    guide: GuideName = None,
    device: Device = "auto",
    compiled: Compiled = False,
    checkpoint: Checkpoint = None,
    resume: Resume = False,
    progress: Progress = True,
    force: Force = False,
) -> None:
    """Fit a model to the raw counts of FILE.h5ad; open DIR/index.html afterwards.

    DIR/annotated.h5ad is a copy of FILE with the embedding in obsm["X_pyro_scvi"], components of expression in
    obsm["X_pyro_scvi_expression_pca"] and, where umap-learn is installed, their UMAP in obsm["X_umap"].

    Several processes train together if torchrun starts them, each on its share of the cells; the first writes:
    torchrun --standalone --nproc-per-node 2 -m pyro_scvi fit FILE.h5ad --out DIR

    Ctrl-C or SIGTERM ends training after the running step: with --checkpoint the same command goes on with --resume,
    without it the results are those of the epochs that had ended.
    """
    if resume and checkpoint is None:
        raise typer.BadParameter("there is no checkpoint to resume from; add --checkpoint DIR", param_hint="'--resume'")
    if checkpoint is not None and _overlap(checkpoint, out):
        raise typer.BadParameter(
            "one of --checkpoint and --out is inside the other, and would be replaced by it; pass two folders that "
            "lie apart",
            param_hint="'--checkpoint'",
        )
    model = ModelOptions(n_latent, prior, likelihood or ZINB, dispersion, library, guide, seed)
    counts = CountOptions(layer, raw, batch, covariates or (), allow_non_integer)
    training: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "device": device, "progress": progress}
    training |= {"compiled": compiled, "checkpoint": checkpoint, "resume": resume}
    with errors_in_one_line(), warnings_as_notes(), distributed.joined() as ranks:
        training["ranks"] = ranks
        if not ranks.first:
            _train_beside(file, counts, model, training)
            return
        with new_folder(out, ("annotated.h5ad", FIT), force, source=file) as space:
            adata = read_h5ad(file)
            pair = largest_groups(adata, labels)
            cells = counts.cells_of(adata)
            source = f"the {cells.n_cells:,} cells of {file.name}"
            job = Job(file.name, source, "annotated.h5ad", labels, pair, called(ctx), seed, training)
            fit_and_report(space, adata, cells, model.build_model, job)


def _overlap(one: Path, other: Path) -> bool:
    """Whether one of two folders is the other, or inside it."""
    one, other = one.resolve(), other.resolve()
    return one.is_relative_to(other) or other.is_relative_to(one)


def _train_beside(file: Path, counts: CountOptions, model: ModelOptions, training: dict[str, Any]) -> None:
    """Take part in the training of the first process, which writes the results."""
    with errors_in_one_line(), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the first says them
        train(counts.cells_of(read_h5ad(file)), model.build_model, model.seed, training)
