"""Peak resident memory of every public function of a fit, on 20,000 cells.

    python -m benchmarks.rows.memory --seeds 0 --out FILE

Every verb runs with its default arguments on the same synthetic counts, in a process of its own, so that the peak is
that verb's: imports, reading the cells and loading the fit are in it and are also given alone (``before_mb``). The
process that starts the others imports nothing large, since a child's peak starts at what its parent holds. The fit is
trained for one epoch only: memory does not depend on the values of the weights. Verbs that are slow per cell get one of
their batches instead of all cells: their working memory is far larger than what they keep per cell.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.commands import command_line, parser_of, printed_by
from benchmarks.harness.resident_memory import peak_megabytes
from benchmarks.systems.verbs import BY_BATCH, VERBS

MODULE = "benchmarks.rows.memory"
LIMIT_MB = 2000


def prepare(folder: Path, options: argparse.Namespace, seed: int) -> None:
    """Write the cells, and a fit of one epoch, into ``folder``."""
    import pyro_scvi as ps
    from benchmarks.harness.simulation import grouped_counts

    data = grouped_counts(options.cells, options.genes, seed)
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
    call, n_cells = BY_BATCH[verb] if verb in BY_BATCH else (VERBS[verb], cells.n_cells)
    cells = cells.take(slice(n_cells)) if n_cells < cells.n_cells else cells
    before, started = peak_megabytes(), time.process_time()
    call(ps, fit, cells)
    seconds = time.process_time() - started
    return {"n_cells": n_cells, "cpu_seconds": seconds, "before_mb": before, "peak_mb": peak_megabytes()}


def run(options: argparse.Namespace, command: str) -> pd.DataFrame:
    """Measure every verb for every seed, each in its process."""
    rows: list[dict[str, Any]] = []
    sizes = ["--cells", str(options.cells), "--genes", str(options.genes)]
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            printed_by(MODULE, "--prepare", folder, "--seeds", str(seed), *sizes)
            for verb in options.verbs:
                result = json.loads(printed_by(MODULE, "--measure", folder, verb))
                sys.stderr.write(f"{verb}, seed {seed}: {result['peak_mb']:.0f} MB, {result['cpu_seconds']:.0f} s\n")
                row = {"verb": verb, **result, "n_genes": options.genes, "seed": seed}
                rows.append({**row, "below_limit": result["peak_mb"] < LIMIT_MB, "command": command})
    return pd.DataFrame(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
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
    command = command_line(MODULE, arguments)
    table = run(options, command)
    sys.stdout.write(table.drop(columns="command").to_string(index=False, float_format="{:.1f}".format) + "\n")
    if options.out:
        options.out.write_text(table.to_json(orient="records", indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
