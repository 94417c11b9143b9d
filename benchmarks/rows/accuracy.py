"""Rows of numerical accuracy: the likelihood in float32, and the held-out ELBO that bfloat16 costs."""

import statistics
from dataclasses import dataclass

from benchmarks.harness.interleaving import Outcome
from benchmarks.harness.processes import Bench, System, Unavailable, require_packages
from benchmarks.harness.results import AtMost, Line


@dataclass(frozen=True)
class Likelihood:
    """Largest errors of the zero-inflated negative binomial in float32 over a grid of extreme parameters."""

    thinned: int = 1
    name: str = "likelihood"

    def run(self, bench: Bench) -> Outcome:
        """Evaluate the grid; nothing of it depends on rounds."""
        require_packages(["mpmath"])
        sample = bench.once(System("ours", "benchmarks.quality.likelihood_accuracy:errors", {"thinned": self.thinned}))
        facts = sample.facts
        title = "ZINB in float32, {} against 60 digits"
        lines = [
            Line(title.format(part), "|d| / (1 + |truth|)", ours=facts[part]).judged(AtMost(bar))
            for part, bar in (("value", 1e-5), ("gradient", 1e-3))
        ]
        count = Line(f"ZINB in float32, not finite of {4 * facts['points']:,} figures", ours=facts["non_finite"])
        return Outcome([*lines, count.judged(AtMost(0))], {"errors": sample._asdict()})


@dataclass(frozen=True)
class HalfQuality:
    """What training in bfloat16 costs in held-out bound: mean over seeds of float32 minus bfloat16, nats per cell."""

    file: str
    epochs: int = 20
    n_cells: int | None = None

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"bfloat16-{self.file.removesuffix('.h5ad')}"

    def run(self, bench: Bench) -> Outcome:
        """Fit every seed in both precisions."""
        if reason := bench.once(System("ours", "benchmarks.systems.ours:autocast_available")).facts["reason"]:
            raise Unavailable(reason)
        bounds = {half: [self._bound(bench, seed, half) for seed in bench.seeds] for half in (False, True)}
        differences = [full - half for full, half in zip(*bounds.values(), strict=True)]
        spread = f", sd over seeds {statistics.stdev(differences):.2f}" if len(differences) > 1 else ""
        title = f"{self.file.removesuffix('.h5ad')}: held-out ELBO lost by bfloat16, {self.epochs} epochs"
        line = Line(title, "nats / cell", ours=statistics.mean(differences), note=f"mean of {len(differences)}{spread}")
        return Outcome([line.judged(AtMost(0.1))], {"float32": bounds[False], "bfloat16": bounds[True]})

    def _bound(self, bench: Bench, seed: int, half: bool) -> float:
        options = {"path": str(bench.file(self.file)), "seed": seed, "epochs": self.epochs, "n_cells": self.n_cells}
        options |= {"configuration": "matched", "judge": "bound", "half": half}
        return bench.once(System("ours", "benchmarks.quality.ours_held_out:judged", options)).facts["value"]
