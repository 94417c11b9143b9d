"""Interleaved rounds: the same work measured on several sides in turn, and its cost compared."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from benchmarks.harness.processes import Bench, System, Unavailable, require_packages
from benchmarks.harness.results import AtLeast, AtMost, Line, Quantity, compared, skipped

PACKAGES_OF_SIDE = {"scvi-tools": ("scvi",), "mpmath": ("mpmath",)}


class Outcome(NamedTuple):
    """Lines of the table, and further details for the JSON file."""

    lines: list[Line]
    details: dict[str, Any]


class Row(Protocol):
    """A named part of the benchmark."""

    @property
    def name(self) -> str:
        """What ``--rows`` calls it."""

    def run(self, bench: Bench) -> Outcome:
        """Measure."""


@dataclass(frozen=True)
class Comparison:
    """A line made of a row's measurements: ``ours`` against ``peer``, beside the ``limit``; names of systems."""

    title: str
    quantity: Quantity
    bar: AtLeast | AtMost | None = None
    ours: str = "ours"
    peer: str | None = None
    limit: str | None = None
    note: str = ""


@dataclass(frozen=True)
class Interleaved:
    """Systems that are measured by turns, and the lines made of them.

    ``condition`` is a task that runs first; if its ``reason`` is not empty, the row is skipped for that reason. With
    ``fresh`` every measurement has a process of its own. A system whose package is not installed is left out, and the
    lines note it.
    """

    name: str
    systems: Mapping[str, System]
    comparisons: tuple[Comparison, ...]
    condition: System | None = None
    fresh: bool = False

    def run(self, bench: Bench) -> Outcome:
        """Measure what can be measured."""
        if self.condition is not None and (reason := bench.once(self.condition).facts["reason"]):
            return Outcome([skipped(comparison.title, reason) for comparison in self.comparisons], {})
        missing = {name: reason for name, system in self.systems.items() if (reason := lacking(system.side))}
        present = {name: system for name, system in self.systems.items() if name not in missing}
        samples = bench.each_alone(present) if self.fresh else bench.interleaved(present)
        lines = [self._line(comparison, samples, missing) for comparison in self.comparisons]
        details = {name: [sample._asdict() for sample in taken] for name, taken in samples.items()}
        return Outcome(lines, details)

    @staticmethod
    def _line(comparison: Comparison, samples: dict[str, Any], missing: dict[str, str]) -> Line:
        reasons = [missing[name] for name in (comparison.peer, comparison.limit) if name in missing]
        note = "; ".join(filter(None, [comparison.note, *(f"no peer: {reason}" for reason in reasons)]))
        peer, limit = (samples.get(name or "", ()) for name in (comparison.peer, comparison.limit))
        bar = None if reasons and isinstance(comparison.bar, AtLeast) else comparison.bar
        return compared(comparison.title, comparison.quantity, samples[comparison.ours], peer, limit, bar, note)


def lacking(side: str) -> str:
    """Why a side cannot be measured; empty if it can."""
    try:
        require_packages(PACKAGES_OF_SIDE.get(side, ()))
    except Unavailable as reason:
        return str(reason)
    return ""
