"""From cells to a page: train on nine tenths of the cells, evaluate the fit on the others, write the report."""

from collections.abc import Callable
from typing import Any

import pandas as pd
from anndata import AnnData

from pyro_scvi import plots
from pyro_scvi.analysis.integration.embedding import embed
from pyro_scvi.analysis.integration.spaces import Expression
from pyro_scvi.cli import fit_report, page
from pyro_scvi.cli.files import column, write_h5ad
from pyro_scvi.cli.fit_report import EvaluatedFit
from pyro_scvi.cli.messages import say
from pyro_scvi.cli.page import Job
from pyro_scvi.cli.workspace import FIT, PAGE, Workspace
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.indexing import number_held_out, split_at_random
from pyro_scvi.errors import FitError
from pyro_scvi.export import html_page, scanpy
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.plots import Projection
from pyro_scvi.plots.projection import UMAP
from pyro_scvi.training.fit import fit
from pyro_scvi.training.fitted import Fit
from pyro_scvi.version import __version__

HELD_OUT = 0.1  # of the cells: the fit never sees them
JUDGED_CELLS = 200  # at most so many held-out cells: each takes hundreds of passes through the decoder

BuildModel = Callable[[Cells], tuple[SCVI, Guide | None]]


def fit_and_report(space: Workspace, adata: AnnData, cells: Cells, build_model: BuildModel, job: Job) -> None:
    """Hold out a tenth of the cells, fit the rest, embed all, and write tables, pictures and the page."""
    held_out = number_held_out(HELD_OUT, cells.n_cells)
    say(f"fitting {cells.n_cells - held_out:,} cells x {cells.n_genes:,} genes, {held_out:,} cells held out")
    fitted, train_cells, test_cells = train(cells, build_model, job.seed, job.training)
    _require_finished(fitted, job)
    fitted.save(space.path / FIT)
    space.keep(FIT)
    labels = None if job.labels is None else adata.obs[job.labels]
    evaluated = evaluate(fitted, cells, train_cells, test_cells, labels, job)
    write_report(space, adata, evaluated, job)


def train(cells: Cells, build_model: BuildModel, seed: int, training: dict[str, Any]) -> tuple[Fit, Cells, Cells]:
    """Hold out a tenth of the cells and fit the rest: the fit, its cells and the others."""
    train_cells, test_cells = cells.split(held_out=HELD_OUT, seed=seed)
    model, guide = build_model(train_cells)
    return fit(model, train_cells, guide, seed=seed, **training), train_cells, test_cells


def evaluate(
    fitted: Fit, cells: Cells, train_cells: Cells, test_cells: Cells, labels: pd.Series | None, job: Job
) -> EvaluatedFit:
    """Embed all cells, and choose the held-out cells that the fit is judged on."""
    seed, progress = job.seed, bool(job.training.get("progress", True))
    latent = embed(fitted, cells, seed=seed)
    space = Expression().fitted(fitted, cells, seed=seed)
    components = embed(fitted, cells, space=space, seed=seed)
    few = test_cells.n_cells <= JUDGED_CELLS
    judged = test_cells if few else test_cells.take(split_at_random(test_cells.n_cells, JUDGED_CELLS, seed)[1])
    say(f"judging the fit on {judged.n_cells:,} held-out cells")
    return EvaluatedFit(
        fitted, cells, train_cells, test_cells, judged, latent, space, components, labels, seed, progress
    )


def write_report(space: Workspace, adata: AnnData, evaluated: EvaluatedFit, job: Job) -> None:
    """Write the page with its pictures and tables, and the file with the embedding."""
    settings = page.settings_of(evaluated.fit, job)
    results = page.results(job, evaluated, space.path)
    projection = plots.project(evaluated.components, seed=job.seed)
    _annotate(adata, evaluated, projection, settings)
    write_h5ad(adata, space.path / job.table)
    pictures = page.made_or_told("The embedding", lambda: [fit_report.embedded(evaluated, projection, space.path)])
    first = ("", [page.summary(job, evaluated.fit), *pictures, *space.notes])
    text = html_page.page(f"pyro-scvi: {job.title}", [first, *results, *page.making(job, settings)])
    (space.path / PAGE).write_text(text, encoding="utf-8")


def largest_groups(adata: AnnData, labels: str | None) -> tuple[str, str] | None:
    """The two largest groups of a column of obs; None without a column, or if it defines no groups."""
    if labels is None:
        return None
    groups = fit_report.categories(column(adata.obs, labels, "--labels"))
    return None if groups is None else (groups.index[0], groups.index[1])


def _require_finished(fitted: Fit, job: Job) -> None:
    """Raise if training was interrupted and can be resumed."""
    if "interrupted" in fitted.settings and (folder := job.training.get("checkpoint")):
        stopped = f"training was interrupted by {fitted.settings['interrupted']}; {folder} holds its state"
        raise FitError(f"{stopped}: add --resume to continue; nothing was written to --out")


def _annotate(adata: AnnData, evaluated: EvaluatedFit, projection: Projection, settings: dict[str, Any]) -> None:
    adata.obsm[scanpy.EMBEDDING] = evaluated.latent
    adata.obsm[scanpy.COMPONENTS] = evaluated.components
    key = {UMAP: "X_umap"}.get(projection.method)
    if key:
        adata.obsm[key] = projection.coordinates
    made = {"version": __version__, "seed": settings["seed"], "settings": settings}
    placed = {"version": __version__, "seed": settings["seed"], "pca": evaluated.space.record()}
    adata.uns[scanpy.PROVENANCE] = {scanpy.EMBEDDING: made, scanpy.COMPONENTS: placed}
