"""Labels of the cortex data, where few are given, beside nearest neighbours on z and scANVI.

    python -m benchmarks.quality.labels --seeds 0 1 2 3 4 --out labels.json

Every system sees the counts of the authors' 75 % of the cells and the labels of a share of them, drawn by label. It is
scored on the rest of these cells. Evidence is that of cells that no system has seen, without their labels: the fit with
labels minus the fit without. scANVI takes part where scvi-tools is installed (extra ``peer``).
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier

import pyro_scvi as ps
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.cortex_split import DEFAULT_DATA, read_task
from benchmarks.harness.machine import versions

MODULE = "benchmarks.quality.labels"
PACKAGES = "torch", "pyro-ppl", "numpy", "scikit-learn", "scvi-tools"
LABELS = "labels"
N_LATENT = 10
NEIGHBOURS = 5, 15
SCANVI_EPOCHS = 400, 20  # of scVI, and of scANVI that starts from it: the defaults for so few cells


class Question(NamedTuple):
    """Cells as an AnnData with all labels, the rows to fit and those kept aside, and which of the former are known."""

    data: anndata.AnnData
    train: np.ndarray
    test: np.ndarray
    known: np.ndarray

    @property
    def truth(self) -> np.ndarray:
        """Labels of the rows to fit."""
        return np.asarray(self.data.obs[LABELS], str)[self.train]

    def cells(self, rows: np.ndarray, *, labels: bool) -> ps.Cells:
        """These rows, with the labels that are given or without any column of labels."""
        data = self.data.copy()
        given = np.full(data.n_obs, None, object)
        given[self.train[self.known]] = self.truth[self.known]
        data.obs["given"] = given
        return ps.Cells.from_anndata(data, labels="given" if labels else None).take(rows)


def question(path: Path, share: float, seed: int) -> Question:
    """Draw the labels that are given."""
    task = read_task(path, samples=0)
    labels = np.asarray(task.data.obs[LABELS], str)[task.train]
    known, _ = train_test_split(np.arange(len(labels)), train_size=share, stratify=labels, random_state=seed)
    return Question(task.data, task.train, task.test, np.isin(np.arange(len(labels)), known))


def fitted(asked: Question, seed: int, *, labels: bool, weight: float) -> ps.Fit:
    """Our model, with a component of the prior for each label or with the default prior."""
    cells = asked.cells(asked.train, labels=labels)
    prior = None
    if labels:
        prior = ps.priors.ByLabel(N_LATENT, cells.columns["given"], label_weight=weight, seed=seed)
    model = ps.SCVI(cells.n_genes, N_LATENT, cells.n_covariates, prior=prior, seed=seed)
    return ps.fit(model, cells, seed=seed, progress=False)


def by_neighbours(z: np.ndarray, asked: Question, k: int) -> np.ndarray:
    """Label of the majority of the k nearest cells with a label, for every cell."""
    classifier = KNeighborsClassifier(k).fit(z[asked.known], asked.truth[asked.known])
    return np.asarray(classifier.predict(z))


def ours(asked: Question, fits: dict[str, ps.Fit]) -> Iterator[tuple[str, np.ndarray]]:
    """Predictions by the prior, and by neighbours on z of each fit."""
    labelled = asked.cells(asked.train, labels=True)
    yield "predict_labels", ps.predict_labels(fits["with labels"], labelled, progress=False).idxmax(axis=1).to_numpy()
    spaces = {"with labels": labelled.without("given"), "without labels": asked.cells(asked.train, labels=False)}
    for name, cells in spaces.items():
        z = ps.embed(fits[name], cells)
        for k in NEIGHBOURS:
            yield f"{k} neighbours on z of the fit {name}", by_neighbours(z, asked, k)


def scanvi(asked: Question, seed: int) -> np.ndarray:
    """Labels by scANVI, started from scVI, with their defaults."""
    import scvi  # an optional extra

    scvi.settings.seed = seed
    data = asked.data[asked.train].copy()
    data.obs["given"] = np.where(asked.known, asked.truth, "unknown")
    scvi.model.SCVI.setup_anndata(data, labels_key="given")
    first = scvi.model.SCVI(data, n_latent=N_LATENT)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "accelerator": "cpu"}
    first.train(max_epochs=SCANVI_EPOCHS[0], **quiet)
    second = scvi.model.SCANVI.from_scvi_model(first, unlabeled_category="unknown")
    second.train(max_epochs=SCANVI_EPOCHS[1], **quiet)
    return np.asarray(second.predict(data))


def scored(asked: Question, predictions: Iterator[tuple[str, np.ndarray]], seed: int) -> list[dict[str, Any]]:
    """A row for each system: its accuracy on the cells whose labels are not given."""
    left = ~asked.known
    rows = []
    for name, labels in predictions:
        accuracy = float((labels[left] == asked.truth[left]).mean())
        balanced = float(balanced_accuracy_score(asked.truth[left], labels[left]))
        rows.append({"system": name, "seed": seed, "accuracy": accuracy, "balanced": balanced})
    return rows


def evidence_lost(asked: Question, fits: dict[str, ps.Fit], n_cells: int) -> dict[str, float]:
    """Mean over unseen cells of log p(x) with labels minus that without, in nats, and its standard error."""
    rows = asked.test[:n_cells]
    values = [
        ps.evidence(fit, asked.cells(rows, labels=name == "with labels"), progress=False).log_evidence.to_numpy()
        for name, fit in fits.items()
    ]
    difference = values[0] - values[1]
    return {"difference": float(difference.mean()), "se": float(difference.std(ddof=1) / np.sqrt(len(rows)))}


def measured(options: argparse.Namespace, seed: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All systems on one draw of the labels."""
    asked = question(options.data, options.share, seed)
    fits = {
        name: fitted(asked, seed, labels=name == "with labels", weight=options.label_weight)
        for name in ("with labels", "without labels")
    }
    rows = scored(asked, ours(asked, fits), seed)
    if options.peer and importlib.util.find_spec("scvi"):
        rows += scored(asked, iter([("scANVI", scanvi(asked, seed))]), seed)
    lost = evidence_lost(asked, fits, options.evidence_cells) if options.evidence_cells else {}
    return rows, lost


def summary(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Mean and standard deviation over seeds, and how far from predict_labels on the same labels."""
    table = pd.DataFrame(rows)
    ahead = table.pivot(index="seed", columns="system", values="accuracy")
    ahead = ahead.sub(ahead["predict_labels"], axis=0)
    of_system = table.groupby("system", sort=False)[["accuracy", "balanced"]]
    means = of_system.mean().join(of_system.std(), rsuffix="_sd")
    return means.assign(minus_ours=ahead.mean(), minus_ours_sd=ahead.std())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="AnnData file, raw counts and obs['labels']")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of labels and fits")
    parser.add_argument("--share", type=float, default=0.05, help="of the labels, given")
    parser.add_argument("--label-weight", type=float, default=50.0, help="how much a label counts in training")
    parser.add_argument("--evidence-cells", type=int, default=200, help="unseen cells whose evidence is compared")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave scANVI out")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, predict, print the table and write it."""
    options = parse(arguments)
    torch.set_num_threads(1)
    rows, lost = [], []
    for seed in options.seeds:
        of_seed, differences = measured(options, seed)
        rows += of_seed
        lost += [{"seed": seed, **differences}] if differences else []
        for row in of_seed:
            sys.stderr.write(f"{row}\n")
        sys.stderr.write(f"{differences}\n")
    sys.stdout.write(f"{summary(rows).round(4).to_string()}\n\n{pd.DataFrame(lost).round(3).to_string()}\n")
    if options.out:
        command = command_line(MODULE, arguments)
        report = {"command": command, "versions": versions(PACKAGES), "rows": rows, "evidence": lost}
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
