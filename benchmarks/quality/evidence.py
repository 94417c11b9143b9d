"""Held-out evidence on the cortex data beside the peers, in nats per cell.

    python -m benchmarks.quality.evidence --seeds 0 1 2 --out FILE

Every system is fitted on the same 75 % of the cells and gives log probabilities of the counts of the rest. Systems are
compared by paired differences over the test cells; the spread over seeds shows how much a refit changes.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.cortex_split import DEFAULT_DATA, Task, read_task
from benchmarks.harness.machine import versions
from benchmarks.systems.evidence_scores import DENSITY, INTEGRATED, SYSTEMS, System, systems

MODULE = "benchmarks.quality.evidence"
PACKAGES = "torch", "pyro-ppl", "numpy", "scikit-learn", "scvi-tools"
REFERENCES = {
    "FA density": ("factor analysis", DENSITY),
    "seed preset": ("pyro-scvi, seed 2017", INTEGRATED),
    "default": ("pyro-scvi, default", INTEGRATED),
}
KEYS = ["system", "quantity", "seed"]
KHAT_LIMIT = 0.7


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


def merged(old: pd.DataFrame, new: pd.DataFrame) -> pd.DataFrame:
    """Join the old rows with those of ``new`` in place of older ones of the same system, quantity and seed."""
    if old.empty:
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
    table.insert(list(table.columns).index("n_cells"), "spread_over_seeds", means.transform("std"))
    return table


def _summary_row(wide: pd.DataFrame, key: tuple[Hashable, ...], group: pd.DataFrame) -> dict[str, Any]:
    system, quantity, seed = key
    row: dict[str, Any] = {"system": system, "quantity": quantity, "seed": seed}
    row["mean"], row["se"] = _mean_se(wide[key])
    for name, (reference, measured) in REFERENCES.items():
        row[f"minus {name}"], row[f"minus {name} se"] = _paired(wide, key, (reference, measured))
    khat = group["khat"].dropna()
    row["khat_above"] = float((khat > KHAT_LIMIT).mean()) if len(khat) else math.nan
    first = group.iloc[0]
    return {**row, "n_cells": len(group), **first[["fit_seconds", "score_seconds", "command"]]}


def _mean_se(value: "pd.Series[float]") -> tuple[float, float]:
    return float(value.mean()), float(np.asarray(value.sem()))


def _paired(wide: pd.DataFrame, key: tuple[Hashable, ...], reference: tuple[str, str]) -> tuple[float, float]:
    columns: Any = wide.columns  # of system, quantity and seed, which pandas' types take for text
    seeds = [seed for *names, seed in columns if tuple(names) == reference]
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
        "versions": versions(PACKAGES),
        "rows": rows,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
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
    command = command_line(MODULE, arguments)
    task = read_task(options.data, samples=options.samples)
    values = pd.read_csv(options.values) if options.values and options.values.exists() else pd.DataFrame()
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
