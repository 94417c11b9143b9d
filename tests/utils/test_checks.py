"""Searches of SciPy's that end without an optimum give no result."""

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize, minimize_scalar

from pyro_scvi.errors import FitError
from pyro_scvi.utils.checks import require_found


def curve(at):
    return np.cos(at) * np.exp(0.1 * at) - 3


FAILED = {
    "no number": lambda: minimize_scalar(lambda at: np.nan * at, bounds=(0, 1), method="bounded"),
    "too few steps": lambda: least_squares(curve, 1.0, max_nfev=1),
    "one step": lambda: minimize(lambda at: float(np.sum(curve(at) ** 2)), 1.0, options={"maxiter": 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILED)
def test_a_search_that_failed_is_refused_with_its_reason(name):
    found = FAILED[name]()
    with pytest.raises(FitError, match="the root is not found: .+"):
        require_found(found, "the root")


def test_one_that_ended_passes():
    require_found(minimize_scalar(lambda at: (at - 0.3) ** 2, bounds=(0, 1), method="bounded"), "the root")
