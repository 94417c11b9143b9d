"""Calibration of the guide of global latents: posteriors known on a grid pass, narrow and moved ones fail."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.support.toys import N_GENES, Toy, cells_of, fit_of, toy


class Level(Toy):
    """A level of all genes that all cells share, and a rate that does not enter."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        level = pyro.sample("level", dist.Normal(1.0, 0.5))
        with pyro.plate("kinds", 2, dim=-1):
            pyro.sample("rate", dist.Normal(0.0, 1.0))
        with pyro.plate("cells", len(gamma) if x is None else len(x), dim=-2):
            z = pyro.sample("z", self.prior())
            theta = {"log_mean": level + 0 * z[..., 0, :1].expand(*z.shape[:-2], N_GENES)}
            return self.observe(x, theta, marginal=marginal, mask=mask)


def refit(width=1.0, shift=0.0):
    """A guide that has the posterior of the level by quadrature, and that of the rate, which is its prior."""

    fit = fit_of(toy(Level))
    q = fit.guide.weights

    def fitted(cells):
        t = np.linspace(-2, 4, 4001)
        log_p = stats.norm.logpdf(t, 1.0, 0.5) + stats.poisson.logpmf(cells.counts.sum(), cells.counts.size * np.exp(t))
        p = np.exp(log_p - log_p.max())
        mean = (p * t).sum() / p.sum()
        sd = np.sqrt((p * t**2).sum() / p.sum() - mean**2)
        with torch.no_grad():
            for loc, log_scale, m, s in zip(
                q.loc, q.log_scale, (mean + shift * sd, 0.0), (width * sd, 1.0), strict=True
            ):
                loc.fill_(m)
                log_scale.fill_(np.log(s))
        return fit

    return fitted


def ranked(make, n_sets=100):
    return ps.calibrate_globals(fit_of(toy(Level)), cells_of(10), make, n_sets, seed=1, progress=False)


def test_the_posterior_is_calibrated_and_a_narrow_or_moved_one_is_not():
    """p > .001 of 3 quantities, and shares within 4 se: the right one fails once in 250 runs."""
    found = ranked(refit())
    assert list(found.summary.index) == ["level", "rate_0", "rate_1"]
    assert (found.summary.rank_p > 0.001).all()
    assert ((found.summary.coverage_90 - 0.9).abs() < 4 * found.summary.se_90).all()
    assert found.ranks.index.name == "simulated data set"
    assert "100, each truth ranked among 99 draws" in repr(found)
    narrow = ranked(refit(width=0.5)).summary.loc["level"]
    assert narrow.coverage_90 < 0.75
    assert narrow.rank_p < 1e-3
    assert ranked(refit(shift=1.0)).summary.rank_p["level"] < 1e-6


def test_one_seed_one_answer():
    state = torch.get_rng_state()
    first, second = ranked(refit(), 3), ranked(refit(), 3)
    pd.testing.assert_frame_equal(first.ranks, second.ranks)
    assert torch.equal(state, torch.get_rng_state())
    assert not first.ranks.equals(ps.calibrate_globals(fit_of(toy(Level)), cells_of(10), refit(), 3, seed=2).ranks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"refit": 3}, "refit must be a function"),
        ({"refit": lambda cells: None}, "must return a fit of a model with the global latents"),
        ({"refit": lambda cells: fit_of(toy())}, "must return a fit of a model with the global latents"),
        ({"draws": 10}, "multiple of 20"),
        ({"n_sets": 0}, "n_sets"),
        ({"fit": fit_of(toy())}, "no global latents"),
    ],
)
def test_refusals(change, message):
    given = {"fit": fit_of(toy(Level)), "cells": cells_of(10), "refit": refit(), "n_sets": 1, "progress": False}
    with pytest.raises(ModelError, match=message):
        ps.calibrate_globals(**{**given, **change})


class Correlated(Toy):
    """A correlation that all cells share, as a Cholesky factor."""

    def forward(self, *args, **options):
        self.factor = pyro.sample("L", dist.LKJCholesky(2, torch.ones(()).double()))
        return super().forward(*args, **options)

    def more(self):
        return self.factor[1, 0]


class Twice(Level):
    """A number of an array, and a site of its name."""

    def forward(self, *args, **options):
        pyro.sample("rate_1", dist.Normal(0.0, 1.0))
        return super().forward(*args, **options)


def test_numbers_that_no_draw_changes_are_not_ranked():
    fit = fit_of(toy(Correlated))
    found = ps.calibrate_globals(fit, cells_of(4), lambda cells: fit, 3, draws=19, progress=False)
    assert list(found.ranks) == ["L_1_0", "L_1_1"]


def test_two_quantities_of_one_name_are_refused_before_any_fit():
    with pytest.raises(ModelError, match="two quantities of the table would be called 'rate_1'"):
        ps.calibrate_globals(fit_of(toy(Twice)), cells_of(4), lambda cells: 1 / 0, 3, draws=19)
