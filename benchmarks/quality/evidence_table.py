"""Table of held-out evidence: means over cells, paired differences between systems, spread over seeds."""

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.systems.evidence_scores import DENSITY, INTEGRATED

REFERENCES = {
    "FA density": ("factor analysis", DENSITY),
    "seed preset": ("pyro-scvi, seed 2017", INTEGRATED),
    "default": ("pyro-scvi, default", INTEGRATED),
}
KEYS = ["system", "quantity", "seed"]
KHAT_LIMIT = 0.7


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
