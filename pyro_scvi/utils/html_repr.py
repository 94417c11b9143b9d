"""HTML reprs for notebooks: a table with a caption, and small curves."""

import html
import math
from collections.abc import Mapping, Sequence


def table(caption: str, facts: Mapping[str, str], below: str = "") -> str:
    """HTML of a two-column table; everything is escaped except ``below``, which is HTML already."""
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


def curves(lines: Mapping[str, Sequence[float]], width: int = 240, height: int = 60) -> str:
    """SVG of up to two lines on one scale, the second dashed, with a legend and no axes; NaN is left out."""
    known = {name: [value for value in values if math.isfinite(value)] for name, values in lines.items()}
    known = {name: values for name, values in known.items() if values}
    every = [value for values in known.values() for value in values] or [0.0]
    low, span = min(every), (max(every) - min(every)) or 1.0
    parts = []
    for (name, values), dash, y in zip(known.items(), ("none", "4 3"), (14, 34), strict=False):
        last = max(len(values) - 1, 1)
        points = " ".join(
            f"{i / last * width:.1f},{(low + span - v) / span * height:.1f}" for i, v in enumerate(values)
        )
        stroke = f"fill='none' stroke='currentColor' stroke-width='1.5' stroke-dasharray='{dash}'"
        parts.append(f"<polyline points='{points}' {stroke}/><path d='M{width + 12} {y - 4}h18' {stroke}/>")
        label = f"x='{width + 36}' y='{y}' font-size='12' fill='currentColor'"
        parts.append(f"<text {label}>{html.escape(name)}</text>")
    size = f"width='{width + 110}' height='{height}' viewBox='-2 -2 {width + 114} {height + 4}'"
    return f"<svg {size}>{''.join(parts)}</svg>"
