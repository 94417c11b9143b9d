"""Imputed expression and technical zeros against the closed forms by hand, against draws, and against the truth."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import gamma as gamma_law
from scipy.stats import mannwhitneyu

import pyro_scvi as ps
from pyro_scvi.analysis.predictive.imputation import expression, mean_given_no_dropout
from pyro_scvi.errors import ModelError, SchemaError
from tests.support.simulate import simulated_counts

LIKELIHOODS = ["ZINB", "NB", "ZIP", "Poisson"]


def fitted(cells, likelihood="ZINB", n_latent=3, epochs=8, **options):
    law = getattr(ps.likelihoods, likelihood)()
    model = ps.SCVI(cells.n_genes, n_latent, cells.n_covariates, likelihood=law, n_hidden=8, n_layers=1, **options)
    guide = ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, guide, epochs=epochs, validation=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def few():
    return ps.Cells.from_counts(simulated_counts(15, 10))


def theta_of(fit, cells, samples=25, seed=0, **site_options):
    """The likelihood's parameters (samples, cells, genes), float64, at the draws of z and l that impute makes."""
    found = ps.sample_posterior(fit, cells, samples=samples, sites=["z", "l"], seed=seed, **site_options)
    z, l = (torch.as_tensor(found[site].values) for site in "zl")  # noqa: E741
    with torch.no_grad():
        theta = fit.model.decode(z[:, :, None], l[..., None].log(), cells[:][1])
    return {name: value.double().numpy() for name, value in theta.items()}


# --- expression ---


def by_hand(theta, x):
    """E[w | x, z] averaged over draws, written out with numpy."""
    mu = np.exp(theta["log_mean"])
    r = np.exp(theta["log_inverse_dispersion"]) if "log_inverse_dispersion" in theta else None
    seen = mu if r is None else (r + x) / (r / mu + 1)
    if "gate_logits" not in theta:
        return seen.mean(0)
    pi, p0 = 1 / (1 + np.exp(-theta["gate_logits"])), np.exp(-mu) if r is None else (1 + mu / r) ** -r
    rho = (x == 0) * pi / (pi + (1 - pi) * p0)
    return (rho * mu + (1 - rho) * seen).mean(0)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_expression_is_the_closed_form_averaged_over_draws(likelihood, few):
    fit = fitted(few, likelihood)
    found = ps.impute(fit, few)
    assert found.shape == (15, 10)
    np.testing.assert_allclose(found, by_hand(theta_of(fit, few), few.counts), rtol=1e-4)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_expression_is_the_mean_of_draws_of_w(likelihood, few):
    fit, n = fitted(few, likelihood), 4000
    w = ps.sample_posterior(fit, few, samples=n, sites=["w"], seed=1).w.values.astype(float)
    imputed = ps.impute(fit, few, samples=n, seed=2)
    spread = w.std(0)
    # Both average over as many draws of z and l, the one with the scatter of w, the other without.
    error = (w.mean(0) - imputed) / (spread * (2 / n) ** 0.5)
    assert np.abs(error).max() < 4.5
    assert np.median(spread / imputed) < 3  # so that an expression wrong by a fifth would be seen


def test_one_entry_by_hand():
    """Mu = 2, r = 0.5, pi = 0.3: the numbers of Sec. 1 for a count of 0 and one of 3, at a decoder that is constant."""
    few = ps.Cells.from_counts(np.array([[0, 3], [4, 0], [1, 1]]))
    model = ps.SCVI(2, 1, library=ps.libraries.NoLibrary(), n_hidden=4, norm=None)
    for name, value in (("log_mean", 2.0), ("log_inverse_dispersion", 0.5), ("gate_logits", 0.3 / 0.7)):
        head = model.decoder.heads[name]
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, math.log(value))
    guide = ps.guides.DiagonalNormal(model, n_hidden=4, norm=None)
    options = {"learning_rate": ps.schedules.Constant(0.0), "data_start": False, "validation": 0, "progress": False}
    fit = ps.fit(model, few, guide, epochs=1, device="cpu", **options)
    p0 = (1 + 2 / 0.5) ** -0.5  # 0.447
    rho = 0.3 / (0.3 + 0.7 * p0)  # 0.489
    found = ps.impute(fit, few)
    assert found[0, 0] == pytest.approx(rho * 2 + (1 - rho) * 0.5 * 2 / 2.5, rel=1e-5)
    assert found[0, 1] == pytest.approx(3.5 / (0.5 / 2 + 1), rel=1e-5)
    np.testing.assert_allclose(ps.impute(fit, few, quantity=mean_given_no_dropout), 2, rtol=1e-5)
    expected = rho * (few.counts == 0)
    np.testing.assert_allclose(ps.technical_zero_probability(fit, few), expected, rtol=1e-5)
    quantiles = ps.impute(fit, few, quantiles=[0.1, 0.5, 0.9], samples=20_000)[:, 0, 1]
    exact = gamma_law.ppf([0.1, 0.5, 0.9], 3.5, scale=1 / 1.25)
    np.testing.assert_allclose(quantiles, exact, rtol=0.05)


def test_mean_given_no_dropout_is_mu(few):
    fit = fitted(few)
    expected = np.exp(theta_of(fit, few)["log_mean"]).mean(0)
    found = ps.impute(fit, few, quantity=mean_given_no_dropout)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert not np.allclose(found, ps.impute(fit, few, quantity=expression), rtol=0.05)


def test_quantiles_are_those_of_draws_of_w(few):
    fit = fitted(few)
    levels = [0.05, 0.5, 0.95]
    found = ps.impute(fit, few, quantiles=levels, samples=2000, sampler=ps.Amortized())
    w = ps.sample_posterior(fit, few, samples=20_000, sites=["w"]).w.values
    assert found.shape == (3, 15, 10)
    assert (np.diff(found, axis=0) > 0).all()
    below = (w[None] < found[:, None]).mean(1)
    assert np.abs(below - np.array(levels)[:, None, None]).max() < 0.03


def test_few_draws_of_the_latents_are_enough_for_a_quantile(few):
    fit = fitted(few)
    few_draws, many = (ps.impute(fit, few, quantiles=[0.01, 0.99], samples=n) for n in (25, 400))
    w = ps.sample_posterior(fit, few, samples=5000, sites=["w"], sampler=ps.Importance(proposals=5000)).w.values
    for found in (few_draws, many):
        inside = ((w > found[0]) & (w < found[1])).mean()
        assert abs(inside - 0.98) < 0.01


def test_quantiles_of_poisson_rates_are_those_of_means(few):
    fit = ps.fit(ps.SCVI(10, 2, likelihood=ps.likelihoods.Poisson(), n_hidden=8), few, epochs=2, progress=False)
    low, middle, high = ps.impute(fit, few, quantiles=[0.1, 0.5, 0.9])
    assert (low < middle).all()
    assert (middle < high).all()


def test_quantiles_cover_and_single_batches_join(few):
    fit = fitted(few)
    low, high = ps.impute(fit, few, quantiles=[0.05, 0.95], samples=2000, batch_size=4, sampler=ps.Amortized())
    w = ps.sample_posterior(fit, few, samples=2000, sites=["w"], seed=9).w.values
    inside = ((low <= w) & (w <= high)).mean(0)
    assert np.abs(inside - 0.9).max() < 0.05


# --- batches ---


def test_batches_swap_the_covariates_of_the_decoder_alone(batched_cells):
    cells = batched_cells.take(range(12))
    fit = fitted(cells, epochs=20)
    found = {
        names: ps.impute(fit, cells, quantity=mean_given_no_dropout, batches=names, batch_size=5)
        for names in (("a",), ("b",), ("a", "b"))
    }
    for name in "ab":
        swapped = cells.with_batch(name)
        z_l = ps.sample_posterior(fit, cells, samples=25, sites=["z", "l"], batch_size=5)
        z, l = (torch.as_tensor(z_l[site].values) for site in "zl")  # noqa: E741
        with torch.no_grad():
            mean = fit.model.decode(z[:, :, None], l[..., None].log(), swapped[:][1])["log_mean"].exp().mean(0)
        np.testing.assert_allclose(found[(name,)], mean, rtol=1e-4)
    assert not np.allclose(found[("a",)], found[("b",)], rtol=0.05)
    np.testing.assert_allclose(found[("a", "b")], (found[("a",)] + found[("b",)]) / 2, rtol=1e-5)
    own = ps.impute(fit, cells, quantity=mean_given_no_dropout, batch_size=5)
    in_a = cells.covariates[:, cells.schema.batch_position("a")] == 1
    np.testing.assert_allclose(own[in_a], found[("a",)][in_a], rtol=1e-5)
    np.testing.assert_allclose(own[~in_a], found[("b",)][~in_a], rtol=1e-5)


def test_what_was_not_observed_in_a_batch_is_refused(batched_cells):
    fit = fitted(batched_cells, epochs=1)
    with pytest.raises(ModelError, match="nothing was observed"):
        ps.impute(fit, batched_cells, batches=["a"])
    with pytest.raises(ModelError, match="nothing was observed"):
        ps.impute(fit, batched_cells, batches=["a"], quantity=mean_given_no_dropout, quantiles=[0.5])
    with pytest.raises(SchemaError, match="no batch 'c'"):
        ps.impute(fit, batched_cells, batches=["c"], quantity=mean_given_no_dropout)


def test_batches_of_cells_without_batches_are_refused(few):
    with pytest.raises(SchemaError, match="without batch="):
        ps.impute(fitted(few, epochs=1), few, batches=["a"], quantity=mean_given_no_dropout)


# --- technical zeros ---


@pytest.mark.parametrize("likelihood", ["ZINB", "ZIP"])
def test_technical_zeros_by_bayes(likelihood, few):
    """One draw of z and l: pi / (pi + (1 - pi) p(0)) at a zero, 0 elsewhere."""
    fit = fitted(few, likelihood)
    found = ps.technical_zero_probability(fit, few, samples=1)
    theta = {name: value[0] for name, value in theta_of(fit, few, samples=1).items()}
    mu, pi = np.exp(theta["log_mean"]), 1 / (1 + np.exp(-theta["gate_logits"]))
    p0 = np.exp(-mu)
    if likelihood == "ZINB":
        r = np.exp(theta["log_inverse_dispersion"])
        p0 = (r / (r + mu)) ** r
    np.testing.assert_allclose(found, np.where(few.counts == 0, pi / (pi + (1 - pi) * p0), 0), rtol=1e-4)


def test_technical_zero_probability_is_a_probability_and_the_mean_of_h(few):
    fit, n = fitted(few), 4000
    found = ps.technical_zero_probability(fit, few, samples=n, seed=1)
    assert (found[few.counts > 0] == 0).all()
    assert (found[few.counts == 0] > 0).all()
    assert (found <= 1).all()
    h = ps.sample_posterior(fit, few, samples=n, sites=["h"], seed=2).h.mean("sample").values
    assert np.abs(h - found).max() < 4.5 * (0.25 * 2 / n) ** 0.5


@pytest.mark.parametrize("likelihood", ["NB", "Poisson"])
def test_technical_zeros_need_a_likelihood_that_has_them(likelihood, few):
    with pytest.raises(ModelError, match=rf"under {likelihood}\(.*\) no zero is technical; take ZINB or ZIP"):
        ps.technical_zero_probability(fitted(few, likelihood, epochs=1), few)


def test_technical_zeros_rank_above_biological_ones():
    """Genes of unlike means, every count lost with probability 0.3: a zero of a high gene is more often technical."""
    rng = np.random.default_rng(5)
    means = np.exp(rng.normal(0.7, 1.3, size=40))
    y = rng.poisson(means * rng.gamma(4.0, 0.25, size=(200, 40)))
    h = rng.random(y.shape) < 0.3
    cells = ps.Cells.from_counts(np.where(h, 0, y))
    model = ps.SCVI(40, 2, n_hidden=16, n_layers=1)
    schedule = ps.schedules.OneCycle(0.02)
    fit = ps.fit(model, cells, epochs=40, learning_rate=schedule, validation=0, device="cpu", progress=False)
    found = ps.technical_zero_probability(fit, cells)
    technical, biological = found[(cells.counts == 0) & h], found[(cells.counts == 0) & ~h]
    pairs = len(technical) * len(biological)
    auc = mannwhitneyu(technical, biological).statistic / pairs
    se = ((len(technical) + len(biological) + 1) / (12 * pairs)) ** 0.5
    assert se < 0.01
    assert auc > 0.5 + 5 * se
    assert auc > 0.6  # the probabilities of the law that made the data reach 0.69, this fit 0.635
    expected = 0.3 / (0.3 + 0.7 * (1 + means / 4) ** -4.0)  # that law's, for each gene
    by_gene = np.array([found[cells.counts[:, g] == 0, g].mean() for g in range(40)])
    assert np.corrcoef(by_gene, expected)[0, 1] > 0.75  # 0.88


# --- how ---


def test_imputation_is_reproducible_and_leaves_the_global_state(few):
    fit = fitted(few)
    fit.model.train()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for verb in (ps.impute, ps.technical_zero_probability):
        first, second, other = (verb(fit, few, samples=3, seed=seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, second)
        assert not np.array_equal(first, other)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert fit.model.training


@pytest.mark.parametrize(
    "sampler", [ps.Refined(steps=5), ps.Importance(steps=5, rounds=1, proposals=50), ps.HMC(warmup=5, leapfrog=2)]
)
def test_other_samplers_impute_too(sampler, few):
    fit = fitted(few)
    assert np.isfinite(ps.impute(fit, few, sampler=sampler)).all()
    assert (ps.technical_zero_probability(fit, few, sampler=sampler) <= 1).all()


def test_a_guide_of_points_imputes(few):
    model = ps.SCVI(10, 3, prior=ps.priors.Flat(3), n_hidden=8)
    fit = ps.fit(model, few, ps.guides.Point(model, n_hidden=8), epochs=2, validation=0, progress=False)
    one, many = (ps.impute(fit, few, samples=samples) for samples in (1, 5))
    np.testing.assert_allclose(one, many, rtol=1e-5)


class FarOff(ps.Refined):
    """Draws that do not follow the posterior, and say so."""

    def draw(self, guide, x, gamma, samples):
        draws = super().draw(guide, x, gamma, samples)
        khat = torch.full_like(x[:, 0], 0.2)
        khat[:3] = 0.9
        return draws._replace(diagnose=lambda: {"khat": khat})


def test_quantiles_warn_of_cells_whose_draws_do_not_follow_the_posterior(few):
    fit = fitted(few, epochs=1)
    with pytest.warns(UserWarning, match=f"k-hat is above 0.7 for 3 of {few.n_cells} cells"):
        ps.impute(fit, few, quantiles=[0.5], samples=10, sampler=FarOff())
