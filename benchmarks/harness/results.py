"""Results: measurements of a system, their ratio to the peer, and whether they meet the bar."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from benchmarks.harness.stopwatch import Sample


class Quantity(NamedTuple):
    """A figure derived from seconds per unit of work, by one of the two clocks."""

    unit: str
    of_cost: Callable[[float], float]
    clock: Callable[[Sample], float] = lambda sample: sample.cpu

    def costs(self, samples: Sequence[Sample]) -> list[float]:
        """Seconds per unit of work of every sample."""
        return [self.clock(sample) / sample.facts["work"] for sample in samples]


CELLS_PER_SECOND = Quantity("cells / CPU s", lambda cost: 1 / cost)
CELLS_PER_WALL_SECOND = Quantity("cells / s", lambda cost: 1 / cost, lambda sample: sample.wall)
WALL = Quantity("s", lambda cost: cost, lambda sample: sample.wall)
SECONDS = Quantity("CPU s", lambda cost: cost)
NANOSECONDS = Quantity("CPU ns / value", lambda cost: 1e9 * cost)
VARIANCE = Quantity("CPU s x variance", lambda cost: cost)


@dataclass(frozen=True)
class AtLeast:
    """A bar on the ratio."""

    value: float

    def met(self, line: "Line") -> bool:
        """Whether both ratios reach it, that of the minima and that of the medians."""
        return min(line.ratio_min, line.ratio_median) >= self.value

    def __str__(self) -> str:
        return f">= {self.value:.3g}"


@dataclass(frozen=True)
class AtMost:
    """A bar on our own figure."""

    value: float

    def met(self, line: "Line") -> bool:
        """Whether no round is above it."""
        return max([line.ours, *line.ours_rounds]) <= self.value

    def __str__(self) -> str:
        return f"<= {self.value:.3g}"


@dataclass
class Line:
    """One line of the table.

    ``ours``, ``peer`` and ``limit`` are in ``unit``; ratios are cost of the peer over cost of ours, of the minima over
    rounds and of the medians (rounds are seeds where fits are judged); ``share`` is our part of the limit. NaN: a
    figure that the line does not have.
    """

    title: str
    unit: str = ""
    ours: float = math.nan
    peer: float = math.nan
    ratio_min: float = math.nan
    ratio_median: float = math.nan
    ratio_wall: float = math.nan
    bar: str = ""
    met: str = ""
    limit: float = math.nan
    share: float = math.nan
    ours_rounds: list[float] = field(default_factory=list)
    peer_rounds: list[float] = field(default_factory=list)
    note: str = ""

    def judged(self, bar: AtLeast | AtMost | None) -> "Line":
        """The line with its bar and whether it is met."""
        if bar is not None:
            self.bar, self.met = str(bar), "yes" if bar.met(self) else "no"
        return self


def skipped(title: str, reason: str) -> Line:
    """A line that was not measured, and why."""
    return Line(title, note=f"skipped: {reason}")


def failed(title: str, error: str) -> Line:
    """A line whose measurement raised an error, of which the last line is shown."""
    return Line(title, met="failed", note=f"failed: {error.strip().splitlines()[-1]}")


def compared(
    title: str,
    quantity: Quantity,
    ours: Sequence[Sample],
    peer: Sequence[Sample] = (),
    limit: Sequence[Sample] = (),
    bar: AtLeast | AtMost | None = None,
    note: str = "",
) -> Line:
    """Make a line of the samples of ours, of the peer and of the limit; each must say how much ``work`` it did."""
    costs, theirs, limits = (quantity.costs(samples) for samples in (ours, peer, limit))
    line = Line(title, quantity.unit, ours=quantity.of_cost(min(costs)), note=note)
    line.ours_rounds = [quantity.of_cost(cost) for cost in costs]
    if peer:
        line.peer, line.peer_rounds = quantity.of_cost(min(theirs)), [quantity.of_cost(cost) for cost in theirs]
        line.ratio_min = min(theirs) / min(costs)
        line.ratio_median = statistics.median(theirs) / statistics.median(costs)
        line.ratio_wall = min(WALL.costs(peer)) / min(WALL.costs(ours))
    if limit:
        line.limit, line.share = quantity.of_cost(min(limits)), min(limits) / min(costs)
    return line.judged(bar)
