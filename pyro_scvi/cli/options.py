"""Options that several commands share, and the priors, likelihoods and guides by name."""

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from typer.core import TyperCommand

from pyro_scvi import guides, likelihoods, priors
from pyro_scvi.analysis.integration import spaces
from pyro_scvi.cli.wording import options_of
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import resolve_device
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference import samplers
from pyro_scvi.likelihoods import library_size
from pyro_scvi.likelihoods.dispersion import Dispersion
from pyro_scvi.priors.base import Prior


def _vamp(cells: Cells, n_latent: int) -> priors.VampPrior:
    rows = np.linspace(0, cells.n_cells - 1, min(50, cells.n_cells)).astype(int)
    return priors.VampPrior(cells.n_genes, n_latent, len(rows), pseudo_cells=cells[rows][0])


def _per_gene_and_batch(cells: Cells) -> likelihoods.PerGeneAndBatch:
    if not cells.n_batches:
        raise ModelError("a dispersion per gene and batch needs batches: pass --batch")
    return likelihoods.PerGeneAndBatch(cells.n_genes, cells.n_batches)


PRIORS: dict[str, Callable[[Cells, int], Prior]] = {
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
DISPERSIONS: dict[str, Callable[[Cells], Dispersion]] = {
    "cell-gene": lambda cells: likelihoods.PerCellAndGene(),
    "gene": lambda cells: likelihoods.PerGene(cells.n_genes),
    "gene-batch": _per_gene_and_batch,
}
LIBRARIES: dict[str, Callable[[], library_size.Library]] = {
    "latent": library_size.LatentLibrary,
    "observed": library_size.ObservedLibrary,
    "none": library_size.NoLibrary,
}
GUIDES: dict[str, Callable[..., Guide]] = {
    "diagonal": guides.DiagonalNormal,
    "full-rank": guides.FullRankNormal,
    "iaf": guides.InverseAutoregressiveFlow,
    "point": guides.Point,
}
SPACES: dict[str, Callable[[], spaces.Space]] = {
    "expression": spaces.Expression,
    "latent": spaces.Latent,
}
SAMPLERS: dict[str, Callable[[], samplers.Sampler]] = {
    "amortized": samplers.Amortized,
    "refined": samplers.Refined,
    "importance": samplers.Importance,
}


def choice(parts: Mapping[str, Any], text: str) -> Any:
    """An option that takes one of the names and passes on the object it stands for."""

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
    except ModelError as error:
        raise typer.BadParameter(str(error)) from error
    return name


def _h5ad(path: Path) -> Path:
    if path.suffix != ".h5ad":
        raise typer.BadParameter(f"{path} does not end in .h5ad.")
    return path


Input = Annotated[Path, typer.Argument(metavar="FILE.h5ad", help="Raw counts; the file is only read.")]
FitFolder = Annotated[Path, typer.Argument(metavar="FIT", help="A saved fit: DIR/fit as `fit` writes it, or DIR.")]
Out = Annotated[Path, typer.Option(metavar="DIR", help="Folder for the results.")]
OutFile = Annotated[Path, typer.Option(metavar="OUT.h5ad", help="The copy to write.", callback=_h5ad)]
Layer = Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="X")]
Raw = Annotated[bool, typer.Option("--raw", help="Read the counts and genes of adata.raw.")]
AllowNonInteger = Annotated[
    bool, typer.Option("--allow-non-integer", help="Accept values that are not integers, such as corrected counts.")
]
QueryLayer = Annotated[str | None, typer.Option(help="Layer with the raw counts.", show_default="the fit's")]
Fill = Annotated[bool, typer.Option("--fill-missing-genes", help="Count genes that FILE lacks as 0 in every cell.")]
NewBatches = Annotated[
    bool, typer.Option("--allow-new-batches", help="Accept cells of batches that the fit does not know.")
]
Epochs = Annotated[int | None, typer.Option(min=1, help="Passes through the cells.", show_default="by their number")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of all random numbers.")]
Sampling = Annotated[Any, choice(SAMPLERS, "How the latents of a cell are drawn")]
Device = Annotated[str, typer.Option(callback=_usable_device, help="auto, cpu, cuda, cuda:1, mps.")]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show a progress bar.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the results of an earlier run.")]


class Recorded(TyperCommand):
    """A command that records its command line, for the page, and whose options messages name."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        with options_of(self):
            return super().invoke(ctx)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Record the arguments before they are parsed."""
        ctx.meta[__name__] = shlex.join(["python", "-m", "pyro_scvi", str(ctx.info_name), *args])
        return super().parse_args(ctx, args)


def called(ctx: typer.Context) -> str:
    """The command line that a :class:`Recorded` command was called with."""
    return str(ctx.meta[__name__])
