"""Counts larger than memory: building a store, and reading cells from it, from a backed file and from memory.

    python -m benchmarks.rows.stores --out FILE

Every row is a process of its own, so that its peak of resident memory is its own: imports (``before_mb``) are in it.
Simulated counts, 12 % non-zero. ``build`` streams an uncompressed .h5ad into a store; ``fit and embed`` opens the cells
in one of three ways (``store``, ``backed``, ``memory``), trains the default model for one epoch and embeds all cells;
``minibatches`` draws batches of 128 random cells as float32 tensors and does nothing with them. Files are warm in the
page cache where memory allows it. Seconds are of the wall unless named CPU.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.commands import command_line, parser_of, printed_by
from benchmarks.harness.resident_memory import peak_megabytes

MODULE = "benchmarks.rows.stores"
BATCH = 128
LIMIT_MB, CELLS_PER_SECOND = 1200, 100_000


def open_cells(file: Path, way: str) -> Any:
    """Cells of the file, or of the store beside it."""
    import anndata

    import pyro_scvi as ps

    if way == "store":
        return ps.Cells.from_store(file.with_suffix(".store"))
    if way == "backed":
        return ps.Cells.from_anndata(anndata.read_h5ad(file, backed="r"), backed=True)
    return ps.Cells.from_anndata(anndata.read_h5ad(file))


def write(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the simulated cells."""
    from benchmarks.harness import simulation

    return simulation.write(str(file), options.cells, options.genes)().facts


def build(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build the store."""
    import pyro_scvi as ps

    store = ps.stores.build(file, file.with_suffix(".store"), progress=False)
    return {"megabytes": sum(item.stat().st_size for item in store.iterdir()) / 1e6}


def fit_and_embed(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Open the cells, train for one epoch, embed all."""
    import pyro_scvi as ps

    marks = [Mark()]
    cells = open_cells(file, options.way)
    marks.append(Mark())
    fit = ps.fit(ps.SCVI(cells.n_genes), cells, epochs=1, device="cpu", progress=False)
    marks.append(Mark())
    ps.embed(fit, cells)
    marks.append(Mark())
    steps = zip(("open", "fit", "embed"), marks, marks[1:], strict=False)
    return {f"{name}_{key}": value for name, start, end in steps for key, value in end.since(start).items()}


def minibatches(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Draw random minibatches; the fastest of five equal rounds, and the median."""
    import numpy as np

    cells, generator, rates = open_cells(file, options.way), np.random.default_rng(0), []
    n_batches = options.draws // (5 * BATCH)
    for _ in range(5):
        start = Mark()
        for _ in range(n_batches):
            cells[generator.integers(cells.n_cells, size=BATCH)]
        rates.append(n_batches * BATCH / Mark().since(start)["cpu_s"])
    return {"cells_per_cpu_s": max(rates), "median": float(np.median(rates))}


TASKS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {
    "write": write,
    "build": build,
    "fit and embed": fit_and_embed,
    "minibatches": minibatches,
}


class Mark:
    """A moment, in wall and CPU seconds."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def since(self, start: "Mark") -> dict[str, float]:
        """Seconds since another moment."""
        return {"s": self.wall - start.wall, "cpu_s": self.cpu - start.cpu}


def measure(task: str, file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one task in this process, with its peak of resident memory and that before it."""
    import torch

    torch.set_num_threads(1)
    before, start = peak_megabytes(), Mark()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* ha(s|ve) no counts")  # a few simulated cells or genes
        result = TASKS[task](file, options)
    return {**result, **Mark().since(start), "before_mb": before, "peak_mb": peak_megabytes()}


def in_a_process(task: str, file: Path, n_cells: int, n_genes: int, way: str, draws: int) -> dict[str, Any]:
    """Run this module for one task and return its result."""
    sizes = ["--cells", n_cells, "--genes", n_genes, "--way", way, "--draws", draws]
    result = json.loads(printed_by(MODULE, "--measure", task, str(file), *map(str, sizes)))
    row = {"task": task, "way": way, "n_cells": n_cells, "n_genes": n_genes, **result}
    sys.stderr.write(json.dumps(row) + "\n")
    return row


def run(options: argparse.Namespace, command: str) -> pd.DataFrame:
    """Fit and embed in every way, then draw minibatches of few and of many cells of more genes."""
    rows = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        file = Path(folder) / "cells.h5ad"
        size = (options.cells, options.genes)
        for task in ("write", "build"):
            rows.append(in_a_process(task, file, *size, "store", 0))
        for way in options.ways:
            rows.append(in_a_process("fit and embed", file, *size, way, 0))
            rows[-1]["met"] = rows[-1]["peak_mb"] < LIMIT_MB
        for n_cells in options.minibatch_cells:
            file = Path(folder) / f"{n_cells}.h5ad"
            for task in ("write", "build"):
                rows.append(in_a_process(task, file, n_cells, options.minibatch_genes, "store", 0))
            for way in options.ways:
                draws = options.draws if way != "backed" else options.draws // 50
                rows.append(in_a_process("minibatches", file, n_cells, options.minibatch_genes, way, draws))
                rows[-1]["met"] = rows[-1]["median"] >= CELLS_PER_SECOND
    return pd.DataFrame(rows).assign(command=command)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--out", type=Path, help="JSON file for the table")
    parser.add_argument("--folder", type=Path, help="where the files are written; removed afterwards")
    parser.add_argument("--cells", type=int, default=1_300_000, help="to fit and embed")
    parser.add_argument("--genes", type=int, default=720, help="to fit and embed")
    parser.add_argument("--ways", nargs="+", choices=["store", "backed", "memory"], default=["store", "backed"])
    parser.add_argument("--minibatch-cells", type=int, nargs="*", default=[100_000, 400_000])
    parser.add_argument("--minibatch-genes", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=1_000_000, help="cells drawn in minibatches")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--way", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, print its table and write it; in a child process, do that process's part."""
    options = parse(arguments)
    if options.measure:
        task, file = options.measure
        sys.stdout.write(json.dumps(measure(task, Path(file), options)) + "\n")
        return
    command = command_line(MODULE, arguments)
    table = run(options, command)
    sys.stdout.write(table.drop(columns="command").to_string(index=False, float_format="{:.1f}".format) + "\n")
    if options.out:
        options.out.write_text(table.to_json(orient="records", indent=1) + "\n")


if __name__ == "__main__":
    main()
