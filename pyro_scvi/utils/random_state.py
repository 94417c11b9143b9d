"""Random state: a seed for a block of code, with the caller's random state left untouched."""

import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pyro_scvi.utils.checks import require_seed

_lock = threading.RLock()


@contextmanager
def in_turn() -> Iterator[None]:
    """Let one thread at a time run the block; a thread that is inside may enter again.

    torch's generator, Pyro's handlers, its parameter store and its validation belong to the whole process. Programs
    in two threads at once would draw each other's numbers and see each other's sites.
    """
    with _lock:
        yield


def _renew_lock() -> None:
    """Make a new lock in a forked process, where the thread that may have held the old one does not exist."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own torch seed, and restore torch's global generators afterwards; threads take turns.

    pyro.set_rng_seed would also reset the generators of NumPy and Python, from which nothing here draws.

    Raises
    ------
    ModelError
        If the seed is no integer from 0 to 2**63 - 1.
    """
    require_seed(seed)
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with in_turn(), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers, such as a seed, a rank and an epoch."""
    return int(
        np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1)
    )  # below 2^63, as torch wants


@contextmanager
def global_state_kept() -> Iterator[None]:
    """Restore the global generators of NumPy and Python, and torch's number of threads, after the block.

    numba raises the number of OpenMP threads for the whole process, to more than a shared machine may give.
    """
    ours, theirs, threads = np.random.get_state(), random.getstate(), torch.get_num_threads()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(ours)  # noqa: NPY002
        random.setstate(theirs)
        torch.set_num_threads(threads)
