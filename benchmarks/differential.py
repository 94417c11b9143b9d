"""Differential expression against a reference: ``python -m benchmarks.differential --seeds 0 1 2 --out FILE``.

B cells against dendritic cells in two sets of blood cells. A system gives every gene a score; the score is judged by
how well it finds the genes that bulk microarrays of sorted cells call most significant (area under the ROC curve) and
by its rank correlation with -log10 of the microarrays' p-value. Nothing is chosen by the reference: all models are
fitted with default settings and every score that is tried is printed. Two more tables: how many genes are called
between two random halves of one cell type, and how long all genes of 10,000 against 10,000 cells take.
"""

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

import pyro_scvi as ps
from pyro_scvi.paper.data.blood import Blood, read_pbmc4k, read_pbmc_3ka

FOLDER = Path(os.environ.get("PYRO_SCVI_DATA", "../shared/data"))
CALLED = 0.05
WILCOXON = "Wilcoxon rank-sum", "-log p"
PACKAGES = "torch", "pyro-ppl", "numpy", "scipy", "scvi-tools"


Scores = dict[str, np.ndarray]  # by name of the score, (genes,) each


class System(NamedTuple):
    """Something that scores genes; ``seeded`` if another seed gives other scores."""

    name: str
    score: Callable[[Blood, int], Scores]
    seeded: bool = True


READERS = {"pbmc4k": read_pbmc4k, "pbmc_3kA": read_pbmc_3ka}


def score_tests(data: Blood, seed: int, *, test: Callable[..., Any], statistic: bool) -> Scores:
    """Score by a test of the log counts per 10,000; a gene that is constant in both groups scores 0."""
    x = data.dense()
    y = np.log1p(x / x.sum(1, keepdims=True) * 1e4)
    a, b = (y[(data.adata.obs["labels"] == group).to_numpy()] for group in data.groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        found = test(a, b)
    scores = {"-log p": -np.log(found.pvalue)} | ({"|t|": np.abs(found.statistic)} if statistic else {})
    return {name: np.nan_to_num(score, nan=0.0) for name, score in scores.items()}


@cache
def fitted(data: Blood, seed: int, *, gene_dispersion: bool) -> tuple[ps.Fit, ps.Cells]:
    """Fit with default settings: the default model, or a dispersion per gene with dropout 0.1."""
    cells = ps.Cells.from_anndata(data.adata, batch=data.batch)
    likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes)) if gene_dispersion else None
    dropout = 0.1 if gene_dispersion else 0.0
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, likelihood=likelihood, dropout=dropout, seed=seed)
    guide = ps.guides.DiagonalNormal(model, dropout=dropout, seed=seed)
    return ps.fit(model, cells, guide, seed=seed, device="cpu", progress=False), cells


def score_ours(data: Blood, seed: int, *, gene_dispersion: bool) -> Scores:
    """Score by P(w_a < w_b) and by P(fold change), with depth taken out and as the paper has it."""
    fit, cells = fitted(data, seed, gene_dispersion=gene_dispersion)
    contrasts = {"depth-corrected": ps.differential.DepthCorrected(), "depth-laden": ps.differential.DepthLaden()}
    scores = {}
    for name, contrast in contrasts.items():
        table = _compared(fit, cells, "labels", data.groups, contrast=contrast, seed=seed)
        scores[f"|log BF|, {name}"] = table["log_bayes_factor"].abs().to_numpy()
        scores[f"P(change > .5 one way), {name}"] = table["p_lfc"].to_numpy()
    return scores


def _compared(
    fit: ps.Fit, cells: ps.Cells, groupby: str | np.ndarray, groups: tuple[str, str], **options: Any
) -> pd.DataFrame:
    group_a, group_b = groups
    return ps.differential_expression(fit, cells, groupby=groupby, group_a=group_a, group_b=group_b, **options)


def score_scvi_tools(data: Blood, seed: int) -> Scores:
    """Score by the Bayes factors of scvi-tools, both modes, after its default training."""
    import scvi

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, seed
    adata = anndata.AnnData(data.adata.X.astype(np.float32), data.adata.obs.copy(), data.adata.var[[]].copy())
    scvi.model.SCVI.setup_anndata(adata, batch_key=data.batch)
    model = scvi.model.SCVI(adata)
    model.train(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    a, b = data.groups
    scores = {}
    for mode in ("vanilla", "change"):
        table = model.differential_expression(groupby="labels", group1=a, group2=b, mode=mode, silent=True)
        scores[f"|log BF|, {mode}"] = table["bayes_factor"].abs().loc[adata.var_names].to_numpy()
    scores["|median lfc|, change"] = table["lfc_median"].abs().loc[adata.var_names].to_numpy()
    return scores


SYSTEMS = {
    "wilcoxon": System(
        WILCOXON[0],
        partial(score_tests, test=partial(stats.mannwhitneyu, method="asymptotic"), statistic=False),
        seeded=False,
    ),
    "welch": System(
        "Welch t", partial(score_tests, test=partial(stats.ttest_ind, equal_var=False), statistic=True), seeded=False
    ),
    "default": System("pyro-scvi, default", partial(score_ours, gene_dispersion=False)),
    "gene": System("pyro-scvi, dispersion per gene, dropout .1", partial(score_ours, gene_dispersion=True)),
    "scvi-tools": System("scvi-tools, default training", score_scvi_tools),
}


def judged(data: Blood, score: np.ndarray, wilcoxon: np.ndarray, resamples: int = 400) -> dict[str, float]:
    """Area under the curve and rank correlation of a score, (genes,); the area's gain on Wilcoxon and its se.

    The standard errors are those of the bootstrap over the matched genes.
    """
    ours, theirs = score[data.matched], wilcoxon[data.matched]
    generator = np.random.default_rng(0)
    drawn = [generator.integers(len(ours), size=len(ours)) for _ in range(resamples)]
    areas = np.array([[_area(data.positive[rows], s[rows]) for s in (ours, theirs)] for rows in drawn])
    area = _area(data.positive, ours)
    return {
        "auc": area,
        "auc_se": float(areas[:, 0].std(ddof=1)),
        "minus_wilcoxon": area - _area(data.positive, theirs),
        "minus_wilcoxon_se": float((areas[:, 0] - areas[:, 1]).std(ddof=1)),
        "spearman": float(stats.spearmanr(ours, -np.log10(data.p)).statistic),
    }


def _area(positive: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(positive, score))


def against_reference(data: Blood, systems: Sequence[System], seeds: Sequence[int], kept: Path | None) -> pd.DataFrame:
    """One row per system, score and seed; ``kept`` is a CSV file of such rows, which are not computed again."""
    rows = pd.read_csv(kept) if kept and kept.exists() else pd.DataFrame(columns=["data", "system", "seed"])
    for system in systems:
        for seed in seeds if system.seeded else seeds[:1]:
            if ((rows["data"] == data.name) & (rows["system"] == system.name) & (rows["seed"] == seed)).any():
                continue
            sys.stderr.write(f"{data.name}: {system.name}, seed {seed}\n")
            rows = pd.concat([*([rows] if len(rows) else []), _reference_rows(data, system, seed)])
            if kept:
                rows.to_csv(kept, index=False)
    return rows[rows["data"] == data.name]


def _reference_rows(data: Blood, system: System, seed: int) -> pd.DataFrame:
    started = time.process_time()
    scores = system.score(data, seed)
    key = {"data": data.name, "system": system.name, "seed": seed, "cpu_seconds": time.process_time() - started}
    wilcoxon = SYSTEMS["wilcoxon"].score(data, 0)[WILCOXON[1]]
    sizes = {"n_genes": int(data.matched.sum()), "n_positive": int(data.positive.sum())}
    of_type = data.adata.obs["labels"].value_counts()
    sizes |= {"n_a": int(of_type[data.groups[0]]), "n_b": int(of_type[data.groups[1]])}
    return pd.DataFrame([{**key, "score": n, **judged(data, score, wilcoxon), **sizes} for n, score in scores.items()])


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd over the seeds of every system's figures; standard errors, over genes, are averaged."""
    of_score = rows.groupby(["data", "system", "score"], sort=False)
    measured = ["auc", "auc_se", "minus_wilcoxon", "minus_wilcoxon_se", "spearman"]
    table = of_score[measured].mean()
    table.insert(1, "auc_sd", of_score["auc"].std())
    table["spearman_sd"] = of_score["spearman"].std()
    table["n_seeds"] = of_score.size()
    return table.join(of_score[["n_genes", "n_positive", "n_a", "n_b", "cpu_seconds"]].mean()).reset_index()


def between_halves(data: Blood, seed: int, splits: int, *, gene_dispersion: bool) -> dict[str, Any]:
    """Genes called between random halves of the most frequent type, by one fit; beside it those of B against DC."""
    fit, cells = fitted(data, seed, gene_dispersion=gene_dispersion)
    members = np.flatnonzero(data.adata.obs["labels"] == data.largest)
    counts = []
    for split in range(splits):
        labels = np.full(cells.n_cells, "other", dtype=object)
        half = np.random.default_rng(split).permutation(members)
        labels[half[: len(half) // 2]], labels[half[len(half) // 2 :]] = "first", "second"
        counts.append(_n_called(_compared(fit, cells, labels, ("first", "second"), seed=split)))
    calls = np.array(counts)
    return {
        "data": data.name,
        "system": SYSTEMS["gene" if gene_dispersion else "default"].name,
        "cell_type": data.largest,
        "n_cells": len(members),
        "n_genes": cells.n_genes,
        "seed": seed,
        "n_splits": splits,
        "called_mean": calls.mean(),
        "called_sd": calls.std(ddof=1),
        "called_most": calls.max(),
        "splits_with_calls": int((calls > 0).sum()),
        "share_called": calls.mean() / cells.n_genes,
        "called_b_against_dc": _n_called(_compared(fit, cells, "labels", data.groups, seed=seed)),
    }


def _n_called(table: pd.DataFrame) -> int:
    return int((table["fdr"] <= CALLED).sum())


def timed(data: Blood, seed: int, *, n_cells: int = 20_000) -> list[dict[str, Any]]:
    """CPU seconds for all genes of two halves of resampled cells, with default precision and with the most pairs."""
    fit, _ = fitted(data, seed, gene_dispersion=False)
    rows = np.random.default_rng(seed).integers(data.adata.n_obs, size=n_cells)
    counts = sparse.csr_matrix(data.adata.X)[rows]
    cells = ps.Cells.from_counts(counts, gene_names=list(data.adata.var_names))
    labels = np.repeat(["first", "second"], n_cells // 2).astype(object)
    kinds = {"default": {}, "20,000 pairs": {"largest_se": 0.0}}
    found = []
    for name, options in kinds.items():
        started = time.process_time()
        _compared(fit, cells, labels, ("first", "second"), seed=seed, **options)
        seconds = time.process_time() - started
        found.append(
            {"options": name, "n_cells": n_cells, "n_genes": cells.n_genes, "seed": seed, "cpu_seconds": seconds}
        )
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.differential", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the data files")
    parser.add_argument("--data", nargs="+", choices=READERS, default=list(READERS))
    parser.add_argument("--systems", nargs="*", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one fit each")
    parser.add_argument("--splits", type=int, default=20, help="random halves per fit; 0 leaves this table out")
    parser.add_argument("--rows", type=Path, help="CSV file of the first table: read if there, completed, written")
    parser.add_argument("--out", type=Path, help="JSON file for the tables")
    return parser.parse_args(arguments)


def tables(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Run what was asked for."""
    data = [READERS[name](options.folder) for name in options.data]
    systems = [SYSTEMS[name] for name in options.systems]
    found = {}
    if systems:
        found["reference"] = pd.concat([against_reference(one, systems, options.seeds, options.rows) for one in data])
        found["reference, over seeds"] = over_seeds(found["reference"])
    if options.splits:
        models = [(one, seed, gene) for one in data for seed in options.seeds for gene in (False, True)]
        halves = [between_halves(one, seed, options.splits, gene_dispersion=gene) for one, seed, gene in models]
        found["halves of one cell type"] = pd.DataFrame(halves)
    if "pbmc4k" in options.data:
        pbmc4k = data[options.data.index("pbmc4k")]
        found["seconds of 10,000 against 10,000 cells"] = pd.DataFrame(
            [row for seed in options.seeds for row in timed(pbmc4k, seed)]
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its tables and write them."""
    options = parse(arguments)
    torch.set_num_threads(1)
    command = shlex.join(
        ["python", "-m", "benchmarks.differential", *(sys.argv[1:] if arguments is None else arguments)]
    )
    found = tables(options)
    for name, table in found.items():
        sys.stdout.write(f"\n{name}\n{table.to_string(index=False, float_format='{:.3f}'.format)}\n")
    if options.out:
        rows = {name: json.loads(table.to_json(orient="records", double_precision=6)) for name, table in found.items()}
        versions = {name: metadata.version(name) for name in PACKAGES}
        options.out.write_text(json.dumps({"command": command, "versions": versions, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
