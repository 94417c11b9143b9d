"""Scales of continuous covariates: values that lie where no model can have learnt anything, and units that differ."""

import numpy as np
import pandas as pd

from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

FARTHEST = 50.0
"""Standard deviations from the mean of the training cells beyond which a covariate is refused: means overflow there."""

FAR = 10.0
"""Standard deviations from the mean beyond which a covariate of a query raises a warning."""

NARROWEST = 0.05
"""A query whose covariate spreads less than this, in standard deviations, around a point off the mean may have a
smaller unit."""


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
    elif 0 < z.std() < NARROWEST and abs(np.median(z)) > 1:
        warn(
            f"covariate column {name!r} is {np.median(values):.4g} ± {values.std():.2g} here and {mean:.4g} ± {sd:.2g} "
            "in the training cells. Is it in another unit, such as a share for percent?"
        )
