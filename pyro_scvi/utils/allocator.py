"""Memory allocation: freed memory is kept for the next tensors."""

from functools import cache

import torch

_LARGEST = 32 * 2**20 - 2**13  # bytes; glibc learns from blocks of up to 32 MB, its own bookkeeping included


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of what is freed, twice the largest block that it has seen freed (mallopt(3)).

    With its first threshold it may give the memory of every step back to the system and take it again page by page:
    a tenth to a quarter of the time of steps of a thousand cells. Other C libraries are not moved by it.
    """
    torch.empty(_LARGEST, dtype=torch.uint8)
