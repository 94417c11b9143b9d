"""Evidence at the medians of random weights, beside the average over draws of them, of a sparse linear decoder.

    python -m benchmarks.quality.global_draws --seeds 0 1 2 --out global_draws.json

Medians are one choice of the weights out of many, and chosen by the training cells; the average pays for not knowing
them. An average over few draws is too low; how much, the row of half the draws shows, which is lower still.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch

import pyro_scvi as ps
from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.machine import versions

MODULE = "benchmarks.quality.global_draws"
PACKAGES = "torch", "pyro-ppl", "numpy"
GENES, LATENTS, EPOCHS = 100, 5, 30  # as in notebook 11
SPARSE = {"decoder.heads.log_mean.weight": ps.weights.LaplaceWeights(0.3)}


def split() -> tuple[ps.Cells, ps.Cells]:
    """Training and held-out cells of the demo counts, genes of largest variance."""
    adata = ps.datasets.pbmc68k_reduced()
    variance = adata.X.power(2).mean(0).A1 - adata.X.mean(0).A1 ** 2
    chosen = np.sort(np.argsort(-variance)[:GENES])
    return ps.Cells.from_anndata(adata[:, chosen].copy()).split(held_out=0.1, seed=0)


def measured(train: ps.Cells, test: ps.Cells, seed: int, draws: int, samples: int) -> pd.DataFrame:
    """Log p(x) of each held-out cell in nats, (cells, ways): at the medians, over half the draws and over all."""
    model = ps.SCVI(
        train.n_genes, LATENTS, decoder=ps.networks.LinearDecoder(), weight_priors=SPARSE, decoder_columns=[], seed=seed
    )
    fit = ps.fit(model, train, epochs=EPOCHS, seed=seed, progress=False)
    ways = {"medians": None, f"{draws // 2} draws": draws // 2, f"{draws} draws": draws}
    return pd.DataFrame(
        {
            name: ps.evidence(fit, test, samples=samples, global_draws=n, seed=seed, progress=False).log_evidence
            for name, n in ways.items()
        }
    )


def summary(by_seed: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Medians minus the average over draws, nats per cell: mean, its error over cells, share of cells above 0."""
    rows = []
    for seed, table in by_seed.items():
        for name in table.columns[1:]:
            price = table["medians"] - table[name]
            row = {"seed": seed, "minus": name, "mean": price.mean(), "se": price.sem(), "above_0": (price > 0).mean()}
            rows.append(row)
    return pd.DataFrame(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of fits and draws")
    parser.add_argument("--draws", type=int, default=8, help="of the weights")
    parser.add_argument("--samples", type=int, default=50, help="of z for each cell and draw of the weights")
    parser.add_argument("--cells", type=int, help="held-out cells; all by default")
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, evaluate, print the table and write it."""
    options = parse(arguments)
    torch.set_num_threads(1)
    train, test = split()
    test = test.take(range(options.cells or test.n_cells))
    by_seed = {seed: measured(train, test, seed, options.draws, options.samples) for seed in options.seeds}
    table = summary(by_seed)
    between = table.groupby("minus", sort=False)["mean"].agg(["mean", "std"])
    sys.stdout.write(f"{test.n_cells} cells\n{table.round(3).to_string()}\n\n{between.round(3).to_string()}\n")
    if options.out:
        report = {"command": command_line(MODULE, arguments), "versions": versions(PACKAGES)}
        report["rows"] = table.to_dict("records")
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
