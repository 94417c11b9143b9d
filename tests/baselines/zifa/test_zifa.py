"""ZIFA: the original's outputs, quadrature, and an EM that climbs.

Goldens: shared/golden/zifa_{a,b,c}.npz, made with the original implementation (epierson9/ZIFA) in Python 3.11.
Perturbed once, each of these made a test fail: c in the E-step, w, the sign of mu's term in b, the mean's square in
the second moment, log c in the marginal, the Jacobian, new against old parameters in the M-step, the decay's slope.
"""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning

from pyro_scvi.baselines import ZIFA
from pyro_scvi.baselines.zifa.em import LEAST_VARIANCE, Seen, Sums, maximised
from pyro_scvi.baselines.zifa.estimator import relative_change
from pyro_scvi.baselines.zifa.model import Parameters, expected_complete, log_counts, log_kept, log_marginal, posterior
from pyro_scvi.errors import DataError, ModelError
from tests.support.simulate import simulated_counts

COUNTS = simulated_counts()


@pytest.fixture(params="abc")
def original(request, golden):
    arrays = golden(f"zifa_{request.param}.npz")
    return {name: torch.as_tensor(value, dtype=torch.float64).squeeze() for name, value in arrays.items()}


def parameters(original, suffix):
    return Parameters(*(original[name + suffix] for name in ("A", "mus", "sigmas", "decay")))


def close(found, expected, tolerance):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def test_e_step_is_the_originals(original):
    y = original["Y"]
    found = posterior(y, parameters(original, "0"))
    close(found.mean, original["EZ0"], 1e-10)
    close(found.second_moment, original["EZZT0"], 1e-10)
    u, u2 = log_counts(y, parameters(original, "0"), found)
    close(u[y == 0], original["EX0"][y == 0], 1e-10)
    close(u2[y == 0], original["EX20"][y == 0], 1e-10)
    close(u[y > 0], y[y > 0], 0)


def test_m_step_is_the_originals(original):
    y, old = original["Y"], parameters(original, "0")
    new = maximised(Sums.of(y, posterior(y, old)), Seen.of(y), old)
    for found, expected in zip(new, parameters(original, "1"), strict=True):
        close(found, expected, 1e-6)
    close(posterior(y, new).mean, original["EZ1"], 1e-6)


def test_fit_is_the_originals(original):
    """Start and stop rule: the signs of factors are free."""
    counts = np.expm1(original["Y"].numpy())
    method = ZIFA(int(original["K"])).fit(counts)
    expected = parameters(original, "_fit")
    signs = torch.sign((torch.as_tensor(method.loadings_) * expected.loadings).sum(0))
    close(torch.as_tensor(method.loadings_) * signs, expected.loadings, 1e-6)
    close(torch.as_tensor(method.mean_), expected.mean, 1e-6)
    close(torch.as_tensor(method.scale_), expected.scale, 1e-6)
    assert method.decay_ == pytest.approx(float(expected.decay), abs=1e-6)
    close(torch.as_tensor(method.transform(counts)) * signs, original["EZ_fit"], 1e-6)


# --- against integrals ---

SMALL = Parameters(
    loadings=torch.tensor([[0.8], [-0.5], [1.1], [0.3]], dtype=torch.float64),
    mean=torch.tensor([0.6, 1.5, 0.2, 2.0], dtype=torch.float64),
    scale=torch.tensor([0.5, 0.3, 0.9, 0.6], dtype=torch.float64),
    decay=torch.tensor(0.4, dtype=torch.float64),
)
Y = torch.tensor([[0, 1.2, 0, 2.1], [0.7, 0, 1.4, 0], [0, 0, 0, 0], [1, 2, 3, 0.5]], dtype=torch.float64)


GRID = np.arange(-12, 12, 0.01)  # sums over it converge exponentially: all tails are normal


def joint(y):
    """p(z, y) of one cell on the grid of z: u is integrated out of lost genes by a sum over the same grid."""
    value = norm.pdf(GRID)
    for y_j, a, mu, sigma in zip(y.tolist(), *(p.squeeze().tolist() for p in SMALL[:3]), strict=True):
        eta, decay = a * GRID + mu, float(SMALL.decay)
        if y_j > 0:
            value *= norm.pdf(y_j, eta, sigma) * (1 - np.exp(-decay * y_j**2))
        else:
            value *= 0.01 * (norm.pdf(GRID[:, None], eta, sigma) * np.exp(-decay * GRID[:, None] ** 2)).sum(0)
    return value


@pytest.mark.parametrize("cell", range(4))
def test_marginal_and_posterior_against_quadrature(cell):
    y = Y[cell : cell + 1]
    found = posterior(y, SMALL)
    total, mean, square = (0.01 * (GRID**k * joint(y[0])).sum() for k in range(3))
    log_p = float(log_marginal(y, SMALL, found) + log_kept(y, SMALL.decay))
    assert log_p == pytest.approx(np.log(total), abs=1e-10)
    assert float(found.mean) == pytest.approx(mean / total, abs=1e-10)
    assert float(found.second_moment) == pytest.approx(square / total, abs=1e-10)


def test_score_is_the_marginal_with_the_jacobian():
    method = ZIFA(2).fit(COUNTS)
    law = Parameters(*map(torch.as_tensor, (method.loadings_, method.mean_, method.scale_, method.decay_)))
    y = torch.log1p(torch.as_tensor(COUNTS, dtype=torch.float64))
    expected = log_marginal(y, law, posterior(y, law)) + log_kept(y, law.decay) - y.sum(1)
    np.testing.assert_allclose(method.score_samples(COUNTS), expected, rtol=1e-12)


def test_counts_have_probability_one():
    """One gene: the probability of 0, the density above it, and what falls below, where log1p of counts is never."""
    counts = np.random.default_rng(0).poisson(1.5, (200, 1)).astype(float)
    with pytest.warns(ConvergenceWarning):
        method = ZIFA(1, max_iter=5).fit(counts)
    zero = np.exp(method.score_samples([[0.0]])[0])
    seen, _ = quad(lambda u: np.exp(method.score_samples([[np.expm1(u)]])[0] + u), 1e-9, 12, limit=200)
    scale = np.hypot(method.loadings_[0, 0], method.scale_[0])
    below, _ = quad(lambda u: norm.pdf(u, method.mean_[0], scale) * -np.expm1(-method.decay_ * u**2), -12, 0)
    assert zero + seen + below == pytest.approx(1, abs=1e-7)


def test_expected_complete_log_likelihood_is_the_marginal_less_the_entropy():
    """log p(y) = E[log p(z, u, y)] + H(z, u | y), with H(z) and the H(u | z) of lost counts in closed form."""
    found = posterior(Y, SMALL)
    lost_variance = SMALL.shrinkage * SMALL.scale.square()
    entropy_u = torch.where(Y == 0, 0.5 * torch.log(2 * np.pi * np.e * lost_variance), 0.0).sum(1)
    entropy_z = 0.5 * torch.log(2 * np.pi * np.e * found.covariance.flatten())
    expected = log_marginal(Y, SMALL, found) + log_kept(Y, SMALL.decay) - entropy_u - entropy_z
    close(expected_complete(Y, SMALL, found), expected, 1e-12)


# --- EM ---


@pytest.mark.parametrize("n_latent", [1, 4])
def test_em_climbs_to_where_the_gradient_is_0(n_latent):
    with pytest.warns(ConvergenceWarning, match="EM stopped after 3000 iterations"):
        method = ZIFA(n_latent, tol=0, max_iter=3000).fit(COUNTS)
    steps = np.diff(method.log_likelihoods_)
    assert steps[0] > 0
    assert steps.min() > -1e-11
    assert method.n_iter_ == len(method.log_likelihoods_) == 3000
    assert method.score_samples(COUNTS).mean() == pytest.approx(method.log_likelihoods_[-1], abs=1e-10)
    law = [method.loadings_, method.mean_, method.scale_, method.decay_]
    leaves = Parameters(*(torch.as_tensor(value, dtype=torch.float64).requires_grad_() for value in law))
    y = torch.log1p(torch.as_tensor(COUNTS, dtype=torch.float64))
    value = (log_marginal(y, leaves, posterior(y, leaves)) + log_kept(y, leaves.decay)).mean()
    assert max(float(g.abs().max()) for g in torch.autograd.grad(value, leaves)) < 1e-3


def test_minibatches_change_nothing():
    whole, parts = ZIFA(3).fit(COUNTS), ZIFA(3, batch_size=7).fit(COUNTS)
    np.testing.assert_allclose(whole.loadings_, parts.loadings_, atol=1e-10)
    np.testing.assert_allclose(whole.score_samples(COUNTS), parts.score_samples(COUNTS), atol=1e-10)


def test_recovers_its_own_law():
    """20,000 cells drawn from the model: parameters within 5 standard errors, roughly 5 / sqrt(cells)."""
    rng = np.random.default_rng(0)
    n, genes = 20_000, 12
    a, mu, sigma, decay = rng.normal(0, 0.7, genes), rng.uniform(2.5, 4.0, genes), rng.uniform(0.3, 0.6, genes), 0.1
    u = rng.normal(rng.normal(size=(n, 1)) * a + mu, sigma)
    y = np.where(rng.random((n, genes)) < np.exp(-decay * u**2), 0, u)
    method = ZIFA(1, tol=1e-5, max_iter=1000).fit(np.expm1(np.where(y > 0, y, 0)))
    np.testing.assert_allclose(np.abs(method.loadings_[:, 0]), np.abs(a), atol=0.05)
    np.testing.assert_allclose(method.mean_, mu, atol=0.05)
    np.testing.assert_allclose(method.scale_, sigma, atol=0.05)
    assert method.decay_ == pytest.approx(decay, abs=0.02)


# --- what is derived from it ---


def test_imputation_and_probability_of_loss():
    method = ZIFA(2).fit(COUNTS)
    law = Parameters(*map(torch.as_tensor, (method.loadings_, method.mean_, method.scale_, method.decay_)))
    y = torch.log1p(torch.as_tensor(COUNTS, dtype=torch.float64))
    u, _ = log_counts(y, law, posterior(y, law))
    np.testing.assert_allclose(method.impute(COUNTS), np.where(COUNTS > 0, COUNTS, np.expm1(u.numpy())), rtol=1e-12)
    expected = np.where(COUNTS > 0, 0, np.exp(-method.decay_ * u.numpy() ** 2))
    np.testing.assert_allclose(method.technical_zero_probability(COUNTS), expected, rtol=1e-12)


def test_needs_zeros_and_sensible_settings():
    with pytest.raises(DataError, match="no count is zero, .* Take FactorAnalysis instead"):
        ZIFA(2).fit(COUNTS + 1)
    with pytest.raises(ModelError, match="max_iter must be an integer of 1 or more, got 0"):
        ZIFA(2, max_iter=0).fit(COUNTS)


def test_a_gene_without_variation_keeps_a_variance():
    """Without a floor its sigma would be 0 and its density infinite."""
    y = torch.cat([Y, torch.full((4, 1), 0.7, dtype=torch.float64)], 1)
    start = Parameters(torch.ones(5, 1).double(), y.mean(0), torch.ones(5).double(), SMALL.decay)
    new = maximised(Sums.of(y, posterior(y, start)), Seen.of(y), start)
    assert float(new.scale[-1]) == pytest.approx(LEAST_VARIANCE**0.5)


def test_stop_rule_is_the_largest_mean_change_relative_to_the_new_value():
    old = SMALL._replace(loadings=2 * SMALL.loadings, decay=1.25 * SMALL.decay)
    assert relative_change(old, SMALL) == pytest.approx(1)
    assert relative_change(SMALL, old) == pytest.approx(0.5)


def test_cortex_held_out(data_path):
    """The split of the authors' notebook, and their score of ZIFA, -1366.15; goldens to a unit for their FA start."""
    import anndata
    from sklearn.model_selection import train_test_split

    counts = anndata.read_h5ad(data_path("cortex_558.h5ad")).X
    train, test = train_test_split(counts, random_state=0)
    method = ZIFA(10).fit(train)
    assert method.expected_complete_log_likelihood(test).mean() == pytest.approx(-1366.15, abs=1)
    assert method.score_samples(test).mean() == pytest.approx(-1294.5, abs=0.5)
