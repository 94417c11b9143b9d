"""Stacking weights against brute force, and what they must do for copies, winners and complements."""

import numpy as np
import pandas as pd
import pytest

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.support.toys import cells_of, fit_of, toy


def table_of(log_p):
    by_cell = pd.DataFrame(log_p, columns=[f"m{k}" for k in range(log_p.shape[1])])
    table = pd.DataFrame(index=by_cell.columns)
    table.attrs["pointwise"] = by_cell
    return table


def score(log_p, weights):
    return np.logaddexp.reduce(log_p + np.log(np.maximum(weights, 1e-300)), axis=1).mean()


@pytest.mark.parametrize("seed", range(3))
def test_weights_are_those_of_brute_force(seed):
    log_p = np.random.default_rng(seed).normal([0.0, 0.1, -0.3], 1.0, (60, 3)) - 500
    weights = ps.stacking_weights(table_of(log_p), draws=2)["stacking"].to_numpy()
    grid = np.linspace(0, 1, 101)
    best = max(score(log_p, [a, b, 1 - a - b]) for a in grid for b in grid[grid <= 1 - a + 1e-9])
    assert score(log_p, weights) >= best - 1e-9
    assert weights.sum() == pytest.approx(1)


RARE = {  # cells that one model alone predicts, where a solver of general problems stops at a wrong place
    "one of a hundred": np.concatenate([np.tile([0.0, -20.0], (99, 1)), [[-900.0, 0.0]]]),
    "one of ten thousand": np.concatenate([np.tile([0.0, -20.0, -21.0], (9999, 1)), [[-900.0, 0.0, -3.0]]]),
}


@pytest.mark.parametrize("name", RARE)
def test_a_rare_cell_gets_the_weight_of_its_share(name):
    """By calculus: (n - 1) log(1 - w) + log w is largest at w = 1 / n, but for e^-20 of the common cells."""
    weights = ps.stacking_weights(table_of(RARE[name]), draws=2)["stacking"].to_numpy()
    assert weights[:2] == pytest.approx([1 - 1 / len(RARE[name]), 1 / len(RARE[name])], rel=1e-3)


@pytest.mark.parametrize(("spread", "n_models"), [(300.0, 3), (3000.0, 4), (3.0, 8)])
def test_weights_are_those_of_em(spread, n_models):
    """EM only ever climbs; its optimum has a mean ratio to the mixture of at most 1 for every model."""
    log_p = np.random.default_rng(0).normal(0, spread, (60, n_models))
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    weights = np.full(n_models, 1 / n_models)
    for _ in range(3000):
        weights = weights * (p / (p @ weights)[:, None]).mean(0)
    found = ps.stacking_weights(table_of(log_p), draws=2)["stacking"].to_numpy()
    assert score(log_p, found) >= score(log_p, weights) - 1e-7
    assert (p / (p @ found)[:, None]).mean(0).max() < 1 + 1e-6


def test_copies_winners_and_complements():
    rng = np.random.default_rng(0)
    one, half = rng.normal(-10, 1, 200), np.arange(200) < 100
    copies = ps.stacking_weights(table_of(np.stack([one, one, one - 5], 1)))
    assert copies["stacking"]["m2"] < 1e-6
    assert copies["pseudo_bma"][["m0", "m1"]].tolist() == pytest.approx([0.5, 0.5])
    complements = np.stack([np.where(half, one, one - 4), np.where(half, one - 4, one - 0.5)], 1)
    table = ps.stacking_weights(table_of(complements))
    assert 0.4 < table["stacking"]["m0"] < 0.6
    assert 0.02 < table["stacking_se"]["m0"] < 0.06  # of 200 cells: sqrt(.25 / 200) = .035
    assert table["pseudo_bma"]["m0"] > 0.7  # better by 50 nats, of 53 by which the bootstrap moves it
    pd.testing.assert_frame_equal(table, ps.stacking_weights(table_of(complements)))


def test_pseudo_bma_is_that_of_its_formula_without_spread():
    log_p = np.full((5, 2), -3.0) + [0.0, -0.2]
    table = ps.stacking_weights(table_of(log_p), draws=3)
    assert table["pseudo_bma"].tolist() == pytest.approx([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))])
    assert table["pseudo_bma_se"].to_numpy() == pytest.approx(0, abs=1e-12)


def test_compare_keeps_values_by_cell_if_asked():
    cells, fits = cells_of(2), {"a": fit_of(toy()), "b": fit_of(toy(seed=1))}
    table = ps.compare(fits, cells, samples=50, pointwise=True, progress=False)
    by_cell = table.attrs["pointwise"]
    assert list(by_cell.columns) == list(table.index)
    assert by_cell.mean().to_dict() == pytest.approx(table.log_evidence.to_dict())
    assert by_cell.index.equals(pd.Index(cells.cell_names, name="cell"))
    assert ps.stacking_weights(table)["stacking"].sum() == pytest.approx(1)
    assert ps.stacking_weights(table.iloc[:1])["stacking"].tolist() == [1.0]
    with pytest.raises(ModelError, match="pointwise=True"):
        ps.stacking_weights(ps.compare(fits, cells, samples=50, progress=False))


def test_what_has_no_values_by_cell_is_refused():
    for wrong in (pd.DataFrame({"log_evidence": [1.0]}), None, table_of(np.zeros((2, 2))).rename({"m0": "other"})):
        with pytest.raises(ModelError, match="pointwise=True"):
            ps.stacking_weights(wrong)
    with pytest.raises(ModelError, match="NaN or infinite for some cells"):
        ps.stacking_weights(table_of(np.array([[0.0, np.nan]])))
    with pytest.raises(ModelError, match="draws"):
        ps.stacking_weights(table_of(np.zeros((3, 2))), draws=1)
