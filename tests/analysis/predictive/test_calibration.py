"""Simulation-based calibration: right samplers pass, wrong ones fail, and the ranks are what they say."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import chisquare

import pyro_scvi as ps
from pyro_scvi.analysis.predictive.calibration import AggregatePosterior, Calibration, Prior, calibrate, rank_summary
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.program_runs import theta_at
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.proposals import start
from pyro_scvi.inference.samplers import Draws
from tests.support.toys import Toy, fit_of, toy

FAST_HMC = ps.HMC(warmup=60, steps=50, leapfrog=5, least=4)
EXACT = {"hmc": (FAST_HMC, 5), "importance": (ps.Importance(steps=50, rounds=2, proposals=1000), 1)}


def fitted(library, n_covariates=0, likelihood=None):
    model = ps.SCVI(
        15,
        2,
        n_covariates,
        n_hidden=8,
        n_layers=1,
        norm=None,
        initial_sd=0.7,
        library=library,
        likelihood=likelihood,
    )
    gamma = torch.nn.functional.one_hot(torch.arange(200) % 2).float()[:, :n_covariates]
    counts = ps.prior_predictive(model, 200, gamma=gamma, seed=3)
    counts[0] += 1  # no gene without counts
    counts[:, 0] += 1  # no cell without counts
    obs = {"obs": pd.DataFrame({"donor": ["a", "b"] * 100}), "batch": "donor"} if n_covariates else {}
    cells = ps.Cells.from_counts(counts, **obs)
    options = {"validation": 0, "progress": False, "device": "cpu"}
    return ps.fit(model, cells, epochs=20, learning_rate=ps.schedules.OneCycle(0.02), **options), cells


@pytest.fixture(scope="module")
def fit_and_cells():
    torch.set_num_threads(1)
    return fitted(ps.libraries.LatentLibrary(loc=4.5, scale=0.5))


@pytest.mark.parametrize("name", EXACT)
def test_exact_samplers_are_calibrated(name, fit_and_cells):
    """p > .001 on 4 quantities and |z| < 4 on 8 shares: a right sampler fails once in 200 runs."""
    sampler, thin = EXACT[name]
    found = calibrate(fit_and_cells[0], 300, sampler=sampler, thin=thin, seed=2, batch_size=300)
    table = found.summary
    assert list(table.index) == ["z_0", "z_1", "l", "log_likelihood"]
    assert (table.rank_p > 0.001).all()
    assert ((table.coverage_50 - 0.5).abs() < 4 * table.se_50).all()
    assert ((table.coverage_90 - 0.9).abs() < 4 * table.se_90).all()
    assert found.ranks.shape == (300, 4)
    assert found.ranks.to_numpy().min() >= 0
    assert found.ranks.to_numpy().max() <= found.draws == 99


@pytest.mark.slow
def test_hmc_is_calibrated_on_a_thousand_cells(fit_and_cells):
    table = calibrate(fit_and_cells[0], 1000, sampler=ps.HMC(), seed=4, batch_size=250).summary
    assert (table.rank_p > 0.001).all()
    assert ((table.coverage_90 - 0.9).abs() < 4 * table.se_90).all()


def test_the_amortized_guide_is_reported_as_it_is(fit_and_cells):
    """A diagonal normal after a short fit is not the posterior, and the ranks say so."""
    table = calibrate(fit_and_cells[0], 300, sampler=ps.Amortized(), thin=1).summary
    assert (table.rank_p < 1e-4).any()
    assert (table.coverage_90 < 0.87).any()


class Shifted:
    """Draws of a sampler, l multiplied by a factor."""

    def __init__(self, factor):
        self.factor = factor

    def draw(self, guide, x, gamma, samples):
        found = FAST_HMC.draw(guide, x, gamma, samples)
        return Draws({**found.sites, "l": self.factor * found.sites["l"]}, found.diagnose)


def test_a_wrong_sampler_fails_where_it_is_wrong(fit_and_cells):
    table = calibrate(fit_and_cells[0], 300, sampler=Shifted(1.2), thin=5, seed=2, batch_size=300).summary
    assert table.rank_p["l"] < 1e-6
    assert (table.rank_p[["z_0", "z_1"]] > 0.001).all()


def test_latents_may_come_from_real_cells(fit_and_cells):
    """Draws for one cell gather where its own posterior does."""
    fit, cells = fit_and_cells
    table = ps.calibrate(fit, 60, source=AggregatePosterior(cells), sampler=FAST_HMC, thin=2, batch_size=60).summary
    assert np.isfinite(table.to_numpy()).all()
    with torch.no_grad():
        sites, gamma = AggregatePosterior(cells.take([3])).draw(fit, 50)
    assert sites["z"].shape == (50, 1, 2)
    assert sites["l"].shape == (50, 1)
    assert gamma.shape == (50, 0)
    own = ps.sample_posterior(fit, cells.take([3]), samples=2000, sampler=ps.Refined()).z.values[:, 0]
    assert (np.abs(sites["z"].numpy().mean((0, 1)) - own.mean(0)) < 5 * own.std(0) / 50**0.5).all()


def test_the_prior_source_draws_from_the_prior(fit_and_cells):
    fit, _ = fit_and_cells
    torch.manual_seed(1)
    sites, _ = Prior().draw(fit, 4000)
    assert sites["z"].mean((0, 1)).abs().max() < 5 / 4000**0.5
    assert (sites["z"].std(0) - 1).abs().max() < 5 / 8000**0.5
    log_l = sites["l"].log()
    assert float(log_l.mean()) == pytest.approx(4.5, abs=5 * 0.5 / 4000**0.5)


def test_covariates_come_from_cells():
    fit, cells = fitted(ps.libraries.LatentLibrary(loc=4.5, scale=0.5), 2, ps.likelihoods.Poisson())
    with pytest.raises(ModelError, match=r"2 covariates: pass source=calibration.Prior\(cells\)"):
        ps.calibrate(fit, 20)
    found = ps.calibrate(fit, 40, source=Prior(cells), sampler=FAST_HMC, thin=2, draws=19)
    assert list(found.ranks.columns) == ["z_0", "z_1", "l", "log_likelihood"]
    assert (found.summary.rank_p > 1e-4).all()


def test_cells_far_from_all_that_was_fitted_are_found():
    """Where the mean is an exponential, prior draws have counts far beyond those of the fit, and the guide is lost.

    Refined from the guide alone, a third of these cells end in a mode hundreds of nats below the truth, with a k-hat
    that sees nothing.
    """
    fit, cells = fitted(ps.libraries.NoLibrary(), 2, ps.likelihoods.Poisson())
    with evaluating(fit.model, fit.guide, 1):
        truth, gamma = Prior(cells).draw(fit, 200)
        theta = theta_at(fit.model, None, gamma, truth)
        x = fit.model.likelihood.marginal(**theta).sample()
        density, loc, _ = start(fit.guide, x, gamma)
        found = ps.Importance().draw(fit.guide, x, gamma, 50).sites["z"].squeeze(-2)
        below = density(truth["z"].squeeze(-2)[None])[0] - density(found).amax(0)
        of_guide = density(truth["z"].squeeze(-2)[None])[0] - density(fit.guide.start(x, gamma)[0][None])[0]
        of_start = density(truth["z"].squeeze(-2)[None])[0] - density(loc[None])[0]
    assert (of_guide > 30).float().mean() > 0.2
    assert (of_start > 30).float().mean() < 0.5 * (of_guide > 30).float().mean()
    assert (below > 10).float().mean() < 0.1
    ranks = ps.calibrate(fit, 5, source=Prior(cells), sampler=ps.Amortized(), thin=1, draws=19).ranks
    assert list(ranks.columns) == ["z_0", "z_1", "log_likelihood"]


def test_one_seed_gives_one_result_and_the_global_state_is_untouched(fit_and_cells):
    fit, _ = fit_and_cells
    torch.manual_seed(11)
    state = torch.get_rng_state()
    runs = [calibrate(fit, 20, sampler=ps.Amortized(), thin=1, seed=seed).ranks for seed in (1, 1, 2)]
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0].equals(runs[1])
    assert not runs[0].equals(runs[2])


def test_the_summary_by_hand():
    """Of 100 possible ranks, 5 to 94 are in the central 90 % and 25 to 74 in the central half."""
    row = rank_summary(np.array([4, 5, 24, 25, 74, 75, 94, 95] * 10), 99)
    assert row["coverage_90"] == 6 / 8
    assert row["coverage_50"] == 2 / 8
    assert row["se_90"] == pytest.approx((0.9 * 0.1 / 80) ** 0.5)
    assert row["rank_p"] == pytest.approx(chisquare([20, 20, 0, 20, 20]).pvalue)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_cells": 0}, "n_cells must be an integer of 1 or more"),
        ({"draws": 100}, "multiple of 20"),
        ({"draws": 0}, "draws must be an integer of 1 or more"),
        ({"thin": 0}, "thin must be an integer of 1 or more"),
    ],
)
def test_numbers_that_cannot_be_are_refused(options, message, fit_and_cells):
    with pytest.raises(ModelError, match=message):
        ps.calibrate(fit_and_cells[0], **options)


def test_a_flat_prior_is_refused():
    model = ps.SCVI(15, 2, prior=ps.priors.Flat(2), n_hidden=8)
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, size=(40, 15)))
    fit = ps.fit(model, cells, ps.guides.Point(model, n_hidden=8), epochs=1, validation=0, progress=False)
    with pytest.raises(ModelError, match="Flat"):
        ps.calibrate(fit, 20)


def test_the_repr_says_what_matters_in_a_few_lines():
    ranks = pd.DataFrame({"z_0": np.arange(40) % 20, "z_1": np.zeros(40, dtype=int)})
    summary = pd.DataFrame({name: rank_summary(values.to_numpy(), 19) for name, values in ranks.items()}).T
    found = Calibration(ranks, summary, 19)
    assert len(repr(found).splitlines()) == 5
    assert ", z_1, of 2 quantities" in repr(found)
    assert "hold 0% to " in repr(found)
    assert "<td>" in found._repr_html_()


@pytest.mark.parametrize("draws", [0, 1, 20, 98, 100])
def test_numbers_of_draws_that_make_no_equal_bins_are_refused(draws, fit_and_cells):
    with pytest.raises(ModelError, match="draws"):
        ps.calibrate(fit_and_cells[0], 4, draws=draws, progress=False)


class Correlated(Toy):
    def more(self):
        return pyro.sample("L", dist.LKJCholesky(2, torch.ones(()).double()))[..., 1, 0]


class CalledAsNumber(Toy):
    def more(self):
        return pyro.sample("z_0", dist.Normal(torch.zeros(()).double(), 1.0))


def test_numbers_that_no_draw_changes_are_not_ranked():
    """The upper triangle and the corner of a Cholesky factor, whose rank would be 0 in every cell."""
    found = calibrate(fit_of(toy(Correlated)), 100, sampler=ps.Importance(), draws=19, thin=1, progress=False)
    assert list(found.ranks) == ["z_0", "L_2", "L_3", "log_likelihood"]
    assert (found.summary.rank_p > 1e-4).all()


def test_two_quantities_of_one_name_are_refused():
    with pytest.raises(ModelError, match="two quantities of the table would be called 'z_0'"):
        calibrate(fit_of(toy(CalledAsNumber)), 4, sampler=ps.Importance(), draws=19, progress=False)
