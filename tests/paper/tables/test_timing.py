"""Seconds and memory by number of cells: slopes, what is not run, and the cells that are simulated for it."""

import math

import numpy as np
import pytest

from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.data import simulated
from pyro_scvi.paper.steps import Outcome
from pyro_scvi.paper.tables import timing


class Made:
    """A time of 2 ms n^1.5, whatever the system."""

    def of(self, step):
        if step.settings["system"] == "MAGIC":
            return Outcome(None, 0, 0, "not finished in 1,200 CPU seconds")
        n = step.settings["n_cells"]
        peak = 500 + n / 100 * (step.settings["system"] != "ZIFA")
        return Outcome({"seconds": 2e-3 * n**1.5, "peak_mb": peak, "before_mb": 500, "shape": [n, 10]}, 1, 1)


def rows_of(system):
    return {row.quantity: row for row in timing.rows(Made(), FULL) if row.system == system}


def test_the_slope_is_that_of_a_power_law():
    line = rows_of("ZIFA")[timing.SLOPE]
    assert (line.value, line.n) == (pytest.approx(1.5), len(FULL.sizes))
    assert line.error == pytest.approx(0, abs=1e-6)


def test_what_is_not_run_says_how_long_it_would_take():
    rows = rows_of("ZINB-WaVE")
    beyond = rows["CPU seconds, n = 100,000"]
    assert math.isnan(beyond.value)
    assert beyond.note == "not run: in proportion to 10,000 cells it would take 20,000 CPU s, the limit is 1,200"
    assert "peak MB, n = 100,000" not in rows
    assert rows_of("MAGIC")["CPU seconds, n = 1,000"].note == "not finished in 1,200 CPU seconds"


def test_a_peak_that_the_simulation_had_reached_before_is_said():
    assert rows_of("ZIFA")["peak MB, n = 1,000"].note == "no more than the simulation of the cells had taken"
    assert rows_of("factor analysis")["peak MB, n = 1,000"].note == ""


def test_cells_per_second_are_of_the_largest_size():
    rate = rows_of("scVI, default")[timing.RATE]
    n = max(FULL.sizes)
    assert rate.value == pytest.approx(n * 9 / (2e-3 * n**1.5))
    assert rate.note == f"9 epochs of {n:,} cells"


def test_every_system_trains_as_long_as_its_defaults_say():
    epochs = {n: timing.epochs_of("scvi-tools", n, FULL) for n in (1_000, 20_000, 100_000)}
    assert epochs == {1_000: 400, 20_000: 400, 100_000: 80}
    assert timing.epochs_of("scVI, default", 10_000, FULL) == 30
    assert timing.epochs_of("ZIFA", 10_000, FULL) is None
    assert timing.epochs_of("scVI, default", 200, QUICK) == QUICK.epochs
    steps = [(step.settings["system"], step.settings["n_cells"]) for step in timing.steps(FULL)]
    assert ("ZINB-WaVE", 100_000) not in steps
    assert len(steps) == len(set(steps)) == len(timing.SYSTEMS) * len(FULL.sizes) - 1


def test_simulated_cells_have_counts_and_the_same_genes_at_every_size(data_path):
    data_path("brain10k.h5ad")
    few, more = (simulated.counts(n, 50, 200, 1, 0) for n in (50, 120))
    assert (few.shape[0], more.shape[0]) == (50, 120)
    assert few.shape[1] == more.shape[1] < 715
    assert more.dtype == np.int32
    assert (np.asarray(more.sum(1)).ravel() > 0).all()
    assert (simulated.counts(50, 50, 200, 1, 0) != few).nnz == 0
