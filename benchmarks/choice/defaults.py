"""The default model, chosen by held-out evidence on seven data sets: variants of it, paired over held-out cells.

    python -m benchmarks.choice.defaults --seeds 0 1 2 --out defaults.jsonl

Labels decide nothing: scores of embeddings are reported. A line of the file is one fit; fits that are in the file
already are not made again, and the tables are those of all fits in it. ``--table`` prints them alone.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd

import pyro_scvi as ps
from benchmarks.harness.commands import parser_of
from benchmarks.harness.data import real
from benchmarks.harness.paths import DATA
from benchmarks.systems.default_variants import VARIANTS
from benchmarks.systems.our_models import as_cells
from pyro_scvi.inference.evaluation import bound_terms, evaluating
from pyro_scvi.paper.metrics.embedding_scores import batch_entropy, of_types

MODULE = "benchmarks.choice.defaults"
MOST_GENES, MOST_TRAINED, HELD_OUT = 2000, 2500, 300
LEAST_TRAINED = 0.8  # of all cells, where there are few
STEPS, ROUNDS = 50, 0  # of the evidence's proposals: its bias, a tenth of a nat, is that of every variant
DRAWS, BOUND_OF = 20, 300  # draws and cells for the bound of training cells
WATCHED = 0.1  # the share that fit sets aside, which is not trained on
SPACES = {"z": ps.spaces.Latent(), "expression": ps.spaces.Expression(10)}
REPORTED = "train_bound", "bound", "best_epoch", "last_minus_best", "fit_seconds"
SCORES = "silhouette", "ari", "nmi", "accuracy", "entropy"
FILES = {
    "cortex": "cortex_558.h5ad",
    "brain10k": "brain10k.h5ad",
    "pbmc4k": "pbmc4k_top2000.h5ad",
    "pbmc_3kA": "pbmc_3kA.h5ad",
    "pbmc_8k4k": "pbmc_8k4k_hvg.h5ad",
    "pbmc8k_top200": "pbmc8k_top200.h5ad",
}
EMBEDDED = "pbmc68k_reduced"
VARIABLE = {"pbmc_3kA": 1200}  # genes of the largest variance of log counts per ten thousand
LABELS = {EMBEDDED: "bulk_labels"}


class Question(NamedTuple):
    """Cells to train on and cells held out, of one data set, with the known types and batches of the former."""

    train: ps.Cells
    held_out: ps.Cells
    types: np.ndarray | None
    batches: np.ndarray | None


def question(name: str, folder: Path, n_held_out: int, n_trained: int, *, told: bool = True) -> Question:
    """Read a data set and split it, by a fixed seed; ``told`` says whether gamma has the batches, if there are any."""
    data = counts(name, folder)
    order = np.random.default_rng(0).permutation(data.n_obs)
    n_trained = min(n_trained, round(LEAST_TRAINED * data.n_obs))
    rows, held_out = np.sort(order[:n_trained]), order[n_trained : n_trained + n_held_out]
    cells = as_cells(data if told or "batch" not in data.obs else _without_batch(data))
    label = LABELS.get(name, "labels")
    types, batches = (np.asarray(data.obs[key], str)[rows] if key in data.obs else None for key in (label, "batch"))
    several = batches is not None and len(set(batches)) > 1
    return Question(cells.take(rows), cells.take(held_out), types, batches if several else None)


def _without_batch(data: anndata.AnnData) -> anndata.AnnData:
    return anndata.AnnData(data.X, data.obs.drop(columns="batch"), data.var)


def counts(name: str, folder: Path) -> anndata.AnnData:
    """A data set's counts, of its variable genes where it has more than are wanted."""
    if name == EMBEDDED:
        return ps.datasets.pbmc68k_reduced()
    data = real(str(folder / FILES[name]))
    if name not in VARIABLE:
        return data
    share = data.X.multiply(1e4 / data.X.sum(1)).tocsr().log1p()
    variance = np.asarray(share.power(2).mean(0) - np.square(share.mean(0))).ravel()
    data = data[:, np.sort(np.argsort(-variance)[: VARIABLE[name]])].copy()
    return data[np.asarray(data.X.sum(1)).ravel() > 0].copy()


def fitted(asked: Question, variant: str, seed: int, epochs: int | None) -> ps.Fit:
    """One fit, with the package's own training.

    Raises
    ------
    SystemExit
        If it was interrupted: a fit of fewer epochs must not stand among the others.
    """
    model, options = VARIANTS[variant](asked.train, seed)
    fit = ps.fit(model, asked.train, **options, epochs=epochs, device="cpu", progress=False)
    if "interrupted" in fit.settings:
        raise SystemExit(f"{variant}: {fit.settings['interrupted']}; nothing was kept of it")
    return fit


def measured(asked: Question, fit: ps.Fit, samples: int, *, scored: bool) -> dict[str, Any]:
    """Evidence of the held-out cells, bounds of both, scores of embeddings of the training cells."""
    table = ps.evidence(fit, asked.held_out, samples=samples, steps=STEPS, rounds=ROUNDS, progress=False)
    history = fit.history.held_out_loss
    found = {
        "evidence": table.log_evidence.round(3).tolist(),
        "khat_share": float((table.khat > 0.7).mean()),
        "bound": float(table.amortized_bound.mean()),
        "train_bound": bound(fit, trained_on(asked.train, fit)),
        "best_epoch": int(history.idxmin()),
        "epochs": len(history),
        "last_minus_best": float(history.iloc[-3:].mean() - history.rolling(3).mean().min()),
    }
    return found | ({space: scores(asked, fit, space) for space in SPACES} if scored else {})


def trained_on(cells: ps.Cells, fit: ps.Fit) -> ps.Cells:
    """Some of the cells that were trained on, evenly spaced: files are sorted by type."""
    rows, _ = cells.split_rows(held_out=WATCHED, seed=fit.settings["seed"])
    return cells.take(rows[:: max(1, len(rows) // BOUND_OF)])


def bound(fit: ps.Fit, cells: ps.Cells) -> float:
    """Mean evidence bound of cells under the guide, nats per cell."""
    x, gamma = cells[:]
    with evaluating(fit.model, fit.guide, 0):
        return float(bound_terms(fit.guide, x, gamma, DRAWS)[0].mean())


def scores(asked: Question, fit: ps.Fit, space: str) -> dict[str, float]:
    """How an embedding of the training cells separates the known types and mixes the batches."""
    return scores_at(asked, ps.embed(fit, asked.train, space=SPACES[space]))


def scores_at(asked: Question, place: np.ndarray) -> dict[str, float]:
    """The same for places (cells, axes) of the training cells by any system."""
    found = {} if asked.types is None else of_types(place, asked.types)
    return found | ({} if asked.batches is None else {"entropy": batch_entropy(place, asked.batches)})


def line_of(asked: Question, name: str, variant: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fit and measure: what is kept of one fit."""
    started = time.process_time()
    fit = fitted(asked, variant, seed, options.epochs)
    seconds = time.process_time() - started
    found = measured(asked, fit, options.samples, scored=options.scores)
    return {"data": name, "variant": variant, "seed": seed, "fit_seconds": round(seconds, 2), **found}


def read(path: Path | None) -> list[dict[str, Any]]:
    """The fits of a file."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path and path.exists() else []


def paired(lines: Sequence[dict[str, Any]], against: str = "default") -> pd.DataFrame:
    """Evidence of each variant minus that of one of them, by data set: mean over cells and its standard error.

    Cells are averaged over the seeds that both have, and over the held-out cells that both have.
    """
    by_fit = {(line["data"], line["variant"], line["seed"]): np.array(line["evidence"]) for line in lines}
    rows = []
    for data, variant in dict.fromkeys((line["data"], line["variant"]) for line in lines):
        shared = [seed for d, v, seed in by_fit if (d, v) == (data, variant) and (data, against, seed) in by_fit]
        if not shared:
            continue
        pairs = [(by_fit[data, variant, seed], by_fit[data, against, seed]) for seed in shared]
        n = min(len(values) for pair in pairs for values in pair)
        difference = np.mean([ours[:n] - theirs[:n] for ours, theirs in pairs], axis=0)
        error = difference.std(ddof=1) / np.sqrt(n)
        rows.append({"data": data, "variant": variant, "seeds": len(shared), "nats": difference.mean(), "se": error})
    return pd.DataFrame(rows, columns=["data", "variant", "seeds", "nats", "se"])


def differences(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """The table that decides: a row for each variant, a column for each data set, nats, standard error and seeds."""
    table = paired(lines)
    table["text"] = [f"{row.nats:+.1f} ({row.se:.1f}) [{row.seeds}]" for row in table.itertuples()]
    wide = table.pivot(index="variant", columns="data", values="text")
    order = [variant for variant in VARIANTS if variant in wide.index]
    wide = wide.loc[order, list(dict.fromkeys(table.data))].fillna("").reset_index()
    wide.insert(1, "what it is", [str(VARIANTS[name].__doc__).rstrip(".") for name in order])
    return wide


def summary(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds of what is reported and not optimised."""
    flat = pd.json_normalize([{k: v for k, v in line.items() if k != "evidence"} for line in lines])
    means = flat.groupby(["data", "variant"], sort=False).mean(numeric_only=True).drop(columns="seed").reset_index()
    figures = [*REPORTED, *(f"{space}.{score}" for space in SPACES for score in SCORES)]
    return means[["data", "variant", *(name for name in figures if name in means)]]


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown, numbers with three significant digits."""
    rows = [table.columns, ["---"] * len(table.columns), *table.itertuples(index=False)]
    return "".join("| " + " | ".join(map(_cell, row)) + " |\n" for row in rows)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if np.isnan(value) else f"{value:.1f}" if abs(value) >= 1 else f"{value:.3f}".replace("0.", ".", 1)


def parser_with(module: str, text: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every command that completes a file of fits."""
    parser = parser_of(module, text)
    parser.add_argument("--folder", type=Path, default=DATA, help="folder with the real data")
    parser.add_argument("--data", nargs="+", choices=[*FILES, EMBEDDED], default=[*FILES, EMBEDDED])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--trained", type=int, default=MOST_TRAINED, help="cells to train on, at most")
    parser.add_argument("--epochs", type=int, help="of every fit; by default those that it chooses itself")
    parser.add_argument("--table", action="store_true", help="print the tables of the file and make no fit")
    parser.add_argument("--out", type=Path, help="file of fits, one JSON line each: read if there, and completed")
    return parser


def keep(lines: list[dict[str, Any]], line: dict[str, Any], out: Path | None) -> None:
    """Add what was measured of a fit to ``lines`` and to their file, and say so."""
    lines.append(line)
    of_fit = [f"{name} {line[name]}" for name in ("data", "variant", "seed") if name in line]
    sys.stderr.write(", ".join(of_fit) + "\n")
    if out:
        with out.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_with(MODULE, __doc__)
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--cells", type=int, default=HELD_OUT, help="held-out cells whose evidence is estimated")
    parser.add_argument("--samples", type=int, default=200, help="draws of the evidence sampler")
    parser.add_argument("--no-scores", dest="scores", action="store_false", help="no scores of embeddings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the fits that are missing, print the tables."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", "k-hat is above")  # its share is kept
    lines = read(options.out)
    if not options.table:
        complete(lines, options)
    sys.stdout.write(markdown(differences(lines)) + "\n" + markdown(summary(lines)))


def complete(lines: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Make the fits that are asked for and not among ``lines``, which grow; the file grows with them."""
    for name in options.data:
        asked = question(name, options.folder, options.cells, options.trained)
        for seed in options.seeds:
            for variant in options.variants:
                if any((line["data"], line["variant"], line["seed"]) == (name, variant, seed) for line in lines):
                    continue
                keep(lines, line_of(asked, name, variant, seed, options), options.out)


if __name__ == "__main__":
    main()
