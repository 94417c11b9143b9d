"""Posterior samplers on held-out cells: Pareto k-hat, R-hat, effective draws, and agreement with NUTS.

    python -m benchmarks.quality.posterior --seeds 0 1 2 --out FILE

The default model and the paper's own are fitted as for the evidence. On the same random held-out cells every sampler
draws the latents, and its own diagnostics say how far to trust it: Pareto k-hat for weighted draws, R-hat, effective
draws and divergences for Hamiltonian Monte Carlo. For some of the cells the latter is compared with Pyro's NUTS on the
model as it stands, in the mean and the standard deviation of every latent.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

import pyro_scvi as ps
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.cortex_split import DEFAULT_DATA, read_task
from benchmarks.harness.machine import versions
from benchmarks.quality.nuts import agreement, hamiltonian, moments, nuts
from benchmarks.systems.our_models import Configured, default, seed_2017
from pyro_scvi.inference.samplers import Sampler

MODULE = "benchmarks.quality.posterior"
PACKAGES = "torch", "pyro-ppl", "numpy", "scikit-learn", "scvi-tools"
KHAT_LIMIT, RHAT_LIMIT = 0.7, 1.05
MODELS: dict[str, Callable[[ps.Cells, int], Configured]] = {"default": default, "seed": seed_2017}
HAMILTONIAN = ps.HMC()
SAMPLERS: dict[str, Sampler] = {  # HMC comes last: its draws are those compared with NUTS
    "Amortized": ps.Amortized(),
    "Refined": ps.Refined(),
    "Importance": ps.Importance(),
    "HMC": HAMILTONIAN,
}


def fitted(train: ps.Cells, model: str, seed: int) -> ps.Fit:
    """Fit to all training cells, none of them set aside."""
    configured, options = MODELS[model](train, seed)
    options = {"seed": seed, "device": "cpu", "validation": 0, "progress": False, **options}
    return ps.fit(configured, train, **options)


def sampled(fit: ps.Fit, cells: ps.Cells, sampler: str, samples: int) -> tuple[xr.Dataset, float]:
    """Draw the latents of the cells; returns CPU seconds per cell too."""
    sites = ("z", "l") if fit.model.library.latent else ("z",)
    started = time.process_time()
    draws = ps.sample_posterior(fit, cells, samples=samples, sites=sites, sampler=SAMPLERS[sampler], seed=0)
    return draws, (time.process_time() - started) / cells.n_cells


def diagnosed(draws: xr.Dataset, samples: int, seconds: float) -> dict[str, float]:
    """Shares of the cells beyond the limits, with binomial standard errors, and effective draws."""
    row = {"n_cells": draws.sizes["cell"], "draws": samples, "cpu_seconds_per_cell": seconds}
    if "khat" in draws:
        row |= _share("khat_above", draws["khat"].to_numpy() > KHAT_LIMIT)
        row |= {"median_khat": float(draws["khat"].median())}
    else:
        row |= _share("rhat_below", draws["rhat"].to_numpy() < RHAT_LIMIT)
        row |= {"largest_rhat": float(draws["rhat"].max()), "divergences": int(draws["divergences"].sum())}
    return {**row, "median_ess": float(draws["ess"].median()), "min_ess": float(draws["ess"].min())}


def _share(name: str, holds: np.ndarray) -> dict[str, float]:
    share = float(holds.mean())
    return {name: share, f"{name}_se": float(np.sqrt(share * (1 - share) / len(holds)))}


def over_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """Mean and sd over the fits of one model."""
    of_sampler = rows.groupby(["model", "sampler"], sort=False)
    measured = ["khat_above", "rhat_below", "median_ess", "min_ess", "cpu_seconds_per_cell"]
    mean, sd = of_sampler[measured].mean(), of_sampler[measured[:2]].std().add_suffix("_sd")
    return mean.join(sd).join(of_sampler.size().rename("n_seeds")).reset_index()


def compared(fit: ps.Fit, cells: ps.Cells, draws: xr.Dataset, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Hamiltonian draws of the first cells against NUTS, one row per cell."""
    rows = []
    for cell in range(options.nuts_cells):
        started = time.process_time()
        theirs, diverged = nuts(fit, *cells[[cell]], warmup=options.nuts_warmup, samples=options.nuts_samples)
        seconds = time.process_time() - started
        agreed = agreement(moments(hamiltonian(draws, cell, HAMILTONIAN.chains)), moments(theirs))
        rhat = float(draws["rhat"][cell])
        rows.append({"cell": cell, **agreed, "rhat": rhat, "nuts_divergences": diverged, "nuts_cpu_seconds": seconds})
        sys.stderr.write(f"{rows[-1]}\n")
    return rows


def tables(options: argparse.Namespace) -> dict[str, pd.DataFrame]:
    """Fit, sample and compare what was asked for."""
    task = read_task(options.data, samples=options.samples)
    everything = ps.Cells.from_anndata(task.data)
    chosen = np.random.default_rng(0).choice(task.test, options.cells, replace=False)
    train, cells = everything.take(task.train), everything.take(chosen)
    rows, agreements = [], []
    for model in options.models:
        for seed in options.seeds:
            fit = fitted(train, model, seed)
            for sampler in SAMPLERS:
                draws, seconds = sampled(fit, cells, sampler, options.samples)
                key = {"model": model, "sampler": sampler, "seed": seed}
                rows.append({**key, **diagnosed(draws, options.samples, seconds)})
                sys.stderr.write(f"{rows[-1]}\n")
            if seed == options.seeds[0]:
                of_cells = compared(fit, cells, draws, options)
                agreements += [{"model": model, "seed": seed, **row} for row in of_cells]
    table = pd.DataFrame(rows)
    by_title = {
        "samplers": table,
        "samplers, over seeds": over_seeds(table),
        "HMC against NUTS": pd.DataFrame(agreements),
    }
    return {name: table for name, table in by_title.items() if len(table)}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="AnnData file with raw counts in X")
    parser.add_argument("--out", type=Path, help="JSON file for the tables")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one fit each")
    parser.add_argument("--cells", type=int, default=64, help="held-out cells, drawn at random")
    parser.add_argument("--samples", type=int, default=1000, help="draws per cell")
    parser.add_argument("--nuts-cells", type=int, default=4, help="cells compared with NUTS, for the first seed")
    parser.add_argument("--nuts-warmup", type=int, default=300)
    parser.add_argument("--nuts-samples", type=int, default=500)
    return parser.parse_args(arguments)


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
