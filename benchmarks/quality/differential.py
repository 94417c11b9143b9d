"""Differential expression against a reference: bulk microarrays of sorted blood cells.

    python -m benchmarks.quality.differential --seeds 0 1 2 --out FILE

B cells against dendritic cells in two sets of blood cells. A system gives every gene a score; the score is judged by
how well it finds the genes that the microarrays call most significant (area under the ROC curve) and by its rank
correlation with -log10 of the microarrays' p-value. Abundant genes are significant more often, and dendritic cells are
three to four times deeper. So one row scores by abundance alone, ``auc_within`` is the area within five bins of
abundance, averaged over pairs of genes, and one Welch test is made on depths matched by thinning. Nothing is chosen by
the reference: all models are fitted with default settings and every score that is tried is printed. Two more tables:
how many genes are called between two random halves of one cell type, and how long all genes of 10,000 against 10,000
cells take.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse, stats
from sklearn.metrics import roc_auc_score

import pyro_scvi as ps
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.machine import versions
from benchmarks.harness.paths import DATA
from benchmarks.systems.gene_scores import SYSTEMS, WILCOXON, System, abundance, compared, fitted
from pyro_scvi.paper.data.blood import Blood, read_pbmc4k, read_pbmc_3ka

MODULE = "benchmarks.quality.differential"
CALLED = 0.05
PACKAGES = "torch", "pyro-ppl", "numpy", "scipy", "scvi-tools"
READERS = {"pbmc4k": read_pbmc4k, "pbmc_3kA": read_pbmc_3ka}


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
        "auc_within": _area_within(data.positive, ours, abundance(data)[data.matched]),
        "spearman": float(stats.spearmanr(ours, -np.log10(data.p)).statistic),
    }


def _area(positive: np.ndarray, score: np.ndarray) -> float:
    return float(roc_auc_score(positive, score))


def _area_within(positive: np.ndarray, score: np.ndarray, by: np.ndarray, n_bins: int = 5) -> float:
    """Area under the curve over the pairs of genes that lie in the same of ``n_bins`` equally large bins."""
    bins = np.argsort(np.argsort(by)) * n_bins // len(by)
    areas, pairs = [], []
    for k in range(n_bins):
        inside = positive[bins == k]
        if 0 < inside.sum() < len(inside):
            areas.append(_area(inside, score[bins == k]))
            pairs.append(inside.sum() * (len(inside) - inside.sum()))
    return float(np.average(areas, weights=pairs))


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
    measured = ["auc", "auc_se", "auc_within", "minus_wilcoxon", "minus_wilcoxon_se", "spearman"]
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
        counts.append(_n_called(compared(fit, cells, labels, ("first", "second"), seed=split)))
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
        "called_b_against_dc": _n_called(compared(fit, cells, "labels", data.groups, seed=seed)),
    }


def _n_called(table: pd.DataFrame) -> int:
    return int((table["q_value"] <= CALLED).sum())


def timed(data: Blood, seed: int, *, n_cells: int = 20_000) -> list[dict[str, Any]]:
    """CPU seconds for all genes of two halves of resampled cells, with default precision and with the most pairs."""
    fit, _ = fitted(data, seed, gene_dispersion=False)
    rows = np.random.default_rng(seed).integers(data.adata.n_obs, size=n_cells)
    counts = sparse.csr_matrix(data.adata.X)[rows]
    cells = ps.Cells.from_counts(counts, gene_names=list(data.adata.var_names))
    labels = np.repeat(["first", "second"], n_cells // 2).astype(object)
    pairs = ps.differential.RandomPairs
    kinds = {"means": ps.differential.GroupMeans(), "pairs": pairs(), "20,000 pairs": pairs(largest_se=0.0)}
    timings = []
    for name, estimand in kinds.items():
        started = time.process_time()
        compared(fit, cells, labels, ("first", "second"), seed=seed, estimand=estimand)
        seconds = time.process_time() - started
        timings.append(
            {"options": name, "n_cells": n_cells, "n_genes": cells.n_genes, "seed": seed, "cpu_seconds": seconds}
        )
    return timings


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--folder", type=Path, default=DATA, help="of the data files")
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
    by_title = {}
    if systems:
        by_title["reference"] = pd.concat(
            [against_reference(one, systems, options.seeds, options.rows) for one in data]
        )
        by_title["reference, over seeds"] = over_seeds(by_title["reference"])
    if options.splits:
        models = [(one, seed, gene) for one in data for seed in options.seeds for gene in (False, True)]
        halves = [between_halves(one, seed, options.splits, gene_dispersion=gene) for one, seed, gene in models]
        by_title["halves of one cell type"] = pd.DataFrame(halves)
    if "pbmc4k" in options.data:
        pbmc4k = data[options.data.index("pbmc4k")]
        by_title["seconds of 10,000 against 10,000 cells"] = pd.DataFrame(
            [row for seed in options.seeds for row in timed(pbmc4k, seed)]
        )
    return by_title


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its tables and write them."""
    options = parse(arguments)
    torch.set_num_threads(1)
    command = command_line(MODULE, arguments)
    by_title = tables(options)
    for name, table in by_title.items():
        sys.stdout.write(f"\n{name}\n{table.to_string(index=False, float_format='{:.3f}'.format)}\n")
    if options.out:
        rows = {
            name: json.loads(table.to_json(orient="records", double_precision=6)) for name, table in by_title.items()
        }
        about = {"command": command, "versions": versions(PACKAGES)}
        options.out.write_text(json.dumps({**about, **rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
