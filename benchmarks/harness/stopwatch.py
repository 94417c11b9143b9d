"""Stopwatch: CPU and wall seconds of a stretch of this process, and facts measured in it."""

import time
from typing import Any, NamedTuple


class Sample(NamedTuple):
    """One measurement: process CPU seconds (all threads), wall seconds, and facts that go into JSON."""

    cpu: float
    wall: float
    facts: dict[str, Any]


class Stopwatch:
    """Total time of its ``with`` blocks, or of the stretches between ``start`` and ``stop``.

    Examples
    --------
    >>> with Stopwatch() as watch:
    ...     work()
    >>> watch.sample(work=100)
    """

    def __init__(self) -> None:
        self.cpu, self.wall = 0.0, 0.0

    def start(self) -> None:
        """Go on."""
        self._started = time.process_time(), time.perf_counter()

    def stop(self) -> None:
        """Pause."""
        self.cpu += time.process_time() - self._started[0]
        self.wall += time.perf_counter() - self._started[1]

    def __enter__(self) -> "Stopwatch":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sample(self, **facts: Any) -> Sample:
        """The seconds so far, with the facts measured in them."""
        return Sample(self.cpu, self.wall, facts)
