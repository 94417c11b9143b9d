"""Figure 1: the model as a plate diagram, drawn from the program itself."""

from pathlib import Path

from matplotlib.figure import Figure

from pyro_scvi import plots
from pyro_scvi.likelihoods.library_size import NoLibrary
from pyro_scvi.model import SCVI
from pyro_scvi.paper.budget import Budget
from pyro_scvi.paper.experiment import Experiment, Picture
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Results, Step
from pyro_scvi.paper.summary import Finding

N_GENES, N_COVARIATES = 558, 2

MODELS = {"Lopez et al. (2017)": NoLibrary, "the default, with a library size": None}


def steps(budget: Budget) -> list[Step]:
    """None: nothing is fitted."""
    return []


def rows(results: Results, budget: Budget) -> list[Row]:
    """None: it is a drawing."""
    return []


def pictures(results: Results, budget: Budget, folder: Path) -> list[Picture]:
    """The program of the paper's model and that of the default, side by side."""
    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    for ax, (name, library) in zip(figure.subplots(1, 2), MODELS.items(), strict=True):
        model = SCVI(N_GENES, 10, N_COVARIATES, library=library and library())
        plots.program(model, ax)
        ax.set_title(name, fontsize=10)
    file = folder / "figure1.png"
    figure.savefig(file, dpi=110)
    return [Picture(file, ALT, CAPTION)]


ALT = (
    "Two plate diagrams. In the plate of cells the latents z, in the default also the library size l, and the "
    "covariates gamma; in the plate of genes within it w and h depend on z and gamma, y on w, the observed x on y, h."
)
CAPTION = (
    "The explicit programs, read off the code that is run: circles are random variables, the shaded one is "
    "observed, the square holds the covariates."
)
TEXT = (
    "Both diagrams are drawn from the programs themselves: the sites, plates and dependencies that Pyro's provenance "
    "tracking finds when model(x, gamma, marginal=False) runs. For training w, y and h are integrated out exactly.",
    "The paper's figure has the same nodes z, gamma, w, h, y and x. The default has one more, the library size l, "
    "which the authors added in 2018.",
)

CLAIM = "The counts of a cell depend on its latents z and its covariates; w, y and h stand between them."
FINDINGS = (Finding("The diagrams are drawn from the programs that are fitted, not by hand."),)

EXPERIMENT = Experiment(
    name="figure1",
    title="Figure 1: the model",
    text=TEXT,
    steps=steps,
    rows=rows,
    pictures=pictures,
    claim=CLAIM,
    findings=FINDINGS,
)
