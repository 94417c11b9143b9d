"""Errors for want of memory: torch raises a plain RuntimeError for most of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pyro_scvi.errors import PyroScviError

_TEXTS = (  # of torch on CPUs, on macOS, on GPUs and in their libraries, and of Python's threads
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "can't start new thread",
)


class _Told(MemoryError):
    """A MemoryError that says what to lower."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, torch or a new thread had no memory: torch has an exception for some, a text for others."""
    if isinstance(error, PyroScviError) or not isinstance(error, RuntimeError):
        return isinstance(error, MemoryError)
    return isinstance(error, torch.OutOfMemoryError) or any(text in str(error) for text in _TEXTS)


@contextmanager
def memory_errors_told(advice: str) -> Iterator[None]:
    """Let every want of memory in the block end as one MemoryError that says what to lower.

    Raises
    ------
    MemoryError
        If there is not enough memory.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, _Told) or not is_out_of_memory(error):
            raise
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise _Told(f"there is not enough memory; {advice} ({first})") from error
