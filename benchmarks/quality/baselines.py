"""The paper's baselines on real counts: clustering, held-out scores, CPU time and peak memory.

    python -m benchmarks.quality.baselines --systems ZIFA FA --seeds 0 --out FILE

Every system is fitted with 10 latents, in a process of its own with one thread, so that the peak of resident memory is
that fit's; imports and the counts are in it and are also given alone (``before_mb``). The data are those of the paper's
Tables 1 and 3 as far as they are public, in the folder that PYRO_SCVI_DATA names:

- ``cortex``: all cells, 558 genes; mean silhouette width of the latents by the 7 labels (Table 3).
- ``held-out``: the split of the authors' notebook, scikit-learn's train_test_split with random_state=0; nats per cell.
- ``brain-1000``, ``brain-10000``: so many random cells, the genes seen in them; CPU time and memory alone.

A score is a mean over cells, with its standard error over them, which is not that of a difference between systems.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from benchmarks.harness.commands import command_line, parser_of, printed_by
from benchmarks.harness.machine import versions
from benchmarks.harness.paths import DATA
from benchmarks.harness.resident_memory import peak_megabytes

MODULE = "benchmarks.quality.baselines"
N_LATENTS = 10
PACKAGES = "numpy", "scipy", "scikit-learn", "torch"


class System(NamedTuple):
    """How a baseline is made from its module and a seed, the scores it has, and what the authors give for it.

    ``silhouette`` is that of the paper's Table 3; ``authors`` the held-out score stored with the authors' notebooks,
    and ``scored`` which of ``scores`` it is.
    """

    make: Callable[[Any, int], Any]
    scores: tuple[str, ...] = ()
    silhouette: float = math.nan
    scored: str = ""
    authors: float = math.nan


EXPECTED, MARGINAL = "expected_complete_log_likelihood", "score_samples"
SCORES: dict[str, Callable[[Any, Any], np.ndarray]] = {
    EXPECTED: lambda method, counts: method.expected_complete_log_likelihood(counts),
    MARGINAL: lambda method, counts: method.score_samples(counts),
}
SYSTEMS = {
    "FA": System(lambda b, seed: b.FactorAnalysis(N_LATENTS, seed=seed), (MARGINAL,), 0.208, MARGINAL, -1304.10),
    "PCA": System(lambda b, seed: b.PCA(N_LATENTS, seed=seed)),
    "ZIFA": System(lambda b, seed: b.ZIFA(N_LATENTS, seed=seed), (EXPECTED, MARGINAL), 0.202, EXPECTED, -1366.15),
    "ZIFA, tol=1e-4": System(
        lambda b, seed: b.ZIFA(N_LATENTS, seed=seed, tol=1e-4, max_iter=1000), (EXPECTED, MARGINAL)
    ),
    "ZINB-WaVE": System(lambda b, seed: b.ZINBWaVE(N_LATENTS), (MARGINAL,), 0.260, MARGINAL, -1228.40),
}


class Counts(NamedTuple):
    """What a task fits, (cells, genes); the labels of these cells, if a silhouette is asked; cells to score, if any."""

    train: Any
    labels: np.ndarray | None = None
    test: Any = None


def cortex() -> Counts:
    """All cells of the cortex with their labels."""
    data = read("cortex_558.h5ad")
    return Counts(data.X, data.obs["labels"].to_numpy())


def held_out() -> Counts:
    """The authors' split of the cortex."""
    from sklearn.model_selection import train_test_split

    data = read("cortex_558.h5ad")
    train, test, labels, _ = train_test_split(data.X, data.obs["labels"].to_numpy(), random_state=0)
    return Counts(train, labels, test)


def brain(n_cells: int) -> Counts:
    """Random cells of the mouse brain and the genes that were seen in them."""
    data = read("brain10k.h5ad")
    chosen = data.X[np.sort(np.random.default_rng(0).permutation(data.n_obs)[:n_cells])]
    return Counts(chosen[:, np.asarray(chosen.sum(0)).ravel() > 0])


TASKS: dict[str, Callable[[], Counts]] = {
    "cortex": cortex,
    "held-out": held_out,
    "brain-1000": lambda: brain(1_000),
    "brain-10000": lambda: brain(10_000),
}


def read(name: str) -> Any:
    """The cells of a file of the data folder."""
    import anndata

    if not (DATA / name).is_file():
        raise SystemExit(f"{name} is not in {DATA}; set PYRO_SCVI_DATA to the folder that holds it")
    return anndata.read_h5ad(DATA / name)


def measure(name: str, task: str, seed: int) -> dict[str, Any]:
    """Fit one system in this process and score it."""
    import torch
    from sklearn.metrics import silhouette_score

    from pyro_scvi import baselines

    torch.set_num_threads(1)
    system, counts = SYSTEMS[name], TASKS[task]()
    before, started = peak_megabytes(), time.process_time()
    method = system.make(baselines, seed).fit(counts.train)
    row: dict[str, Any] = {
        "cpu_seconds": time.process_time() - started,
        "before_mb": before,
        "peak_mb": peak_megabytes(),
    }
    row |= {"n_cells": counts.train.shape[0], "n_genes": counts.train.shape[1]}
    row["iterations"] = getattr(method, "n_iter_", None)
    if counts.labels is not None:
        row["silhouette"] = float(silhouette_score(method.transform(counts.train), counts.labels))
        row["paper_silhouette"] = system.silhouette
    if counts.test is not None:
        for score in system.scores:
            values = SCORES[score](method, counts.test)
            row |= {score: float(values.mean()), f"{score}_se": float(values.std(ddof=1) / math.sqrt(len(values)))}
        row |= {"authors": system.authors, "authors_score": system.scored}
    return row


def in_a_process(name: str, task: str, seed: int) -> dict[str, Any]:
    """What :func:`measure` gives in a new process with one thread; its errors go where ours go."""
    return json.loads(printed_by(MODULE, "--measure", name, task, str(seed)))


def run(options: argparse.Namespace, command: str) -> pd.DataFrame:
    """Measure every system on every task for every seed; ``--out`` is written after each."""
    rows: list[dict[str, Any]] = []
    origin = {"command": command, "versions": {"python": platform.python_version(), **versions(PACKAGES)}}
    for task in options.tasks:
        for name in options.systems:
            for seed in options.seeds:
                result = in_a_process(name, task, seed)
                sys.stderr.write(f"{name}, {task}, seed {seed}: {result['cpu_seconds']:.1f} CPU s\n")
                rows.append({"task": task, "system": name, "seed": seed, **result, **origin})
                if options.out:
                    pd.DataFrame(rows).to_json(options.out, orient="records", indent=1)
    return pd.DataFrame(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the systems that have one")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.out and not options.out.parent.is_dir():
        parser.error(f"--out must be in a folder that exists, got {options.out}; make {options.out.parent} first")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print a table by task and write all; in a child process, do that process's part."""
    options = parse(arguments)
    if options.measure:
        name, task, seed = options.measure
        sys.stdout.write(json.dumps(measure(name, task, int(seed))) + "\n")
        return
    command = command_line(MODULE, arguments)
    table = run(options, command)
    for task, part in table.groupby("task", sort=False):
        shown = part.drop(columns=["task", "command", "versions"]).dropna(axis=1, how="all")
        sys.stdout.write(f"{task!s}\n{shown.to_string(index=False, float_format='{:.6g}'.format)}\n\n")


if __name__ == "__main__":
    main()
