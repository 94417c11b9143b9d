"""Memory allocation: freed memory is reused for the next tensors."""

from contextlib import suppress
from functools import cache

import torch

_LARGEST = 32 * 2**20 - 2**13  # bytes; glibc adapts to freed blocks of up to 32 MB, its own header included


@cache
def keep_freed_memory() -> None:
    """Let glibc keep up to 64 MB of freed memory: twice the largest block that it has seen freed (mallopt(3)).

    With its initial threshold it may return the memory of every step to the system and fetch it again page by page,
    which takes a tenth to a quarter of the time of a step with a thousand cells. Other C libraries ignore this.
    """
    with suppress(RuntimeError):  # there may be less memory than that, and still enough
        torch.empty(_LARGEST, dtype=torch.uint8)
