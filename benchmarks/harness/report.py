"""Report: lines as a table and as JSON, and changes since an earlier report."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.harness.results import Line

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
    """Changes in every line that both have: our figure then and now, and whether the rounds still overlap."""
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
    """Write JSON: the lines, the machine, the command, and the rows' details; NaN becomes null, inf "inf"."""
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
