"""Separate modes: climbs, mixture proposals and samplers, against densities with known integrals."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.inference.hmc import rank_normalised_rhat, sample_chains
from pyro_scvi.inference.importance import (
    Mixture,
    Proposal,
    adapted_mixture,
    evidence_of,
    laplace_scale_tril,
    weighted_draws,
)
from pyro_scvi.inference.modes import FEW, MANY, MODES, further_modes, separate_modes

CELLS = 5
WIDTH = 0.2
NONE = ps.libraries.NoLibrary()


def bumps(centres, weights):
    """A mixture of normals of known weights, which sum to 1, in every cell; the density's integral is 1."""
    centres, log_weights = torch.as_tensor(centres, dtype=torch.float64), torch.as_tensor(weights).double().log()
    constant = -centres.shape[-1] / 2 * math.log(2 * math.pi * WIDTH**2)

    def density(u):
        squares = (u[..., None, :] - centres).square().sum(-1)
        return (log_weights - squares / (2 * WIDTH**2)).logsumexp(-1) + constant

    return density


@torch.no_grad()
def fold(model, slopes):
    """Set a decoder of two hidden units for each latent to log mu = 1 + A |z|, as |z| = relu(z) + relu(-z)."""
    eye, head = torch.eye(model.n_latent), model.decoder.heads["log_mean"]
    for name, value in model.decoder.named_parameters():
        if not name.startswith("heads"):
            value.copy_(torch.cat([eye, -eye]) if value.dim() > 1 else torch.zeros_like(value))
    head.weight.copy_(torch.cat([slopes, slopes], 1))
    head.bias.fill_(2.0)


def found_by_climbs(density, size, starts=FEW, modes=MODES):
    candidates = torch.randn(128, CELLS, size, dtype=torch.float64) * 1.5
    unit = candidates.std(0)
    return separate_modes(density, candidates, density(candidates), unit, starts=starts, modes=modes, block=50)


@pytest.mark.parametrize(
    "centres",
    [
        [[-1.5], [1.5]],
        [[-2.0], [0.0], [2.0]],
        [[-1.5, 0], [1.5, 0], [0, 2.0]],
        [[i, j, k] for i in (-1.0, 1.0) for j in (-1.0, 1.0) for k in (-1.0, 1.0)],
    ],
)
def test_climbs_find_every_mode_and_no_other(centres):
    centres = torch.tensor(centres, dtype=torch.float64)
    modes = found_by_climbs(bumps(centres, [1 / len(centres)] * len(centres)), centres.shape[-1], starts=MANY)
    assert (modes.present.sum(0) == len(centres)).all()
    gaps = torch.cdist(modes.places.transpose(0, 1), centres[None].expand(CELLS, -1, -1)).amin(2)
    assert (gaps[modes.present.T] < 3 * WIDTH).all()


def test_climbs_find_modes_wherever_they_are():
    """Four modes at random in three dimensions, another place in every cell; candidates know nothing of them."""
    n = 150
    centres, candidates = (torch.randn(k, n, 3, dtype=torch.float64) for k in (4, 128))

    def density(u):
        return (-(u[:, None] - 1.2 * centres).square().sum(-1) / (2 * 0.15**2)).logsumexp(1)

    options = {"starts": MANY, "modes": MODES, "block": 1000}
    modes = separate_modes(density, candidates, density(candidates), candidates.std(0), **options)
    gaps = (modes.places[:, None] - 1.2 * centres).norm(dim=-1).where(modes.present[:, None], torch.inf)
    between = torch.cdist(centres.transpose(0, 1), centres.transpose(0, 1)) + 10 * torch.eye(4)
    separate = 1.2 * between.amin((1, 2)) > 0.8
    assert (gaps.amin(0) < 0.45)[:, separate].all(0).double().mean() > 0.87  # .74 without starts that are far apart


def test_a_mode_that_no_climb_has_reached_is_found_from_the_others():
    """Eight narrow modes, of which climbs from the octants without one know seven."""
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0]).double()] * 3)
    density = bumps(corners, [1 / 8] * 8)
    near = corners[:7, None] + 0.1 * torch.randn(7, CELLS, 3, dtype=torch.float64)
    options = {"starts": MANY, "modes": MODES, "block": 50}
    unit = torch.ones(CELLS, 3, dtype=torch.float64)
    found = separate_modes(density, near, density(near), unit, **options)
    assert (found.present.sum(0) == 7).all()
    points = found.mirrored(torch.full_like(unit, 0.1))
    assert points.shape[1:] == (CELLS, 3)
    more = further_modes(density, found, points, density(points), unit, block=50)
    assert (more.present.sum(0) == 8).all()
    gaps = (more.places[:8, :, None] - corners).norm(dim=-1)  # (modes, cells, corners)
    assert (gaps.amin(0) < WIDTH).all()


def test_a_cell_with_more_modes_than_starts_find_at_once_is_searched_until_nothing_is_new():
    """The signs of four latents are not told by the counts: sixteen modes."""
    torch.manual_seed(0)
    model = ps.SCVI(60, 4, n_hidden=8, n_layers=1, norm=None, likelihood=ps.likelihoods.Poisson(), library=NONE)
    slopes = 0.5 * torch.randn(60, 4)
    fold(model, slopes)
    rates = (2 + torch.rand(6, 4).add(0.7) @ slopes.T).exp()
    cells = ps.Cells.from_counts(torch.poisson(rates).int().numpy())
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).eval(), pd.DataFrame(), cells.schema)
    draws = ps.sample_posterior(fit, cells, samples=800, sampler=ps.Importance(), progress=False)
    shares = np.stack([((draws.z.values > 0) @ 2 ** np.arange(4) == k).mean(0) for k in range(16)])
    assert (shares > 0.01).all()


def test_modes_that_a_shallow_valley_separates_are_two():
    """A fall of two nats: one Student-t at the higher mode would miss the mass beyond."""
    density = bumps([[-0.46], [0.46]], [0.75, 0.25])
    line = torch.linspace(-0.46, 0.46, 201, dtype=torch.float64)[:, None, None].expand(-1, CELLS, 1)
    fall = torch.minimum(density(line)[0], density(line)[-1]) - density(line).amin(0)
    assert ((fall > 1.2) & (fall < 2.2)).all()
    assert (found_by_climbs(density, 1, starts=MANY).present.sum(0) == 2).all()


def test_one_mode_is_one_however_narrow_or_skewed():
    density = bumps([[0.7, -0.4]], [1.0])
    assert (found_by_climbs(density, 2).present.sum(0) == 1).all()
    narrow = found_by_climbs(lambda u: -0.5 * ((u - 0.3) / 1e-3).square().sum(-1), 3)
    assert (narrow.present.sum(0) == 1).all()
    skewed = found_by_climbs(lambda u: (2 * u - u.exp()).sum(-1), 2)
    assert (skewed.present.sum(0) == 1).all()


def test_a_density_that_is_no_number_in_places_has_the_other_modes():
    inner = bumps([[-1.5], [1.5]], [0.5, 0.5])
    modes = found_by_climbs(lambda u: inner(u).where(u[..., 0] < 1, torch.nan), 1)
    assert (modes.places[0] < 0).all()


def mixture_at(density, centres):
    """A mixture with equal shares, a component at each centre with the covariance of a Laplace step."""
    centres = torch.as_tensor(centres, dtype=torch.float64)[:, None].repeat(1, CELLS, 1)
    scale = torch.full_like(centres[0], WIDTH)
    with torch.enable_grad():
        trils = torch.stack([laplace_scale_tril(density, loc, scale) for loc in centres])
    return Mixture(Proposal(centres, trils), torch.zeros(centres.shape[:2], dtype=torch.float64))


def test_shares_and_evidence_of_unequal_modes():
    centres, weights = [[-1.5, 0.0], [1.5, 0.0], [0.0, 2.0]], [0.7, 0.2, 0.1]
    density = bumps(centres, weights)
    mixture = mixture_at(density, centres)
    for _ in range(3):
        mixture = adapted_mixture(mixture, *weighted_draws(density, mixture, 1000, 200))
    floor = torch.tensor(weights, dtype=torch.float64) * 0.9 + 0.1 / 3
    torch.testing.assert_close(mixture.log_shares.exp(), floor[:, None].expand(-1, CELLS), atol=0.05, rtol=0)
    draws, log_weights = weighted_draws(density, mixture, 4000, 500)
    log_mean, se, ess, khat = evidence_of(log_weights)
    assert (log_mean.abs() < 5 * se).all()
    assert (ess > 2000).all()
    assert (khat < 0.7).all()
    left = (log_weights.softmax(0) * (draws[..., 0] < -0.75)).sum(0)
    torch.testing.assert_close(left, torch.full_like(left, 0.7), atol=0.05, rtol=0)


def test_the_density_of_a_mixture_is_that_of_its_draws():
    density = bumps([[-1.5], [1.5]], [0.5, 0.5])
    mixture = mixture_at(density, [[-1.5], [1.5]])
    absent = mixture._replace(log_shares=torch.tensor([[0.0], [-torch.inf]]).double().expand(2, CELLS))
    grid = torch.linspace(-60, 60, 12001, dtype=torch.float64)[:, None, None].expand(-1, CELLS, 1)
    for one, right in ((mixture, 0.5), (absent, 0.0)):
        mass = one.log_prob(grid).exp() * 0.01
        torch.testing.assert_close(mass.sum(0), torch.ones(CELLS).double(), atol=1e-3, rtol=0)
        drawn = (one.sample(4000) > 0).double().mean(0)[:, 0]
        torch.testing.assert_close(drawn, mass[grid[:, 0, 0] > 0].sum(0), atol=0.05, rtol=0)
        assert float(drawn.mean()) == pytest.approx(right, abs=0.05)


def test_chains_change_modes_and_give_each_its_share():
    density = bumps([[-1.5], [1.5]], [0.8, 0.2])
    mixture = mixture_at(density, [[-1.5], [1.5]])
    chains = sample_chains(density, mixture, chains=4, draws=300, warmup=60, leapfrog=3)
    assert (rank_normalised_rhat(chains.draws).amax(-1) < 1.05).all()
    share = (chains.draws < 0).double().mean((0, 1))[:, 0]
    torch.testing.assert_close(share, torch.full_like(share, 0.8), atol=0.1, rtol=0)


def test_chains_that_cannot_change_modes_disagree():
    density = bumps([[-1.5], [1.5]], [0.5, 0.5])
    mixture = mixture_at(density, [[-1.5], [1.5]])
    narrow = mixture.parts.scale_tril * 1e-6
    stuck = Mixture(Proposal(mixture.parts.loc, narrow), mixture.log_shares)
    chains = sample_chains(density, stuck, chains=4, draws=50, warmup=50, leapfrog=3)
    assert (rank_normalised_rhat(chains.draws).amax(-1) > 1.05).all()  # they start in different modes
