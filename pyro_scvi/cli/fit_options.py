"""Options of the command ``fit``: the counts and columns that it reads, and the model that it builds."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from anndata import AnnData

from pyro_scvi.cli.options import DISPERSIONS, GUIDES, LIBRARIES, LIKELIHOODS, PRIORS, choice
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.base import Guide
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.dispersion import Dispersion
from pyro_scvi.likelihoods.library_size import Library
from pyro_scvi.likelihoods.negative_binomial import GammaPoisson
from pyro_scvi.model import SCVI
from pyro_scvi.priors.base import Prior

Batch = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of obs with the batch.")]
Covariates = Annotated[
    list[str] | None, typer.Option(metavar="COLUMN", help="Continuous column of obs; may be given again.")
]
Labels = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column of obs that colours the picture; its two largest groups are compared."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Cells per step.")]
LatentSize = Annotated[int, typer.Option(min=1, help="Size of z.")]
PriorName = Annotated[Any, choice(PRIORS, "p(z)")]
LikelihoodName = Annotated[Any, choice(LIKELIHOODS, "p(x | z)")]
DispersionName = Annotated[Any, choice(DISPERSIONS, "What has an inverse dispersion of its own in zinb and nb")]
LibraryName = Annotated[Any, choice(LIBRARIES, "Library size")]
GuideName = Annotated[Any, choice(GUIDES, "q(z | x)")]
Compiled = Annotated[
    bool, typer.Option("--compiled", help="Compile the steps of training: slower to start, faster for many cells.")
]
Checkpoint = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for the state of training, written after every epoch.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on from --checkpoint, if there is one, with the same options.")
]


@dataclass(frozen=True)
class CountOptions:
    """Places of the raw counts, the batch and the continuous covariates in a file."""

    layer: str | None
    raw: bool
    batch: str | None
    covariates: Sequence[str]
    allow_non_integer: bool

    def cells_of(self, adata: AnnData) -> Cells:
        """The cells of a file that was read."""
        return Cells.from_anndata(adata, copy=False, **asdict(self))


@dataclass(frozen=True)
class ModelOptions:
    """Components of model and guide; None: the default."""

    n_latent: int
    prior: Callable[[Cells, int], Prior] | None
    likelihood: type[Likelihood]
    dispersion: Callable[[Cells], Dispersion] | None
    library: Callable[[], Library] | None
    guide: Callable[..., Guide] | None
    seed: int

    def __post_init__(self) -> None:
        """Raise if a dispersion is given for a likelihood that has none."""
        if self.dispersion and not issubclass(self.likelihood, GammaPoisson):
            raise typer.BadParameter(f"{self.likelihood.__name__} has no dispersion", param_hint="'--dispersion'")

    def build_model(self, cells: Cells) -> tuple[SCVI, Guide | None]:
        """Model and guide for these cells; None is the default guide."""
        model = SCVI(
            cells.n_genes,
            self.n_latent,
            cells.n_covariates,
            prior=self.prior and self.prior(cells, self.n_latent),
            likelihood=self._likelihood(cells),
            library=self.library and self.library(),
            seed=self.seed,
        )
        return model, self.guide and self.guide(model, seed=self.seed)

    def _likelihood(self, cells: Cells) -> Likelihood:
        if self.dispersion and issubclass(self.likelihood, GammaPoisson):
            return self.likelihood(self.dispersion(cells))
        return self.likelihood()
