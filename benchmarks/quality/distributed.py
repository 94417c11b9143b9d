"""Held-out evidence bound of data-parallel training by one and by several processes.

    python -m benchmarks.quality.distributed FILE.h5ad
    torchrun --nproc-per-node 2 -m benchmarks.quality.distributed FILE.h5ad

The bound is that after equal epochs, nats per cell, for several seeds and both normalisations; the cells held out
are the same for every seed and number of processes. One JSON line for each fit.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import anndata
import torch

import pyro_scvi as ps
from benchmarks.harness.commands import parser_of
from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.inference.evaluation import bound_terms, evaluating

MODULE = "benchmarks.quality.distributed"
DRAWS = 20  # of the latents of each held-out cell


def held_out_bound(fit: ps.Fit, cells: ps.Cells) -> float:
    """Mean evidence bound of cells, nats per cell."""
    with evaluating(fit.model, fit.guide, 0):
        batches = minibatches(fit, cells).in_order(128)
        bounds = [bound_terms(fit.guide, x, gamma, DRAWS)[0].mean(0) for x, gamma in batches]
    return float(torch.cat(bounds).mean())


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("file", type=Path, help="raw counts")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit once for each normalisation and seed."""
    options = parse(arguments)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", ".* ha(s|ve) no counts")
    train, test = ps.Cells.from_anndata(anndata.read_h5ad(options.file)).split(0.1, seed=0)
    with ps.distributed.joined() as ranks:
        for norm in (ps.networks.BatchNorm(), ps.networks.LayerNorm()):
            for seed in options.seeds:
                model = ps.SCVI(train.n_genes, seed=seed, norm=norm)
                guide, started = ps.guides.DiagonalNormal(model, seed=seed, norm=norm), time.perf_counter()
                shared = {"epochs": options.epochs, "progress": False, "device": "cpu"}
                fit = ps.fit(model, train, guide, seed=seed, ranks=ranks, **shared)
                row = {"ranks": ranks.size, "norm": type(norm).__name__, "seed": seed, "n": test.n_cells}
                row |= {"bound": held_out_bound(fit, test), "seconds": time.perf_counter() - started}
                if ranks.first:
                    sys.stdout.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
