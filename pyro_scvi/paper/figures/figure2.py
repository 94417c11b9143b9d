"""Figure 2: genes that differ between B and dendritic cells, judged by microarrays of sorted cells."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from pyro_scvi import baselines
from pyro_scvi.analysis.differential import DepthCorrected, RandomPairs, Uncorrected, differential_expression
from pyro_scvi.analysis.differential.matched_pairs import Groups
from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.baselines.scvi_tools import trained
from pyro_scvi.data.cells import Cells
from pyro_scvi.distributions.gamma_ratio import probability_less
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.samplers import Amortized
from pyro_scvi.paper import systems
from pyro_scvi.paper.budget import Budget
from pyro_scvi.paper.data import blood, files
from pyro_scvi.paper.data.blood import Blood
from pyro_scvi.paper.experiment import Experiment, Picture
from pyro_scvi.paper.metrics.concordance import AUC, MIXTURE, RHO, SPEARMAN, judged, significance
from pyro_scvi.paper.rows import Row, over_seeds
from pyro_scvi.paper.steps import Outcome, Results, Step
from pyro_scvi.paper.summary import Finding, each
from pyro_scvi.plots.canvas import HELD_OUT, INK, MISSING, TRAIN
from pyro_scvi.training.fitted import Fit
from pyro_scvi.utils.random_state import global_state_kept, seeded

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Result = dict[str, Any]

CELLS_OF_A_GROUP = 100
PAIRS = 1_000  # of cells in a comparison: the standard error of P(w_a < w_b) is then .016 at most
VISITS = 450_000  # cells that a fit of many epochs looks at, at most
N_LATENTS = 10

SEEDS = {"scVI, 2017 preset": 1, "scVI, default": 2}
EPOCHS = {"scVI, 2017 preset": 150, "scvi-tools": 400}  # their own

WILCOXON = "Wilcoxon rank-sum"
MIXED = "Wilcoxon rank-sum, groups mixed at random (null)"


def drawn(of: Blood, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ``size`` random cells of each group, with replacement as the authors drew; each cell once."""
    labels, generator = of.adata.obs["labels"].to_numpy(), np.random.default_rng(seed)
    first, second = (np.unique(generator.choice(np.flatnonzero(labels == group), size)) for group in of.groups)
    return first, second


def ours(case: Result, name: str, seed: int, epochs: int | None, pairs: int) -> Result:
    """A model of ours fitted to all cells without their labels; its scores of the genes for every draw."""
    of = blood.read(case["file"], case["at_most"])
    cells = Cells.from_anndata(of.adata, batch=of.batch)
    started = time.process_time()
    fit = systems.fitted(name, cells, seed=seed, epochs=epochs)
    seconds = time.process_time() - started

    def scores(rows: tuple[np.ndarray, np.ndarray], draw: int) -> dict[str, np.ndarray]:
        options = {"pairs": pairs, "seed": draw}
        return {
            "P(w_a < w_b), depth-corrected": with_noise(fit, cells, rows, DepthCorrected(), **options),
            "P(w_a < w_b), depth-laden": with_noise(fit, cells, rows, Uncorrected(), **options),
            "P(mu_a < mu_b), means only": means_only(fit, cells, rows, **options),
        }

    return _over_draws(of, case, scores) | {"seconds": seconds}


def with_noise(
    fit: Fit,
    cells: Cells,
    rows: tuple[np.ndarray, np.ndarray],
    contrast: DepthCorrected | Uncorrected,
    *,
    pairs: int,
    seed: int,
) -> np.ndarray:
    """Absolute log Bayes factor of w_a < w_b, (genes,), w the Gamma rates."""
    both = cells.take(np.concatenate(rows))
    labels = ["a"] * len(rows[0]) + ["b"] * len(rows[1])
    estimand = RandomPairs(largest_se=0.0, most_pairs=pairs, contrast=contrast)
    table = differential_expression(fit, both, groupby=labels, group_a="a", group_b="b", estimand=estimand, seed=seed)
    return table["log_bayes_factor"].abs().to_numpy()


def means_only(fit: Fit, cells: Cells, rows: tuple[np.ndarray, np.ndarray], *, pairs: int, seed: int) -> np.ndarray:
    """Absolute log odds of mu_a < mu_b, (genes,), mu the means over the cell's depth, clipped to [1/2M, 1 - 1/2M].

    The authors' later code compares these: of the posterior of w it keeps the uncertainty of z alone.
    """
    groups = Groups(fit, cells, minibatches(fit, cells), *rows, DepthCorrected(), Amortized())
    generator = np.random.default_rng(seed)
    with evaluating(fit.model, fit.guide, seed):
        a, b = (groups.side(generator.choice(part, pairs))._replace(log_r=None) for part in rows)
        p = probability_less(a, b).mean(0).numpy()
    p = np.clip(p, 0.5 / pairs, 1 - 0.5 / pairs)
    return np.abs(np.log(p) - np.log1p(-p))


def peer(case: Result, seed: int, epochs: int) -> Result:
    """SCVI of scvi-tools fitted to all cells; the Bayes factors of both its modes for every draw."""
    of = blood.read(case["file"], case["at_most"])
    started = time.process_time()
    batch = None if of.batch is None else of.adata.obs[of.batch]
    model = trained(of.dense(), epochs, seed, N_LATENTS, batch)
    seconds = time.process_time() - started

    def scores(rows: tuple[np.ndarray, np.ndarray], draw: int) -> dict[str, np.ndarray]:
        by_mode = {}
        for mode in ("vanilla", "change"):
            with seeded(draw), global_state_kept():
                table = model.differential_expression(idx1=rows[0], idx2=rows[1], mode=mode, silent=True)
            by_mode[f"Bayes factor, mode {mode}"] = table["bayes_factor"].abs().loc[model.adata.var_names].to_numpy()
        return by_mode

    return _over_draws(of, case, scores) | {"seconds": seconds}


def two_group_test(case: Result, name: str) -> Result:
    """One of TESTS for every draw, which sees the drawn cells alone."""
    of = blood.read(case["file"], case["at_most"])
    counts = of.dense()
    started = time.process_time()

    def scores(rows: tuple[np.ndarray, np.ndarray], draw: int) -> dict[str, np.ndarray]:
        second = np.repeat([False, True], [len(part) for part in rows])
        if name == MIXED:
            second = np.random.default_rng(draw).permutation(second)
        return {"-log p": significance(TESTS[name](counts[np.concatenate(rows)], second))}

    result = _over_draws(of, case, scores)
    return result | {"seconds": (time.process_time() - started) / case["draws"]}


def arrays(case: Result) -> Result:
    """A second set of arrays against the first, and against the first with genes in random order, once per draw."""
    of = blood.read(case["file"], case["at_most"])
    generator = np.random.default_rng(0)
    other = np.zeros(len(of.matched))
    other[of.matched] = significance(of.other_p)
    shuffled = []
    for _ in range(case["draws"]):
        at_random = other.copy()
        at_random[of.matched] = generator.permutation(other[of.matched])
        shuffled.append(judged(of, at_random))
    rows = [drawn(of, case["size"], draw) for draw in range(case["draws"])]
    return {
        "arrays": _columns([judged(of, other)]),
        "shuffled": _columns(shuffled),
        "genes": int(of.matched.sum()),
        "positives": int(of.positive.sum()),
        "groups": [int((of.adata.obs["labels"] == group).sum()) for group in of.groups],
        "distinct": [[len(part) for part in pair] for pair in rows],
    }


def _over_draws(
    of: Blood, case: Result, scores: Callable[[tuple[np.ndarray, np.ndarray], int], dict[str, np.ndarray]]
) -> Result:
    by_score: dict[str, list[dict[str, float]]] = {}
    for draw in range(case["draws"]):
        for name, score in scores(drawn(of, case["size"], draw), draw).items():
            by_score.setdefault(name, []).append(judged(of, score))
    return {"scores": {name: _columns(values) for name, values in by_score.items()}}


def _columns(values: Sequence[dict[str, float]]) -> dict[str, list[float]]:
    return {name: [value[name] for value in values] for name in values[0]}


def _wilcoxon(counts: np.ndarray, second: np.ndarray) -> Any:
    return baselines.Wilcoxon().test(counts, second)["p_value"]


def _welch(counts: np.ndarray, second: np.ndarray) -> Any:
    logs = np.log1p(counts / counts.sum(1, keepdims=True) * 1e4)
    with np.errstate(divide="ignore", invalid="ignore"):  # a gene that is constant in both groups has no p-value
        return stats.ttest_ind(logs[~second], logs[second], equal_var=False).pvalue


def _mast(counts: np.ndarray, second: np.ndarray) -> Any:
    return baselines.MAST().test(counts, second)["p_value"]


def _deseq2(counts: np.ndarray, second: np.ndarray) -> Any:
    return baselines.DESeq2().test(counts, second)["p_value"]


TESTS: dict[str, Callable[[np.ndarray, np.ndarray], Any]] = {
    "DESeq2": _deseq2,
    "MAST": _mast,
    WILCOXON: _wilcoxon,
    "Welch t": _welch,
    MIXED: _wilcoxon,
}


class Setting(NamedTuple):
    """A data set: its file, its name in the tables, and how many cells it has."""

    file: str
    name: str
    cells: int


SETTINGS = (
    Setting(files.PBMC_4K, "pbmc4k_top2000", 3_934),
    Setting(files.PBMC_3KA, "pbmc_3kA", 5_534),
)


def steps(budget: Budget) -> list[Step]:
    """Every system on both data sets, and the arrays."""
    of_systems = [steps for setting in SETTINGS for steps in systems_of(setting, budget).values()]
    listed = [*(reference(setting, budget) for setting in SETTINGS), *(step for steps in of_systems for step in steps)]
    return sorted(listed, key=lambda step: step.settings.get("seed", -1))  # the first fit of every system comes first


def systems_of(setting: Setting, budget: Budget) -> dict[str, list[Step]]:
    """By name, the steps of a system over seeds."""
    case, needs = _case(setting, budget), (setting.file, files.ARRAYS)
    by_name = {}
    for name, n_seeds in SEEDS.items():
        options = {"case": case, "name": name, "epochs": _epochs(name, setting, budget), "pairs": _pairs(budget)}
        by_name[name] = [Step(ours, options | {"seed": seed}, needs) for seed in budget.seeds[:n_seeds]]
    options = {"case": case, "seed": budget.seeds[0], "epochs": _epochs("scvi-tools", setting, budget)}
    by_name["scvi-tools"] = [Step(peer, options, needs)]
    return by_name | {name: [Step(two_group_test, {"case": case, "name": name}, needs)] for name in TESTS}


def reference(setting: Setting, budget: Budget) -> Step:
    """The step of the arrays."""
    return Step(arrays, {"case": _case(setting, budget)}, (setting.file, files.ARRAYS))


def _case(setting: Setting, budget: Budget) -> Result:
    return {"file": setting.file, "at_most": budget.cells, "draws": budget.repeats, "size": CELLS_OF_A_GROUP}


def _epochs(name: str, setting: Setting, budget: Budget) -> int | None:
    """Epochs: the configuration's, but at most VISITS cells in all; None: the default of fit()."""
    if name not in EPOCHS:
        return budget.epochs
    return min(EPOCHS[name], math.ceil(VISITS / setting.cells), budget.epochs or EPOCHS[name])


def _pairs(budget: Budget) -> int:
    return PAIRS if budget.epochs is None else 50


QUANTITIES = {
    AUC: "AUC",
    SPEARMAN: "Spearman",
    MIXTURE: "IDR mixture weight",
    RHO: "IDR rho",
}
LEADS = {WILCOXON: -0.02, "DESeq2": 0.0}  # tests that a model is compared with, and what is asked of it
OF_ARRAYS, AT_RANDOM = "a second set of arrays", "random order of the genes (null)"
NULLS = (MIXED, AT_RANDOM)
NO_EDGER = "not run: edgeR with ZINB-WaVE's weights exists in R alone"


def rows(results: Results, budget: Budget) -> list[Row]:
    """Agreement of every system with the arrays, and what was drawn."""
    return [row for setting in SETTINGS for row in _rows_of(setting, results, budget)]


def _rows_of(setting: Setting, results: Results, budget: Budget) -> Iterator[Row]:
    systems_steps = systems_of(setting, budget)
    bases = {other: _auc_of(other, systems_steps, results) for other in LEADS}
    for name, steps in systems_steps.items():
        outcomes = [results.of(step) for step in steps]
        fits = [outcome.result for outcome in outcomes if outcome.result is not None]
        seeds = tuple(step.settings["seed"] for step in steps if "seed" in step.settings)
        if not fits:
            yield Row(setting.name, name, QUANTITIES[AUC], np.nan, seeds=seeds, note=_reasons(outcomes))
            continue
        seconds = float(np.mean([result["seconds"] for result in fits]))
        for score in fits[0]["scores"]:
            system = name if len(fits[0]["scores"]) == 1 else f"{name}: {score}"
            columns = {key: np.mean([result["scores"][score][key] for result in fits], 0) for key in QUANTITIES}
            for key, values in columns.items():
                note = _of_fits(key, [result["scores"][score][key] for result in fits], seeds)
                yield _over_draws_row(setting, system, QUANTITIES[key], values, seeds, seconds, note)
            for other, base in bases.items():
                if base is not None and name != other:
                    lead = columns[AUC] - base
                    note = _met(lead, LEADS[other]) if name in SEEDS else ""
                    yield _over_draws_row(setting, system, f"AUC less {other}'s", lead, seeds, seconds, note)
    yield Row(setting.name, "edgeR", QUANTITIES[AUC], np.nan, note=NO_EDGER)
    known = results.of(reference(setting, budget))
    if known.result is None:
        yield Row(setting.name, OF_ARRAYS, QUANTITIES[AUC], np.nan, note=known.reason)
    else:
        yield from _reference_rows(setting, known.result)


def _auc_of(name: str, systems_steps: dict[str, list[Step]], results: Results) -> np.ndarray | None:
    """A test's AUC by draw, if it was computed."""
    (result,) = (results.of(step).result for step in systems_steps[name])
    return None if result is None else np.array(result["scores"]["-log p"][AUC])


def _of_fits(key: str, by_fit: list[list[float]], seeds: tuple[int, ...]) -> str:
    """Notes that the spread over draws does not show: differences between fits, and a collapsed mixture."""
    means = [float(np.mean(values)) for values in by_fit]
    notes = [f"by fit: {', '.join(f'{mean:.3f}' for mean in means)}"] if len(means) > 1 else []
    notes += ["one fit"] if seeds and len(means) == 1 else []
    notes += (
        ["nearly all genes count as reproducible: rho says little"] if key == MIXTURE and np.mean(means) > 0.99 else []
    )
    return "; ".join(notes)


def _met(lead: np.ndarray, least: float) -> str:
    return f"at least {least:g}: {'yes' if lead.mean() >= least else 'no'}"


def _over_draws_row(
    setting: Setting, system: str, quantity: str, values: np.ndarray, seeds: tuple[int, ...], seconds: float, note: str
) -> Row:
    value, error, n = over_seeds(values.tolist())
    return Row(setting.name, system, quantity, value, error, "sd over draws", n, seeds, seconds, note=note)


def _reference_rows(setting: Setting, result: Result) -> Iterator[Row]:
    for key, quantity in QUANTITIES.items():
        yield Row(setting.name, OF_ARRAYS, quantity, result["arrays"][key][0])
        value, error, n = over_seeds(result["shuffled"][key])
        yield Row(setting.name, AT_RANDOM, quantity, value, error, "sd over draws", n, (0,))
    yield Row(setting.name, "the data", "genes with a reference", result["genes"])
    yield Row(setting.name, "the data", "genes that count as different", result["positives"])
    per_group = zip(("B", "dendritic"), result["groups"], zip(*result["distinct"], strict=True), strict=True)
    for group, of_file, distinct in per_group:
        value, error, n = over_seeds(distinct)
        yield Row(setting.name, "the data", f"{group} cells in the file", of_file)
        yield Row(setting.name, "the data", f"different {group} cells in a draw", value, error, "sd over draws", n)


def _reasons(outcomes: Sequence[Outcome]) -> str:
    return "; ".join(sorted({outcome.reason for outcome in outcomes}))


def pictures(results: Results, budget: Budget, folder: Path) -> list[Picture]:
    """AUC, mixture weight and rho by system, one row of panels for each data set."""
    from matplotlib.figure import Figure

    table = rows(results, budget)
    figure = Figure(figsize=(11, 8.5), layout="constrained")
    grid = figure.subplots(len(SETTINGS), len(SHOWN), sharey="row", squeeze=False)
    for line, setting in zip(grid, SETTINGS, strict=True):
        of = [row for row in table if row.data == setting.name and np.isfinite(row.value)]
        names = list(dict.fromkeys(row.system for row in of if row.quantity == QUANTITIES[AUC]))
        for ax, key in zip(line, SHOWN, strict=True):
            _panel(ax, [row for row in of if row.quantity == QUANTITIES[key]], names)
            ax.set_xlabel(QUANTITIES[key], fontsize=9)
        line[0].set_yticks(range(len(names)), names, fontsize=8)
        line[0].set_ylim(len(names) - 0.5, -0.5)
        line[0].set_title(setting.name, fontsize=10, loc="left", color=INK)
    file = folder / "figure2.png"
    figure.savefig(file, dpi=100)
    return [Picture(file, ALT, CAPTION)]


SHOWN = (AUC, MIXTURE, RHO)


def _panel(ax: Axes, of: Sequence[Row], names: Sequence[str]) -> None:
    for row in of:
        colour = TRAIN if row.system.startswith("scVI,") else MISSING if row.system in NULLS else HELD_OUT
        ax.errorbar(row.value, names.index(row.system), xerr=np.nan_to_num(row.error), fmt="o", ms=5, color=colour)
    ax.grid(axis="x", color=MISSING, linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)


ALT = "Area under the ROC curve, mixture weight and correlation by system, with their spread, on two data sets."
CAPTION = (
    "Agreement with microarrays of sorted cells: mean and standard deviation over random draws of cells. Blue: this "
    "package's models; red: other systems and a second set of arrays; grey: what chance gives."
)
TEXT = (
    "B against dendritic cells. Every system gives each gene a score: the absolute log Bayes factor of w_a < w_b, or "
    "-log p. The scores are judged by microarrays of sorted cells (B against myeloid dendritic, GSE29618) in three "
    "ways. The first is the area under the ROC curve of the 800 genes that the arrays call most significant. On "
    "pbmc_3kA these are of the matched genes. On pbmc4k_top2000 fewer genes match, and those of the arrays' own 800 "
    "that it has are taken. The second is the rank correlation with the p-values of the arrays. The third is the "
    "irreproducible discovery rate (IDR) of scores and raw p-values, from the authors' start and with their "
    "tolerance: weight and correlation of its reproducible part. (The authors took adjusted p-values.) The paper's "
    "figure shows that correlation, rho, but its text has no values. A random order of the genes can reach a large "
    "rho as well, so rho says little without the weight. Both stand beside rows of chance, and beside a second set of "
    "arrays (GSE22886), which shows how far arrays agree with arrays.",
    f"Each draw takes {CELLS_OF_A_GROUP} cells of both groups at random with replacement, as the authors did. A cell "
    "counts once and the groups are small, so a draw holds fewer different cells (below). All systems see the same "
    "cells. scVI and scvi-tools are fitted once per seed to all cells of the file, without labels. Then they compare "
    "each draw's cells. The tests see only these cells. Values are means over draws, and over seeds where there are "
    "several. The spread is over draws alone. Fits differ by more, as the notes by fit show. Draws are seeded 0 to "
    "19. CPU s is that of a fit, or of the test of one draw.",
    "P(w_a < w_b), depth-laden, is the paper's. w is the Gamma rate, and the integral over it is exact. Dendritic "
    "cells have three to four times more molecules. So the depth-corrected rows compare w divided by the cell's "
    "depth. Means only, P(mu_a < mu_b) of means over depth, is what the authors' later code computes. Hardly any "
    f"pair of cells contradicts it. So many genes tie at the largest value that {PAIRS:,} pairs can give, and IDR "
    "means little.",
    "The authors dropped genes whose Bayes factor or p-value was not finite, and with them the most significant ones. "
    "Here Bayes factors are clipped to what the pairs resolve, and p-values to the smallest double. A gene without a "
    "p-value counts as p = 1. As in the authors' code, MAST gets log2(x + 1) of raw counts, and DESeq2 its own size "
    "factors. Wilcoxon and Welch compare logs of counts over the cell's total.",
    "For comparison, the authors' later results on 12,039 cells (Lopez et al. 2018; mixture weight, rho, AUC): DESeq2 "
    ".120, .450, .649; MAST .178, .472, .690; edgeR .212, .543, .751; scVI .229, .374, .730; without library size "
    ".124, .365, .618. Those cells are not public with their labels and all genes. pbmc4k_top2000 is a reconstruction "
    "of a part of them. Its gene names are inferred, and 263 have a reference. In pbmc_3kA the labels of one of two "
    "batches are transferred. There scVI and scvi-tools take the batch as covariate.",
    "The 2017 preset and scvi-tools are trained for fewer epochs than their 150 and 400, so that a fit looks at "
    f"{VISITS:,} cells at most. There is one seed of each, and two of the default. scvi-tools has its own networks "
    "and learning rate, and a KL warm-up of half its epochs, at most 20. Its mode change gives a log Bayes factor, "
    "which is negative if a gene does not differ. Its absolute value is taken all the same.",
)

CLAIM = (
    "B cells are compared with dendritic cells, gene by gene. The ranks by scVI's Bayes factor and by DESeq2 are "
    "compared with "
    "those of microarrays of sorted cells."
)
RANKS = (
    "2017 preset {preset}, default {default}, scvi-tools {peer}, DESeq2 {deseq}, MAST {mast}, Wilcoxon {wilcoxon}, "
    "Welch's t-test {welch}."
)
RANKED_BY = {
    "preset": "scVI, 2017 preset: P(w_a < w_b), depth-corrected",
    "default": "scVI, default: P(w_a < w_b), depth-corrected",
    "peer": "scvi-tools: Bayes factor, mode change",
    "deseq": "DESeq2",
    "mast": "MAST",
    "wilcoxon": "Wilcoxon rank-sum",
    "welch": "Welch t",
}
FINDINGS = tuple(
    Finding(f"Area under the curve, {data}: {RANKS}", each(data, "AUC", **RANKED_BY))
    for data in ("pbmc4k_top2000", "pbmc_3kA")
)

EXPERIMENT = Experiment(
    name="figure2",
    title="Figure 2: differential expression",
    text=TEXT,
    steps=steps,
    rows=rows,
    pictures=pictures,
    claim=CLAIM,
    findings=FINDINGS,
)
