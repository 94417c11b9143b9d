"""Checks of simple arguments, and warnings that name the caller's line."""

import contextlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from numbers import Integral, Real
from types import FrameType, UnionType
from typing import Any, ParamSpec, TypeVar

from pyro_scvi.errors import FitError, ModelError

P = ParamSpec("P")
T = TypeVar("T")

_SWITCH = (bool, "bool")  # annotations, which some modules keep as text


def require_at_least(least: int, /, **named: int) -> None:
    """Refuse arguments that are not integers, or are below ``least``.

    Raises
    ------
    ModelError
        If it is refused; names the argument.
    """
    for name, value in named.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ModelError(f"{name} must be an integer of {least} or more, got {brief(value)}")


def require_number(value: Any, name: str, least: float = 0.0, below: float = math.inf) -> None:
    """Refuse a value that is no number from ``least`` to less than ``below``; NaN is refused, too.

    Raises
    ------
    ModelError
        If it is refused; names the argument.
    """
    if not _is_number(value) or not least <= value < below:
        limits = f"from {least:g} to below {below:g}" if below < math.inf else f"of {least:g} or more"
        raise ModelError(f"{name} must be a finite number {limits}, got {brief(value)}")


def require_positive(value: Any, name: str, most: float = math.inf) -> None:
    """Refuse a value that is no finite number above 0 and up to ``most``.

    Raises
    ------
    ModelError
        If it is refused; names the argument.
    """
    if not _is_number(value) or not (0 < value <= most and value < math.inf):
        limits = f"above 0, up to {most:g}" if most < math.inf else "above 0"
        raise ModelError(f"{name} must be a finite number {limits}, got {brief(value)}")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def require_seed(seed: Any) -> None:
    """Refuse seeds that torch or NumPy does not take.

    Raises
    ------
    ModelError
        If it is no integer from 0 to 2**63 - 1.
    """
    is_integer = isinstance(seed, Integral) and not isinstance(seed, bool)
    if not is_integer or not 0 <= seed < 2**63:
        raise ModelError(f"seed must be an integer from 0 to 2**63 - 1, got {brief(seed)}")


def require_switches(**named: Any) -> None:
    """Refuse arguments that are neither True nor False: "no" would count as True.

    Raises
    ------
    ModelError
        If one is refused; names the argument.
    """
    for name, value in named.items():
        if not isinstance(value, bool):
            raise ModelError(f"{name} must be True or False, got {brief(value)}")


def switches_checked(function: Callable[P, T]) -> Callable[P, T]:
    """The function, which first refuses what is neither True nor False for its arguments that are ``bool``."""
    signature = inspect.signature(function)
    places = {name: i for i, (name, each) in enumerate(signature.parameters.items()) if each.annotation in _SWITCH}

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        given = {name: args[i] for name, i in places.items() if i < len(args)}
        require_switches(**given, **{name: kwargs[name] for name in places if name in kwargs})
        return function(*args, **kwargs)

    return checked


def items_of(values: Any) -> list[Any] | None:
    """The items of any container, as a list; None of what is none: one word, a number, an array without dimensions."""
    if isinstance(values, str | bytes):
        return None
    try:
        return list(values)
    except TypeError:
        return None


def require_kind(value: Any, kind: type | UnionType, name: str, example: str) -> None:
    """Refuse a value that is no object of this kind, such as a class or a string.

    Raises
    ------
    ModelError
        If it is refused; names the argument, what was passed and an ``example`` of what to pass.
    """
    if not isinstance(value, kind):
        raise ModelError(f"{name} must be an object such as {example}; got {brief(value)}")


def require_found(found: Any, what: str) -> None:
    """Refuse what a search of SciPy's returned if it has not ended at an optimum.

    Raises
    ------
    FitError
        Where its ``success`` is not true; says ``what`` was searched for, and SciPy's reason.
    """
    if not found.success:
        raise FitError(f"{what} is not found: {found.message}")


def warn(text: str) -> None:
    """Warn the caller of the package: the warning names the nearest line outside it, however deep the call is."""
    level, frame = 1, sys._getframe().f_back
    while frame is not None and _is_ours(frame):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level + 1)


def _is_ours(frame: FrameType) -> bool:
    """Whether a call is inside the package, or in the library that enters its ``with`` blocks."""
    if frame.f_globals.get("__name__") == contextlib.__name__:
        return True
    return frame.f_globals.get("__name__", "").partition(".")[0] == __name__.partition(".")[0]


def brief(value: Any) -> str:
    """A value, for a message: strings and numbers by their repr, everything else by its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return repr(value) if value is None or isinstance(value, str | Real) else type(value).__name__
