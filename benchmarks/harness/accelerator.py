"""Accelerators: waiting until their work is done, their peak of memory, and the precision of their products."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WAITED = "synchroniz"  # in the warning that torch gives where the host waits


def synchronise(device: str) -> None:
    """Wait for the device, so that its work is timed."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def peak_gigabytes(device: str) -> float:
    """Peak of a CUDA device's memory since this was last asked; 0 for the CPU."""
    if torch.device(device).type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak


@contextmanager
def tensor_cores(*, used: bool) -> Iterator[None]:
    """Compute products of float32 matrices in the block by tensor cores in tf32, or not."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if used else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def waits_noted(device: str) -> Iterator[list[str]]:
    """Give a list that has, after the block, the places where the host waited for a CUDA device in it."""
    places: list[str] = []
    if torch.device(device).type != "cuda":
        yield places
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield places
        finally:
            torch.cuda.set_sync_debug_mode("default")
            places += [f"{one.filename}:{one.lineno}" for one in seen if WAITED in str(one.message)]
