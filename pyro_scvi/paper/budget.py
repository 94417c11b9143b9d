"""The computing budget of a run: full for the report, tiny for a test."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Sizes of an experiment.

    Attributes
    ----------
    seeds
        One fit each, of systems that have a seed.
    epochs
        Most epochs of a model's training; None: as many as its preset has.
    samples
        Draws of the evidence sampler for each cell.
    test_cells
        Most held-out cells to score.
    cells
        Most cells to read from a data set, spread evenly over it; None: all.
    sizes
        Numbers of cells of the experiments over n.
    repeats
        Random draws of cells in the experiments on differential expression.
    limit
        CPU seconds after which a system counts as unable to run.
    isolated
        Whether every step runs in its own process, with limited time and measured memory.
    """

    seeds: tuple[int, ...]
    epochs: int | None
    samples: int
    test_cells: int
    cells: int | None
    sizes: tuple[int, ...]
    repeats: int
    limit: int
    isolated: bool


FULL = Budget(
    seeds=(0, 1, 2, 3, 4),
    epochs=None,
    samples=1000,
    test_cells=500,
    cells=None,
    sizes=(1_000, 4_000, 10_000, 100_000),
    repeats=20,
    limit=1200,
    isolated=True,
)
"""What the report shows."""

QUICK = Budget(
    seeds=(0, 1),
    epochs=3,
    samples=60,
    test_cells=16,
    cells=300,
    sizes=(200, 300),
    repeats=2,
    limit=60,
    isolated=False,
)
"""Every step once, in minutes; its numbers mean nothing."""
