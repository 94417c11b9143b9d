"""Single training steps on a device: their seconds, its peak of memory, and how often the host waits for it."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import pyro_scvi as ps
from benchmarks.harness.accelerator import peak_gigabytes, synchronise, tensor_cores, waits_noted
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import HALF, as_cells, default
from benchmarks.systems.ours_large import EnoughSteps

MANY_EPOCHS = 10_000  # more than a measurement needs; it ends the fit


@dataclass(frozen=True)
class Timed(ps.schedules.Constant):
    """A constant learning rate that notes the end of every step on the device, and ends the run after some."""

    steps: int = 60
    device: str = "cpu"
    seconds: list[float] = field(default_factory=list)
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __call__(self, optimiser: Optimizer, steps: int) -> LRScheduler:
        """Attach a watch to the optimiser."""
        optimiser.register_step_post_hook(self._stepped)
        self.watch.start()
        return super().__call__(optimiser, steps)

    def _stepped(self, *_: Any) -> None:
        synchronise(self.device)
        self.watch.stop()
        self.seconds.append(self.watch.wall - sum(self.seconds))
        if len(self.seconds) == self.steps:
            raise EnoughSteps
        self.watch.start()


def timed(
    n_cells: int,
    n_genes: int,
    batch_size: int,
    steps: int,
    device: str,
    half: bool = False,
    compiled: bool = False,
    tf32: bool = False,
) -> Callable[[], Sample]:
    """Seconds of the median step of the second half, of the first one, and the device's peak of memory."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = default(cells, 0)
    options |= _plain(batch_size, device) | {"compiled": compiled, "epochs": MANY_EPOCHS, **(HALF if half else {})}

    def measure() -> Sample:
        schedule = Timed(steps=steps, device=device, seconds=[], watch=Stopwatch())
        peak_gigabytes(device)  # of what came before
        with tensor_cores(used=tf32), suppress(EnoughSteps):
            ps.fit(model, cells, learning_rate=schedule, **options)
        step = median(schedule.seconds[steps // 2 :])
        facts = {"step": step, "first_step": schedule.seconds[0], "peak": peak_gigabytes(device)}
        return schedule.watch.sample(work=steps * batch_size, **facts)

    return measure


def waits(n_cells: int, n_genes: int, batch_size: int, epochs: int, device: str) -> Callable[[], Sample]:
    """How often the host waits for a CUDA device in a step, the whole fit divided by its steps; by torch's warnings."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = default(cells, 0)

    def measure() -> Sample:
        with Stopwatch() as watch, waits_noted(device) as seen:
            ps.fit(model, cells, epochs=epochs, **options | _plain(batch_size, device))
        n_steps = epochs * (n_cells // batch_size)
        return watch.sample(work=n_steps, waits=len(seen) / n_steps)

    return measure


def _plain(batch_size: int, device: str) -> dict[str, Any]:
    return {"batch_size": batch_size, "device": device, "validation": 0, "progress": False}
