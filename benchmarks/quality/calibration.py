"""Simulation-based calibration of the samplers on a model fitted to the mouse cortex data.

    python -m benchmarks.quality.calibration --cells 1000 --out calibration.json

Cells are simulated from the fitted default model, z and l from their prior; each sampler is asked for them again.
A right sampler has uniform ranks: p above .001 for every quantity, and 90 % coverage within 4 standard errors.
"""

import argparse
import os
import sys
import time
from pathlib import Path

import anndata
import pandas as pd

import pyro_scvi as ps

DATA = Path(os.environ.get("PYRO_SCVI_DATA", "../shared/data"))
SAMPLERS = {
    "HMC": (ps.HMC(), 5),
    "Importance": (ps.Importance(), 1),
    "Refined": (ps.Refined(), 1),
    "Amortized": (ps.Amortized(), 1),
}


def main() -> None:
    """Fit once, calibrate every sampler, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cells = ps.Cells.from_anndata(anndata.read_h5ad(DATA / "cortex_558.h5ad"))
    train, _ = cells.split(held_out=752, seed=options.seed)
    fit = ps.fit(ps.SCVI(train.n_genes, seed=options.seed), train, seed=options.seed, progress=False)
    tables = {}
    for name in options.samplers:
        sampler, thin = SAMPLERS[name]
        started = time.perf_counter()
        found = ps.calibrate(fit, options.cells, sampler=sampler, thin=thin, seed=options.seed)
        tables[name] = found.summary.assign(n=options.cells, seconds=time.perf_counter() - started)
        sys.stdout.write(f"{name}\n{tables[name].round(4).to_string()}\n\n")
    if options.out:
        pd.concat(tables, names=["sampler"]).reset_index().to_json(options.out, orient="records", indent=1)


if __name__ == "__main__":
    main()
