"""Rows of time to quality: CPU seconds until our fit is as good on held-out cells as a trained scvi-tools."""

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from benchmarks.harness.interleaving import Outcome
from benchmarks.harness.processes import Bench, System, require_packages
from benchmarks.harness.results import AtLeast, Line
from benchmarks.quality.learning_curves import NAMES

GRID = (1, 2, 3, 4, 5, 7, 10, 15, 20)  # epochs in all of our runs, from the shortest on
STOCK = {"n_epochs_kl_warmup": 1}
FASTER = {"n_epochs_kl_warmup": 1, "lr": 1e-2, "eps": 1e-8}


class Point(NamedTuple):
    """A state of a fit: epochs of training, CPU seconds, and its score, nats per cell with standard error."""

    epochs: int
    seconds: float
    value: float
    se: float


class PeerRun(NamedTuple):
    """A way to train scvi-tools; ``epochs`` of None is its own choice, ``plan`` what its training plan is given."""

    label: str
    epochs: int | None
    plan: dict[str, Any]
    bar: AtLeast | None = None


@dataclass(frozen=True)
class TimeToQuality:
    """For every seed: train scvi-tools, then ours in budgets of the grid until one is as good.

    Our one-cycle schedule depends on the number of epochs: every budget is a run of its own, and the time is that of
    the single run that first reaches the target, without interpolation and without the runs before it. The ratios are
    the least and the median over seeds, each of one seed's peer and one seed's fit of ours.

    Parameters
    ----------
    file, configuration
        Real data, and our model.
    judge
        "bound" or "evidence", see :mod:`benchmarks.quality.held_out_scores`.
    peers
        Ways to train the peer, each with its line.
    most_seeds
        How many of the seeds are used.
    n_cells
        Take the first cells of the file only.
    """

    name: str
    file: str
    configuration: str
    judge: str
    peers: tuple[PeerRun, ...]
    grid: tuple[int, ...] = GRID
    most_seeds: int | None = None
    n_cells: int | None = None

    def run(self, bench: Bench) -> Outcome:
        """Measure every seed."""
        require_packages(["scvi"])
        by_seed = {seed: self._one_seed(bench, seed) for seed in bench.seeds[: self.most_seeds]}
        lines = [self._line(peer, by_seed) for peer in self.peers]
        if len(self.peers) > 1 and self.judge == "bound":
            lines.append(self._later_peer(by_seed))
        curves = {seed: {label: list(points) for label, points in curves.items()} for seed, curves in by_seed.items()}
        return Outcome(lines, {"file": self.file, "judge": self.judge, "curves": curves})

    def _one_seed(self, bench: Bench, seed: int) -> dict[str, list[Point]]:
        options = {"path": str(bench.file(self.file)), "seed": seed, "judge": self.judge, "n_cells": self.n_cells}
        curves = {peer.label: _peer_curve(bench, peer, options) for peer in self.peers}
        target = max(curve[-1].value for curve in curves.values())
        ours: list[Point] = []
        for epochs in self.grid:
            system = System("ours", "benchmarks.quality.ours_held_out:judged", self._ours(options, epochs))
            sample = bench.once(system)
            ours.append(Point(epochs, sample.cpu, sample.facts["value"], sample.facts["se"]))
            if ours[-1].value >= target and not bench.whole_curves:
                break
        curves["ours"] = ours
        for label, curve in curves.items():
            sys.stderr.write(f"{self.name}, seed {seed}, {label}: {described(curve)}\n")
        return curves

    def _ours(self, options: dict[str, Any], epochs: int) -> dict[str, Any]:
        return {**options, "configuration": self.configuration, "epochs": epochs}

    def _line(self, peer: PeerRun, by_seed: dict[int, dict[str, list[Point]]]) -> Line:
        title = f"{self.file.removesuffix('.h5ad')}: time to the {NAMES[self.judge]} of {peer.label}"
        targets = {seed: curves[peer.label][-1] for seed, curves in by_seed.items()}
        ours = {seed: reached(curves["ours"], targets[seed].value) for seed, curves in by_seed.items()}
        note = "; ".join(f"seed {seed}: {targets[seed].value:.2f}, {told(ours[seed])}" for seed in by_seed)
        return ratio_line(title, list(ours.values()), list(targets.values()), peer.bar, note)

    def _later_peer(self, by_seed: dict[int, dict[str, list[Point]]]) -> Line:
        first, second = (peer.label for peer in self.peers[:2])
        title = f"{self.file.removesuffix('.h5ad')}: time of both to the {NAMES[self.judge]} of {first}"
        targets = [curves[first][-1].value for curves in by_seed.values()]
        pairs = list(zip(by_seed.values(), targets, strict=True))
        ours, theirs = ([reached(curves[label], target) for curves, target in pairs] for label in ("ours", second))
        return ratio_line(title, ours, theirs, None, f"the peer is {second}")


def reached(curve: Sequence[Point], target: float) -> Point | None:
    """The first point that is as good as the target."""
    return next((point for point in curve if point.value >= target), None)


def told(point: Point | None) -> str:
    """Which run of ours reached a target."""
    if point is None:
        return "not reached"
    return f"ours {point.value:.2f} after a run of {point.epochs} epoch(s), {point.seconds:.1f} s"


def described(curve: Sequence[Point]) -> str:
    """Every point in words."""
    return ", ".join(f"{point.epochs} ep {point.seconds:.1f} s {point.value:.2f} ({point.se:.2f})" for point in curve)


def ratio_line(
    title: str, ours: Sequence[Point | None], peer: Sequence[Point | None], bar: AtLeast | None, note: str
) -> Line:
    """Median seconds of both over seeds, and the least and the median of the seeds' ratios; infinite if not reached."""
    seconds, theirs = ([point.seconds if point else math.inf for point in side] for side in (ours, peer))
    line = Line(title, "CPU s", statistics.median(seconds), statistics.median(theirs), note=note)
    ratios = [b / a if math.isfinite(a) else 0.0 for a, b in zip(seconds, theirs, strict=True)]
    line.ratio_min, line.ratio_median = min(ratios), statistics.median(ratios)
    line.ours_rounds, line.peer_rounds = seconds, theirs
    return line.judged(bar)


def _peer_curve(bench: Bench, peer: PeerRun, options: dict[str, Any]) -> list[Point]:
    given = {**options, "epochs": peer.epochs, "plan": peer.plan}
    sample = bench.once(System("scvi-tools", "benchmarks.quality.scvi_tools_held_out:judged", given))
    return [Point(*point) for point in sample.facts["curve"]]


@dataclass(frozen=True)
class Size:
    """How long the peer trains, the judge of defaults, our grid, how many cells of a file are taken (None: all)."""

    epochs: int = 20
    own_epochs: int | None = None
    evidence: str = "evidence"
    grid: tuple[int, ...] = GRID
    n_cells: int | None = None


QUICK = Size(epochs=2, own_epochs=2, evidence="evidence of few", grid=(1, 2), n_cells=300)
DATA = {"cortex_558": None, "brain10k": 1}  # and the seeds for which the peer's own many epochs are run


def rows(size: Size) -> list[TimeToQuality]:
    """Two rows for every data set: like for like by the bound, and defaults by the evidence."""
    stock = PeerRun(f"scvi-tools, {size.epochs} epochs", size.epochs, STOCK, AtLeast(15))
    ours = PeerRun(f"scvi-tools, {size.epochs} epochs with Adam at 0.01", size.epochs, FASTER, AtLeast(4))
    own = PeerRun("scvi-tools with its defaults", size.own_epochs, {}, AtLeast(15))
    short = PeerRun(f"scvi-tools, {size.epochs} epochs, KL warm-up of 1", size.epochs, STOCK)
    kinds: dict[str, Any] = {"grid": size.grid, "n_cells": size.n_cells}
    by_bound, by_evidence = ("matched", "bound", (stock, ours)), ("default", size.evidence, (own, short))
    return [
        *(TimeToQuality(f"bound-{name}", f"{name}.h5ad", *by_bound, **kinds) for name in DATA),
        *(
            TimeToQuality(f"evidence-{name}", f"{name}.h5ad", *by_evidence, most_seeds=n, **kinds)
            for name, n in DATA.items()
        ),
    ]
