"""Execution of programs: settings beside their arguments, and whether torch is tracing them.

Pyro calls model, guide and networks, through its handlers, with the arguments of the model. Settings of a training step
that concern all of them are read from one :class:`Execution` instead. It holds for the thread that entered
:func:`executing`, until that block ends. With the defaults, model and guide run under plain Pyro.

:func:`tracing` is no setting. It tells whether torch is tracing; code asks it where the fast way depends on values.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode


@dataclass(frozen=True)
class Execution:
    """Settings that hold while programs run.

    Parameters
    ----------
    register_parameters
        Whether model and guide register their parameters with Pyro. That costs more than the networks' own overhead,
        and is not needed if the optimiser has the parameters already.
    check_programs
        Whether the evidence bound is Pyro's own estimator, which refuses guides that do not match the model. If not,
        the bound assumes a matching guide and skips densities that it does not use.
    matrix_products
        The type in which encoders and decoders multiply matrices; None: that of their input. Their output always has
        the type of their input.
    """

    register_parameters: bool = True
    check_programs: bool = True
    matrix_products: torch.dtype | None = None


_DEFAULT = Execution()
_current = ContextVar("pyro_scvi_execution", default=_DEFAULT)


def execution() -> Execution:
    """The settings that hold now, in this thread."""
    return _current.get()


@contextmanager
def executing(**changes: Any) -> Iterator[None]:
    """Change fields of :class:`Execution` for the block; the others stay as they are."""
    token = _current.set(replace(_current.get(), **changes))
    try:
        yield
    finally:
        _current.reset(token)


def tracing() -> bool:
    """Whether torch is tracing operations, to compile them, instead of running them.

    Tensors have no values then. Their entries cannot be counted or gathered, and code that differs from call to call
    must be traced as one operation.
    """
    return get_proxy_mode() is not None
