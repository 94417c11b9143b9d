"""Utilisation of an accelerator: the time it works while a fit trains; the rest of the time it waits for kernels."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile

import pyro_scvi as ps
from benchmarks.harness.accelerator import synchronise
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import as_cells, matched_constant

TOP, LONGEST_NAME = 15, 120


def busy(n_cells: int, n_genes: int, batch_size: int, epochs: int, device: str) -> Callable[[], Sample]:
    """Seconds of all kernels of a fit, by torch's profiler, and the wall seconds of the same fit without it.

    On a CPU the kernels are torch's operators, so that the same code can be tried there.
    """
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = matched_constant(cells, 0)
    options |= {"batch_size": batch_size, "device": device, "validation": 0, "progress": False, "epochs": epochs}

    def fit() -> None:
        ps.fit(model, cells, **options)
        synchronise(device)

    fit()

    def measure() -> Sample:
        with Stopwatch() as watch:
            fit()
        with profile(activities=[ACTIVITIES[device]], acc_events=True) as profiled:
            fit()
        facts = {"busy": KERNEL_SECONDS[device](profiled), "top": longest(profiled, epochs * -(-n_cells // batch_size))}
        return watch.sample(work=n_cells * epochs, **facts)

    return measure


def longest(profiled: profile, n_steps: int) -> list[tuple[str, float, float]]:
    """The kernels that take most of the time: name, calls and microseconds of a step."""
    events = profiled.key_averages()
    times = {event.key: event.self_device_time_total or event.self_cpu_time_total for event in events}
    first = sorted(events, key=lambda event: -times[event.key])[:TOP]
    return [(event.key[:LONGEST_NAME], event.count / n_steps, times[event.key] / n_steps) for event in first]


ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}
KERNEL_SECONDS: dict[str, Callable[[profile], float]] = {
    "cuda": lambda profiled: sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6,
    "cpu": lambda profiled: sum(event.self_cpu_time_total for event in profiled.key_averages()) / 1e6,
}
