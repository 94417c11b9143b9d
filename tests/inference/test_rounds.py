"""Draws in rounds: that all count rightly; and normals fitted by Newton steps."""

import math

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.inference.importance import Proposal, SamplingBudget, evidence_of
from pyro_scvi.inference.refinement import fitted_normal, newton_normal
from pyro_scvi.inference.rounds import drawn_in_rounds
from pyro_scvi.utils.cell_streams import cell_streams, narrowed
from pyro_scvi.utils.random_state import seeded

SIZE = 3
LOG_INTEGRAL = SIZE / 2 * math.log(2 * math.pi)


def normal(u):
    """A standard normal density without its constant."""
    return -0.5 * u.square().sum(-1)


def rough(u):
    """The same times weights whose tail index is 2, whatever the proposal: they depend on far digits of u."""
    return normal(u) - 2 * (1e5 * u.sum(-1)).frac().abs().clamp(min=1e-12).log()


def curved(u):
    """Narrow along a parabola."""
    return normal(u) - 2 * (u[..., 0] - u[..., 1].square()).square()


def cells_of(*densities):
    """The log joint density of the cells in given rows, each cell with its own."""

    def density_of(rows):
        return lambda u: torch.stack([densities[row](u[:, i]) for i, row in enumerate(rows.tolist())], -1)

    return density_of


def standard(cells, scale=1.0):
    eye = scale * torch.eye(SIZE, dtype=torch.float64)
    return Proposal(torch.zeros(cells, SIZE, dtype=torch.float64), eye.repeat(cells, 1, 1))


def draws_made(found):
    return torch.isfinite(found.log_weights).sum(0).tolist()


@pytest.mark.parametrize("rounds", [0, 1, 3])
@pytest.mark.parametrize("samples", [2, 99, 250, 1001])
def test_all_draws_are_made(samples, rounds):
    found = drawn_in_rounds(cells_of(normal, rough), standard(2), SamplingBudget(samples, 0, rounds), 50)
    assert draws_made(found) == [samples, samples]
    assert found.draws.shape == (samples, 2, SIZE)


def test_results_are_those_of_the_draws():
    found = drawn_in_rounds(cells_of(normal, curved), standard(2), SamplingBudget(1000, 0, 3), 50)
    torch.testing.assert_close(torch.stack(found[:4]), torch.stack(evidence_of(found.log_weights)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_are_those_that_the_weights_belong_to(dtype):
    start = Proposal(*(of.to(dtype) for of in standard(2)))
    found = drawn_in_rounds(lambda rows: normal, start, SamplingBudget(1000, 0, 1), 50)
    log_q = start.log_prob(found.draws)  # no better proposal is needed, so all draws are from it
    torch.testing.assert_close(found.log_weights, (normal(found.draws) - log_q).double(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("shift", [0.3, 1.5])
def test_rounds_are_unbiased_and_their_errors_right_unless_the_first_proposal_is_poor(shift):
    cells = 400
    first = Proposal(standard(cells).loc + shift, standard(cells, 0.7).scale_tril)
    budget = SamplingBudget(400, 0, 2)
    with seeded(1):
        found = drawn_in_rounds(lambda rows: normal, first, budget, 400)
    error = found.log_evidence - LOG_INTEGRAL
    ratio = error.exp()
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / cells**0.5
    if shift < 1:
        assert float((error / found.se).square().mean()) == pytest.approx(1, abs=0.3)
        assert float(found.se.square().mean() ** 0.5) < 0.1


def test_a_density_that_is_no_number_weighs_nothing():
    def half(u):
        return normal(u).where(u[..., 0] < 0, torch.nan)

    found = drawn_in_rounds(cells_of(half), standard(1), SamplingBudget(4000, 0, 3), 500)
    assert abs(float(found.log_evidence) - LOG_INTEGRAL + math.log(2)) < 5 * float(found.se)
    nowhere = drawn_in_rounds(lambda rows: lambda u: torch.nan * normal(u), standard(1), SamplingBudget(100, 0, 1), 500)
    assert not bool(nowhere.khat[0] <= 0.7)


@pytest.mark.parametrize("row", [0, 1])
def test_a_cell_does_not_depend_on_those_beside_it(row):
    density_of, budget = cells_of(normal, curved), SamplingBudget(400, 0, 2)

    def found(rows):
        def own(part):
            return density_of(rows[part])

        with cell_streams(1, "ab"), narrowed(rows), seeded(0):
            start = standard(len(rows))
            fitted = fitted_normal(own, start.loc + 0.5, torch.ones_like(start.loc), steps=100, block=50)
            return drawn_in_rounds(own, fitted, budget, 50)

    beside, alone = found(torch.arange(2)), found(torch.tensor([row]))
    for together, single in zip(beside.of(torch.tensor([row])), alone, strict=True):
        torch.testing.assert_close(together, single, rtol=1e-9, atol=1e-9)


# --- normals fitted by Newton steps ---


@pytest.mark.parametrize("size", [1, 2, 11])
def test_the_normal_fitted_to_a_normal_is_itself(size):
    root = torch.randn(5, size, size, dtype=torch.float64)
    precision = root @ root.mT + torch.eye(size, dtype=torch.float64)
    mean = torch.randn(5, size, dtype=torch.float64)

    def density_of(rows):
        return lambda u: -0.5 * torch.einsum("sci,cij,scj->sc", u - mean[rows], precision[rows], u - mean[rows])

    found, unsteady = newton_normal(density_of, torch.zeros_like(mean), torch.ones_like(mean), steps=20, block=5)
    assert not len(unsteady)
    # A cell leaves after a step of less than a fifth of a standard deviation.
    white = torch.linalg.solve_triangular(found.scale_tril, (mean - found.loc)[..., None], upper=False)
    assert white.abs().max() < 0.1
    ratio = found.scale_tril.mT @ precision @ found.scale_tril
    torch.testing.assert_close(ratio, torch.eye(size).double().expand_as(ratio), atol=0.15, rtol=0)
    assert (found.scale_tril.diagonal(dim1=-2, dim2=-1) > 0).all()


def test_the_normal_fitted_to_a_skewed_density_is_where_its_bound_is_highest():
    """For u_i ~ log Gamma(3): E exp(u) = 3 under q and E exp(u) times the variance is 1, so loc = log 3 - 1 / 6."""

    def density_of(rows):
        return lambda u: (3 * u - u.exp()).sum(-1)

    loc = torch.full((200, 2), -1.0, dtype=torch.float64)
    found, unsteady = newton_normal(density_of, loc, 0.3 * torch.ones_like(loc), steps=20, block=50)
    assert not len(unsteady)
    # The mode is at log 3, and the cubature's error is of the fourth order.
    torch.testing.assert_close(found.loc.mean(0), torch.full((2,), math.log(3) - 1 / 6).double(), atol=0.05, rtol=0)
    variance = (found.scale_tril @ found.scale_tril.mT).diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(variance.mean(0), torch.full((2,), 1 / 3).double(), atol=0.08, rtol=0)


def test_gradients_that_are_no_number_leave_a_cell_where_it_is():
    ones = torch.ones(4, SIZE)
    found = fitted_normal(lambda rows: lambda u: torch.nan * normal(u), ones, ones, steps=4, block=9)
    assert torch.equal(found.loc, ones)
    assert torch.isfinite(found.scale_tril).all()


def test_where_newton_steps_stay_long_rounding_is_not_carried_into_the_answer():
    counts = np.random.default_rng(0).poisson(np.random.default_rng(1).gamma(2, 1.5, (60, 20)))
    cells = ps.Cells.from_counts(counts)
    fit = ps.fit(ps.SCVI(20, 2), cells, epochs=10, progress=False)
    one, other = (
        ps.evidence(fit, cells, samples=100, batch_size=size, progress=False).log_evidence for size in (8, 60)
    )
    np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)
