"""Scales of continuous covariates: values that lie where no model can have learnt anything, and units that differ."""

import numpy as np
import pandas as pd

from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

FARTHEST = 50.0
"""Standard deviations from the mean of the training cells beyond which a covariate is refused: means overflow there."""

FAR = 10.0
"""Standard deviations from the mean beyond which a covariate of a query raises a warning."""

OFF = 3.0
"""Standard deviations from the mean beyond which half of the cells of a query raise a warning: at most a ninth of the
training cells themselves can lie there."""

NARROWEST = 0.05
"""A query whose covariate spreads less than this, in standard deviations, around a point off the mean may have a
smaller unit."""

OTHER_UNIT = 2.0
"""Factor between the counts per size factor of a query and of the training cells that raises a warning."""

MIXED = 10.0
"""Factor by which both size and spread of a covariate must differ between parts of the data to raise a warning."""

FEW = 10
"""Cells of a part that say nothing of its scale."""

SMALLEST = 1e-100
"""A covariate whose values are all below this is refused: its variance may underflow, and its scale be wrong."""


def require_not_tiny(name: str, values: np.ndarray) -> None:
    """Refuse a covariate whose values (cells,) are too small for their squares to be numbers.

    Raises
    ------
    DataError
        If they are; names the column.
    """
    if 0 < np.abs(values).max(initial=0) < SMALLEST:
        raise DataError(f"covariate column {name!r} holds values too small to be standardised; rescale it.")


def require_near(name: str, values: np.ndarray, mean: float, sd: float, cells: pd.Index) -> None:
    """Refuse values (cells,) of a covariate at which no function of a fit gives numbers that can be trusted.

    Raises
    ------
    DataError
        If there is one; names the column and a cell.
    """
    far = np.abs(values - mean) > FARTHEST * sd
    if far.any():
        first = int(far.argmax())
        raise DataError(
            f"covariate column {name!r} lies more than {FARTHEST:g} standard deviations from the mean of the training "
            f"cells ({mean:.4g} ± {sd:.2g}) in {far.sum()} of {len(values)} cells: cell {str(cells[first])!r} has "
            f"{values[first]:.4g}. Is it in another unit, such as percent for a share? Otherwise leave such cells out, "
            "or take the logarithm of the column for model and query."
        )


def warn_of_units(name: str, values: np.ndarray, mean: float, sd: float) -> None:
    """Warn of a covariate of a query that lies far from that of the training cells, or is all but constant beside it.

    Warns
    -----
    UserWarning
        If so; names the column and both scales.
    """
    z = (values - mean) / sd
    n_far = int((np.abs(z) > FAR).sum())
    if n_far > len(z) / FAR**2:  # no more of the training cells themselves can lie there, by Chebyshev's inequality
        warn(
            f"covariate column {name!r} lies more than {FAR:g} standard deviations from the mean of the training "
            f"cells ({mean:.4g} ± {sd:.2g}) in {n_far} of {len(z)} cells; results for them are extrapolated. Is "
            "the column in another unit?"
        )
    elif z.std() > 0 and abs(np.median(z)) > (1 if z.std() < NARROWEST else OFF):  # cells of one donor have one value
        warn(
            f"covariate column {name!r} is {np.median(values):.4g} ± {values.std():.2g} here and {mean:.4g} ± {sd:.2g} "
            "in the training cells. Is it in another unit, such as a share for percent, or years for months?"
        )


def warn_of_mixed_units(name: str, values: np.ndarray, parts: np.ndarray, what: str) -> None:
    """Warn of a covariate (cells,) that is in another unit in one of the ``parts`` (cells,) than in the largest.

    Another factor changes size and spread alike. What differs between parts, such as a fraction of dying cells, mostly
    does not by as much.

    Warns
    -----
    UserWarning
        If there is one; names the column, the part, and both scales; ``what`` says what parts are.
    """
    names, codes, sizes = np.unique(parts.astype(str), return_inverse=True, return_counts=True)
    centres, means = (np.bincount(codes, of) / sizes for of in (values, np.abs(values)))
    sds = np.sqrt(np.bincount(codes, (values - centres[codes]) ** 2) / sizes)
    scaled = np.flatnonzero((sizes >= FEW) & (sds > NARROWEST * means))  # one value for all cells has no scale
    if len(scaled) < 2:
        return
    largest = scaled[sizes[scaled].argmax()]
    factors = np.stack([means[scaled] / means[largest], sds[scaled] / sds[largest]])
    off = scaled[(factors.min(0) > MIXED) | (factors.max(0) < 1 / MIXED)]
    if len(off):
        shown = [f"{means[part]:.4g} ± {sds[part]:.2g} in {what} {str(names[part])!r}" for part in (off[0], largest)]
        more = f" ({len(off)} such in all)" if len(off) > 1 else ""
        warn(
            f"covariate column {name!r} is {shown[0]}{more}, and {shown[1]}. Is it in another unit there, such as "
            "percent for a share? Then convert it, so that all cells have one unit. A real difference may stay."
        )


def unit_of_sizes(totals: np.ndarray, sizes: np.ndarray) -> tuple[float, ...]:
    """Median and standard deviation, over cells, of the log of counts per size factor; () if no cell has counts.

    Each is (cells,). A query has as many counts per size factor if its size factors are in the same unit, however deep
    it was sequenced.
    """
    logs = np.log(totals[totals > 0] / sizes[totals > 0])
    return (float(np.median(logs)), float(logs.std())) if len(logs) else ()


def warn_of_size_factors(name: str, totals: np.ndarray, sizes: np.ndarray, unit: tuple[float, ...]) -> None:
    """Warn of size factors of a query that are in another unit than those of the training cells.

    Warns
    -----
    UserWarning
        If counts per size factor are beyond what ``OTHER_UNIT`` and three standard deviations between cells explain.
    """
    warn_of_size_units(name, unit_of_sizes(totals, sizes), unit)


def warn_of_size_units(name: str, found: tuple[float, ...], unit: tuple[float, ...]) -> None:
    """Warn of size factors of a query whose unit is ``found``, where that of the training cells is ``unit``.

    Warns
    -----
    UserWarning
        As :func:`warn_of_size_factors`.
    """
    if not unit or not found:
        return
    (ours, spread), theirs = unit, found[0]
    if abs(theirs - ours) > max(np.log(OTHER_UNIT), OFF * spread):
        warn(
            f"size factors in column {name!r} are in another unit than those of the training cells: a cell of size "
            f"factor 1 has {np.exp(theirs):.3g} counts here, and {np.exp(ours):.3g} there. This happens if one data "
            "set has totals and the other totals divided by their median. Compute them as for the training cells; "
            f"obs[{name!r}] * {np.exp(theirs - ours):.3g} has their unit."
        )
