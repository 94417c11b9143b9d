"""Held-out scores of this package: a fit to real cells within a budget of epochs."""

from collections.abc import Callable

import pyro_scvi as ps
from benchmarks.harness.data import real, split
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.quality.held_out_scores import JUDGES
from benchmarks.systems.our_models import CONFIGURATIONS, HALF, as_cells

WARM_UP_CELLS = 256  # a process's first steps load and compile what later ones find


def judged(
    path: str,
    configuration: str,
    seed: int,
    epochs: int,
    judge: str,
    n_cells: int | None = None,
    half: bool = False,
) -> Callable[[], Sample]:
    """One fit of ``epochs`` in all, for which the one-cycle schedule is laid out; making the model is timed too."""
    train, held_out = split(real(path, n_cells))
    cells = as_cells(train)

    def measure() -> Sample:
        with Stopwatch() as watch:
            fit = trained(cells, configuration, seed, epochs, half)
        estimate = JUDGES[judge].ours(fit, held_out)
        return watch.sample(work=1, value=estimate.value, se=estimate.se, epochs=epochs)

    trained(cells.take(slice(WARM_UP_CELLS)), configuration, seed, 1, half)
    return measure


def trained(cells: ps.Cells, configuration: str, seed: int, epochs: int, half: bool) -> ps.Fit:
    """A new model, fitted to all the cells."""
    model, options = CONFIGURATIONS[configuration](cells, seed)
    options |= {"epochs": epochs, "validation": 0, "device": "cpu", "progress": False, **(HALF if half else {})}
    return ps.fit(model, cells, **options)
