"""What a report opens with: for each table what the paper claims, and what was found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pyro_scvi.paper.layout import number
from pyro_scvi.paper.rows import Row

Place = tuple[str, str, str]
"""Data, system and quantity of a row."""


@dataclass(frozen=True)
class Finding:
    """A sentence with numbers of the rows in it.

    Attributes
    ----------
    text
        The sentence, with ``{name}`` for each number.
    places
        The row of each name: its data, system and quantity.
    """

    text: str
    places: Mapping[str, Place] = field(default_factory=dict)

    def sentence(self, rows: Sequence[Row]) -> str:
        """The sentence with its numbers and their errors; "" if one of them is not there."""
        found = {(row.data, row.system, row.quantity): row for row in rows if not math.isnan(row.value)}
        if not found.keys() >= set(self.places.values()):
            return ""
        return self.text.format_map({name: _shown(found[place]) for name, place in self.places.items()})


def _shown(row: Row) -> str:
    return number(row.value, row.error) if row.error else number(row.value)  # an error of 0 says nothing


def each(data: str, quantity: str, **systems: str) -> dict[str, Place]:
    """Places of one quantity of several systems, by name."""
    return {name: (data, system, quantity) for name, system in systems.items()}
