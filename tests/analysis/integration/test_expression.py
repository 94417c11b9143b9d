"""Normalised expression is decoded from draws of the whole model's posterior, whoever draws them."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps


@pytest.fixture(scope="module")
def simulated():
    """A fit whose zeros are often technical, cells that it drew, and the shares of their genes."""
    rng = np.random.default_rng(0)
    mu = np.exp(rng.normal(1, 0.8, 20) + rng.normal(size=(200, 1)) * rng.normal(size=20) * 0.7)
    counts = rng.poisson(rng.gamma(2, mu / 2)) * (rng.random(mu.shape) > 0.3)
    counts[counts.sum(1) == 0, 0] = 1
    model = ps.SCVI(20, 2, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(20)), n_hidden=16, n_layers=1)
    return ps.fit(model, ps.Cells.from_counts(counts), epochs=20, validation=0, progress=False), counts


@pytest.mark.filterwarnings("ignore:.*k-hat")
@pytest.mark.parametrize("sampler", [ps.Amortized(), ps.Refined(), ps.Importance()])
def test_shares_are_those_of_the_samplers_draws(simulated, sampler):
    fit, counts = simulated
    cells = ps.Cells.from_counts(counts[:12])
    options = {"samples": 40, "sampler": sampler, "seed": 3}
    draws = ps.sample_posterior(fit, cells, sites=("z", "l"), progress=False, **options)
    z, size = (torch.as_tensor(draws[name].values).float() for name in ("z", "l"))
    with torch.no_grad():
        theta = fit.model.decode(z[:, :, None], size[..., None], torch.zeros(len(cells), 0))
    expected = 1e4 * torch.softmax(theta["log_mean"], -1).mean(0)
    table = ps.normalized_expression(fit, cells, **options)
    np.testing.assert_allclose(table, expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:.*k-hat")
def test_quantiles_refine_the_guide_by_default(simulated):
    fit, counts = simulated
    cells, levels = ps.Cells.from_counts(counts[:12]), (0.05, 0.95)
    given = ps.normalized_expression(fit, cells, quantiles=levels, sampler=ps.Refined(), samples=400)
    np.testing.assert_array_equal(ps.normalized_expression(fit, cells, quantiles=levels), given)
    np.testing.assert_array_equal(
        ps.normalized_expression(fit, cells), ps.normalized_expression(fit, cells, sampler=ps.Amortized(), samples=25)
    )


@pytest.mark.filterwarnings("ignore:.*k-hat")
def test_quantiles_of_poisson_rates_are_those_of_many_weighted_draws(cells):
    model = ps.SCVI(cells.n_genes, 2, likelihood=ps.likelihoods.Poisson(), n_hidden=8, n_layers=1)
    fit = ps.fit(model, cells, epochs=2, validation=0, progress=False)
    few = cells.take(range(4))
    given = ps.impute(fit, few, quantiles=(0.05, 0.95), sampler=ps.Importance(), samples=400)
    np.testing.assert_array_equal(ps.impute(fit, few, quantiles=(0.05, 0.95)), given)


def test_cells_of_one_name_have_draws_of_their_own_whatever_comes_with_them(simulated):
    fit, counts = simulated
    few = ps.Cells.from_counts(counts[:12]).take([7, 7, 3])
    options = {"samples": 30, "sites": ("z",), "sampler": ps.Amortized(), "progress": False}
    one, two = (ps.sample_posterior(fit, few, batch_size=size, **options).z.values for size in (1, 3))
    np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-5)
    assert not np.allclose(one[:, 0], one[:, 1])
