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

    These are the generators of the CPU and of every device that the process uses already. A device that nothing has
    used is left alone: its context takes memory, and a forked process cannot make one. pyro.set_rng_seed would also
    reset the generators of NumPy and Python, from which nothing here draws.

    Raises
    ------
    ModelError
        If the seed is no integer from 0 to 2**63 - 1.
    """
    require_seed(seed)
    with in_turn(), _generators_kept():
        seed_generators(seed)
        yield


def seed_generators(seed: int) -> None:
    """Seed torch's generators of the CPU and of the devices in use.

    torch.manual_seed would also seed, once it is used for the first time, a device that is not in use yet.
    """
    seed = int(seed)  # NumPy's integers are refused by torch
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    if torch.xpu.is_initialized():
        torch.xpu.manual_seed_all(seed)
    if _mps_is_usable():
        torch.mps.manual_seed(seed)


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Restore the generators of the CPU and of the devices in use after the block."""
    cpu = torch.get_rng_state()
    states = {device: torch.get_device_module(device).get_rng_state(device) for device in _devices_in_use()}
    try:
        yield
    finally:
        torch.set_rng_state(cpu)
        for device, state in states.items():
            torch.get_device_module(device).set_rng_state(state, device)


def _devices_in_use() -> list[torch.device]:
    """The devices other than the CPU whose generators exist: all CUDA devices once torch has initialised CUDA."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    xpu = range(torch.xpu.device_count()) if torch.xpu.is_initialized() else ()
    mps = range(1 if _mps_is_usable() else 0)
    return [torch.device(kind, n) for kind, found in (("cuda", cuda), ("xpu", xpu), ("mps", mps)) for n in found]


def _mps_is_usable() -> bool:
    return torch.backends.mps.is_available() and not torch.mps._is_in_bad_fork()


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
