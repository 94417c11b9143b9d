"""Lines of the table: what was measured, its ratio to the peer, its bar; printing, JSON, and what changed since."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
    rounds and of the medians (rounds are seeds where fits are judged); ``share`` is our part of the limit. NaN is a
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


COLUMNS: dict[str, Callable[[Line], str]] = {
    "row": lambda line: line.title,
    "unit": lambda line: line.unit,
    "ours": lambda line: number(line.ours),
    "peer": lambda line: number(line.peer),
    "ratio min (median)": lambda line: _ratios(line.ratio_min, line.ratio_median),
    "wall": lambda line: _ratio(line.ratio_wall),
    "bar": lambda line: line.bar,
    "met": lambda line: line.met,
    "limit": lambda line: number(line.limit),
    "share": lambda line: _ratio(line.share),
}


def table(lines: Sequence[Line]) -> str:
    """Lines as aligned text, notes below their line."""
    cells = [list(COLUMNS), *([text(line) for text in COLUMNS.values()] for line in lines)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(COLUMNS))]
    written = [_aligned(row, widths) for row in cells]
    rows = [written[0], "  ".join("-" * width for width in widths)]
    for text, line in zip(written[1:], lines, strict=True):
        rows += [text] + ([f"    {line.note}"] if line.note else [])
    return "\n".join(rows) + "\n"


def number(value: float) -> str:
    """Four significant digits, or nothing for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _ratio(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.2f}"


def _ratios(of_minima: float, of_medians: float) -> str:
    return "" if math.isnan(of_minima) else f"{of_minima:.2f} ({of_medians:.2f})"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> str:
    first, second, *figures = (text.ljust(width) for text, width in zip(row, widths, strict=True))
    return "  ".join([first, second, *(text.strip().rjust(len(text)) for text in figures)]).rstrip()


def changes(old: Sequence[Line], new: Sequence[Line]) -> str:
    """What became of every line that both have: our figure then and now, and whether the rounds still overlap."""
    before = {line.title: line for line in old}
    texts = [_change(before[line.title], line) for line in new if line.title in before]
    return "\n".join(texts or ["no line in common"]) + "\n"


def _change(old: Line, new: Line) -> str:
    if math.isnan(old.ours) or math.isnan(new.ours):
        return f"{new.title}: not measured in both"
    (a, b), (c, d) = ((min(rounds), max(rounds)) for rounds in (_rounds(old), _rounds(new)))
    apart = "beyond the spread of rounds" if c > b or d < a else "within the spread of rounds"
    theirs = f"; ratio to the peer {_ratio(old.ratio_min)} -> {_ratio(new.ratio_min)}"
    ratio = new.ours / old.ours if old.ours else math.nan
    text = f"{new.title}: {number(old.ours)} -> {number(new.ours)} {new.unit}, x {ratio:.2f}, {apart}"
    return text + (theirs if not math.isnan(old.ratio_min + new.ratio_min) else "")


def _rounds(line: Line) -> list[float]:
    return line.ours_rounds or [line.ours]


def write(path: Path, lines: Sequence[Line], about: dict[str, Any], details: dict[str, Any]) -> None:
    """Write JSON: the lines, the machine and the command, and what rows keep besides; NaN becomes null, inf "inf"."""
    content = {**about, "rows": [asdict(line) for line in lines], "details": details}
    path.write_text(json.dumps(_plain(content), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> list[Line]:
    """The lines of a file that :func:`write` wrote."""
    rows = json.loads(path.read_text())["rows"]
    return [Line(**{key: _figure(value) for key, value in row.items()}) for row in rows]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _figure(value: Any) -> Any:
    if isinstance(value, list):
        return [_figure(item) for item in value]
    return math.nan if value is None else float(value) if value == "inf" else value
