"""Custom operations: functions that torch traces as one operation, because their steps depend on values."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pyro_scvi.utils.execution import tracing

FUNCTIONS: dict[Any, Callable[..., None]] = {}
"""Custom operations, as they stand in a recording, and the functions that they are of."""


def opaque(name: str, *changed: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let torch trace a function on a CPU as one operation, which changes the arguments of these names in place.

    On a GPU the function's own operations are traced; there they do not depend on values, for which a GPU would wait.
    """

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        operation: Any = torch.library.custom_op(f"pyro_scvi::{name}", function, mutates_args=changed)
        FUNCTIONS[getattr(torch.ops.pyro_scvi, name).default] = function

        @wraps(function)
        def called(x: Tensor, *others: Any) -> None:
            (operation if x.device.type == "cpu" and tracing() else function)(x, *others)

        return called

    return decorated
