"""Zarr folders, opened where there is room for the threads that read and write them."""

import asyncio
import mmap
import os
import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

_LONGEST = 10  # seconds
_STACK = 8 * 2**20  # bytes of a thread's stack on Linux, unless the system has another limit


def zarr_group(place: Path | dict[str, Any], mode: Literal["r", "r+", "w"], **options: Any) -> Any:
    """The root group of a zarr folder, or of a mapping in memory.

    Raises
    ------
    MemoryError
        If there is too little memory for the threads of zarr.
    OSError
        If too many files are open.
    """
    import zarr

    _require_room(os.getpid())  # a forked process has no threads yet
    return zarr.open_group(place if isinstance(place, dict) else str(place), mode=mode, **options)


@contextmanager
def writes_ended() -> Iterator[None]:
    """After an error, wait for the other writes that zarr has begun: they would make a deleted folder anew."""
    try:
        yield
    except BaseException:
        from zarr.core.sync import sync

        with suppress(TimeoutError):  # one that waits for a thread that cannot start never ends
            sync(_others(), timeout=_LONGEST)
        raise


async def _others() -> None:
    """Wait for all other tasks of zarr's event loop, however they end."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)


@cache
def _require_room(process: int) -> None:
    """Refuse to start threads that may not all begin: Python waits forever for one with a stack and nothing else."""
    threads = 1 + min(32, (os.cpu_count() or 1) + 4)  # an event loop, and the pool of ThreadPoolExecutor
    try:
        with ExitStack() as held:  # one by one, as threads begin: a system may refuse all of it in one piece
            for _ in range(threads):
                held.enter_context(mmap.mmap(-1, _stack(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    except (OSError, OverflowError) as error:
        needed = f"zarr needs {threads * _stack() / 1e6:.0f} MB for {threads} threads"
        raise MemoryError(
            f"there is not enough memory: {needed}; raise the limit of memory, lower that of stacks (ulimit -s), or "
            "take .h5ad files"
        ) from error
    _require_files(4)  # of an event loop


def _require_files(count: int) -> None:
    """Refuse to start an event loop without files to open: asyncio would leave a traceback behind."""
    opened: list[int] = []
    try:
        while len(opened) < count:
            opened += os.pipe()
    finally:
        for file in opened:
            os.close(file)


def _stack() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_STACK)
    return _STACK if soft == resource.RLIM_INFINITY else soft
