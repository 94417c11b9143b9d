"""Rows of inference by a fit: posterior predictive draws, evidence, differential expression."""

from dataclasses import dataclass
from typing import Any

from benchmarks.harness.interleaving import Comparison, Interleaved
from benchmarks.harness.processes import System
from benchmarks.harness.results import NANOSECONDS, SECONDS, VARIANCE, AtLeast


@dataclass(frozen=True)
class Size:
    """Cells and genes of the fit, and how much is asked of it."""

    n_cells: int = 20_000
    n_genes: int = 720
    drawn_cells: int = 1000
    draws: int = 10
    weighed_cells: int = 200
    weights: int = 1000
    pairs: int = 5000

    def of_fit(self) -> dict[str, Any]:
        """Arguments of every task that needs a fit."""
        return {"n_cells": self.n_cells, "n_genes": self.n_genes}


QUICK = Size(n_cells=200, n_genes=80, drawn_cells=20, draws=2, weighed_cells=8, weights=20, pairs=500)


def both(task: str, options: dict[str, Any], **of_peer: Any) -> dict[str, System]:
    """The same task on both sides."""
    return {
        "ours": System("ours", f"benchmarks.systems.ours:{task}", options),
        "peer": System("scvi-tools", f"benchmarks.systems.scvi_tools:{task}", {**options, **of_peer}),
    }


def predictive(size: Size) -> list[Interleaved]:
    """Posterior predictive draws, again and again in a process, and the first time in a new one.

    scvi-tools returns them in a format whose code is compiled in a process's first call.
    """
    options = {**size.of_fit(), "cells": size.drawn_cells, "samples": size.draws}
    title = f"posterior predictive, {size.draws} draws of {size.drawn_cells} cells"
    again = Comparison(title, NANOSECONDS, AtLeast(8), peer="peer")
    first = Comparison(f"{title}, a process's first call", NANOSECONDS, peer="peer")
    return [
        Interleaved("predictive", both("predictive_draws", options), (again,)),
        Interleaved("first-predictive", both("predictive_draws", options | {"warm": False}), (first,), fresh=True),
    ]


def evidence(size: Size) -> Interleaved:
    """Evidence by equally many draws from the guide, and with the proposal refined, which has no equal there."""
    options = {**size.of_fit(), "cells": size.weighed_cells, "samples": size.weights}
    refined = System("ours", "benchmarks.systems.ours:refined_evidence", options)
    many = System("scvi-tools", "benchmarks.systems.scvi_tools:weighted_evidence", {**options, "per_pass": 25})
    title = f"evidence of {size.weighed_cells} cells by {size.weights} draws from the guide"
    per_draw = "CPU ns / likelihood of a cell"
    quantity = NANOSECONDS._replace(unit=per_draw)
    lines = (
        Comparison(title, quantity, AtLeast(4), peer="peer"),
        Comparison(f"{title}, compiled", quantity, AtLeast(4), ours="compiled", peer="peer"),
        Comparison(f"{title}, the peer given 25 draws per pass", quantity, peer="many"),
        Comparison("the same cells by ps.evidence, refined and adapted", quantity, ours="refined"),
    )
    compiled = System("ours", "benchmarks.systems.ours:weighted_evidence", options | {"compiled": True})
    systems = {**both("weighted_evidence", options), "compiled": compiled, "many": many, "refined": refined}
    return Interleaved("importance", systems, lines)


def differential_kernel(size: Size) -> Interleaved:
    """Monte Carlo efficiency of the probability that a gene is higher in one of two cells."""
    options = {"n_pairs": size.pairs, "n_genes": size.n_genes, "sd": 0.5}
    systems = {
        "ours": System("ours", "benchmarks.systems.gamma_comparison:exact", options),
        "sampled": System("ours", "benchmarks.systems.gamma_comparison:sampled", options),
    }
    title = f"P(w_a < w_b) of {size.pairs} pairs, dispersion per gene, against sampling w"
    line = Comparison(title, VARIANCE, AtLeast(50), peer="sampled", note="log-ratio sd 0.5; CPU seconds x variance")
    return Interleaved("differential-kernel", systems, (line,))


def differential(size: Size) -> Interleaved:
    """Differential expression of two halves of the cells; the peer's estimates leave out the noise of w."""
    systems = both("differential_expression", size.of_fit(), mode="vanilla")
    systems["change"] = System(
        "scvi-tools", "benchmarks.systems.scvi_tools:differential_expression", {**size.of_fit(), "mode": "change"}
    )
    half = size.n_cells // 2
    lines = tuple(
        Comparison(f"differential expression, {half} cells against {half}, peer's mode {mode}", SECONDS, peer=name)
        for mode, name in (("vanilla", "peer"), ("change", "change"))
    )
    return Interleaved("differential-verb", systems, lines)


def rows(size: Size) -> list[Interleaved]:
    """All rows of inference."""
    return [*predictive(size), evidence(size), differential_kernel(size), differential(size)]
