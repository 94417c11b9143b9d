"""Our package on as many cells as the mouse brain data: cost of loading and training."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import anndata
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import pyro_scvi as ps
from benchmarks.harness.accelerator import peak_gigabytes, synchronise
from benchmarks.harness.resident_memory import peak_megabytes
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import matched

EMBEDDED_AT_ONCE = 16_384  # cells


class EnoughSteps(Exception):
    """Ends a fit whose steps have been counted."""


@dataclass(frozen=True)
class Until(ps.schedules.Constant):
    """A constant learning rate that ends the run after some steps, and notes the seconds from the middle one on."""

    steps: int = 200
    watch: Stopwatch = field(default_factory=Stopwatch)

    def __call__(self, optimiser: Optimizer, steps: int) -> LRScheduler:
        """Attach a counter to the optimiser."""
        optimiser.register_step_post_hook(partial(self._counted, [0]))
        return super().__call__(optimiser, steps)

    def _counted(self, done: list[int], *_: Any) -> None:
        done[0] += 1
        if done[0] == self.steps // 2:
            self.watch.start()
        if done[0] == self.steps:
            self.watch.stop()
            raise EnoughSteps


def load_and_train(path: str, steps: int, batch_size: int) -> Callable[[], Sample]:
    """Read the file and train the matched model for ``steps`` batches; all in the process's peak of memory."""

    def measure() -> Sample:
        before = peak_megabytes()
        schedule = Until(steps=steps, watch=Stopwatch())
        with Stopwatch() as watch:
            cells = ps.Cells.from_anndata(anndata.read_h5ad(path), copy=False)
            loaded = peak_megabytes()
            model, options = matched(cells, 0)
            options |= {"learning_rate": schedule, "batch_size": batch_size, "validation": 0}
            with suppress(EnoughSteps):
                ps.fit(model, cells, epochs=10, device="cpu", progress=False, **options)
        per_epoch = schedule.watch.cpu / (steps - steps // 2) * cells.n_cells / batch_size
        peaks = {"before": before, "loaded": loaded, "peak": peak_megabytes()}
        return watch.sample(work=1, cpu_seconds_per_epoch=per_epoch, **peaks)

    return measure


def epochs(path: str, n_epochs: int, batch_size: int, device: str) -> Callable[[], Sample]:
    """Read the file and train for ``n_epochs``; wall seconds of the median epoch after the first, and of all.

    Peak memory of the device, and the wall seconds of embedding all cells, are facts beside them.
    """

    def measure() -> Sample:
        with Stopwatch() as watch:
            cells = ps.Cells.from_anndata(anndata.read_h5ad(path), copy=False)
            model, options = matched(cells, 0)
            options |= {"batch_size": batch_size, "validation": 0, "progress": False, "device": device}
            fit = ps.fit(model, cells, epochs=n_epochs, **options)
            synchronise(device)
        later = fit.history.seconds.iloc[1:] if n_epochs > 1 else fit.history.seconds
        with Stopwatch() as embedding:
            ps.embed(fit, cells, batch_size=EMBEDDED_AT_ONCE)
        facts = {"peak": peak_gigabytes(device), "embedding": embedding.wall}
        return watch.sample(work=1, seconds_per_epoch=float(later.median()), seconds=watch.wall, **facts)

    return measure
