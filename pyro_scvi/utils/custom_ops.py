"""Custom operations: functions that torch's tracing records as one operation, as their steps depend on values."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from pyro_scvi.utils.execution import tracing


def opaque(name: str, *changed: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Let a recording on a CPU take a function as one operation, which changes the arguments of these names.

    A GPU waits for what depends on the values of tensors; there its parts are written down.
    """

    def decorated(function: Callable[..., None]) -> Callable[..., None]:
        operation: Any = torch.library.custom_op(f"pyro_scvi::{name}", function, mutates_args=changed)

        @wraps(function)
        def called(x: Tensor, *others: Any) -> None:
            (operation if x.device.type == "cpu" and tracing() else function)(x, *others)

        return called

    return decorated
