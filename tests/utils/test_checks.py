"""Searches of SciPy's that end without an optimum give no result; what is neither True nor False is refused."""

import inspect
from types import ModuleType

import numpy as np
import pytest
from scipy.optimize import least_squares, minimize, minimize_scalar

import pyro_scvi as ps
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.utils.checks import require_found, switches_checked


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


# --- True and False ---

INSIDE = {
    "SCVI.forward": "Pyro calls it",
    "SCVI.observe": "the program calls it",
    "Guide.forward": "Pyro calls it",
    "Schema": "made by Cells",
    "Schema.gene_positions": "called by Cells",
    "Schema.encode": "called by Cells",
    "Normalisation": "made by SCONE",
    "Processes.batch_sizes": "called by fit",
    "Processes.own_batch_sizes": "called by fit",
}
"""Public only for those who write programs or read results; each with whoever calls it."""


def public(namespace, seen):
    for name in namespace.__all__:
        one = getattr(namespace, name)
        if isinstance(one, ModuleType):
            if one.__name__.startswith("pyro_scvi") and one not in seen:
                seen.add(one)
                yield from public(one, seen)
        elif callable(one):
            yield one
            if inspect.isclass(one):
                yield from (each for each in vars(one).values() if inspect.isfunction(each))
                yield from (getattr(one, key) for key, each in vars(one).items() if isinstance(each, classmethod))


def switches():
    """Every public function and class with each of its arguments that are True or False."""
    return [
        pytest.param(function, each.name, id=f"{name}-{each.name}")
        for name, function in {each.__qualname__: each for each in public(ps, set())}.items()
        if name not in INSIDE and not name.rpartition(".")[2].startswith("_")
        for each in parameters_of(function)
        if each.annotation in (bool, "bool")
    ]


def parameters_of(function):
    try:
        return inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return ()


@pytest.mark.parametrize(("function", "name"), switches())
def test_switches_are_true_or_false(function, name):
    """Before anything else: a word such as "no" would count as True."""
    needed = [
        None
        for each in parameters_of(function)
        if each.default is each.empty and each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)
    ]
    for value in ("no", 0, None):
        with pytest.raises(ModelError, match=f"{name} must be True or False, got {value!r}"):
            function(*needed, **{name: value})


def test_switches_that_are_passed_by_place_are_checked():
    @switches_checked
    def write(path: str, overwrite: bool = False, *, progress: bool = True) -> tuple:
        return path, overwrite, progress

    assert write("a", True, progress=False) == ("a", True, False)
    with pytest.raises(ModelError, match="overwrite must be True or False, got 'no'"):
        write("a", "no")
