"""Check of a count matrix for values that cannot be counts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pyro_scvi.data.counts import Counts, Matrix, Source, blocks, narrow, stored_values
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

LARGEST_USUAL_COUNT = 1e6
"""A single entry above this is hardly ever a number of molecules, so it raises a warning."""

LARGEST_EXACT_COUNT = 2**24
"""Above this, float32 no longer holds every integer."""


def check_counts(
    counts: Counts,
    genes: Sequence[str] | pd.Index,
    cells: pd.Index,
    source: str,
    hint: str,
    *,
    allow_non_integer: bool = False,
) -> Counts:
    """Scan every entry, and return the matrix in a type that converts to float32 without loss.

    Parameters
    ----------
    counts
        (cells, genes), as :func:`canonical` gives it, or a source, which is read once, in blocks.
    genes, cells
        Names for messages.
    source, hint
        Name of the matrix in messages, and where raw counts might be instead.
    allow_non_integer
        Accept finite non-negative values that are no integers.

    Returns
    -------
    csr_array, ndarray or Source
        (cells, genes); a matrix in memory has float32 or an integer type of at most 32 bits.

    Raises
    ------
    DataError
        If an entry is NaN, infinite, negative, no integer or too large; names its cell and gene.

    Warns
    -----
    UserWarning
        If an entry is above ``LARGEST_USUAL_COUNT``.
    """
    check = Check(genes, source, hint, allow_non_integer)
    if isinstance(counts, Source):
        if not counts.checked:
            counts.scan(lambda rows, block: check(block, cells[rows]))
        check.warn()
        return counts
    check(counts, cells)
    check.warn()
    return narrow(counts)


class Check:
    """Refuses blocks of a matrix with values that are no counts; arguments as in :func:`check_counts`."""

    def __init__(
        self, genes: Sequence[str] | pd.Index, source: str, hint: str, allow_non_integer: bool = False
    ) -> None:
        self.genes, self.source, self.hint, self.rules = genes, source, hint, _rules(allow_non_integer)
        self.implausible: str | None = None  # the first entry that is implausibly large

    def __call__(self, counts: Matrix, cells: pd.Index) -> None:
        """Scan a block, (cells, genes), whose cells have these names."""
        for rule in self.rules:
            position = _first(counts, rule.breaks)
            if position is not None:
                entry = _describe(counts, position, self.genes, cells)
                raise DataError(rule.message.format(source=self.source, entry=entry, hint=self.hint))
        position = _first(counts, lambda values: values > LARGEST_USUAL_COUNT)
        if position is not None and self.implausible is None:
            self.implausible = _describe(counts, position, self.genes, cells)

    def warn(self) -> None:
        """Warn about an implausibly large count, once for all blocks."""
        if self.implausible is not None:
            warn(
                f"{self.source} has an implausibly large count: {self.implausible}. It is taken as it is and weighs on "
                "the whole fit; if it is a sum or a measurement and no number of molecules, drop that cell or gene."
            )


class _Rule(NamedTuple):
    breaks: Callable[[np.ndarray], np.ndarray]  # values -> bool of the same shape
    message: str


def _rules(allow_non_integer: bool) -> list[_Rule]:
    rules = [
        _Rule(
            lambda values: ~np.isfinite(values),
            "{source} must hold finite counts; {entry}. Drop that cell or gene, or fill it in. {hint}",
        ),
        _Rule(
            lambda values: values < 0,
            "{source} must hold counts of 0 or more; {entry}. Are the values scaled? {hint}",
        ),
        _Rule(
            lambda values: values > LARGEST_EXACT_COUNT,
            f"{{source}} must hold counts up to {LARGEST_EXACT_COUNT}, which float32 keeps exactly; {{entry}}. "
            "Are the values scaled? {hint}",
        ),
    ]
    if not allow_non_integer:
        message = (
            "{source} must hold raw integer counts; {entry}. Are the values normalised or logarithms? {hint} "
            "To go on with these values, pass allow_non_integer=True."
        )
        rules.append(_Rule(lambda values: np.rint(values) != values, message))
    return rules


def _first(counts: Matrix, breaks: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Position, among the stored values, of the first value that breaks a rule."""
    for start, values in blocks(stored_values(counts)):
        broken = breaks(values)
        if broken.any():
            return start + int(broken.argmax())
    return None


def _describe(counts: Matrix, position: int, genes: Sequence[str] | pd.Index, cells: pd.Index) -> str:
    if isinstance(counts, np.ndarray):
        cell, gene = divmod(position, counts.shape[1])
    else:
        cell, gene = int(np.searchsorted(counts.indptr, position, side="right")) - 1, counts.indices[position]
    return f"cell {str(cells[cell])!r}, gene {str(genes[gene])!r} holds {stored_values(counts)[position]:g}"
