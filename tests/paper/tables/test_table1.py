"""Table 1 from hand-made outcomes: leads are paired, seeds averaged, and what is missing says why."""

import math

import numpy as np
import pytest

import pyro_scvi as ps
from pyro_scvi.analysis.predictive.checks import prior_predictive
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.steps import Outcome
from pyro_scvi.paper.tables import table1
from tests.conftest import simulated_counts

CELLS = np.array([-900.0, -1100.0, -1300.0, -1500.0])
LEFT_OUT = {"genes": 3, "train_cells": 0, "test_cells": 1}


class Given:
    """Outcomes by the name of the step's function, made from its settings."""

    def __init__(self, **by_function):
        self.by_function = by_function

    def of(self, step):
        made = self.by_function[step.function.__name__](**step.settings)
        return Outcome(None, 0.0, 0.0, made) if isinstance(made, str) else Outcome(made, 1.0, 1.0)


def scored(log_p, **others):
    scores = {"log_p": list(log_p), "khat_above": 0.25, "seconds": 2.0, "left_out": LEFT_OUT}
    return scores | {key: list(value) for key, value in others.items()}


def simulation(sizes, **settings):
    by_n = {str(n): {table1.FA: scored(CELLS - 20), table1.OURS: scored(CELLS - 10, bound=CELLS - 12)} for n in sizes}
    return {"genes": 5, table1.TRUTH: scored(CELLS), **by_n}


GIVEN = Given(
    independent_genes=lambda case: scored(CELLS - 100),
    factor_analysis=lambda case, samples: scored(CELLS - 50, density=CELLS + 500),
    zifa=lambda case, samples: scored(CELLS - [40, 40, 40, 42], density=CELLS, expected=CELLS - 60),
    zinb_wave=lambda case, tol, max_iter: {
        "refitted": list(CELLS),
        "converged": False,
        "iterations": 200,
        "seconds": 9.0,
        "left_out": LEFT_OUT,
    },
    ours=lambda case, name, seed, **settings: scored(CELLS - seed, bound=CELLS - 3, refitted=CELLS) | {"epochs": 60},
    scvi_tools=lambda **settings: "not installed: scvi",
    simulated=simulation,
)


@pytest.fixture(scope="module")
def rows():
    return {(row.data, row.system, row.quantity): row for row in table1.rows(GIVEN, FULL)}


def test_leads_are_paired_over_cells_and_averaged_over_seeds(rows):
    row = rows["cortex", "scVI, default minus ZIFA", table1.LEAD]
    lead = np.array([40, 40, 40, 42]) - 1  # seeds 0, 1 and 2 are 0, 1 and 2 nats worse
    assert row.value == pytest.approx(lead.mean())
    assert row.error == pytest.approx(lead.std(ddof=1) / 2)
    assert (row.n, row.seeds) == (4, (0, 1, 2))
    assert rows["cortex", "scVI, default minus ZIFA", table1.MEDIAN_LEAD].value == 39
    assert all(math.isnan(row.paper) for (data, *_), row in rows.items() if data.startswith("simulated"))
    ceiling = rows["simulated, n = 100,000", f"scVI, default minus {table1.TRUTH}", table1.LEAD]
    assert (ceiling.value, ceiling.error) == (-10, 0)


def test_every_score_has_its_own_row(rows):
    data = "brain10k, n = 4,000"
    assert rows[data, table1.FA, table1.QUANTITIES["density"]].value == pytest.approx(CELLS.mean() + 500)
    assert rows[data, table1.FA, table1.QUANTITIES["density"]].paper == -1178.2
    assert rows[data, table1.ZIFA, table1.QUANTITIES["expected"]].paper == -1250.9
    probability = rows[data, table1.FA, table1.QUANTITIES["log_p"]]
    assert math.isnan(probability.paper)
    assert probability.error == pytest.approx(CELLS.std(ddof=1) / 2)
    assert "3 genes without a count in the smallest training set dropped" in probability.note
    ours = rows[data, table1.OURS, table1.QUANTITIES["log_p"]]
    assert "sd over seeds 1.00; k-hat above 0.7: 25%" in ours.note
    assert ours.seconds == 2
    wave = rows[data, table1.WAVE, table1.QUANTITIES["refitted"]]
    assert "not converged in 200 iterations" in wave.note


def test_what_is_missing_says_why(rows):
    assert "not installed" in rows["cortex", table1.PEER, table1.QUANTITIES["log_p"]].note
    assert "no distribution of new cells" in rows["cortex", table1.WAVE, table1.QUANTITIES["log_p"]].note
    assert "not installed" in rows["cortex", f"scVI, default minus {table1.PEER}", table1.LEAD].note
    unfitted = rows["simulated, n = 100,000", table1.ZIFA, table1.QUANTITIES["log_p"]]
    assert math.isnan(unfitted.value)
    assert "not fitted beyond 10,000" in unfitted.note


def test_sizes_are_those_that_the_file_has():
    names = [on.name for on in table1.datasets(FULL)]
    assert names == ["cortex", "brain10k, n = 1,000", "brain10k, n = 4,000", "brain10k, n = 9,000"]
    assert {on.case["least"] for on in table1.datasets(FULL)[1:]} == {1_000}
    assert [on.case["n"] for on in table1.datasets(QUICK)[1:]] == [200, 270]


def test_epochs_stay_within_the_cells_that_may_be_seen():
    cortex, small, _, large = table1.datasets(FULL)
    assert table1.epochs_of(table1.PEER, small, FULL) == 400
    assert table1.epochs_of(table1.PEER, large, FULL) == 400
    assert table1.epochs_of("scVI, 2017 preset", large, FULL) == 50
    assert table1.epochs_of("scVI, 2018 preset", small, FULL) == 120
    assert table1.epochs_of("scVI, 2017 preset", cortex, FULL) == 150
    assert table1.epochs_of(table1.OURS, large, FULL) is None
    assert {table1.epochs_of(name, large, QUICK) for name in (table1.PEER, table1.OURS)} == {3}


def test_the_picture_is_drawn(tmp_path):
    (picture,) = table1.pictures(GIVEN, FULL, tmp_path)
    assert picture.file.stat().st_size > 5_000


def test_simulated_cells_follow_the_law_that_is_their_ceiling(monkeypatch):
    """No block repeats another, and their mean is that of the law's own draws."""
    monkeypatch.setattr(table1, "BLOCK", 500)
    cells = ps.Cells.from_counts(simulated_counts())
    model, options = ps.presets.default(cells)
    fit = ps.fit(model, cells, epochs=2, progress=False, device="cpu", validation=0, **options)
    drawn = table1._draws(fit, 1_200, 0)
    assert drawn.shape == (1_200, cells.n_genes)
    assert (drawn[:500] != drawn[500:1000]).nnz > 0
    expected = prior_predictive(fit.model, 1_000, seed=9).mean(1)  # by cell
    se = expected.std() * np.sqrt(1 / 1_000 + 1 / 1_200)
    assert abs(drawn.mean() - expected.mean()) < 5 * se
