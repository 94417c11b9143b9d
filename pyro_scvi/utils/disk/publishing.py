"""Publishing results: all of them take their places or none, and what they replace is never lost on the way."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

REPLACED = "replaced"
# What asks a process to end: Ctrl-C, the system, and a terminal that is closed, which Windows does not tell.
STOPPING = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in signal.Signals.__members__)


class NotRolledBack(OSError):
    """Publishing failed, and so did moving back; the temporary folder holds results and must stay."""


def publish(folder: Path, out: Path, temporary: Path) -> None:
    """Move every result of ``folder`` into ``out``; what was there is in ``temporary / REPLACED`` afterwards.

    Raises
    ------
    NotRolledBack
        If a result could not be moved, and those before it could not be moved back.
    OSError
        If a result could not be moved; everything is where it was.
    """
    replaced = temporary / REPLACED
    replaced.mkdir()
    names = sorted(result.name for result in folder.iterdir())
    with signals_deferred():
        if not os.path.lexists(out):
            folder.rename(out)  # all at once
            return
        try:
            for name in names:
                if os.path.lexists(out / name):
                    (out / name).rename(replaced / name)
                (folder / name).rename(out / name)
        except BaseException as error:
            _roll_back(names, folder, out, replaced, error)
            raise


def _roll_back(names: list[str], folder: Path, out: Path, replaced: Path, error: BaseException) -> None:
    """Undo what was moved. Where things are tells how far it came: an error may come after a step as well."""
    try:
        for name in reversed(names):
            if os.path.lexists(out / name) and not os.path.lexists(folder / name):
                (out / name).rename(folder / name)
            if os.path.lexists(replaced / name):
                (replaced / name).rename(out / name)
    except BaseException as again:
        raise NotRolledBack(
            f"the results could not be moved into {out} ({error!r}), nor back ({again!r}); nothing is lost: the new "
            f"ones that are not in {out} are in {folder}, the earlier ones in {replaced}"
        ) from error


def rescue(result: Path, out: Path) -> Path:
    """Move a finished result into ``out`` under a name that is free; returns where it is."""
    place = next(place for n in count(2) if not os.path.lexists(place := out / f"{result.name}-{n}"))
    result.rename(place)
    return place


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Hold signals that would stop it back until the block has ended; they arrive in the main thread only."""
    received: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if (earlier := signal.getsignal(number)) is not None:  # None: code in another language handles it
                before[number] = earlier
                signal.signal(number, lambda received_number, _: received.append(received_number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
