"""A row of a table: what was measured of which system, with its error, and beside the paper's own number."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Row:
    """One number of one system.

    Attributes
    ----------
    data, system, quantity
        What was measured, and on what; the unit is part of ``quantity``.
    value
        NaN if there is none; ``note`` then says why.
    error, spread
        Its uncertainty, and what kind that is: "se over cells", "sd over seeds". NaN and "" where there is none.
    n
        Number of cells or seeds behind ``value`` and ``error``.
    seeds
        Of the fits behind it.
    seconds
        CPU seconds of the fits behind it, mean over seeds.
    paper
        The number printed in Lopez et al. (2017).
    note
        Why there is no number, or a remark on it.
    """

    data: str
    system: str
    quantity: str
    value: float
    error: float = math.nan
    spread: str = ""
    n: int = 0
    seeds: tuple[int, ...] = ()
    seconds: float = math.nan
    paper: float = math.nan
    note: str = ""


def over_cells(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard error and number of one value per cell; the arguments value, error and n of a row."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1) / math.sqrt(len(array))), len(array)


def over_seeds(values: Sequence[float]) -> tuple[float, float, int]:
    """Mean, standard deviation (NaN for one) and number of one value per seed; value, error and n of a row."""
    array = np.asarray(values, dtype=float)
    return float(array.mean()), float(array.std(ddof=1)) if len(array) > 1 else math.nan, len(array)
