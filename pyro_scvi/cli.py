"""The command line: fit a model to a data set and leave a folder to open and to go on from."""

import platform
import shlex
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import anndata
import numpy as np
import pandas as pd
import typer
from anndata import AnnData
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.metrics import silhouette_score
from typer.core import TyperCommand

import pyro_scvi
from pyro_scvi import datasets, guides, libraries, likelihoods, plots, priors, report
from pyro_scvi.cells import Cells
from pyro_scvi.errors import DataError, FitError, ModelError, PyroScviError, SchemaError
from pyro_scvi.evidence import KHAT_LIMIT, evidence
from pyro_scvi.fit import Fit
from pyro_scvi.fit import fit as train_model
from pyro_scvi.guides import Guide
from pyro_scvi.minibatches import resolve_device
from pyro_scvi.model import SCVI
from pyro_scvi.plots import Projection
from pyro_scvi.posterior import embed
from pyro_scvi.store import CONFIG

app = typer.Typer(
    name="pyro-scvi",
    help="scVI as a Pyro program: fit single-cell counts, embed the cells, judge the model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

EVIDENCE_CELLS = 200  # at most so many held-out cells: each takes hundreds of passes through the decoder
SILHOUETTE_CELLS = 5000  # the silhouette compares all pairs

Build = Callable[[Cells], tuple[SCVI, Guide | None]]


def _vamp(cells: Cells, n_latent: int) -> priors.VampPrior:
    rows = np.linspace(0, cells.n_cells - 1, min(50, cells.n_cells)).astype(int)
    return priors.VampPrior(cells.n_genes, n_latent, len(rows), pseudo_cells=cells[rows][0])


def _per_gene_and_batch(cells: Cells) -> likelihoods.PerGeneAndBatch:
    if not cells.n_batches:
        raise ModelError("a dispersion per gene and batch needs batches: pass --batch")
    return likelihoods.PerGeneAndBatch(cells.n_genes, cells.n_batches)


PRIORS: dict[str, Callable[[Cells, int], priors.Prior]] = {
    "normal": lambda cells, n: priors.StandardNormal(n),
    "student-t": lambda cells, n: priors.StudentT(n),
    "laplace": lambda cells, n: priors.Laplace(n),
    "ard": lambda cells, n: priors.ARDNormal(n),
    "mixture": lambda cells, n: priors.GaussianMixture(n),
    "vamp": _vamp,
    "flow": lambda cells, n: priors.Flow(n),
    "logistic-normal": lambda cells, n: priors.LogisticNormal(n),
    "dirichlet": lambda cells, n: priors.Dirichlet(n),
}
LIKELIHOODS: dict[str, type[likelihoods.Likelihood]] = {
    "zinb": likelihoods.ZINB,
    "nb": likelihoods.NB,
    "zip": likelihoods.ZIP,
    "poisson": likelihoods.Poisson,
}
DISPERSIONS: dict[str, Callable[[Cells], likelihoods.Dispersion]] = {
    "cell-gene": lambda cells: likelihoods.PerCellAndGene(),
    "gene": lambda cells: likelihoods.PerGene(cells.n_genes),
    "gene-batch": _per_gene_and_batch,
}
LIBRARIES: dict[str, Callable[[], libraries.Library]] = {
    "latent": libraries.LatentLibrary,
    "observed": libraries.ObservedLibrary,
    "none": libraries.NoLibrary,
}
GUIDES: dict[str, Callable[..., Guide]] = {
    "diagonal": guides.DiagonalNormal,
    "full-rank": guides.FullRankNormal,
    "iaf": guides.InverseAutoregressiveFlow,
    "point": guides.Point,
}


def _choice(parts: Mapping[str, Any], text: str) -> Any:
    """An option that takes one of the names and hands on what it stands for."""

    def parse(name: str) -> Any:
        if name not in parts:
            raise typer.BadParameter(f"{name!r} is not one of {', '.join(parts)}.")
        return parts[name]

    return typer.Option(
        parser=parse, metavar="NAME", help=f"{text}: {', '.join(parts)}.", show_default=next(iter(parts))
    )


def _usable_device(name: str) -> str:
    try:
        resolve_device(name)
    except FitError as error:
        raise typer.BadParameter(str(error)) from error
    return name


Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes through the cells.", show_default="by their number")]
Seed = Annotated[int, typer.Option(min=0, help="Of everything random.")]
Device = Annotated[str, typer.Option(callback=_usable_device, help="auto, cpu, cuda, cuda:1, mps.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the results of an earlier run in DIR.")]


class Recorded(TyperCommand):
    """A command that remembers how it was called, for the page."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Note the arguments before they are taken apart."""
        ctx.meta[__name__] = shlex.join(["python", "-m", "pyro_scvi", str(ctx.info_name), *args])
        return super().parse_args(ctx, args)


@dataclass(frozen=True)
class Job:
    """What a command was asked for, beside data and model."""

    title: str
    source: str
    table: str
    labels: str | None
    command: str
    seed: int
    training: dict[str, Any]


@dataclass(frozen=True)
class Workspace:
    """A folder that is being filled, and what was warned of meanwhile."""

    folder: Path
    caught: list[warnings.WarningMessage]

    @property
    def notes(self) -> list[str]:
        """Every warning once, without the line of code that it came from."""
        return list(dict.fromkeys(str(note.message) for note in self.caught if note.category is UserWarning))


@app.command(cls=Recorded)
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
    with workspace(out, "demo.h5ad", force) as space:
        adata = datasets.pbmc68k_reduced()
        source = "the 700 blood cells of Zheng et al. (2017) that scanpy ships"
        training = {"epochs": epochs, "device": device, "progress": progress}
        job = Job("Demo", source, "demo.h5ad", "bulk_labels", ctx.meta[__name__], seed, training)
        cells = Cells.from_anndata(adata)
        analyse(space, adata, cells, lambda train: (SCVI(train.n_genes, seed=seed), None), job)


@app.command(cls=Recorded)
def fit(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE.h5ad", help="Raw counts; the file is only read.")],
    out: Out,
    layer: Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="X")] = None,
    batch: Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of obs with the batch.")] = None,
    covariates: Annotated[
        list[str] | None, typer.Option(metavar="COLUMN", help="Continuous column of obs; may be given again.")
    ] = None,
    labels: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="Column of obs to colour the picture by.")
    ] = None,
    epochs: Epochs = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Cells per step.")] = 128,
    seed: Seed = 0,
    n_latent: Annotated[int, typer.Option(min=1, help="Size of z.")] = 10,
    prior: Annotated[Any, _choice(PRIORS, "p(z)")] = None,
    likelihood: Annotated[Any, _choice(LIKELIHOODS, "p(x | z)")] = None,
    dispersion: Annotated[Any, _choice(DISPERSIONS, "Where the inverse dispersion of zinb and nb lives")] = None,
    library: Annotated[Any, _choice(LIBRARIES, "Library size")] = None,
    guide: Annotated[Any, _choice(GUIDES, "q(z | x)")] = None,
    device: Device = "auto",
    progress: Progress = True,
    force: Force = False,
) -> None:
    """Fit a model to the raw counts of FILE.h5ad; open DIR/index.html afterwards.

    DIR/annotated.h5ad is a copy of FILE with the embedding in obsm["X_pyro_scvi"] and, where umap-learn is installed,
    its UMAP in obsm["X_umap"].
    """
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

    with workspace(out, "annotated.h5ad", force, source=file) as space:
        adata = _read(file)
        if labels is not None and labels not in adata.obs:
            raise SchemaError(f"obs has no column {labels!r} for --labels; it has {', '.join(adata.obs) or 'none'}")
        cells = Cells.from_anndata(adata, layer=layer, batch=batch, covariates=covariates or ())
        training = {"epochs": epochs, "batch_size": batch_size, "device": device, "progress": progress}
        source = f"the {cells.n_cells:,} cells of {file.name}"
        job = Job(file.name, source, "annotated.h5ad", labels, ctx.meta[__name__], seed, training)
        analyse(space, adata, cells, build, job)


def analyse(space: Workspace, adata: AnnData, cells: Cells, build: Build, job: Job) -> None:
    """Hold out a tenth of the cells, fit the rest, embed all, and write tables, pictures and the page."""
    train, test = cells.split(held_out=0.1, seed=job.seed)
    model, guide = build(train)
    typer.echo(f"fitting {train.n_cells:,} cells x {train.n_genes:,} genes, {test.n_cells:,} cells held out")
    fitted = train_model(model, train, guide, seed=job.seed, **job.training)
    latent = embed(fitted, cells, seed=job.seed)
    judged = test.split(EVIDENCE_CELLS, job.seed)[1] if test.n_cells > EVIDENCE_CELLS else test
    typer.echo(f"evidence of {judged.n_cells:,} held-out cells")
    table = evidence(fitted, judged, seed=job.seed)
    fitted.save(space.folder / "fit")
    projection = plots.project(latent, seed=job.seed)
    settings = _settings(fitted, job)
    _annotate(adata, latent, projection, settings)
    adata.write_h5ad(space.folder / job.table)
    labels = None if job.labels is None else adata.obs[job.labels]
    pictures = _draw(space.folder, fitted, projection, labels, cells.n_cells)
    rows = [*_sizes(fitted, train, test), *_quality(fitted, table), *_silhouette(latent, labels, job.seed)]
    page = report.page(f"pyro-scvi: {job.title}", _sections(job, space, fitted, rows, settings, pictures))
    (space.folder / "index.html").write_text(page, encoding="utf-8")


@contextmanager
def workspace(out: Path, table: str, force: bool, source: Path | None = None) -> Iterator[Workspace]:
    """A folder to fill, whose content moves into ``out`` at the end, or not at all.

    Errors that a user can mend end as one line and exit code 1; warnings become notes.
    """
    try:
        _check(out, table, force, source)
        out.parent.mkdir(parents=True, exist_ok=True)
        with (
            tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary,
            warnings.catch_warnings(record=True) as caught,
        ):
            warnings.simplefilter("always", UserWarning)
            space = Workspace(Path(temporary) / "new", caught)
            space.folder.mkdir()
            yield space
            _publish(space.folder, out, Path(temporary))
    except (PyroScviError, OSError, ImportError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error
    for note in space.notes:
        typer.echo(f"note: {note}", err=True)
    typer.echo(f"wrote {out / 'index.html'}")


def _check(out: Path, table: str, force: bool, source: Path | None) -> None:
    """Refuse, before anything is computed, what could not be written or would overwrite something else."""
    if source is not None and not source.is_file():
        raise FileNotFoundError(f"there is no file {source}")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; pass a folder as --out")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise FileExistsError(f"{out} is not empty; pass another --out, or --force to replace earlier results in it")
    if source is not None and (out / table).exists() and (out / table).samefile(source):
        raise FileExistsError(f"{out / table} is the input, which is never written; pass another --out")
    if (out / "fit").exists() and not (out / "fit" / CONFIG).is_file():
        raise FileExistsError(f"{out / 'fit'} is no saved fit and would be overwritten; pass another --out")


def _publish(folder: Path, out: Path, temporary: Path) -> None:
    """Move every result into its place; what it replaces goes with the temporary folder."""
    replaced = temporary / "replaced"
    replaced.mkdir()
    out.mkdir(exist_ok=True)
    for result in sorted(folder.iterdir()):
        if (out / result.name).exists():
            (out / result.name).rename(replaced / result.name)
        result.rename(out / result.name)


def _read(file: Path) -> AnnData:
    try:
        return anndata.read_h5ad(file)
    except Exception as error:  # whatever h5py and anndata say of a broken file
        raise DataError(f"{file}: cannot read it as h5ad: {str(error).splitlines()[0]}") from error


def _settings(fit: Fit, job: Job) -> dict[str, Any]:
    """How the fit was made, in values that h5ad and a page can hold."""
    model, schema = fit.model, fit.schema
    return {
        "n_latent": model.n_latent,
        "prior": repr(model.prior),
        "likelihood": repr(model.likelihood),
        "library": repr(model.library),
        "guide": type(fit.guide).__name__,
        "layer": schema.layer or "X",
        "batch": schema.batch or "none",
        "covariates": ", ".join(schema.covariates) or "none",
        "seed": job.seed,
        "epochs": fit.settings["epochs"],
        "batch_size": fit.settings["batch_size"],
        "training_cells": fit.settings["n_cells"],
        "device": str(fit.device),
    }


def _annotate(adata: AnnData, latent: np.ndarray, projection: Projection, settings: dict[str, Any]) -> None:
    adata.obsm["X_pyro_scvi"] = latent
    key = {plots.UMAP: "X_umap"}.get(projection.method)
    if key:
        adata.obsm[key] = projection.coordinates
    adata.uns["pyro_scvi"] = {"version": pyro_scvi.__version__, "seed": settings["seed"], "settings": settings}


def _draw(folder: Path, fit: Fit, projection: Projection, labels: pd.Series | None, n_cells: int) -> list[report.Html]:
    """Write the three pictures; returns them for the page."""
    coloured = "" if labels is None else f", coloured by {labels.name}"
    ax = _axes((8.8, 5.0))
    plots.embedding(projection, labels, ax=ax)
    cells = _save(ax, folder / f"{projection.method.lower()}.png", f"{projection.method} of the embedding{coloured}")
    ax = plots.loss(fit, _axes((5.4, 3.8)))
    loss = _save(ax, folder / "loss.png", "Loss, the negative evidence bound, by epoch")
    ax = plots.program(fit.model, _axes((3.2, 5.2)), n_cells=n_cells)
    return [cells, loss, _save(ax, folder / "program.png", "The model as a plate diagram (Lopez et al. 2017, Fig. 1)")]


def _axes(size: tuple[float, float]) -> Axes:
    return Figure(figsize=size, layout="constrained").subplots()  # without pyplot, which would keep the figure


def _save(ax: Axes, path: Path, caption: str) -> report.Html:
    figure = ax.get_figure()
    if not isinstance(figure, Figure):
        raise TypeError(f"expected axes of a figure, got {figure!r}")
    figure.savefig(path, dpi=200)
    return report.picture(path.read_bytes(), alt=caption, caption=caption, width=round(100 * figure.get_figwidth()))


Row = tuple[str, str, str]  # quantity, value, what it is


def _sizes(fit: Fit, train: Cells, test: Cells) -> list[Row]:
    history = fit.history
    seconds, best = float(history.seconds.sum()), history.held_out_loss.idxmin()
    learned = fit.settings["n_cells"]
    use = f"{learned:,} to train, {train.n_cells - learned:,} to choose the epoch, {test.n_cells:,} held out"
    return [
        ("cells", f"{train.n_cells + test.n_cells:,}", use),
        ("genes", f"{train.n_genes:,}", ""),
        ("epochs", f"{len(history):,}", ""),
        ("training time", f"{seconds:.1f}", f"seconds on {fit.device}"),
        ("training loss", f"{history.train_loss.iloc[-1]:.1f}", "nats per cell, last epoch"),
        ("held-out loss", f"{history.held_out_loss.min():.1f}", f"nats per cell, epoch {best}, whose state is kept"),
    ]


def _quality(fit: Fit, table: pd.DataFrame) -> list[Row]:
    n, mean = len(table), float(table.log_evidence.mean())
    se = float(table.log_evidence.std()) / n**0.5
    unreliable = float((table.khat > KHAT_LIMIT).mean())
    return [
        ("held-out evidence", f"{mean:.1f} ± {se:.1f}", f"nats per cell, mean and standard error over n = {n:,} cells"),
        (
            f"k-hat above {KHAT_LIMIT}",
            f"{unreliable:.0%}",
            "of these cells, whose evidence is then unreliable",
        ),
    ]


def _silhouette(latent: np.ndarray, labels: pd.Series | None, seed: int) -> list[Row]:
    """How well categories lie apart; nothing for continuous labels, or where each or none is alone."""
    if labels is None or pd.api.types.is_numeric_dtype(labels):
        return []
    known = labels.notna().to_numpy()
    chosen = np.flatnonzero(known)
    if len(chosen) > SILHOUETTE_CELLS:
        chosen = np.sort(np.random.default_rng(seed).choice(chosen, SILHOUETTE_CELLS, replace=False))
    names = labels.iloc[chosen].astype(str)
    if not 1 < names.nunique() < len(names):
        return []
    text = f"of {labels.name} in the embedding: a description, no target of the fit"
    return [("silhouette", f"{silhouette_score(latent[chosen], names):.3f}", text)]


def _sections(
    job: Job,
    space: Workspace,
    fit: Fit,
    rows: list[Row],
    settings: dict[str, Any],
    pictures: list[report.Html],
) -> list[report.Section]:
    model, n_cells = fit.model, fit.settings["n_cells"]
    sentence = (
        f"scVI with {type(model.likelihood).__name__} counts, {model.n_latent} latents and the guide "
        f"{type(fit.guide).__name__} was fitted to {n_cells:,} of {job.source}; the others were held out."
    )
    cells, *others = pictures
    start = 'import pyro_scvi as ps\n\nfit = ps.load("fit")'
    return [
        ("", [sentence, cells]),
        ("Numbers", [report.table(rows, ("quantity", "value", ""), numbers=[1]), *space.notes]),
        ("Model and training", [report.beside(*others)]),
        ("Settings", [report.table([(name.replace("_", " "), f"{value}") for name, value in settings.items()])]),
        ("How it was made", [report.code(job.command), _versions()]),
        (
            "Going on",
            [f"{job.table} holds the cells with their embedding; the fit is in the folder fit:", report.code(start)],
        ),
    ]


def _versions() -> str:
    found = [f"pyro-scvi {pyro_scvi.__version__}", f"Python {platform.python_version()}"]
    for name in ("torch", "pyro-ppl", "numpy", "anndata", "scanpy"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:  # scanpy is optional
            continue
    return ", ".join(found)
