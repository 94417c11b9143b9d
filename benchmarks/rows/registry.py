"""Registry of the rows by name: each bar of the project's performance targets is one line of one of them."""

from collections.abc import Iterable

from benchmarks.harness.interleaving import Row
from benchmarks.rows import accuracy, gpu, inference, large_data, time_to_quality, training


def cpu_rows(*, quick: bool) -> dict[str, Row]:
    """Rows of ``python -m benchmarks cpu``; quick ones are tiny."""
    return _by_name(
        [
            *training.rows(training.QUICK if quick else training.Size()),
            *inference.rows(inference.QUICK if quick else inference.Size()),
            accuracy.Likelihood(thinned=7 if quick else 1),
            large_data.PeakMemory(large_data.QUICK if quick else large_data.Size()),
            *time_to_quality.rows(time_to_quality.QUICK if quick else time_to_quality.Size()),
            *(
                accuracy.HalfQuality(f"{name}.h5ad", **({"epochs": 1, "n_cells": 300} if quick else {}))
                for name in time_to_quality.DATA
            ),
        ]
    )


def gpu_rows(*, dry: bool) -> dict[str, Row]:
    """Rows of ``python -m benchmarks gpu``; those of a dry run are tiny and on the CPU."""
    return _by_name(gpu.rows("cpu", gpu.QUICK) if dry else gpu.rows("cuda", gpu.Size()))


def _by_name(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}
