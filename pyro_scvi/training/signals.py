"""SIGINT and SIGTERM during training: the first ends training after the current step, the second at once."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Handler = Callable[[int, Any], None]

_log = logging.getLogger(__name__)


class Interrupted(Exception):
    """A step has ended after which nothing more shall be done."""


class Interrupts:
    """The first signal that asked for an end, ``received``: its name, or None."""

    def __init__(self) -> None:
        self.received: str | None = None

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal; the second raises KeyboardInterrupt."""
        name = signal.Signals(number).name
        if self.received:
            raise KeyboardInterrupt(f"{name} after {self.received}: training stopped at once")
        self.received = name
        _log.warning("%s: training ends after the running step; once more ends it at once", name)

    def note_another_rank(self) -> None:
        """A signal reached another of the processes that train together: all end after the same step."""
        self.received = self.received or "a signal to another rank"


@contextmanager
def noted_interrupts() -> Iterator[Interrupts]:
    """Note signals inside, where Python lets a thread do so: the main one. Handlers are put back afterwards.

    Signals that the process ignores, or that another language handles, are left alone; a handler of the user's own is
    called after the signal was noted.
    """
    interrupts, before = Interrupts(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if (earlier := signal.getsignal(number)) not in (None, signal.SIG_IGN):
                    before[number] = signal.signal(number, _note_then_call(interrupts.note, earlier))
        yield interrupts
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _note_then_call(note: Handler, earlier: Any) -> Handler:
    """What notes a signal and then calls a handler of the user's own; Python's would raise at once."""

    def handle(number: int, frame: Any) -> None:
        note(number, frame)
        if callable(earlier) and earlier is not signal.default_int_handler:
            earlier(number, frame)

    return handle
