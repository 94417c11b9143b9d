"""The parts of a fit's report: sizes, quality, differential expression, predictive checks, zeros."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import silhouette_score

from pyro_scvi import plots
from pyro_scvi.analysis.differential import differential_expression
from pyro_scvi.analysis.evidence.evidence import evidence
from pyro_scvi.analysis.integration.spaces import FittedSpace
from pyro_scvi.analysis.predictive.checks import check_predictions
from pyro_scvi.analysis.predictive.imputation import impute, technical_zero_probability
from pyro_scvi.cli import genes
from pyro_scvi.cli.files import write_csv
from pyro_scvi.cli.genes import compared, named
from pyro_scvi.data.cells import Cells
from pyro_scvi.export import html_page
from pyro_scvi.export.pictures import new_axes, save
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.plots import Projection
from pyro_scvi.training.fitted import Fit

SILHOUETTE_CELLS = 5000  # the silhouette compares all pairs
SAMPLES, BAND = 39, 0.9

Row = tuple[str, str, str]  # quantity, value, what it is


@dataclass(frozen=True)
class EvaluatedFit:
    """A fit with its training and evaluation cells, their latents and decoded expression, and their labels."""

    fit: Fit
    cells: Cells
    train: Cells
    test: Cells
    judged: Cells
    latent: np.ndarray
    space: FittedSpace
    components: np.ndarray
    labels: pd.Series | None
    seed: int
    progress: bool = True


def embedded(evaluated: EvaluatedFit, projection: Projection, folder: Path) -> html_page.Html:
    """Picture of the embedding."""
    coloured = "" if evaluated.labels is None else f", coloured by {evaluated.labels.name}"
    ax = plots.embedding(projection, evaluated.labels, ax=new_axes(8.8, 5.0))
    method = projection.method
    return save(ax, folder / f"{method.lower()}.png", f"{method} of the decoded expression{coloured}")


def training(evaluated: EvaluatedFit, folder: Path) -> html_page.Html:
    """Pictures of the loss and of the program."""
    ax = plots.loss(evaluated.fit, new_axes(5.4, 3.8))
    loss = save(ax, folder / "loss.png", "Loss, the negative evidence bound, by epoch")
    ax = plots.program(evaluated.fit.model, new_axes(3.2, 5.2), n_cells=evaluated.cells.n_cells)
    program = save(ax, folder / "program.png", "The model as a plate diagram (Lopez et al. 2017, Fig. 1)")
    return html_page.beside(loss, program)


def numbers(evaluated: EvaluatedFit) -> html_page.Html:
    """Sizes and quality of the fit as a table."""
    rows = [*_sizes(evaluated), *_quality(evaluated), *_silhouette(evaluated)]
    return html_page.table(rows, ("quantity", "value", ""), numbers=[1])


def differing_genes(evaluated: EvaluatedFit, labels: pd.Series, pair: tuple[str, str], folder: Path) -> list[str]:
    """Volcano plot and first genes of two groups of the labels."""
    groups, (a, b) = named(labels), pair
    table = differential_expression(
        evaluated.fit, evaluated.cells, groupby=groups, group_a=a, group_b=b, seed=evaluated.seed
    )
    write_csv(table, folder / "differential_expression.csv")
    comparison = compared(table, groups, a, b, genes.OfMeans())
    sentence = (
        f"{genes.sides(comparison)} {len(comparison.called):,} of {len(table):,} genes are called for "
        f"{comparison.question.criterion}: {len(comparison.higher_in_a()):,} higher in {a}, "
        f"{len(comparison.higher_in_b()):,} in {b}. All genes are in differential_expression.csv."
    )
    picture = genes.volcano(comparison, folder / "volcano.png")
    return [sentence, picture, genes.top(comparison, 10), genes.legend(comparison)]


def predictions(evaluated: EvaluatedFit, folder: Path) -> list[str]:
    """Posterior predictive checks of zeros and totals."""
    checks = check_predictions(evaluated.fit, evaluated.judged, samples=SAMPLES, interval=BAND, seed=evaluated.seed)
    of_genes, of_cells = pd.DataFrame(checks.genes["zero_fraction"]), pd.DataFrame(checks.cells["total"])
    sentence = (
        f"The pictures show the {evaluated.judged.n_cells:,} held-out cells beside their replicas, {SAMPLES} data sets "
        "simulated from the fit. "
        f"If the model is right, about {1 - BAND:.0%} of the genes and cells lie outside the {BAND:.0%} band of the "
        f"simulated sets. Here it is {_outside(of_genes)} genes by their zero fraction, and {_outside(of_cells)} cells "
        "by their total."
    )
    ax = plots.predictive(of_genes, new_axes(6.0, 4.0), name="zero fraction")
    first = save(ax, folder / "predictive_genes.png", "Zero fraction of every gene", width=450)
    ax = plots.predictive(of_cells, new_axes(6.0, 4.0), name="total count")
    second = save(ax, folder / "predictive_cells.png", "Total count of every cell", width=450)
    return [sentence, html_page.beside(first, second)]


def zeros(evaluated: EvaluatedFit) -> list[str]:
    """The model's account of the zero counts."""
    is_zero = evaluated.judged[:][0].numpy() == 0
    imputed = impute(evaluated.fit, evaluated.judged, seed=evaluated.seed)[is_zero]
    rows = [
        ("zeros", f"{is_zero.mean():.1%}", f"of the counts of {evaluated.judged.n_cells:,} held-out cells"),
        *_technical(evaluated, is_zero),
        ("imputed there", f"{imputed.mean():.2f}", "counts: mean over the zeros of the expected expression, E[w | x]"),
    ]
    return [html_page.table(rows, numbers=[1])]


def categories(labels: pd.Series | None) -> pd.Series | None:
    """Sizes of the groups of labels, largest first; None for numbers, a single group, or only groups of one."""
    if labels is None or pd.api.types.is_numeric_dtype(labels):
        return None
    sizes = pd.Series(named(labels)).value_counts()
    return sizes if 1 < len(sizes) < sizes.sum() else None


def _sizes(evaluated: EvaluatedFit) -> list[Row]:
    fit, train, test, history = evaluated.fit, evaluated.train, evaluated.test, evaluated.fit.history
    seconds, best = float(history.seconds.sum()), history.held_out_loss.idxmin()
    learned = fit.settings["n_cells"]
    use = f"{learned:,} to train, {train.n_cells - learned:,} to choose the epoch, {test.n_cells:,} held out"
    return [
        ("cells", f"{evaluated.cells.n_cells:,}", use),
        ("genes", f"{evaluated.cells.n_genes:,}", ""),
        ("epochs", f"{len(history):,}", ""),
        ("training time", f"{seconds:.1f}", f"seconds on {fit.device}"),
        ("training loss", f"{history.train_loss.iloc[-1]:.1f}", "nats per cell, last epoch"),
        ("held-out loss", f"{fit.settings['held_out_loss']:.1f}", f"nats per cell, epoch {best}, whose state is kept"),
    ]


def _quality(evaluated: EvaluatedFit) -> list[Row]:
    table = evidence(evaluated.fit, evaluated.judged, seed=evaluated.seed, progress=evaluated.progress)
    n, mean = len(table), float(table.log_evidence.mean())
    se = float(table.log_evidence.std()) / n**0.5
    unreliable = float((table.khat > KHAT_LIMIT).mean())
    return [
        ("held-out evidence", f"{mean:.1f} ± {se:.1f}", f"nats per cell, mean and standard error over n = {n:,} cells"),
        (f"k-hat above {KHAT_LIMIT}", f"{unreliable:.0%}", "of these cells, whose evidence is then unreliable"),
    ]


def _silhouette(evaluated: EvaluatedFit) -> list[Row]:
    """How well the categories are separated; empty without categories."""
    if evaluated.labels is None or categories(evaluated.labels) is None:
        return []
    chosen = np.flatnonzero(evaluated.labels.notna())
    if len(chosen) > SILHOUETTE_CELLS:
        chosen = np.sort(np.random.default_rng(evaluated.seed).choice(chosen, SILHOUETTE_CELLS, replace=False))
    names = evaluated.labels.iloc[chosen].astype(str)
    if not 1 < names.nunique() < len(names):
        return []
    text = f"of {evaluated.labels.name} in z, not in the picture above: a description, no target of the fit"
    return [("silhouette", f"{silhouette_score(evaluated.latent[chosen], names):.3f}", text)]


def _outside(statistic: pd.DataFrame) -> str:
    beyond = (statistic.observed < statistic.low) | (statistic.observed > statistic.high)
    return f"{beyond.sum():,} of {len(beyond):,} ({beyond.mean():.1%})"


def _technical(evaluated: EvaluatedFit, is_zero: np.ndarray) -> list[Row]:
    if "gate_logits" not in evaluated.fit.model.likelihood.heads:
        return []
    probability = technical_zero_probability(evaluated.fit, evaluated.judged, seed=evaluated.seed)[is_zero]
    return [
        ("technical zeros", f"{(probability > 0.5).mean():.1%}", "of the zeros: those with P(technical | x) > 0.5"),
        ("technical, expected", f"{probability.mean():.1%}", "of the zeros: mean of P(technical | x)"),
    ]
