"""Check of a count matrix for values that cannot be counts."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from pyro_scvi.data.counts import NO_LIMIT, Counts, Matrix, Source, TypeLimit, blocks, narrow, stored_values
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

LARGEST_USUAL_COUNT = 1e6
"""A single entry above this is hardly ever a number of molecules, so it raises a warning."""

LARGEST_EXACT_COUNT = 2**24
"""Above this, float32 no longer holds every integer."""

MANY, FEW = 2_000, 1_000
"""So many counts do not happen to be 1, or multiples of a number; so few usually show that they are not."""

FEATURE_TYPES, GENES = "feature_types", "Gene Expression"

ROUNDING_ERROR = 1e-3
"""Small values that are closer to integers than this may have been integers; a hundredth of it more per count."""


def check_counts(
    counts: Counts,
    genes: Sequence[str] | pd.Index,
    cells: pd.Index,
    source: str,
    hint: str,
    *,
    allow_non_integer: bool = False,
    limit: TypeLimit = NO_LIMIT,
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
        Accept finite non-negative values that are not integers.
    limit
        Of the type that the counts came in.

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
        If an entry is above ``LARGEST_USUAL_COUNT`` or ``limit``, or all counts are 1, or multiples of a number.
    """
    check = Check(genes, source, hint, allow_non_integer, limit)
    if isinstance(counts, Source):
        if not counts.checked:
            counts.scan(lambda rows, block: check(block, cells[rows]))
        check.warn()
        return counts
    check(counts, cells)
    check.warn()
    return narrow(counts)


def warn_of_features(var: pd.DataFrame | None) -> None:
    """Warn of columns of counts that are no genes, such as antibodies, as 10x tells them in ``var["feature_types"]``.

    Warns
    -----
    UserWarning
        If there are any; names their kinds.
    """
    if var is None or FEATURE_TYPES not in var:
        return
    kinds = var[FEATURE_TYPES].dropna().astype(str)
    others = kinds[kinds != GENES]
    if len(others):
        counted = ", ".join(f"{n} {kind!r}" for kind, n in others.value_counts().items())
        warn(
            f"{len(others)} of the {len(var)} features are not genes according to var[{FEATURE_TYPES!r}]: "
            f"{counted}. They would be fitted like genes and be part of each cell's total. To leave them out: "
            f"adata[:, adata.var[{FEATURE_TYPES!r}] == {GENES!r}]."
        )


class Check:
    """Refuses blocks of a matrix with values that are no counts; arguments as in :func:`check_counts`."""

    def __init__(
        self,
        genes: Sequence[str] | pd.Index,
        source: str,
        hint: str,
        allow_non_integer: bool = False,
        limit: TypeLimit = NO_LIMIT,
    ) -> None:
        self.genes, self.source, self.hint, self.limit = genes, source, hint, limit
        self.rules = _rules(allow_non_integer)
        self.implausible: str | None = None  # the first entry that is implausibly large
        self.doubtful: str | None = None  # the first entry that its type may have changed
        self.form = None if allow_non_integer else _Form()

    def __call__(self, counts: Matrix, cells: pd.Index) -> None:
        """Scan a block, (cells, genes), whose cells have these names."""
        for rule in self.rules:
            position = _first(counts, rule.breaks)
            if position is not None:
                entry = _describe(counts, position, self.genes, cells)
                text = rule.message.format(source=self.source, entry=entry, hint=self.hint)
                raise DataError(f"{text}{rule.more(counts)}")
        self.implausible = self.implausible or self._above(LARGEST_USUAL_COUNT, counts, cells)
        self.doubtful = self.doubtful or self._above(self.limit.value, counts, cells, self.limit.most)
        if self.form is not None:
            self.form.look(counts)

    def _above(self, limit: float, counts: Matrix, cells: pd.Index, most: float = np.inf) -> str | None:
        """The first entry above a limit and up to ``most``, in words; None if there is none."""
        position = _first(counts, lambda values: (values > limit) & (values <= most)) if limit < np.inf else None
        return None if position is None else _describe(counts, position, self.genes, cells)

    def warn(self) -> None:
        """Warn about counts that are implausibly large, or that are not what they were, once for all blocks."""
        if self.doubtful is not None:
            warn(
                f"{self.source} came in {self.limit.effect} above {self.limit.value:g}: {self.doubtful}. The true "
                "count may be another one. Read the counts from where they are stored as float32 or as 32-bit integers."
            )
        if self.form is not None:
            self.form.warn(self.source)
        if self.implausible is not None:
            warn(
                f"{self.source} has an implausibly large count: {self.implausible}. It is used as it is and "
                "affects the whole fit. If it is a sum or a measurement and not a number of molecules, drop that "
                "cell or gene."
            )


class _Form:
    """What all counts have in common, in case they were changed: none is above 1, or all are multiples of a number."""

    def __init__(self) -> None:
        self.n_positive, self.largest, self.divisor = 0, 0.0, 0

    def look(self, counts: Matrix) -> None:
        """Go on with the counts of a block; nothing is read once they are seen to be as molecules are."""
        for _, values in blocks(stored_values(counts)):
            if self.divisor == 1 and self.largest > 1:
                return
            self.n_positive += int(np.count_nonzero(values))
            self.largest = max(self.largest, float(values.max(initial=0)))
            for part in (values[:FEW], values):  # a few nearly always show that there is no common divisor
                if self.divisor != 1:
                    self.divisor = int(np.gcd.reduce(part.astype(np.int64), initial=self.divisor))

    def warn(self, source: str) -> None:
        """Warn of a common form, where there are too many counts for chance."""
        if self.n_positive < MANY:
            return
        if self.largest == 1:
            warn(
                f"all {self.n_positive} counts above 0 in {source} are 1. Were they turned into 0 and 1? Some "
                "numbers of molecules are larger than 1. Take the counts from before that step."
            )
        elif self.divisor > 1:
            warn(
                f"all {self.n_positive} counts above 0 in {source} are multiples of {self.divisor}. Were they "
                "multiplied? Their noise is then not the noise of counts. Divide them, or take the counts from "
                "before that step."
            )


class _Rule(NamedTuple):
    breaks: Callable[[np.ndarray], np.ndarray]  # values -> bool of the same shape
    message: str
    more: Callable[[Matrix], str] = lambda counts: ""  # what the other values of the block say about the cause


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
        rules.append(_Rule(lambda values: np.rint(values) != values, message, _how_to_round))
    return rules


def _first(counts: Matrix, breaks: Callable[[np.ndarray], np.ndarray]) -> int | None:
    """Position, among the stored values, of the first value that breaks a rule."""
    for start, values in blocks(stored_values(counts)):
        broken = breaks(values)
        if broken.any():
            return start + int(broken.argmax())
    return None


def _how_to_round(counts: Matrix) -> str:
    """What to do if every value is an integer but for rounding errors; else nothing."""
    largest = 0.0
    for _, values in blocks(stored_values(counts)):
        off = np.abs(values - np.rint(values))
        if (off > ROUNDING_ERROR * (1 + 0.01 * np.abs(values))).any():
            return ""
        largest = max(largest, float(off.max(initial=0)))
    return (
        f" All values are within {largest:.1g} of integers. They look like counts that were computed back from "
        "normalised values: np.rint(matrix) rounds them, as in adata.X = np.rint(adata.X)."
    )


def _describe(counts: Matrix, position: int, genes: Sequence[str] | pd.Index, cells: pd.Index) -> str:
    if isinstance(counts, np.ndarray):
        cell, gene = divmod(position, counts.shape[1])
    else:
        cell, gene = int(np.searchsorted(counts.indptr, position, side="right")) - 1, counts.indices[position]
    return f"cell {str(cells[cell])!r}, gene {str(genes[gene])!r} holds {_digits(stored_values(counts)[position])}"


def _digits(value: np.number) -> str:
    """A number in few digits, or in as many as show that it is no integer."""
    short = f"{value:g}"
    return str(value) if float(short).is_integer() and value != float(short) else short
