"""An atlas of simulated cells from end to end, on one machine: what each stage takes.

    python -m benchmarks.rows.atlas --folder DIR --cells 10000000

``origin`` fits real cells; ``simulate`` draws the atlas from that fit, one .h5ad for each batch; ``build`` makes one
store of all; ``train`` trains for some epochs by several processes, one of which is killed after the first epoch, and
goes on from the checkpoint; ``embed`` writes the embedding of all cells by several processes, block by block; ``map``
reads a batch that the fit does not know, learns it and embeds it; ``express`` writes normalised expression of some
genes, block by block. Every stage is a process of its own, or several at once, and its figures lie in
``DIR/STAGE.json``: the wall seconds of the stage, and of each process CPU seconds and the peak of resident memory. A
stage whose figures are there is not run again; one that was interrupted goes on where it stopped. Stages can be named.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.harness.commands import command_line, parser_of
from benchmarks.harness.paths import DATA
from benchmarks.harness.resident_memory import peak_megabytes

MODULE = "benchmarks.rows.atlas"
BLOCK = 16_384  # cells written at a time
GENES_ASKED = 50  # for normalised expression
WAIT = 0.2  # seconds between looks at a run


# --- what a process of each stage does ---


def origin(options: argparse.Namespace) -> dict[str, Any]:
    """Fit the real cells that the atlas is drawn from."""
    from benchmarks.rows import atlas_cells

    atlas_cells.origin(options.source, options.genes, options.folder)
    return {"n_cells": 0}


def simulate(options: argparse.Namespace) -> dict[str, Any]:
    """Every n-th batch, as one file each, and by the first process one more that is not in the atlas."""
    from benchmarks.rows.atlas_cells import Atlas

    atlas, written, nonzero = Atlas(options.folder, options.seed), 0, 0
    batches = range(options.batches + 1)
    for batch in [batch for batch in batches if batch % options.processes == options.rank]:
        path = batch_file(options.folder, batch)
        if not path.exists():
            n_cells = cells_of(options, batch)
            nonzero += atlas.write(path, batch, n_cells)
            written += n_cells
    return {"n_cells": written, "nonzero": nonzero / max(1, written * options.genes)}


def build(options: argparse.Namespace) -> dict[str, Any]:
    """One store of all files."""
    import pyro_scvi as ps

    files = {f"b{batch:03d}": batch_file(options.folder, batch) for batch in range(options.batches)}
    store = ps.stores.build(files, store_of(options), progress=False)
    return {"n_cells": options.cells, "gigabytes": sum(item.stat().st_size for item in store.iterdir()) / 1e9}


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train as one of several processes, from the checkpoint if there is one."""
    import pyro_scvi as ps

    (options.folder / f"rank_{os.environ['RANK']}.pid").write_text(str(os.getpid()))
    started = time.perf_counter()
    with ps.distributed.joined() as ranks:
        cells = opened(options)
        opening = time.perf_counter() - started
        model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates)
        run: dict[str, Any] = {"epochs": options.epochs, "batch_size": options.batch_size, "validation": 10_000}
        run["validation"] = min(run["validation"], cells.n_cells // 10)
        run |= {"checkpoint": options.folder / "run", "resume": (options.folder / "run").exists()}
        fit = ps.fit(model, cells, ranks=ranks, progress=False, device="cpu", **run)
        if ranks.first:
            fit.save(options.folder / "fit")
    seconds = fit.history.seconds.tolist()
    return {"n_cells": cells.n_cells, "opening": opening, "epochs": seconds, "bound": float(fit.history.iloc[-1, 1])}


def embed(options: argparse.Namespace) -> dict[str, Any]:
    """The embedding of every n-th block of cells."""
    import pyro_scvi as ps

    return written(options, {"X_pyro_scvi": ps.embed}, options.folder / "embedding.zarr")


def map_batch(options: argparse.Namespace) -> dict[str, Any]:
    """Read a batch that the fit does not know, embed it, learn it, and decode it as if from the known ones."""
    import anndata

    import pyro_scvi as ps

    fit = ps.load(options.folder / "fit")
    adata = anndata.read_h5ad(batch_file(options.folder, options.batches))
    cells = ps.Cells.from_anndata(adata, schema=fit.schema, allow_new_batches=True)
    marks = {"read": time.perf_counter()}
    mapped = ps.map_query(fit, cells, epochs=1, progress=False)
    marks["learned"] = time.perf_counter()
    query = ps.Cells.from_anndata(adata, schema=mapped.schema)
    z = ps.embed(mapped, query)
    return {"n_cells": len(z), "seconds of learning": marks["learned"] - marks["read"]}


def express(options: argparse.Namespace) -> dict[str, Any]:
    """Normalised expression of some genes, of every n-th block of cells."""
    import pyro_scvi as ps

    genes = [f"gene_{i}" for i in range(min(options.genes, GENES_ASKED))]
    asked = partial(ps.normalized_expression, genes=genes, batches=["b000"], samples=1)
    return written(options, {"expression": asked}, options.folder / "expression.zarr")


def written(options: argparse.Namespace, verbs: dict[str, Any], path: Path) -> dict[str, Any]:
    """Write this process' blocks."""
    import pyro_scvi as ps

    cells = opened(options)
    shard = (options.rank, options.processes)
    ps.shards.write(ps.load(options.folder / "fit"), cells, path, verbs, shard=shard, block=BLOCK, progress=False)
    return {"n_cells": cells.n_cells // options.processes}


def opened(options: argparse.Namespace) -> Any:
    """The cells of the store; its checksums were compared when it was built."""
    import pyro_scvi as ps

    return ps.Cells.from_store(store_of(options), batch="batch", verify=False)


def store_of(options: argparse.Namespace) -> Path:
    """The store of the atlas."""
    return Path(options.folder) / "atlas.store"


def batch_file(folder: Path, batch: int) -> Path:
    """The file of a batch; the last one is not in the atlas."""
    return Path(folder) / f"b{batch:03d}.h5ad"


def cells_of(options: argparse.Namespace, batch: int) -> int:
    """Number of cells of a batch."""
    return options.cells // options.batches + (batch < options.cells % options.batches)


# --- running the stages ---

ALONE = {"origin": origin, "build": build, "map": map_batch}
SHARED = {"simulate": simulate, "embed": embed, "express": express}
TASKS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {**ALONE, **SHARED, "train": train}
STAGES = ["origin", "simulate", "build", "train", "embed", "map", "express"]


def measure(stage: str, options: argparse.Namespace) -> dict[str, Any]:
    """One process of a stage, with its CPU seconds and its peak of resident memory."""
    import torch

    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* ha(s|ve) no counts")  # a few simulated cells
        result = TASKS[stage](options)
    return result | {"cpu_s": time.process_time(), "peak_mb": peak_megabytes()}


def run(stage: str, options: argparse.Namespace, arguments: list[str]) -> dict[str, Any]:
    """All processes of a stage: their figures, and the seconds until the last has ended."""
    started = time.perf_counter()
    found = trained(options, arguments) if stage == "train" else side_by_side(stage, options, arguments)
    seconds, n_cells = time.perf_counter() - started, found[0]["n_cells"]
    if stage in SHARED:
        n_cells = sum(each["n_cells"] for each in found)
    shown = {key: value for key, value in found[0].items() if key not in ("n_cells", "cpu_s", "peak_mb")}
    row = {"stage": stage, "s": seconds, "cells_per_s": n_cells / seconds, "processes": len(found)}
    row |= {"cpu_s": sum(each["cpu_s"] for each in found), "peak_mb": max(each["peak_mb"] for each in found)}
    return row | shown | {"disk_gb": sum(f.stat().st_size for f in options.folder.rglob("*") if f.is_file()) / 1e9}


def side_by_side(stage: str, options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Processes that know nothing of each other."""
    n = options.processes if stage in SHARED else 1
    results = [options.folder / f"{stage}.{rank}.part" for rank in range(n)]
    processes = [started_with([sys.executable], stage, result, rank, arguments) for rank, result in enumerate(results)]
    failed = [process.wait() for process in processes]
    if any(failed):
        raise SystemExit(f"{stage} ended with {failed}; run the same command to go on")
    return [taken(result) for result in results]


def trained(options: argparse.Namespace, arguments: list[str]) -> list[dict[str, Any]]:
    """Training under torchrun; the last process is killed after the first epoch, and the run is started again."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    result = options.folder / "train.rank.part"
    if options.epochs > 1 and not (options.folder / "run").exists():
        process = started_with(launch, "train", result, 0, arguments)
        while process.poll() is None and not epochs_kept(options.folder / "run"):
            time.sleep(WAIT)
        victim = int((options.folder / f"rank_{options.processes - 1}.pid").read_text())
        if process.poll() is None:
            os.kill(victim, signal.SIGKILL)
        process.wait()
    if started_with(launch, "train", result, 0, arguments).wait():
        raise SystemExit("train failed; run the same command to go on from the checkpoint")
    return [taken(options.folder / f"train.{rank}.part") for rank in range(options.processes)]


def epochs_kept(run_folder: Path) -> int:
    """Epochs in the checkpoint, 0 if there is none."""
    try:
        return len(json.loads((run_folder / "config.json").read_text())["history"]["epoch"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def started_with(
    launch: list[str], stage: str, result: Path, rank: int, arguments: list[str]
) -> subprocess.Popen[bytes]:
    """Start this module for one process of a stage, with one thread."""
    own = ["--measure", stage, "--result", str(result), "--rank", str(rank)]
    return subprocess.Popen([*launch, "-m", MODULE, *arguments, *own], env={**os.environ, "OMP_NUM_THREADS": "1"})


def taken(part: Path) -> dict[str, Any]:
    """The figures that a process has written, once."""
    figures: dict[str, Any] = json.loads(part.read_text())
    part.unlink()
    return figures


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = parser_of(MODULE, __doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where everything is written, and stays")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--cells", type=int, default=10_000_000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--epochs", type=int, default=2, help="with one epoch no process is killed")
    parser.add_argument("--batch-size", type=int, default=1024, help="cells of all processes together")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--source", type=Path, default=DATA / "pbmc4k_top2000.h5ad", help="real raw counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the stages and print their figures; in a child process, do that process' part."""
    options = parse(arguments)
    given = list(sys.argv[1:] if arguments is None else arguments)
    if options.measure:
        rank = os.environ.get("RANK", "") if options.measure == "train" else str(options.rank)
        figures = measure(options.measure, options)
        options.result.with_name(f"{options.measure}.{rank}.part").write_text(json.dumps(figures))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for stage in options.stages:
        kept = options.folder / f"{stage}.json"
        if not kept.exists():
            figures = run(stage, options, given) | {"cells": options.cells, "command": command_line(MODULE, given)}
            kept.write_text(json.dumps(figures, indent=1) + "\n")
        rows.append(json.loads(kept.read_text()))
        sys.stderr.write(json.dumps(rows[-1]) + "\n")
    table = pd.DataFrame(rows).drop(columns="command")
    sys.stdout.write(table.to_string(index=False, float_format="{:.4g}".format, na_rep="") + "\n")


if __name__ == "__main__":
    main()
