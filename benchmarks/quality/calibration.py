"""Simulation-based calibration of the samplers on a model fitted to the mouse cortex data.

    python -m benchmarks.quality.calibration --cells 1000 --out calibration.json

Cells are simulated from the fitted default model, z and l from their prior; each sampler is asked for them again.
A right sampler has uniform ranks: p above .001 for every quantity, and 90 % coverage within 4 standard errors.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import anndata
import pandas as pd

import pyro_scvi as ps
from benchmarks.harness.commands import parser_of
from benchmarks.harness.cortex_split import DEFAULT_DATA
from pyro_scvi.inference.samplers import Sampler

MODULE = "benchmarks.quality.calibration"
SAMPLERS: dict[str, tuple[Sampler, int]] = {  # and one draw in so many is kept
    "HMC": (ps.HMC(), 5),
    "Importance": (ps.Importance(), 1),
    "Refined": (ps.Refined(), 1),
    "Amortized": (ps.Amortized(), 1),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--out", type=Path)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit once, calibrate every sampler, print and write the table."""
    options = parse(arguments)
    cells = ps.Cells.from_anndata(anndata.read_h5ad(DEFAULT_DATA))
    train, _ = cells.split(held_out=752, seed=options.seed)
    fit = ps.fit(ps.SCVI(train.n_genes, seed=options.seed), train, seed=options.seed, progress=False)
    tables = {}
    for name in options.samplers:
        sampler, thin = SAMPLERS[name]
        started = time.perf_counter()
        result = ps.calibrate(fit, options.cells, sampler=sampler, thin=thin, seed=options.seed)
        tables[name] = result.summary.assign(n=options.cells, seconds=time.perf_counter() - started)
        sys.stdout.write(f"{name}\n{tables[name].round(4).to_string()}\n\n")
    if options.out:
        pd.concat(tables, names=["sampler"]).reset_index().to_json(options.out, orient="records", indent=1)


if __name__ == "__main__":
    main()
