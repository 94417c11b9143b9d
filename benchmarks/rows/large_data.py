"""Rows of large data, 1.3 million cells of 720 genes: peak memory on the CPU, seconds of epochs on a GPU."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness.interleaving import Outcome, lacking
from benchmarks.harness.processes import Bench, System
from benchmarks.harness.results import AtMost, Line
from benchmarks.harness.stopwatch import Sample

SIDES = {"ours": "benchmarks.systems.ours_large", "scvi-tools": "benchmarks.systems.scvi_tools_large"}


@dataclass(frozen=True)
class Size:
    """Cells, genes, and training steps whose memory is measured."""

    n_cells: int = 1_300_000
    n_genes: int = 720
    steps: int = 200
    epochs: int = 10


QUICK = Size(n_cells=2000, n_genes=80, steps=20, epochs=2)
LARGEST_RATIO = AtMost(1.3)  # of our peak of memory to the peer's


@dataclass(frozen=True)
class PeakMemory:
    """Peak resident memory of loading the cells and training some steps, each side in a process of its own.

    The file is written by another process, so that making it is in nobody's peak; imports are in both.
    """

    size: Size
    name: str = "memory"
    bar: AtMost = LARGEST_RATIO

    def run(self, bench: Bench) -> Outcome:
        """Write the file, then load and train on both sides."""
        with written(bench, self.size) as (path, file):
            options = {"path": path, "steps": self.size.steps, "batch_size": 128}
            samples = of_sides(bench, "load_and_train", options)
        peaks = {side: sample.facts["peak"] / 1000 for side, sample in samples.items()}
        epochs = {side: 3600 / sample.facts["cpu_seconds_per_epoch"] for side, sample in samples.items()}
        cells = f"{self.size.n_cells:,} x {self.size.n_genes}"
        details = {side: sample._asdict() for side, sample in samples.items()} | {"file": file.facts}
        before = ", ".join(f"{side} {sample.facts['before'] / 1000:.2f}" for side, sample in samples.items())
        title = f"{cells}: peak of loading and {self.size.steps} steps"
        memory = beside(title, "GB", peaks, f"of which before loading: {before}").judged(self.bar)
        return Outcome([memory, beside(f"{cells}: epochs at batch 128", "epochs / CPU hour", epochs)], details)


@dataclass(frozen=True)
class Epochs:
    """Wall seconds of an epoch at batch 1024, and of ten with loading, on a device."""

    size: Size
    device: str
    name: str = "large"
    bars: tuple[AtMost, AtMost] = (AtMost(2.0), AtMost(60.0))

    def run(self, bench: Bench) -> Outcome:
        """Train on both sides; the peer for one epoch."""
        options = {"batch_size": 1024, "device": self.device}
        with written(bench, self.size) as (path, _):
            options |= {"path": path}
            samples = {"ours": bench.once(_system("ours", "epochs", {**options, "n_epochs": self.size.epochs}))}
            if not lacking("scvi-tools"):
                samples["scvi-tools"] = bench.once(_system("scvi-tools", "epochs", {**options, "n_epochs": 1}))
        cells = f"{self.size.n_cells:,} x {self.size.n_genes}, batch 1024"
        seconds = {side: sample.facts["seconds_per_epoch"] for side, sample in samples.items()}
        total = {"ours": samples["ours"].facts["seconds"]}
        lines = [
            beside(f"{cells}: an epoch", "s", seconds).judged(self.bars[0]),
            beside(f"{cells}: {self.size.epochs} epochs with load", "s", total).judged(self.bars[1]),
        ]
        return Outcome(lines, {side: sample._asdict() for side, sample in samples.items()})


def beside(title: str, unit: str, values: dict[str, float], note: str = "") -> Line:
    """A line of one figure of each side, without a ratio."""
    line = Line(title, unit, ours=values["ours"], ours_rounds=[values["ours"]], note=note)
    if "scvi-tools" in values:
        line.peer, line.peer_rounds = values["scvi-tools"], [values["scvi-tools"]]
    return line


@contextmanager
def written(bench: Bench, size: Size) -> Iterator[tuple[str, Sample]]:
    """A temporary h5ad file with the cells, and what writing it was."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "cells.h5ad")
        shape = {"n_cells": size.n_cells, "n_genes": size.n_genes}
        yield path, bench.once(System("ours", "benchmarks.harness.simulation:write", {"path": path, **shape}))


def of_sides(bench: Bench, task: str, options: dict[str, Any]) -> dict[str, Sample]:
    """The same task on every side that is installed, each in a new process."""
    return {side: bench.alone(_system(side, task, options)) for side in SIDES if not lacking(side)}


def _system(side: str, task: str, options: dict[str, Any]) -> System:
    return System(side, f"{SIDES[side]}:{task}", options)
