"""IDR: what the R package gives, the mixture it came from, and refusals.

Golden: shared/golden/idr.npz, made with est.IDR of the R package idr 1.3. Perturbed once, each of these made a test
fail: ties in the ranks, the grid's size, rho's factor 2, sigma's degrees of freedom, the stop of either loop, the
copula's marginal.
"""

import numpy as np
import pytest
from scipy.integrate import dblquad
from scipy.stats import multivariate_normal, norm

from pyro_scvi.baselines import idr
from pyro_scvi.baselines.reproducibility import AUTHORS_START, STARTS, Mixture, expectation, maximisation, normal_scores
from pyro_scvi.errors import DataError, ModelError

RUNS = {  # scores, start, most renewals, parameters, local and global values
    "A": ("simu_x1", "simu_x2", Mixture(0.7, 0.8, 2.6, 1.3), 30, "para_A", "simu_idrA", "simu_IDRA"),
    "B": ("simu_x1", "simu_x2", AUTHORS_START, 20, "para_B", "simu_idrB", "simu_IDRB"),
    "ties": ("ties_y1", "ties_y2", AUTHORS_START, 20, "para_ties", "ties_idr", "ties_IDR"),
}
TRUTH = Mixture(0.4, 0.85, 2.5, 0.8)


def simulated(n=4000, seed=0, mixture=TRUTH):
    """Scores of two methods, any increasing function of z, and which items are reproducible."""
    p, rho, mu, sigma = mixture
    rng = np.random.default_rng(seed)
    good = rng.random(n) < p
    shared = rng.multivariate_normal([mu, mu], sigma**2 * np.array([[1, rho], [rho, 1]]), n)
    z = np.where(good[:, None], shared, rng.normal(size=(n, 2)))
    return np.exp(z[:, 0]), z[:, 1] ** 3, good


@pytest.mark.parametrize("run", RUNS)
def test_is_that_of_the_r_package(golden, run):
    arrays = golden("idr.npz")
    score_1, score_2, start, max_iter, parameters, local_idr, global_idr = RUNS[run]
    found = idr(arrays[score_1], arrays[score_2], starts=[start], max_iter=max_iter)
    np.testing.assert_allclose(found[:4], arrays[parameters], rtol=0, atol=1e-8)
    np.testing.assert_allclose(found.local_idr, arrays[local_idr], rtol=0, atol=1e-10)
    # R ranks local values that differ by rounding as ties or not, differently from here
    np.testing.assert_allclose(found.idr, arrays[global_idr], rtol=0, atol=1e-3)


def test_finds_the_mixture_and_the_items():
    score_1, score_2, good = simulated()
    found = idr(score_1, score_2)
    assert found.mixture_weight == pytest.approx(TRUTH.mixture_weight, abs=0.03)
    assert found.rho == pytest.approx(TRUTH.rho, abs=0.05)
    assert ((found.local_idr < 0.5) == good).mean() > 0.95
    calls = found.idr < 0.1
    assert (~good[calls]).mean() == pytest.approx(0.1, abs=0.03)  # what a global value of 0.1 promises


def test_of_all_starts_the_likeliest_ranks_win():
    score_1, score_2, good = simulated(seed=1)
    best, authors = idr(score_1, score_2), idr(score_1, score_2, starts=[AUTHORS_START])
    each = [idr(score_1, score_2, starts=[start]) for start in STARTS]
    assert best.log_likelihood == max(fit.log_likelihood for fit in each)
    assert best.log_likelihood > authors.log_likelihood + 1
    assert ((best.local_idr < 0.5) == good).mean() >= ((authors.local_idr < 0.5) == good).mean()


def test_density_of_z_integrates_to_one():
    total, _ = dblquad(
        lambda y, x: np.exp(expectation(np.array([[x], [y]]), Mixture(0.4, 0.6, 1.0, 0.7))[1]),
        -6,
        6,
        -6,
        6,
        epsabs=1e-6,
    )
    assert total == pytest.approx(1, abs=1e-5)


def test_log_likelihood_is_that_of_the_copula():
    score_1, score_2, _ = simulated(200)
    found = idr(score_1, score_2)
    p, rho, mu, sigma = found[:4]
    u = np.stack([(np.argsort(np.argsort(score)) + 1) / 201 for score in (score_1, score_2)])
    z = normal_scores(u, Mixture(p, rho, mu, sigma))
    covariance = sigma**2 * np.array([[1, rho], [rho, 1]])
    h = p * multivariate_normal.pdf(z.T, [mu, mu], covariance) + (1 - p) * norm.pdf(z).prod(0)
    f = p * norm.pdf(z, mu, sigma) + (1 - p) * norm.pdf(z)
    assert found.log_likelihood == pytest.approx(np.log(h / f.prod(0)).sum(), rel=1e-10)


def test_em_at_given_z_climbs():
    z = np.random.default_rng(0).normal(size=(2, 500)) + [[0.5]]
    mixture, values = AUTHORS_START, []
    for _ in range(50):
        reproducible, value = expectation(z, mixture)
        values.append(value)
        mixture = maximisation(z, reproducible)
    assert np.diff(values).min() > -1e-9


def test_only_ranks_matter_and_idr_is_a_running_mean():
    score_1, score_2, _ = simulated(300)
    found, same = idr(score_1, score_2), idr(np.log(score_1), np.cbrt(score_2))
    np.testing.assert_array_equal(found.local_idr, same.local_idr)
    order = np.argsort(found.local_idr)
    np.testing.assert_allclose(found.idr[order], np.cumsum(found.local_idr[order]) / np.arange(1, 301))
    mirrored = idr(score_2, score_1)
    np.testing.assert_allclose(found.local_idr, mirrored.local_idr, atol=1e-12)


def test_perfect_agreement_and_disagreement_end():
    score = np.arange(50.0)
    with pytest.warns(UserWarning, match="mixture_weight is above 0.99: the scores do not determine mu and sigma"):
        found = idr(score, score)
    assert np.isfinite(found.local_idr).all()
    assert found.rho > 0.99
    with pytest.warns(UserWarning, match="these scores do not agree"), pytest.warns(match="do not determine"):
        assert idr(score, -score).rho < 0


@pytest.mark.parametrize(
    ("score_1", "score_2", "said"),
    [
        ([1, 2, 3], [1, 2], r"two vectors of one length, got shapes \(3,\) and \(2,\)"),
        ([[1, 2]], [[1, 2]], "two vectors of one length"),
        ([1, 2, 3], [1, np.inf, 2], "score_2 has 1 values that are not finite, the first of them inf of item 1; drop"),
        ([1, np.nan, 3], [1, 2, 3], "score_1 has 1 values that are not finite, the first of them nan of item 1"),
        ([1, 1, 1], [1, 2, 3], "score_1 has fewer than two different values"),
        ([], [], "score_1 has fewer than two different values"),
    ],
)
def test_scores_that_rank_nothing_are_refused(score_1, score_2, said):
    with pytest.raises(DataError, match=said):
        idr(score_1, score_2)


@pytest.mark.parametrize("start", [AUTHORS_START._replace(sigma=0), AUTHORS_START._replace(rho=1), (1, 0, 0, 1)])
def test_starts_are_checked(start):
    with pytest.raises(ModelError, match="a start needs 0 < mixture_weight < 1"):
        idr([1, 2, 3], [1, 2, 3], starts=[start])
    with pytest.raises(ModelError, match="starts must have at least one Mixture"):
        idr([1, 2, 3], [1, 2, 3], starts=[])
    with pytest.raises(ModelError, match=r"got a single one; pass \[Mixture"):
        idr([1, 2, 3], [1, 2, 3], starts=AUTHORS_START)
    with pytest.raises(ModelError, match="sequence of Mixture or of its 4 numbers"):
        idr([1, 2, 3], [1, 2, 3], starts=list(AUTHORS_START))
    with pytest.raises(ModelError, match="tol must be above 0, got 0"):
        idr([1, 2, 3], [1, 2, 3], tol=0)


def test_starts_come_in_any_sequence():
    score_1, score_2, _ = simulated(300)
    found = [idr(score_1, score_2, starts=form(STARTS[1:3])).log_likelihood for form in (list, tuple, np.array)]
    assert len(set(found)) == 1


def test_independent_scores_give_the_authors_fit_and_a_warning():
    scores = np.random.default_rng(0).normal(size=(2, 300))  # the best of the starts calls all reproducible
    with pytest.warns(UserWarning, match="no start of the optimiser is 5 nats better"):
        found = idr(*scores)
    with pytest.warns(UserWarning, match="do not determine"):
        authors = idr(*scores, starts=[AUTHORS_START])
    assert found[:4] == authors[:4]
    assert found.mixture_weight < 0.9
