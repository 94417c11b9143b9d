"""How programs are run: what their caller settles beside their arguments, and whether they are being traced.

Model, guide and networks are called by Pyro, through its handlers, with the arguments of the model. What a training
step settles for all of them at once does not fit into those, and is read from one :class:`Execution` instead. It holds
for the thread that entered :func:`executing`, and is as it was when that block ends. The defaults are what a program
of Pyro's own wants, so that model and guide run under plain Pyro without any of this.

:func:`tracing` is no setting. It says what torch is doing, and code asks it where the fast way depends on values.
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
    """What holds while programs run.

    Parameters
    ----------
    register_parameters
        Whether model and guide tell Pyro of their parameters. An optimiser that has them already needs no telling,
        which costs more than the networks' own overhead.
    check_programs
        Whether the evidence bound is Pyro's own estimator, which refuses guides that do not match the model. Without,
        the bound takes that for granted and leaves out the densities that it never uses.
    matrix_products
        The type in which encoders and decoders multiply matrices; None: that of their input, which also what they
        return keeps.
    """

    register_parameters: bool = True
    check_programs: bool = True
    matrix_products: torch.dtype | None = None


_DEFAULT = Execution()
_current = ContextVar("pyro_scvi_execution", default=_DEFAULT)


def execution() -> Execution:
    """What holds here and now."""
    return _current.get()


@contextmanager
def executing(**changes: Any) -> Iterator[None]:
    """Inside, the fields of :class:`Execution` that are given hold; the others stay as they are."""
    token = _current.set(replace(_current.get(), **changes))
    try:
        yield
    finally:
        _current.reset(token)


def tracing() -> bool:
    """Whether torch writes operations down, to compile them, rather than runs them.

    Tensors have no values then: their entries cannot be counted or gathered, and an operation that differs from call
    to call must be taken as one.
    """
    return get_proxy_mode() is not None
