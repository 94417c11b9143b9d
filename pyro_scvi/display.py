"""How objects show themselves in a notebook: a captioned table, and a small curve."""

import html
from collections.abc import Mapping, Sequence


def table(caption: str, facts: Mapping[str, str], below: str = "") -> str:
    """HTML of a two-column table; everything but ``below`` (an own drawing) is escaped."""
    rows = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(fact)}</td></tr>"
        for name, fact in facts.items()
    )
    return f"<table><caption>{html.escape(caption)}</caption>{rows}</table>{below}"


def grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """HTML of a table with a heading for each column; everything is escaped."""
    left = "style='text-align:left'"
    head = "".join(f"<th {left}>{html.escape(name)}</th>" for name in header)
    body = "".join("<tr>" + "".join(f"<td {left}>{html.escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead>{body}</table>"


def curve(values: Sequence[float], width: int = 240, height: int = 60) -> str:
    """SVG of a falling or rising line, without axes."""
    low, high, last = min(values), max(values), max(len(values) - 1, 1)
    span = (high - low) or 1.0
    points = " ".join(f"{i / last * width:.1f},{(high - v) / span * height:.1f}" for i, v in enumerate(values))
    line = f"<polyline points='{points}' fill='none' stroke='currentColor' stroke-width='1.5'/>"
    return f"<svg width='{width}' height='{height}' viewBox='-2 -2 {width + 4} {height + 4}'>{line}</svg>"
