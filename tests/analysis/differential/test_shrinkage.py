"""Shrunken fold changes against quadrature written apart, and against simulated truth."""

import numpy as np
import pytest
from scipy import stats

from pyro_scvi.analysis.differential import shrinkage
from pyro_scvi.analysis.differential.shrinkage import SCALES, shrunken


def simulated(n_genes=1000, null=0.6, sd=1.0, seed=0):
    """Counts of two groups of unequal exposure: true log2 fold changes, and both counts."""
    rng = np.random.default_rng(seed)
    beta = np.where(rng.random(n_genes) < null, 0.0, rng.normal(0, sd, n_genes))
    mean = rng.gamma(0.5, 60.0, n_genes)
    return beta, rng.poisson(mean * np.exp2(beta)).astype(float), rng.poisson(3 * mean).astype(float)


PER_MEAN = -np.log(3.0)  # the second group is three times as exposed


def test_posterior_of_one_component_by_quadrature(monkeypatch):
    """With the weights given, against a fine grid over (-40, 40) and the binomial law itself."""
    weights = np.zeros(len(SCALES) + 1)
    weights[[0, 3, 6]] = 0.4, 0.35, 0.25
    monkeypatch.setattr(shrinkage, "_weights", lambda evidence: weights)
    n_a, n_b = np.array([0.0, 7.0, 400.0, 3.0, 90.0]), np.array([25.0, 0.0, 1000.0, 9.0, 100.0])
    found = shrunken(n_a, n_b, np.full(5, PER_MEAN))
    beta = np.linspace(-40, 40, 80_001)
    prior = 0.35 * stats.norm(0, SCALES[2]).pdf(beta) + 0.25 * stats.norm(0, SCALES[5]).pdf(beta)
    p, at_null = np.exp2(beta) / (np.exp2(beta) + 3), 0.25
    for g in range(5):
        total = int(n_a[g] + n_b[g])
        density = stats.binom(total, p).pmf(n_a[g]) * prior * (beta[1] - beta[0])
        null = 0.4 * stats.binom(total, at_null).pmf(n_a[g])
        density, null = density / (density.sum() + null), null / (density.sum() + null)
        mean = (density * beta).sum()
        sd = ((density * beta**2).sum() - mean**2) ** 0.5
        lfsr = null + min(density[beta > 0].sum(), density[beta < 0].sum())
        columns = [found[name][g] for name in shrinkage.TABLE]
        np.testing.assert_allclose(columns, [mean, sd, lfsr], rtol=0.01, atol=3e-3)


def test_shrunken_changes_are_nearer_the_truth_and_their_signs_right():
    beta, n_a, n_b = simulated()
    seen = n_a + n_b >= 10
    beta, n_a, n_b = beta[seen], n_a[seen], n_b[seen]
    found = shrunken(n_a, n_b, np.full(len(beta), PER_MEAN))
    raw = np.log2((n_a + 0.5) / (n_b + 0.5) * 3)
    errors = [np.mean((values - beta) ** 2) for values in (found["lfc_shrunk"], raw)]
    assert errors[0] < 0.5 * errors[1]
    called = found["lfsr"] < 0.2
    wrong = np.sign(found["lfc_shrunk"]) != np.sign(beta)
    assert called.sum() > 80
    assert wrong[called].mean() < found["lfsr"][called].mean() + 0.03
    # Of a Bayes rule the error is the posterior's own.
    assert np.mean(found["lfc_shrunk_sd"] ** 2) == pytest.approx(errors[0], rel=0.25)


def test_without_a_change_everything_is_shrunken_to_none():
    _, n_a, n_b = simulated(null=1.0)
    found = shrunken(n_a, n_b, np.full(1000, PER_MEAN))
    assert np.abs(found["lfc_shrunk"]).max() < 0.15
    assert found["lfsr"].min() > 0.4


def test_a_gene_that_one_group_never_shows_is_large_and_finite():
    n_a = np.concatenate([np.full(200, 60.0), [300.0, 12.0, 1.0]])
    n_b = np.concatenate([np.random.default_rng(0).poisson(180.0, 200), [0.0, 0.0, 0.0]])
    found = {name: values[-3:] for name, values in shrunken(n_a, n_b, np.full(203, PER_MEAN)).items()}
    first, second, third = found["lfc_shrunk"]
    assert first > 3
    assert first > second > third >= 0
    assert found["lfsr"][0] < 1e-6
    assert found["lfsr"][2] > 0.3


@pytest.mark.parametrize("n", [0, 1, 3000])
def test_any_number_of_genes(n):
    found = shrunken(np.full(n, 5.0), np.full(n, 15.0), np.full(n, PER_MEAN))
    assert all(values.shape == (n,) and np.isfinite(values).all() for values in found.values())
