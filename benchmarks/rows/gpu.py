"""Rows on a GPU: training speed, the share of time bound by kernel launches, checks of the device, large data.

A dry run is on the CPU.
"""

from dataclasses import dataclass, field
from statistics import median

from benchmarks.harness.interleaving import Comparison, Interleaved, Outcome, Row
from benchmarks.harness.processes import Bench, System
from benchmarks.harness.results import CELLS_PER_WALL_SECOND, Line
from benchmarks.rows import devices, large_data
from benchmarks.rows.training import OURS, PEER


@dataclass(frozen=True)
class Size:
    """Genes, cells and epochs of the training rows, the cells of the large ones, and sizes of the device's checks."""

    genes: int = 720
    cells: int = 20_480
    epochs: int = 4
    large: large_data.Size = field(default_factory=large_data.Size)
    checks: devices.Size = field(default_factory=devices.Size)


QUICK = Size(genes=80, cells=256, epochs=1, large=large_data.QUICK, checks=devices.QUICK)


@dataclass(frozen=True)
class LaunchBound:
    """Share of the wall time in which the device only waits for the next kernel's launch."""

    batch_size: int
    device: str
    size: Size

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"launch-{self.batch_size}"

    def run(self, bench: Bench) -> Outcome:
        """Profile as many fits as there are rounds."""
        options = {**_sizes(self.size, self.batch_size), "device": self.device}
        samples = bench.interleaved({"ours": System("ours", "benchmarks.systems.device_utilisation:busy", options)})[
            "ours"
        ]
        shares = [1 - sample.facts["busy"] / sample.wall for sample in samples]
        line = Line(f"launch-bound share at batch {self.batch_size}", "of wall time", ours=median(shares))
        line.ours_rounds = shares
        return Outcome([line], {"ours": [sample._asdict() for sample in samples]})


def rows(device: str, size: Size) -> list[Row]:
    """All rows on a device."""
    batches = 128, 1024
    return [
        *(training(batch_size, device, size) for batch_size in batches),
        *(LaunchBound(batch_size, device, size) for batch_size in batches),
        *devices.rows(device, size.checks),
        large_data.Epochs(size.large, device),
    ]


def training(batch_size: int, device: str, size: Size) -> Interleaved:
    """Equal networks, likelihood and optimiser; wall time is the figure."""
    options = {**_sizes(size, batch_size), "device": device}
    systems = {
        "ours": System("ours", OURS, {"configuration": "matched_constant", **options}),
        "peer": System("scvi-tools", PEER, {"configuration": "default", **options}),
    }
    line = Comparison(f"training at batch {batch_size} on {device}", CELLS_PER_WALL_SECOND, peer="peer")
    return Interleaved(f"training-{batch_size}", systems, (line,))


def _sizes(size: Size, batch_size: int) -> dict[str, int]:
    return {"n_cells": size.cells, "n_genes": size.genes, "batch_size": batch_size, "epochs": size.epochs}
