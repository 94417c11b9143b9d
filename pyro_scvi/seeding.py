"""Local randomness: a seed for a block of code, and the caller's random state untouched."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed and put the global torch state back afterwards.

    pyro.set_rng_seed would also reset the generators of numpy and of Python; nothing here draws from those.
    """
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield
