"""All rows, by name: each bar of the project's performance targets is one line of one of them."""

from collections.abc import Iterable

from benchmarks.speed import accuracy, gpu, inference, large_rows, quality, training
from benchmarks.speed.interleaved import Row


def cpu_rows(*, quick: bool) -> dict[str, Row]:
    """Rows of ``python -m benchmarks cpu``; quick ones are tiny."""
    return _by_name(
        [
            *training.rows(training.QUICK if quick else training.Size()),
            *inference.rows(inference.QUICK if quick else inference.Size()),
            accuracy.Likelihood(thinned=7 if quick else 1),
            large_rows.PeakMemory(large_rows.QUICK if quick else large_rows.Size()),
            *quality.rows(quality.QUICK if quick else quality.Size()),
            *(
                accuracy.HalfQuality(f"{name}.h5ad", **({"epochs": 1, "n_cells": 300} if quick else {}))
                for name in quality.DATA
            ),
        ]
    )


def gpu_rows(*, dry: bool) -> dict[str, Row]:
    """Rows of ``python -m benchmarks gpu``; those of a dry run are tiny and on the CPU."""
    return _by_name(gpu.rows("cpu", gpu.QUICK) if dry else gpu.rows("cuda", gpu.Size()))


def _by_name(rows: Iterable[Row]) -> dict[str, Row]:
    return {row.name: row for row in rows}
