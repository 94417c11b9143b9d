"""Held-out evidence on the cortex data beside the peers: ``python -m benchmarks.quality.evidence --seeds 0 1 2 --out FILE``.

Every system is fitted on the same 75 % of the cells and gives log probabilities of the counts of the rest, in nats per
cell. Systems are compared by paired differences over the test cells; the spread over seeds says what a refit changes.
"""

import argparse
import hashlib
import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.model_selection import train_test_split

from benchmarks.systems import peers

DEFAULT_DATA = Path(os.environ.get("PYRO_SCVI_DATA", "../shared/data")) / "cortex_558.h5ad"
PACKAGES = "torch", "pyro-ppl", "numpy", "scikit-learn", "scvi-tools"
DENSITY = "log density of log1p counts, Jacobian added"
INTEGRATED = "log probability, latents integrated out"
AMORTIZED = "evidence bound of the amortized posterior"
REFERENCES = {
    "FA density": ("factor analysis", DENSITY),
    "seed preset": ("pyro-scvi, seed 2017", INTEGRATED),
    "default": ("pyro-scvi, default", INTEGRATED),
}
KEYS = ["system", "quantity", "seed"]
SYSTEMS = "fa", "scvi-tools", "seed", "default", "bfloat16"
KHAT_LIMIT = 0.7


class Task(NamedTuple):
    """One experiment: all cells as an AnnData, the row numbers to fit and to score, the evidence sampler's draws."""

    data: anndata.AnnData
    train: np.ndarray
    test: np.ndarray
    samples: int

    @property
    def counts(self) -> tuple[np.ndarray, np.ndarray]:
        """Raw counts (cells, genes) to fit and to score."""
        x = self.data.X.toarray() if sparse.issparse(self.data.X) else np.asarray(self.data.X)
        return x[self.train], x[self.test]


class Score(NamedTuple):
    """One quantity of one fit: ``value`` and ``khat`` (cells,); ``khat`` is None where nothing was sampled."""

    quantity: str
    value: np.ndarray
    khat: np.ndarray | None
    fit_seconds: float
    score_seconds: float


class System(NamedTuple):
    """A row of the table: its name, how it is fitted and scored, and whether a seed makes another fit of it."""

    name: str
    score: Callable[[Task, int], Iterable[Score]]
    seeded: bool = True


def score_factor_analysis(task: Task, seed: int) -> list[Score]:
    """Score factor analysis: the paper's density and, from the same fit, the probability of counts."""
    result = peers.factor_analysis(*task.counts, seed=seed, samples=task.samples)
    probability = result.probability
    return [
        Score(DENSITY, result.log_density, None, result.fit_seconds, 0.0),
        Score(INTEGRATED, probability.log_evidence, probability.khat, result.fit_seconds, result.score_seconds),
    ]


def score_scvi_tools(task: Task, seed: int, *, epochs: int) -> list[Score]:
    """Fit and score scvi-tools with its defaults, the library integrated out with z."""
    fitted = peers.scvi_tools(*task.counts, epochs=epochs, seed=seed)
    started = time.perf_counter()
    result = fitted.evidence(samples=task.samples, seed=0)
    return [Score(INTEGRATED, result.log_evidence, result.khat, fitted.fit_seconds, time.perf_counter() - started)]


def score_ours(task: Task, seed: int, *, configure: Callable[[Any, int], tuple[Any, dict[str, Any]]]) -> list[Score]:
    """Fit and score this package's model; ``configure`` (training cells, seed) gives the model and options of fit."""
    import pyro_scvi as ps

    cells = ps.Cells.from_anndata(task.data)
    train, test = cells.take(task.train), cells.take(task.test)
    started = time.perf_counter()
    model, options = configure(train, seed)
    # As with the peers, on one kind of machine and on all training cells: nothing is stopped by held-out cells.
    options = {"seed": seed, "device": "cpu", "validation": 0, "progress": False, **options}
    fit = ps.fit(model, train, **options)
    fitted = time.perf_counter()
    table = ps.evidence(fit, test, samples=task.samples, seed=0)
    seconds = fitted - started, time.perf_counter() - fitted
    return [
        Score(INTEGRATED, table["log_evidence"].to_numpy(), table["khat"].to_numpy(), *seconds),
        Score(AMORTIZED, table["amortized_bound"].to_numpy(), None, *seconds),
    ]


def seed_preset(cells: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """Configure the paper's model of 2017."""
    import pyro_scvi as ps

    return ps.presets.seed_2017(cells, seed=seed)


def default_model(cells: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """Configure the package's default model."""
    import pyro_scvi as ps

    return ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, seed=seed), {}


def bfloat16_model(cells: Any, seed: int) -> tuple[Any, dict[str, Any]]:
    """Configure the package's default model, its matrix products in bfloat16 during training."""
    model, options = default_model(cells, seed)
    return model, options | {"autocast": torch.bfloat16}


def systems(names: Iterable[str], epochs: Iterable[int]) -> list[System]:
    """Look up the systems of the table; scvi-tools comes once for every number of ``epochs``."""
    rows = {
        "fa": [System("factor analysis", score_factor_analysis, seeded=False)],
        "scvi-tools": [System(f"scvi-tools, {n} epochs", partial(score_scvi_tools, epochs=n)) for n in epochs],
        "seed": [System("pyro-scvi, seed 2017", partial(score_ours, configure=seed_preset))],
        "default": [System("pyro-scvi, default", partial(score_ours, configure=default_model))],
        "bfloat16": [System("pyro-scvi, default, bfloat16", partial(score_ours, configure=bfloat16_model))],
    }
    return [system for name in names for system in rows[name]]


def read_task(path: Path, *, samples: int) -> Task:
    """Read the data and split it as the paper's authors did: 75 / 25, random state 0."""
    data = anndata.read_h5ad(path)
    train, test = train_test_split(np.arange(data.n_obs), test_size=0.25, random_state=0)
    return Task(data, train, test, samples)


def values_of(system: System, task: Task, seed: int, command: str) -> pd.DataFrame:
    """Fit and score one system: one row per quantity and test cell, the KEYS first."""
    frames = []
    for score in system.score(task, seed):
        khat = np.full(len(score.value), np.nan) if score.khat is None else score.khat
        columns = {"cell": task.test, "value": score.value, "khat": khat}
        seconds = {"fit_seconds": score.fit_seconds, "score_seconds": score.score_seconds}
        names = {"system": system.name, "quantity": score.quantity, "seed": seed}
        frames.append(pd.DataFrame({**names, **columns, **seconds, "command": command}))
    return pd.concat(frames, ignore_index=True)


def merged(old: pd.DataFrame | None, new: pd.DataFrame) -> pd.DataFrame:
    """Join the old rows with those of ``new`` in place of older ones of the same system, quantity and seed."""
    if old is None:
        return new
    stale = pd.MultiIndex.from_frame(old[KEYS]).isin(pd.MultiIndex.from_frame(new[KEYS]))
    return pd.concat([old[~stale], new], ignore_index=True)


def summarise(values: pd.DataFrame) -> pd.DataFrame:
    """One row per system, quantity and seed: mean, se over cells, paired differences, spread over seeds, effort.

    Differences are in nats per cell with the se of the mean paired difference; the reference is the fit of the same
    seed, or the reference's first one if it has none of that seed. The spread is the sd of the seeds' means.
    """
    wide = values.pivot_table(index="cell", columns=KEYS, values="value", sort=False)
    rows = [_summary_row(wide, key, group) for key, group in values.groupby(KEYS, sort=False)]
    table = pd.DataFrame(rows)
    means = table.groupby(["system", "quantity"])["mean"]
    table.insert(table.columns.get_loc("n_cells"), "spread_over_seeds", means.transform("std"))
    return table


def _summary_row(wide: pd.DataFrame, key: tuple[str, str, int], group: pd.DataFrame) -> dict[str, Any]:
    system, quantity, seed = key
    row: dict[str, Any] = {"system": system, "quantity": quantity, "seed": seed}
    row["mean"], row["se"] = _mean_se(wide[key])
    for name, (reference, measured) in REFERENCES.items():
        row[f"minus {name}"], row[f"minus {name} se"] = _paired(wide, key, (reference, measured))
    khat = group["khat"].dropna()
    row["khat_above"] = float((khat > KHAT_LIMIT).mean()) if len(khat) else math.nan
    first = group.iloc[0]
    return {**row, "n_cells": len(group), **first[["fit_seconds", "score_seconds", "command"]]}


def _mean_se(value: pd.Series) -> tuple[float, float]:
    return float(value.mean()), float(value.sem())


def _paired(wide: pd.DataFrame, key: tuple[str, str, int], reference: tuple[str, str]) -> tuple[float, float]:
    seeds = [seed for *names, seed in wide.columns if tuple(names) == reference]
    if not seeds:
        return math.nan, math.nan
    seed = key[-1] if key[-1] in seeds else seeds[0]
    return _mean_se(wide[key] - wide[(*reference, seed)])


def report(table: pd.DataFrame, data: Path, task: Task) -> dict[str, Any]:
    """Collect what goes into the JSON file: the rows, the data's name and digest, the sizes and the versions."""
    rows = json.loads(table.to_json(orient="records", double_precision=6))
    return {
        "data": {"file": data.name, "sha256": hashlib.sha256(data.read_bytes()).hexdigest()},
        "n_train": len(task.train),
        "n_test": len(task.test),
        "n_genes": task.data.n_vars,
        "samples": task.samples,
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "rows": rows,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.quality.evidence", description=__doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="AnnData file with raw counts in X")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--values", type=Path, help="CSV file of values per cell: read if there, completed, written")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one fit each")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    epochs = "of scvi-tools, one fit each; 400 is its own choice for so few cells"
    parser.add_argument("--epochs", type=int, nargs="+", default=[150, 400], help=epochs)
    parser.add_argument("--samples", type=int, default=1000, help="draws of the evidence sampler")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its table and write it."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    command = shlex.join(
        ["python", "-m", "benchmarks.quality.evidence", *(sys.argv[1:] if arguments is None else arguments)]
    )
    task = read_task(options.data, samples=options.samples)
    values = pd.read_csv(options.values) if options.values and options.values.exists() else None
    for system in systems(options.systems, options.epochs):
        for seed in options.seeds if system.seeded else options.seeds[:1]:
            sys.stderr.write(f"{system.name}, seed {seed}\n")
            values = merged(values, values_of(system, task, seed, command))
            if options.values:
                values.to_csv(options.values, index=False)
    table = summarise(values)
    sys.stdout.write(table.drop(columns="command").to_string(index=False, float_format="{:.3f}".format) + "\n")
    if options.out:
        options.out.write_text(json.dumps(report(table, options.data, task), indent=1) + "\n")


if __name__ == "__main__":
    main()
