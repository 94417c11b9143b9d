"""The chains' diagnostics against ArviZ, and the sampler on densities whose moments are known."""

import pytest
import torch
from arviz_stats.base import array_stats

from pyro_scvi.inference.hmc import bulk_ess, rank_normalised_rhat, sample_chains
from pyro_scvi.inference.importance import Proposal


def autoregressive(rho, draws=500, chains=4, latents=6):
    """Stationary normal chains (draws, chains, latents) with autocorrelation rho at lag one."""
    noise = torch.randn(draws, chains, latents, dtype=torch.float64)
    found = [noise[0]]
    for step in noise[1:]:
        found.append(rho * found[-1] + (1 - rho**2) ** 0.5 * step)
    return torch.stack(found)


def with_repeats(draws):
    """Every draw repeats its predecessor with probability 0.4, as after a rejection."""
    kept = [draws[0]]
    for row, repeat in zip(draws[1:], torch.rand(draws.shape[:2])[1:] < 0.4, strict=True):
        kept.append(torch.where(repeat[:, None], kept[-1], row))
    return torch.stack(kept)


def stuck():
    """One chain that never moves."""
    draws = autoregressive(0.0)
    draws[:, 0] = draws[0, 0]
    return draws


CHAINS = {
    "independent": lambda: autoregressive(0.0),
    "odd number": lambda: autoregressive(0.0, draws=501),
    "autocorrelated": lambda: autoregressive(0.9),
    "antithetic": lambda: autoregressive(-0.6),
    "shifted": lambda: autoregressive(0.3) + 0.3 * torch.arange(4.0)[:, None],
    "unequal scales": lambda: autoregressive(0.0) * torch.tensor([1.0, 1.0, 1.0, 3.0])[:, None],
    "heavy tails": lambda: autoregressive(0.5).tan(),
    "trend": lambda: autoregressive(0.2) + torch.linspace(-1, 1, 500)[:, None, None],
    "rejections": lambda: with_repeats(autoregressive(0.0)),
    "stuck": stuck,
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS.keys())
def test_diagnostics_agree_with_arviz(make):
    draws = make()
    expected = array_stats.rhat(draws.numpy(), chain_axis=1, draw_axis=0)
    torch.testing.assert_close(rank_normalised_rhat(draws), torch.as_tensor(expected), rtol=0, atol=1e-6)
    expected = array_stats.ess(draws.numpy(), chain_axis=1, draw_axis=0)  # "bulk" is its default
    torch.testing.assert_close(bulk_ess(draws), torch.as_tensor(expected), rtol=0.08, atol=0)


def test_diagnostics_take_any_number_of_dimensions():
    draws = autoregressive(0.5)
    for of in (rank_normalised_rhat, bulk_ess):
        expected = of(draws)
        assert torch.equal(of(draws.unflatten(-1, (2, 3))), expected.unflatten(-1, (2, 3)))
        assert torch.equal(of(draws[..., 0]), expected[0])


def test_ess_is_the_variance_of_the_mean_in_repetitions():
    """Autocorrelation rho: n (1 - rho) / (1 + rho) effective draws of n."""
    draws = autoregressive(0.6, draws=1000, latents=50)
    assert float(bulk_ess(draws).mean()) == pytest.approx(4000 * 0.4 / 1.6, rel=0.08)


# --- Hamiltonian Monte Carlo ---


def start(cells, latents, scale=1.0):
    """A proposal at 0 with covariance scale^2 I, not adapted to anything."""
    eye = torch.eye(latents, dtype=torch.float64).expand(cells, latents, latents)
    return Proposal(torch.zeros(cells, latents, dtype=torch.float64), scale * eye)


def errors(values, expected):
    """(mean - expected) / standard error, for values (draws, chains, ...), the error by the effective draws."""
    pooled = values.flatten(0, 1)
    return (pooled.mean(0) - expected) / (pooled.std(0) / bulk_ess(values).sqrt())


@pytest.fixture(scope="module")
def gaussian():
    """Chains on four correlated Gaussians, the fourth a hundred times narrower than the third, with their moments."""
    torch.set_num_threads(1)  # this runs before the fixture of every test
    torch.manual_seed(0)
    root = torch.randn(4, 3, 3, dtype=torch.float64)
    size = torch.tensor([1.0, 1.0, 3.0, 0.03], dtype=torch.float64)[:, None, None]
    covariance = (root @ root.mT + 0.3 * torch.eye(3, dtype=torch.float64)) * size**2
    mean = torch.randn(4, 3, dtype=torch.float64)
    precision = covariance.inverse()

    def log_joint(u):
        return -0.5 * torch.einsum("sci,cij,scj->sc", u - mean, precision, u - mean)

    found = sample_chains(log_joint, start(4, 3), chains=16, draws=400, warmup=300)
    return found, mean, covariance


def test_moments_of_correlated_gaussians(gaussian):
    found, mean, covariance = gaussian
    assert found.draws.shape == (400, 16, 4, 3)
    assert rank_normalised_rhat(found.draws).max() < 1.02
    assert errors(found.draws, mean).abs().max() < 5
    centred = found.draws - mean
    products = centred[..., :, None] * centred[..., None, :]
    assert errors(products, covariance).abs().max() < 5
    ess = bulk_ess(products)
    assert ess.min() > 200  # so that the standard errors above are small: 1/10 of the sd at most
    assert found.divergences.sum() == 0


def test_every_cell_has_its_own_step(gaussian):
    found, _, covariance = gaussian
    assert ((found.acceptance - 0.9).abs() < 0.12).all()
    smallest = torch.linalg.eigvalsh(covariance)[:, 0].sqrt()
    ratio = found.step_size / smallest  # the stable step is proportional to the narrowest direction
    assert ratio.max() / ratio.min() < 3
    assert found.step_size.max() / found.step_size.min() > 20


@pytest.mark.parametrize("target", [0.6, 0.95])
def test_acceptance_follows_its_target(target):
    def log_joint(u):
        return -0.5 * u.square().sum(-1)

    found = sample_chains(log_joint, start(3, 5), chains=16, draws=150, warmup=300, leapfrog=3, target=target)
    assert ((found.acceptance - target).abs() < 0.1).all()


def test_moments_of_a_skewed_density():
    """u = log of a Gamma(a, 1) variable: mean digamma(a), variance trigamma(a), third central moment polygamma_2(a).

    Standard errors from the spread of many chains: rank-based effective numbers are too large for third moments.
    """
    shape = torch.tensor([[1.5], [3.0], [10.0]], dtype=torch.float64)
    chains = 400
    found = sample_chains(
        lambda u: (shape * u - u.exp()).sum(-1), start(3, 1), chains=chains, draws=300, warmup=200, leapfrog=4
    )
    for power in (1, 2, 3):
        of_chains = ((found.draws - torch.digamma(shape)) ** power).mean(0)  # (chains, cells, 1)
        expected = torch.polygamma(power - 1, shape) if power > 1 else 0
        assert ((of_chains.mean(0) - expected) / (of_chains.std(0) / chains**0.5)).abs().max() < 5
    assert rank_normalised_rhat(found.draws).max() < 1.02


def test_a_target_far_from_the_proposal_is_reached():
    found = sample_chains(
        lambda u: -0.5 * (u - 30).square().sum(-1), start(2, 2), chains=4, draws=200, warmup=200, leapfrog=5
    )
    assert errors(found.draws, 30.0).abs().max() < 5


@pytest.mark.parametrize("depth", [-1e6, -torch.inf], ids=["cliff", "no density"])
def test_divergences_are_counted_where_there_is_a_wall(depth):
    """A half normal beside a normal, the same but for a wall at 0."""
    wall = torch.tensor([0.0, -50.0], dtype=torch.float64)

    def log_joint(u):
        normal = -0.5 * u.square().sum(-1)
        return torch.where(u[..., 0] > wall, normal, normal + depth)

    proposal = Proposal(torch.ones(2, 1, dtype=torch.float64), torch.full((2, 1, 1), 0.3, dtype=torch.float64))
    found = sample_chains(log_joint, proposal, chains=8, draws=300, warmup=200, leapfrog=4)
    assert found.divergences[0] > 100  # of 2400 draws
    assert found.divergences[1] == 0
    assert found.draws[:, :, 0].min() > 0
    assert errors(found.draws, torch.tensor([[(2 / torch.pi) ** 0.5], [0.0]])).abs().max() < 5


def test_one_seed_gives_one_set_of_chains():
    def chains(seed):
        torch.manual_seed(seed)
        return sample_chains(
            lambda u: -0.5 * u.square().sum(-1), start(2, 2), chains=2, draws=10, warmup=10, leapfrog=2
        ).draws

    assert torch.equal(chains(1), chains(1))
    assert not torch.equal(chains(1), chains(2))
