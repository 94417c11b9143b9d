"""Peak resident memory of every verb on 20,000 cells: ``python -m benchmarks.rows.memory --seeds 0 --out FILE``.

Every verb runs with its default arguments on the same synthetic counts, in a process of its own, so that the peak is
that verb's: imports, reading the cells and loading the fit are in it and are also given alone (``before_mb``). The
process that starts the others imports nothing large, since a child's peak starts at what its parent holds. The fit is
one of a single epoch: memory does not depend on what the weights are. The verbs that take long
for every cell get one of their batches instead of all cells: what they need at a time is far more than what they keep
of a cell.
"""

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

LIMIT_MB = 2000
MEAN_LOG_RATE, SD_LOG_RATE = -3.2, 1.2  # of a gene's counts in a cell: one entry in ten is not zero
GROUPS = "a", "b", "c", "d"


def synthetic_counts(n_cells: int, n_genes: int, seed: int) -> Any:
    """AnnData of sparse counts, negative binomial with four groups of cells that differ in a tenth of the genes."""
    import anndata
    from scipy import sparse

    generator = np.random.default_rng(seed)
    rate = np.exp(generator.normal(MEAN_LOG_RATE, SD_LOG_RATE, n_genes))
    change = np.where(generator.random((len(GROUPS), n_genes)) < 0.1, 4.0, 1.0)
    group = generator.integers(len(GROUPS), size=n_cells)
    depth = np.exp(generator.normal(0, 0.4, n_cells))
    blocks = []
    for rows in np.array_split(np.arange(n_cells), -(-n_cells // 1000)):
        mean = depth[rows, None] * rate * change[group[rows]]
        blocks.append(sparse.csr_matrix(generator.poisson(generator.gamma(2.0, mean / 2.0)).astype(np.int32)))
    data = anndata.AnnData(sparse.vstack(blocks, format="csr"))
    data.obs_names, data.var_names = data.obs_names.astype(str), data.var_names.astype(str)
    data.obs["group"] = np.array(GROUPS)[group]
    return data


def train(fit: Any, cells: Any) -> Any:
    """Fit a new default model for two epochs; more of them need no more memory."""
    import pyro_scvi as ps

    return ps.fit(ps.SCVI(cells.n_genes), cells, epochs=2, progress=False)


def mean_rate(fit: Any, cells: Any) -> Any:
    """Draw z and w of every cell and keep the mean of w, as one must where all draws would be 16 GB."""
    import pyro_scvi as ps

    return ps.sample_posterior(fit, cells, sites=("z", "w"), reduce=lambda drawn: {"w": drawn["w"].mean(0)})


def compare(fit: Any, cells: Any) -> Any:
    """Compare two fits of a model."""
    import pyro_scvi as ps

    return ps.compare({"one": fit, "two": fit}, cells)


def differential_expression(fit: Any, cells: Any) -> Any:
    """Compare two groups of some five thousand cells each."""
    import pyro_scvi as ps

    return ps.differential_expression(fit, cells, groupby="group", group_a="a", group_b="b")


def prior_predictive(fit: Any, cells: Any) -> Any:
    """Draw as many new cells."""
    import pyro_scvi as ps

    return ps.prior_predictive(fit.model, cells.n_cells)


def kept_by_leave_one_out(fit: Any, cells: Any) -> Any:
    """Leave out every entry of every cell, with a tenth of the draws and without the search for a proposal."""
    import pyro_scvi as ps

    return ps.leave_one_out(fit, cells, samples=100, sampler=ps.Amortized())


def calibrate(fit: Any, cells: Any) -> Any:
    """Calibrate with one batch of simulated cells and short chains, which need no less at a time than long ones."""
    import pyro_scvi as ps

    return ps.calibrate(fit, cells.n_cells, sampler=ps.HMC(warmup=5), thin=1)


def named(verb: str) -> Callable[[Any, Any], Any]:
    """Find the package's verb that takes a fit and cells and nothing else."""

    def call(fit: Any, cells: Any) -> Any:
        import pyro_scvi as ps

        return getattr(ps, verb)(fit, cells)

    return call


VERBS: dict[str, Callable[[Any, Any], Any]] = {
    "fit": train,
    "embed": named("embed"),
    "sample_posterior": named("sample_posterior"),
    "impute": named("impute"),
    "technical_zero_probability": named("technical_zero_probability"),
    "differential_expression": differential_expression,
    "prior_predictive": prior_predictive,
    "posterior_predictive": named("posterior_predictive"),
    "check_predictions": named("check_predictions"),
    "to_datatree": named("to_datatree"),
    "leave_one_out, 100 amortized draws": kept_by_leave_one_out,
}
BY_BATCH: dict[str, tuple[Callable[[Any, Any], Any], int]] = {  # and the cells of a batch
    "sample_posterior, mean of w": (mean_rate, 64),
    "evidence": (named("evidence"), 64),
    "compare": (compare, 64),
    "annealed_evidence": (named("annealed_evidence"), 16),
    "leave_one_out": (named("leave_one_out"), 8),
    "calibrate, short chains": (calibrate, 64),
}


def task(verb: str, n_cells: int) -> tuple[Callable[[Any, Any], Any], int]:
    """Look up a verb and how many of the cells it gets."""
    return BY_BATCH[verb] if verb in BY_BATCH else (VERBS[verb], n_cells)


def peak_mb() -> float:
    """Largest resident memory of this process so far, in units of 10^6 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def prepare(folder: Path, options: argparse.Namespace, seed: int) -> None:
    """Write the cells, and a fit of one epoch, into ``folder``."""
    import pyro_scvi as ps

    data = synthetic_counts(options.cells, options.genes, seed)
    data.write_h5ad(folder / "cells.h5ad")
    cells = ps.Cells.from_anndata(data)
    ps.fit(ps.SCVI(cells.n_genes), cells, epochs=1, progress=False).save(folder / "fit")


def measure(folder: Path, verb: str) -> dict[str, float]:
    """Run one verb in this process: its cells, its peak, the peak before it, and its CPU seconds."""
    import anndata
    import torch

    import pyro_scvi as ps

    torch.set_num_threads(1)
    fit, cells = ps.load(folder / "fit"), ps.Cells.from_anndata(anndata.read_h5ad(folder / "cells.h5ad"))
    call, n_cells = task(verb, cells.n_cells)
    cells = cells.take(slice(n_cells)) if n_cells < cells.n_cells else cells
    before, started = peak_mb(), time.process_time()
    call(fit, cells)
    seconds = time.process_time() - started
    return {"n_cells": n_cells, "cpu_seconds": seconds, "before_mb": before, "peak_mb": peak_mb()}


def in_a_process(*arguments: str) -> str:
    """Run this module with other arguments and return what it prints; its errors go where ours go."""
    command = [sys.executable, "-m", "benchmarks.rows.memory", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout


def run(options: argparse.Namespace, command: str) -> pd.DataFrame:
    """Measure every verb for every seed, each in its process."""
    rows: list[dict[str, Any]] = []
    sizes = ["--cells", str(options.cells), "--genes", str(options.genes)]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            in_a_process("--prepare", folder, "--seeds", str(seed), *sizes)
            for verb in options.verbs:
                found = json.loads(in_a_process("--measure", folder, verb))
                sys.stderr.write(f"{verb}, seed {seed}: {found['peak_mb']:.0f} MB, {found['cpu_seconds']:.0f} s\n")
                row = {"verb": verb, **found, "n_genes": options.genes, "seed": seed}
                rows.append({**row, "below_limit": found["peak_mb"] < LIMIT_MB, "command": command})
    return pd.DataFrame(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.rows.memory", description=__doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the counts")
    parser.add_argument("--verbs", nargs="+", choices=[*VERBS, *BY_BATCH], default=[*VERBS, *BY_BATCH])
    parser.add_argument("--cells", type=int, default=20_000)
    parser.add_argument("--genes", type=int, default=2_000)
    parser.add_argument("--prepare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its table and write it; in a child process, do that process's part."""
    options = parse(arguments)
    if options.prepare:
        return prepare(options.prepare, options, options.seeds[0])
    if options.measure:
        folder, verb = options.measure
        sys.stdout.write(json.dumps(measure(Path(folder), verb)) + "\n")
        return None
    command = shlex.join(
        ["python", "-m", "benchmarks.rows.memory", *(sys.argv[1:] if arguments is None else arguments)]
    )
    table = run(options, command)
    sys.stdout.write(table.drop(columns="command").to_string(index=False, float_format="{:.1f}".format) + "\n")
    if options.out:
        options.out.write_text(table.to_json(orient="records", indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
