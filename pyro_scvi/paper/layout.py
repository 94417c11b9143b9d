"""The layout of rows as a table: systems by quantities, the paper's numbers beside them, notes as footnotes."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from string import ascii_lowercase

from pyro_scvi.paper.rows import Row

DIGITS = 4  # of a number without an error
MOST_DECIMALS = 6
SYSTEM, QUANTITY, ABOUT = "system", "quantity", "±, n, seeds"
TEXTS = (SYSTEM, QUANTITY, ABOUT)  # columns that hold no numbers
LONGEST = 46  # characters of a header; of a longer one the first words stand there, and all of it under the table
NOTHING = "\N{EN DASH}"


@dataclass(frozen=True)
class Layout:
    """A table in plain text: a heading, the header of its columns, its rows, and footnotes by their number.

    ``columns`` says in full what the headers marked (a), (b) and so on stand for.
    """

    heading: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)
    columns: list[str] = field(default_factory=list)


def laid_out(rows: Sequence[Row]) -> list[Layout]:
    """One table per data set, systems by quantities; quantities of a single system become a list."""
    return [layout for name in _unique(row.data for row in rows) for layout in _of_data(name, rows)]


def _of_data(name: str, rows: Sequence[Row]) -> list[Layout]:
    rows = [row for row in rows if row.data == name]
    systems_of = Counter(quantity for _, quantity in {(row.system, row.quantity) for row in rows})
    shared = [row for row in rows if systems_of[row.quantity] > 1]
    alone = [row for row in rows if systems_of[row.quantity] == 1]
    tables = [_matrix(name if block[0] is shared[0] else "", block) for block in _blocks(shared)]
    return [*tables, _list("" if shared else name, alone)] if alone else tables


def _blocks(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows in blocks without a system or quantity in common: levels of systems, and differences between them."""
    left, blocks = list(rows), []
    while left:
        systems, quantities, block = {left[0].system}, {left[0].quantity}, list[Row]()
        while len(block) < len(matches := [row for row in left if row.system in systems or row.quantity in quantities]):
            block = matches
            systems, quantities = {row.system for row in block}, {row.quantity for row in block}
        blocks.append(block)
        left = [row for row in left if row not in block]
    return blocks


def _matrix(heading: str, rows: Sequence[Row]) -> Layout:
    """Systems by quantities. A column's usual n and kind of error stand with its name, others in footnotes.

    Where all columns have the same, it stands in the heading of the table.
    """
    notes: list[str] = []
    quantities, systems = _unique(row.quantity for row in rows), _unique(row.system for row in rows)
    columns = {quantity: [row for row in rows if row.quantity == quantity] for quantity in quantities}
    usual = {quantity: _usual(column) for quantity, column in columns.items()}
    common = set(usual.values())
    named = dict.fromkeys(quantities, "") if len(common) == 1 else usual
    with_paper = {row.quantity for row in rows if math.isfinite(row.paper)}
    titles, legend = _titles({quantity: f"{quantity}{_bracketed(named[quantity])}" for quantity in quantities})
    header = [SYSTEM]
    for quantity in quantities:
        header += [titles[quantity], *["paper"] * (quantity in with_paper)]
    table = []
    for system in systems:
        of = {row.quantity: row for row in rows if row.system == system}
        line = [system]
        for quantity in quantities:
            row = of.get(quantity)
            line.append("" if row is None else _cell(row, usual[quantity], notes))
            if quantity in with_paper:
                line.append("" if row is None else _paper(row))
        table.append([*line, _seconds(of.values()), _seeds(of.values())])
    heading = " ".join([heading, *[f"({text})" for text in common if text and len(common) == 1]]).strip()
    return Layout(heading, *_without_empty([*header, "CPU s", "seeds"], table), notes, legend)


def _titles(full: dict[str, str]) -> tuple[dict[str, str], list[str]]:
    """A header for each quantity, and what the cut ones stand for: all before a comma that is outside brackets."""
    titles, legend = {}, list[str]()
    for quantity, text in full.items():
        first = re.match(r"(?:[^,()]|\([^()]*\))+", quantity)
        if len(text) <= LONGEST or first is None:
            titles[quantity] = text
        else:
            letter = ascii_lowercase[len(legend)]
            titles[quantity] = f"{first[0]} ({letter})"
            legend.append(f"({letter}) {text}")
    return titles, legend


def _list(heading: str, rows: Sequence[Row]) -> Layout:
    notes: list[str] = []
    table = [[row.system, row.quantity, _cell(row, _spread(row), notes), _paper(row), _about(row)] for row in rows]
    return Layout(heading, *_without_empty([SYSTEM, QUANTITY, "value", "paper", ABOUT], table), notes)


def _without_empty(header: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    return [header[i] for i in kept], [[row[i] or NOTHING for i in kept] for row in rows]


def _cell(row: Row, usual: str, notes: list[str]) -> str:
    reasons = [row.note] if row.note else []
    if math.isnan(row.value):
        return f"NA{_marks(reasons or ['no reason given'], notes)}"
    if _spread(row) != usual:
        reasons.append(_spread(row) or "one value, without an error")
    return number(row.value, row.error) + _marks(reasons, notes)


def _marks(reasons: Sequence[str], notes: list[str]) -> str:
    notes += [reason for reason in reasons if reason not in notes]
    return "".join(f" [{notes.index(reason) + 1}]" for reason in reasons)


def number(value: float, error: float = math.nan) -> str:
    """A number with its error, to two digits of the error; without one, to four digits."""
    value = 0.0 if abs(value) < 0.5 * 10**-MOST_DECIMALS else value  # what rounding leaves of 0
    if math.isfinite(error):
        decimals = _decimals(error or value or 1.0, 2 if error else DIGITS)
        return f"{value:,.{decimals}f} ± {error:,.{decimals if error else 0}f}"
    if not math.isfinite(value):
        return str(value)
    return f"{value:,.0f}" if value == round(value) else f"{value:,.{_decimals(value, DIGITS)}f}"


def _decimals(number: float, digits: int) -> int:
    """After the point, for so many digits of the number."""
    return min(MOST_DECIMALS, max(0, digits - 1 - math.floor(math.log10(abs(number)))))


def _spread(row: Row) -> str:
    """What the error is and over how many; "" where neither is known."""
    parts = [f"± {row.spread}"] if math.isfinite(row.error) and row.spread else []
    return ", ".join([*parts, *[f"n = {row.n:,}"] * (row.n > 1)])


def _usual(rows: Iterable[Row]) -> str:
    known = [_spread(row) for row in rows if not math.isnan(row.value)]
    return Counter(known).most_common(1)[0][0] if known else ""


def _bracketed(text: str) -> str:
    return f" ({text})" if text else ""


def _paper(row: Row) -> str:
    return f"{row.paper:,}" if math.isfinite(row.paper) else ""


def _about(row: Row) -> str:
    seeds = _seeds([row])
    return "; ".join([part for part in (_spread(row), f"seeds {seeds}" if seeds else "") if part])


def _seconds(rows: Iterable[Row]) -> str:
    known = [row.seconds for row in rows if math.isfinite(row.seconds)]
    return f"{max(known):,.{1 if max(known) < 10 else 0}f}" if known else ""


def _seeds(rows: Iterable[Row]) -> str:
    """As 0-4, or 0, 2, 5."""
    seeds = sorted({seed for row in rows for seed in row.seeds})
    if len(seeds) > 2 and seeds == list(range(seeds[0], seeds[-1] + 1)):
        return f"{seeds[0]}\N{EN DASH}{seeds[-1]}"
    return ", ".join(map(str, seeds))


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
