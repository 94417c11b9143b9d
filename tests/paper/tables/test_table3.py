"""Table 3 from hand-made outcomes: spreads over seeds, and a choice on which the labels have no influence."""

import math

import numpy as np
import pytest

from pyro_scvi.paper import systems
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.tables import table1, table3
from tests.paper.tables.test_table1 import CELLS, GIVEN, LEFT_OUT, Given

BEST = "scVI, default, mixture of 16"


def types(silhouette):
    return {"silhouette": silhouette, "ari": 0.5, "nmi": 0.6, "seconds": 3.0}


def ours(case, name, seed, epochs, **settings):
    """Evidence is best for BEST and grows with epochs; the silhouette is worst there and falls."""
    log_p = CELLS + 5 * (name == BEST) + (epochs or 60) / 10
    silhouette = 0.3 - 0.1 * (name == BEST) - (epochs or 60) / 1000 + 0.01 * seed
    return types(silhouette) | {"log_p": list(log_p), "khat_above": 0.0, "left_out": LEFT_OUT, "epochs": epochs or 60}


def embedded_baseline(system, seed, **settings):
    return "not installed: scvi" if system == table1.PEER else types(0.25 + 0.01 * seed)


GIVEN_3 = Given(
    **GIVEN.by_function
    | {
        "ours": ours,
        "embedded": lambda name, seed, **settings: types(0.2 + 0.02 * seed),
        "embedded_baseline": embedded_baseline,
    }
)


@pytest.fixture(scope="module")
def rows():
    return {(row.system, row.quantity): row for row in table3.rows(GIVEN_3, FULL)}


def test_means_and_spreads_over_seeds(rows):
    row = rows["scVI, gene dispersion, dropout 0.1", "silhouette"]
    assert (row.value, row.n, row.seeds) == (pytest.approx(0.24), 5, (0, 1, 2, 3, 4))
    assert row.error == pytest.approx(np.std(0.02 * np.arange(5), ddof=1))
    assert rows["scVI, 2017 preset, z as a parameter", "silhouette"].paper == 0.285
    assert rows[table1.WAVE, "silhouette"].n == 1


def test_seeds_are_those_that_gave_a_result():
    def two_of_five(name, seed, **settings):
        return types(0.2 + 0.02 * seed) if seed in (1, 3) else "not finished in 1,200 CPU seconds"

    given = Given(**GIVEN_3.by_function | {"embedded": two_of_five})
    row = next(row for row in table3.rows(given, FULL) if row.system == table1.OURS)
    assert (row.value, row.n, row.seeds) == (pytest.approx(0.24), 2, (1, 3))
    assert "further seeds are missing: not finished in 1,200 CPU seconds" in row.note


def test_every_system_has_its_rows(rows):
    for name in [*table3.METHODS, *systems.MODELS, *(name + table3.PARAMETER for name in table3.AS_PARAMETER)]:
        for quantity in (*table3.SCORES.values(), table3.HELD_OUT):
            row = rows[name, quantity]
            assert row.note or not math.isnan(row.value)
    assert "has no distribution" in rows["scVI, default, z as a parameter", table3.HELD_OUT].note
    assert "not installed" in rows[table1.PEER, "silhouette"].note


def test_evidence_chooses_whatever_the_silhouette(rows):
    row = rows["choice without labels", "silhouette"]
    assert row.value == pytest.approx(0.3 - 0.1 - 0.06 + 0.005)
    assert (row.n, row.seeds, row.error) == (2, (0, 1), pytest.approx(math.sqrt(0.00005)))
    assert row.note.endswith(f": {BEST}")  # the others are 5 nats behind, every cell alike
    behind = rows["candidate: scVI, default", table3.BEHIND]
    assert (behind.value, behind.error, behind.seeds) == (pytest.approx(-5), pytest.approx(0, abs=1e-9), (0, 1))
    assert behind.note.endswith(f"behind {BEST}")
    for name in systems.CANDIDATES:
        assert not math.isnan(rows[f"candidate: {name}", "silhouette"].value)
        assert not math.isnan(rows[f"candidate: {name}", table3.HELD_OUT].value)


def test_candidates_within_two_standard_errors_stand_beside_the_choice():
    level = {"a": np.array([0.0, 2.0, 1.0, 1.2]), "b": np.array([0.5, 0.0, 1.5, 0.5]), "c": np.full(4, -9.0)}
    known = {name: ([{"silhouette": 0.2}], (0,), "") for name in level}
    *_, choice = rows_behind = list(table3._compared(known, level))
    assert choice.note == "chosen by the best held-out log p(x), 1.1: a; within 2 standard errors: b"
    assert [row.note.split("; ")[1] for row in rows_behind[:-1]] == ["not told from a", "behind a"]


def test_protocols_that_reach_a_silhouette_are_named():
    silhouettes = {table1.WAVE: 0.25, "PCA": 0.9, "scVI, default": 0.26, "candidate: a": 0.3, "candidate: b": 0.2}
    found = [Row("cortex", system, "silhouette", value) for system, value in silhouettes.items()]
    wave, paper = table3._answers([*found, Row("cortex", "scVI, default", table3.HELD_OUT, -1.0)])
    assert (wave.system, wave.value) == ("silhouette of ZINB-WaVE here, 0.250", 2)
    assert wave.note == "scVI, default (0.260); candidate: a (0.300)"
    assert (paper.value, paper.note) == (1, "candidate: a (0.300)")
    lower = table3._answers([row for row in found if row.value < 0.26])
    assert [(row.value, row.note) for row in lower] == [(0, "none"), (0, "none")]


def test_labels_have_no_part_in_the_choice():
    """With every silhouette turned over, the same is chosen."""

    def turned(**settings):
        result = ours(**settings)
        return result | {"silhouette": -result["silhouette"]}

    given = Given(**GIVEN_3.by_function | {"ours": turned})
    notes = [
        next(row.note for row in table3.rows(of, FULL) if row.system == "choice without labels")
        for of in (GIVEN_3, given)
    ]
    assert notes[0].split(";")[0] == notes[1].split(";")[0]


def test_shorter_runs_say_what_evidence_would_take(rows):
    row = rows["scVI, default, 5 epochs in all", table3.HELD_OUT]
    assert row.value == pytest.approx(CELLS.mean() + 0.5)
    assert rows["scVI, default, 60 epochs in all", table3.HELD_OUT].value > row.value


def test_the_candidates_share_their_training():
    settings = [step.settings for of in table3.candidates(FULL).values() for step in of]
    for key in ("case", "epochs", "rate", "kl", "samples"):
        assert len({str(asked[key]) for asked in settings}) == 1
    assert {step.settings["epochs"] for step in table3.steps(QUICK) if "epochs" in step.settings} == {3}


def test_the_picture_is_drawn(tmp_path):
    (picture,) = table3.pictures(GIVEN_3, FULL, tmp_path)
    assert picture.file.stat().st_size > 5_000
