"""Rows that check a device: whether it computes what the CPU does, and what limits a training step there."""

from dataclasses import dataclass
from typing import Any

from benchmarks.harness.interleaving import Outcome, Row
from benchmarks.harness.processes import Bench, System
from benchmarks.harness.results import AtMost, Line
from benchmarks.harness.stopwatch import Sample

AGREEMENT, STEPS = "benchmarks.systems.device_agreement", "benchmarks.systems.device_steps"
LAW_BAR, VERB_BAR, ALIKE_BAR, WAITS_BAR = AtMost(1e-3), AtMost(0.05), AtMost(1e-3), AtMost(1.5)
EAGER: dict[str, dict[str, bool]] = {"": {}, ", tf32": {"tf32": True}, ", bfloat16": {"half": True}}
COMPILED = {", compiled": {"compiled": True}}


@dataclass(frozen=True)
class Size:
    """Sizes of the checks; compiling takes too long for a dry run."""

    n_cells: int = 60
    n_genes: int = 40
    matrix: int = 8192
    step_cells: int = 16_384
    step_genes: int = 720
    steps: int = 60
    batch_sizes: tuple[int, ...] = (128, 1024, 8192)
    compiled: bool = True


QUICK = Size(12, 10, 64, step_cells=64, step_genes=20, steps=4, batch_sizes=(32,), compiled=False)


@dataclass(frozen=True)
class Speed:
    """What the device can do: products of matrices, and how often a kernel can be launched."""

    device: str
    size: Size
    name: str = "speed"

    def run(self, bench: Bench) -> Outcome:
        """Multiply large matrices and launch small kernels."""
        sample = _once(bench, f"{AGREEMENT}:speed", size=self.size.matrix, device=self.device)
        lines = [Line(f"products, {name}", "TFLOP/s", ours=value) for name, value in sample.facts["products"].items()]
        return _outcome([*lines, Line("a launch", "us", ours=1e6 * sample.facts["launch"])], sample)


@dataclass(frozen=True)
class Law:
    """Errors of the zero-inflated negative binomial and its gradients on the device."""

    device: str
    size: Size
    name: str = "law"

    def run(self, bench: Bench) -> Outcome:
        """Evaluate at random parameters."""
        sample = _once(bench, f"{AGREEMENT}:law_errors", **_small(self.size, self.device))
        errors = sample.facts["errors"].items()
        lines = [_beside_cpu(f"ZINB, {name}", "|d| / (1 + |value|)", error, LAW_BAR) for name, error in errors]
        return _outcome(lines, sample)


@dataclass(frozen=True)
class Verbs:
    """Results of the verbs on the device beside those of the same fit on the CPU, from the same seed."""

    device: str
    size: Size
    name: str = "verbs"

    def run(self, bench: Bench) -> Outcome:
        """One line for each verb."""
        sample = _once(bench, f"{AGREEMENT}:verbs", **_small(self.size, self.device))
        found = sample.facts["differences"].items()
        return _outcome([_beside_cpu(name, "mean |d| / spread", value, VERB_BAR) for name, value in found], sample)


@dataclass(frozen=True)
class Alike:
    """Fits that should be alike: of one seed, saved and loaded, resumed."""

    device: str
    size: Size
    name: str = "alike"

    def run(self, bench: Bench) -> Outcome:
        """Compare embeddings."""
        sample = _once(bench, f"{AGREEMENT}:alike", **_small(self.size, self.device))
        found = sample.facts["differences"].items()
        return _outcome([Line(name, "largest |d|", ours=value).judged(ALIKE_BAR) for name, value in found], sample)


@dataclass(frozen=True)
class Steps:
    """Milliseconds of a step of the default model, and the device's peak of memory."""

    batch_size: int
    device: str
    size: Size

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""
        return f"step-{self.batch_size}"

    def run(self, bench: Bench) -> Outcome:
        """Time each variant."""
        lines, details = [], {}
        for variant, options in (EAGER | (COMPILED if self.size.compiled else {})).items():
            given = {**_steps(self.size, self.batch_size, self.device), "steps": self.size.steps, **options}
            sample = _once(bench, f"{STEPS}:timed", **given)
            note = f"first step {sample.facts['first_step']:.2f} s, peak {sample.facts['peak']:.2f} GB"
            title = f"a step at batch {self.batch_size}{variant}"
            lines.append(Line(title, "ms", ours=1e3 * sample.facts["step"], note=note))
            details[variant or "eager"] = sample._asdict()
        return Outcome(lines, details)


@dataclass(frozen=True)
class Waits:
    """How often the host waits for the device in a step: once, for the loss, and for some at the start of the fit."""

    device: str
    size: Size
    name: str = "waits"

    def run(self, bench: Bench) -> Outcome:
        """Let torch warn of every wait."""
        options = _steps(self.size, min(self.size.batch_sizes), self.device)
        sample = _once(bench, f"{STEPS}:waits", epochs=2, **options)
        return _outcome([Line("waits of the host", "a step", ours=sample.facts["waits"]).judged(WAITS_BAR)], sample)


def rows(device: str, size: Size) -> list[Row]:
    """All of them on one device."""
    checks: list[Row] = [kind(device, size) for kind in (Speed, Law, Verbs, Alike, Waits)]
    return [*checks, *(Steps(batch_size, device, size) for batch_size in size.batch_sizes)]


def _beside_cpu(title: str, unit: str, found: float | str, bar: AtMost) -> Line:
    """A line of a difference from the CPU; of an error's text, a failed one."""
    if isinstance(found, str):
        return Line(title, unit, met="failed", note=f"failed: {found}")
    return Line(title, unit, ours=found).judged(bar)


def _once(bench: Bench, task: str, **options: Any) -> Sample:
    return bench.once(System("ours", task, options))


def _outcome(lines: list[Line], sample: Sample) -> Outcome:
    return Outcome(lines, {"ours": sample._asdict()})


def _small(size: Size, device: str) -> dict[str, Any]:
    return {"n_cells": size.n_cells, "n_genes": size.n_genes, "device": device}


def _steps(size: Size, batch_size: int, device: str) -> dict[str, Any]:
    return {"n_cells": size.step_cells, "n_genes": size.step_genes, "batch_size": batch_size, "device": device}
