"""Progress bars: redrawn on a terminal or in a notebook, a line every half minute in a log file."""

import os
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from tqdm.auto import tqdm
from tqdm.std import tqdm as text_tqdm

T = TypeVar("T")

EVERY = 30.0  # seconds between the lines of a log file
SHORT = 5.0  # seconds that an analysis may take before it shows its progress


# tqdm's class takes a type parameter in its stubs only.
if TYPE_CHECKING:
    TextBar = text_tqdm[Any]
    RedrawnBar = tqdm[Any]
else:
    TextBar = text_tqdm
    RedrawnBar = tqdm


class Redrawn(RedrawnBar):
    """tqdm's bar, with a lock of its own: see :func:`_take_new_locks`."""

    def display(self, *args: Any, **options: Any) -> Any:
        """Draw it, unless nobody can read it: a terminal that is gone must not cost what is being computed."""
        with suppress(OSError):
            return super().display(*args, **options)

    def close(self) -> None:
        """End it, by a last write that may fail as well."""
        with suppress(OSError):
            super().close()


class Lines(TextBar):
    """A line of text for each update, for streams in which a line cannot be redrawn."""

    def __init__(self, **options: Any) -> None:
        form = "{unit} {n_fmt} of {total_fmt}, {elapsed} gone, {remaining} left{postfix}"
        self.began = monotonic()
        super().__init__(None, mininterval=EVERY, miniters=1, bar_format=form, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the line, unless its disk is full; ``pos``, its place among several bars, is ignored."""
        with suppress(OSError):
            self.fp.write(f"{str(self) if msg is None else msg}\n")
            self.fp.flush()

    def close(self) -> None:
        """Write a last line, unless the one before was the last or the bar was too short to be shown."""
        if not self.disable and self.n > self.last_print_n and monotonic() - self.began >= (self.delay or 0.0):
            self.refresh()
        self.sp = None  # or tqdm would write another end of line
        super().close()


def progress_bar(total: int, unit: str, shown: bool, *, delay: float = 0.0) -> Any:
    """A tqdm bar over ``total`` units on stderr, shown from ``delay`` seconds on; ``TQDM_DISABLE=1`` hides all."""
    kind = Redrawn if _redraws(sys.stderr) else Lines
    return kind(total=total, unit=unit, delay=delay, disable=not (shown and total) or _all_hidden())


def each(things: Sequence[T], unit: str, shown: bool) -> Iterator[T]:
    """The things, with a bar over them."""
    with progress_bar(len(things), unit, shown) as bar:
        for thing in things:
            yield thing
            bar.update()


def over_cells(batches: Iterable[tuple[Tensor, Tensor]], n_cells: int, shown: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of counts and covariates, with a bar over their cells if they take more than ``SHORT`` seconds."""
    with progress_bar(n_cells, "cell", shown, delay=SHORT) as bar:
        for x, gamma in batches:
            yield x, gamma
            bar.update(len(x))


def _all_hidden() -> bool:
    """Whether TQDM_DISABLE is set, which tqdm's bars in notebooks ignore."""
    return os.environ.get("TQDM_DISABLE", "").lower() not in ("", "0", "false")


def _redraws(stream: Any) -> bool:
    """Whether a line can be redrawn: on a terminal, and on the stream of a notebook's kernel."""
    return stream.isatty() or type(stream).__module__.startswith("ipykernel")


def _take_new_locks() -> None:
    """Give the bars of this process a lock that no other process knows.

    Every bar takes the lock, hidden ones too. tqdm's own is shared with forked processes: one that is killed while it
    holds it would leave all others waiting for ever. A forked process also has only one of its parent's threads, so a
    lock that another thread held would never be released.
    """
    for kind in (Redrawn, Lines):
        kind.set_lock(threading.RLock())


_take_new_locks()
if hasattr(os, "register_at_fork"):  # Windows forks no processes
    os.register_at_fork(after_in_child=_take_new_locks)
