"""Calls of genes where it is known which differ: false discovery share, power and intervals.

    python -m benchmarks.quality.calls --seeds 0 1 2 --cells 500 1000 --out FILE

Cells are drawn from a fit to two types of real blood cells (B and CD8 T cells of pbmc4k, whose counts are a
reconstruction), with the laws of 60 % of the genes exchanged between the groups so that these are exactly null. Depths
are equal or fourfold, and in one scene four donors of each group differ in every gene (sd .3 of the log mean). A model
is fitted to the drawn cells, not told of the groups. All systems test the genes that group means test.

``false_share`` is the share of null genes among those called at .05, ``power`` the share of the others that is called,
and ``auc`` the area under the curve of its score. ``slope`` and ``covered`` are of group means: slope of lfc on truth
and share of the 95 % intervals that hold it, over genes with 50 expected molecules; ``slope_each`` and ``covered_each``
are over those with 50 in each group.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

import pyro_scvi as ps
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.exchanged import Drawn, Laws, Scene, drawn_from, laws_of
from benchmarks.harness.machine import versions
from benchmarks.harness.paths import DATA
from benchmarks.systems.callers import CALLERS, Caller, Calls, Case, compared

MODULE = "benchmarks.quality.calls"
FILE, TYPES = "pbmc4k_top2000.h5ad", ("B cells", "CD8 T cells")
CALLED, DONORS, DEPTHS = 0.05, 4, 4.0
MOLECULES = 50  # expected, of genes whose fold changes are compared with the truth
PACKAGES = "torch", "pyro-ppl", "numpy", "scipy", "scvi-tools"
FIGURES = ["false_share", "power", "auc", "called", "slope", "covered", "slope_each", "covered_each"]


def scenes(sizes: Sequence[int]) -> list[Scene]:
    """Equal and unequal depths at every size, and donors at the first."""
    plain = [Scene(name, n, depths) for n in sizes for name, depths in (("equal", 1.0), ("fourfold depths", DEPTHS))]
    return [*plain, Scene(f"{DONORS} donors a group", sizes[0], n_donors=DONORS)]


def source(folder: Path, epochs: int | None) -> tuple[Laws, np.ndarray, float]:
    """Laws of real cells of both types by a fit, which of them are of the second, and the median of their totals."""
    adata = anndata.read_h5ad(folder / FILE)
    adata = adata[adata.obs["labels"].isin(TYPES)]
    adata = adata[:, np.asarray(adata.X.sum(0)).ravel() > 0].copy()
    cells = ps.Cells.from_anndata(adata)
    fit = ps.fit(ps.SCVI(cells.n_genes), cells, epochs=epochs, device="cpu", progress=False)
    second = (adata.obs["labels"] == TYPES[1]).to_numpy()
    return laws_of(fit, cells, seed=0), second, float(np.median(cells.totals))


def case_of(drawn: Drawn, seed: int, epochs: int | None) -> tuple[Case, pd.DataFrame]:
    """Fit drawn cells and compare their group means; genes without a count are left out first."""
    seen = drawn.counts.sum(0) > 0
    columns = {name: getattr(drawn, name)[..., seen] for name in ("null", "lfc", "expected")}
    drawn = drawn._replace(counts=drawn.counts[:, seen], **columns)
    cells = ps.Cells.from_counts(drawn.counts)
    model = ps.SCVI(cells.n_genes, seed=seed)
    fit = ps.fit(model, cells, epochs=epochs, seed=seed, device="cpu", progress=False)
    table = compared(fit, cells, drawn, ps.differential.GroupMeans(), seed)
    return Case(drawn, fit, cells, table["tested"].to_numpy(), seed), table


def judged(calls: Calls, case: Case) -> dict[str, float]:
    """What is true of the genes that a system calls."""
    called, null = calls.q <= CALLED, case.drawn.null
    return {
        "false_share": float((called & null).sum() / max(1, called.sum())),
        "power": float(called[~null].mean()),
        "auc": float(roc_auc_score(~null, calls.score)),
        "called": int(called.sum()),
    }


def measured(table: pd.DataFrame, drawn: Drawn) -> dict[str, float]:
    """Fold changes beside the truth, over genes with enough molecules."""
    found = {}
    for name, expected in zip(("", "_each"), drawn.expected, strict=True):
        known = (expected >= MOLECULES) & table["tested"].to_numpy()
        of, truth = table[known], drawn.lfc[known]
        inside = (of["lfc_low"] <= truth) & (truth <= of["lfc_high"])
        found |= {f"slope{name}": float(np.polyfit(truth, of["lfc"], 1)[0]), f"covered{name}": float(inside.mean())}
    return found


def rows_of(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each scene, seed and system."""
    callers = [CALLERS[name] for name in options.systems]
    laws, second, depth = source(options.folder, options.epochs)
    for seed in options.seeds:
        for scene in scenes(options.cells):
            case, table = case_of(drawn_from(laws, second, depth, scene, seed), seed, options.epochs)
            for caller in callers:
                if scene.n_donors or not caller.needs_donors:
                    yield _row(scene, seed, caller, case, table)


def _row(scene: Scene, seed: int, caller: Caller, case: Case, table: pd.DataFrame) -> dict[str, Any]:
    key = {"scene": scene.name, "n_cells": scene.n_cells, "seed": seed, "system": caller.name}
    beside = measured(table, case.drawn) if caller is CALLERS["means"] else {}
    row = key | judged(caller.calls(case), case) | beside
    sys.stderr.write(f"{json.dumps(row)}\n")
    return row


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds, with standard errors."""
    by = rows.groupby(["scene", "n_cells", "system"], sort=False)[[name for name in FIGURES if name in rows]]
    errors = by.std() / np.sqrt(by.size().to_numpy()[:, None])
    return by.mean().join(errors.add_suffix("_se")).reset_index()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--folder", type=Path, default=DATA, help="of the data files")
    parser.add_argument("--systems", nargs="+", choices=CALLERS, default=list(CALLERS))
    parser.add_argument("--cells", type=int, nargs="+", default=[500, 1500, 5000], help="per group, one or several")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one simulation and fit each")
    parser.add_argument("--epochs", type=int, help="of every fit; by default those of fit")
    parser.add_argument("--out", type=Path, help="JSON file for the rows and the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its table and write it."""
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = pd.DataFrame(rows_of(options))
    table = over_seeds(rows)
    sys.stdout.write(f"{table.to_string(index=False, float_format='{:.3f}'.format)}\n")
    if options.out:
        written = {"command": command_line(MODULE, arguments), "versions": versions(PACKAGES)}
        for name, frame in {"rows": rows, "over seeds": table}.items():
            written[name] = json.loads(frame.to_json(orient="records", double_precision=6))
        options.out.write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
