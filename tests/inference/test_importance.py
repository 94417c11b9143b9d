"""Adaptive importance sampling and Pareto k-hat, against ArviZ and densities with known integrals."""

import math

import arviz_stats.base
import pytest
import torch

from pyro_scvi.inference.importance import (
    Proposal,
    adaptive_importance,
    evidence_of,
    laplace_scale_tril,
    refine,
    weighted_draws,
)
from pyro_scvi.inference.pareto_khat import pareto_khat, pareto_smoothed


def gaussian(cells=5, latents=3):
    root = torch.randn(cells, latents, latents, dtype=torch.float64)
    precision = root @ root.mT + torch.eye(latents, dtype=torch.float64)
    mean = torch.randn(cells, latents, dtype=torch.float64)

    def log_joint(u):
        return -0.5 * torch.einsum("sci,cij,scj->sc", u - mean, precision, u - mean)

    log_integral = 0.5 * latents * math.log(2 * math.pi) - 0.5 * torch.logdet(precision)
    return log_joint, mean, precision, log_integral


def test_evidence_of_a_gaussian_is_its_integral():
    log_joint, mean, _, log_integral = gaussian()
    found = adaptive_importance(log_joint, torch.zeros_like(mean), torch.ones_like(mean), samples=2000)
    assert ((found.log_evidence - log_integral).abs() < 5 * found.se).all()
    assert (found.se < 0.02).all()
    assert (found.khat < 0.7).all()
    assert (found.ess > 1000).all()


def test_laplace_covariance_of_a_gaussian_is_exact():
    log_joint, mean, precision, _ = gaussian()
    tril = laplace_scale_tril(log_joint, mean, torch.ones_like(mean))
    torch.testing.assert_close(tril @ tril.mT, precision.inverse(), rtol=1e-8, atol=1e-8)


def test_refine_finds_the_mean_field_optimum():
    log_joint, mean, precision, _ = gaussian()
    loc, scale = refine(log_joint, torch.zeros_like(mean), torch.ones_like(mean), steps=400)
    torch.testing.assert_close(loc, mean, atol=0.05, rtol=0)
    torch.testing.assert_close(scale, precision.diagonal(dim1=-2, dim2=-1) ** -0.5, atol=0.05, rtol=0.05)


def test_proposal_density_is_that_of_its_draws():
    tril = torch.linalg.cholesky(torch.tensor([[[2.0, 0.5], [0.5, 1.0]]], dtype=torch.float64))
    proposal = Proposal(torch.tensor([[1.0, -1.0]], dtype=torch.float64), tril)
    # The integral of the density over a fine grid that holds nearly all of its mass.
    axis = torch.linspace(-60, 60, 1201, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 1, 2)
    assert float(proposal.log_prob(grid).exp().sum() * 0.1**2) == pytest.approx(1, abs=1e-4)
    draws = proposal.sample(200_000)
    expected = tril @ tril.mT * 7 / 5  # the covariance of a Student-t with 7 degrees of freedom
    torch.testing.assert_close(torch.cov(draws[:, 0].T), expected[0], atol=0.05, rtol=0)


@pytest.mark.parametrize("spread", [0.3, 1.0, 1.5, 2.5])
def test_khat_agrees_with_arviz(spread):
    log_weights = spread * torch.randn(2000, 20, dtype=torch.float64)
    expected = torch.as_tensor(arviz_stats.base.array_stats.psislw(-log_weights.T.numpy(), axis=-1)[1])
    torch.testing.assert_close(pareto_khat(log_weights), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("spread", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("samples", [100, 2000])
def test_smoothed_weights_agree_with_arviz(spread, samples):
    log_weights = spread * torch.randn(samples, 20, dtype=torch.float64)
    smoothed, khat = pareto_smoothed(log_weights)
    expected, expected_khat = arviz_stats.base.array_stats.psislw(-log_weights.T.numpy(), axis=-1)
    expected = torch.as_tensor(expected).T.log_softmax(0)
    torch.testing.assert_close(smoothed, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(khat, torch.as_tensor(expected_khat), atol=1e-8, rtol=0)
    assert (smoothed.gather(0, log_weights.argsort(0)).diff(dim=0) >= 0).all()  # the order is kept


def test_few_weights_are_left_as_they_are():
    log_weights = torch.randn(20, 3)
    smoothed, khat = pareto_smoothed(log_weights)
    torch.testing.assert_close(smoothed, log_weights.log_softmax(0))
    assert khat.isinf().all()


def test_khat_recovers_the_tail_index_of_pareto_weights():
    for index in (0.2, 0.5, 1.0):
        weights = torch.distributions.Pareto(torch.ones(50, dtype=torch.float64), 1 / index).sample((4000,))
        assert float(pareto_khat(weights.log()).mean()) == pytest.approx(index, abs=0.12)


def test_standard_error_is_that_of_repetitions():
    log_weights = 0.5 * torch.randn(500, 4000, dtype=torch.float64)
    estimate, se, ess, _ = evidence_of(log_weights)
    assert float(se.mean()) == pytest.approx(float(estimate.std()), rel=0.1)
    assert float(ess.mean()) == pytest.approx(500 / math.exp(0.25), rel=0.05)
    assert float(estimate.mean()) == pytest.approx(0.125, abs=0.01)


def test_a_density_that_is_no_number_weighs_nothing():
    """A standard normal that is NaN above zero: what is left integrates to half."""

    def log_joint(u):
        return torch.where(u[..., 0] > 0, torch.nan, -0.5 * u[..., 0].square())

    proposal = Proposal(torch.zeros(3, 1, dtype=torch.float64), torch.ones(3, 1, 1, dtype=torch.float64))
    _, log_weights = weighted_draws(log_joint, proposal, 4000, 500)
    estimate, se, _, _ = evidence_of(log_weights)
    assert ((estimate - math.log(0.5 * math.sqrt(2 * math.pi))).abs() < 5 * se).all()


def test_few_draws_have_no_khat():
    assert torch.isinf(pareto_khat(torch.randn(10, 3, dtype=torch.float64))).all()


def test_equal_seeds_give_equal_results_and_leave_the_global_state():
    log_joint, mean, _, _ = gaussian()
    before = torch.get_rng_state()
    first, second = (adaptive_importance(log_joint, mean, torch.ones_like(mean), samples=50, seed=3) for _ in range(2))
    assert torch.equal(first.log_evidence, second.log_evidence)
    assert torch.equal(before, torch.get_rng_state())
