"""Local randomness: a seed for a block of code, and the caller's random state untouched."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pyro_scvi.errors import require_seed


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed and put the global torch state back afterwards.

    pyro.set_rng_seed would also reset the generators of numpy and of Python; nothing here draws from those.

    Raises
    ------
    ModelError
        If the seed is no integer from 0 to 2**63 - 1.
    """
    require_seed(seed)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Put the global generators of numpy and Python back after code that may draw from them, and torch's threads.

    numba raises the number of OpenMP threads for the whole process, to more than a shared machine may give.
    """
    ours, theirs, threads = np.random.get_state(), random.getstate(), torch.get_num_threads()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(ours)  # noqa: NPY002
        random.setstate(theirs)
        torch.set_num_threads(threads)
