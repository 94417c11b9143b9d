"""SIGINT, SIGTERM and SIGHUP during training: the first ends training after the current step, the second at once."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from pyro_scvi.utils.disk.publishing import STOPPING

Handler = Callable[[int, Any], None]

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """Training ends after the step that has just been made."""


class Interrupts:
    """Keeps the name of the first signal that asked training to end in ``received``; None before."""

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal; a second one raises KeyboardInterrupt."""
        name = signal.Signals(number).name
        if self.received:
            raise KeyboardInterrupt(f"{name} after {self.received}: training stopped at once")
        self.received = name
        _log.warning("%s: training ends after the running step; send the signal again to stop at once", name)

    def note_another_rank(self) -> None:
        """Note a signal to another of the processes that train together: all end after the same step."""
        self.received = self.received or "a signal to another rank"


@contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Note signals inside the block, in the main thread only, as Python allows; handlers are restored afterwards.

    Signals that the process ignores, or that code in another language handles, are left alone. A handler of the user's
    own is called after the signal was noted.
    """
    interrupts, before = Interrupts(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if (earlier := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    before[number] = signal.signal(number, _note_then_call(interrupts.note, earlier))
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def sigterm_raises() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit inside the block: what is finished is kept, the rest is cleaned up.

    By Python's default they end the process at once. A handler of the user's own is left alone, and so is nohup, which
    has SIGHUP ignored; in training a signal ends the running step.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    ours = [number for number in STOPPING if in_main_thread and signal.getsignal(number) is signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _exit)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_end_at_once() -> Iterator[None]:
    """Let signals end the process inside the block, where code in another language waits and Python sees none.

    A handler of the user's own is left alone, and so are signals that the process ignores.
    """
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in STOPPING if in_main_thread}
    ours = {number: handler for number, handler in before.items() if handler in (signal.default_int_handler, _exit)}
    for number in ours:
        signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in ours.items():
            signal.signal(number, handler)


def _exit(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)  # the exit code that a shell gives to a process that a signal has ended


def _note_then_call(note: Handler, earlier: Any) -> Handler:
    """A handler that notes a signal, then calls the user's own; Python's default one would raise at once."""

    def handle(number: int, frame: Any) -> None:
        note(number, frame)
        if callable(earlier) and earlier not in (signal.default_int_handler, _exit):
            earlier(number, frame)

    return handle
