"""Training, verbs and draws of counts run one program; entries that it leaves out of its density are not observed."""

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, Toy, toy


class Running(Toy):
    """A program with places for code that looks at how it is run."""

    def shared(self, gamma):
        return pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0))

    def added(self, x, index, n_cells):
        return 0.0

    def mask(self, mask, gamma):
        return mask

    def returned(self, x):
        return x

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        b = self.shared(gamma)
        with cells_plate(gamma, index, n_cells):
            theta = self.decode(pyro.sample("z", self.prior()), self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + b + self.added(x, index, n_cells)
            return self.returned(self.observe(x, theta, marginal=marginal, mask=self.mask(mask, gamma)))


class OfIndex(Running):
    def added(self, x, index, n_cells):
        return 0.0 if index is None else 0.1 * index[:, None]


class OfTable(Running):
    """A table of a few rows, looked up by index."""

    def added(self, x, index, n_cells):
        return 0.0 if index is None else torch.zeros(8).double()[index][:, None]


class OfSize(Running):
    def added(self, x, index, n_cells):
        return 0.0 if n_cells is None else float(np.log(n_cells))


class InTraining(Running):
    def added(self, x, index, n_cells):
        return 2.0 if self.training else 0.0


class TrainedPrior(ps.priors.StandardNormal):
    def forward(self):
        return dist.Normal(torch.zeros(1).double(), 2.0 if self.training else 1.0).to_event(1)


class OfDraws(Running):
    def added(self, x, index, n_cells):
        return 2.0 if x is None else 0.0


class OfNumber(Running):
    def shared(self, gamma):
        return pyro.sample("b", dist.Normal(torch.zeros(()).double(), 1.0 / len(gamma)))


class OfCovariates(Running):
    def shared(self, gamma):
        return pyro.sample("b", dist.Normal(gamma.mean(), 1.0))


REFUSED = {
    "index": (OfIndex, {}, "'x' depends on index= and n_cells=, which only training gives: pass both to cells_plate"),
    "a table": (OfTable, {}, "depends on index= and n_cells="),
    "n_cells": (OfSize, {}, "'x' depends on index= and n_cells="),
    "training": (InTraining, {}, "'x' depends on self.training"),
    "a prior in training": (Running, {"prior": TrainedPrior(1)}, "'z' depends on self.training"),
    "draws": (OfDraws, {}, "'x' depends on whether there are counts"),
    "number": (OfNumber, {}, "'b' depends on the cells that come with it or on how many"),
    "covariates": (OfCovariates, {"n_covariates": 1}, "'b' depends on the cells that come with it"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_program_that_depends_on_how_it_is_run_is_refused_by_its_site(case):
    kind, options, says = REFUSED[case]
    with pytest.raises(ModelError, match=says):
        ps.guides.DiagonalNormal(toy(kind, **options))


@pytest.mark.parametrize("options", [{}, {"dropout": 0.5}, {"library": ps.libraries.ObservedLibrary()}])
def test_a_program_that_does_not_is_not(options):
    ps.guides.DiagonalNormal(toy(Running, **options))


@pytest.mark.parametrize("changed", [lambda x: 10 * x, lambda x: None])
def test_a_program_that_returns_something_else_than_its_counts_draws_none(changed):
    kind = type("Changed", (Running,), {"returned": lambda self, x: changed(x)})
    with pytest.raises(ModelError, match="returns something else than the counts that it draws as 'x'"):
        ps.prior_predictive(toy(kind), 5)


# --- entries that are left out ---

MEASURED = torch.tensor([True, True, True, False])


class Panel(Running):
    """The last gene was not measured."""

    def mask(self, mask, gamma):
        return mask & MEASURED


class ByBatch(Running):
    """It was not in cells of the second batch."""

    def mask(self, mask, gamma):
        return mask & (MEASURED | (gamma[:, :1] == 0))


def batched(n=8):
    counts = np.random.default_rng(0).poisson(2.0, (n, N_GENES)).astype(np.float32)
    obs = pd.DataFrame({"age": np.arange(n) % 2.0}, index=[f"c{i}" for i in range(n)])
    return ps.Cells.from_anndata(anndata.AnnData(counts, obs=obs), covariates=["age"])


def panel_fit(kind=Panel):
    parts = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary()}
    parts |= {"decoder": ps.networks.LinearDecoder(), "decoder_columns": []}
    model = kind(N_GENES, 1, 1, **parts).double()
    model.decoder.heads["log_mean"].weight.data.copy_(torch.tensor([[0.8], [-0.5], [0.3], [0.6]]))
    guide = ps.guides.DiagonalNormal(model).double()
    return ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), batched().schema)


@pytest.mark.filterwarnings("ignore:k-hat")
def test_evidence_is_that_of_the_entries_that_are_kept():
    fit, cells = panel_fit(), batched(8).take(range(3))
    fit.model.decoder.requires_grad_(False)
    b = float(fit.guide.weights.medians()["b"].detach())
    z = np.linspace(-7, 7, 1001)
    head = fit.model.decoder.heads["log_mean"]
    weight, bias = head.weight.detach().numpy()[:, 0], head.bias.detach().numpy()
    log_p = stats.poisson.logpmf(cells.counts[:, None, :3], np.exp(z[:, None] * weight[:3] + bias[:3] + b)).sum(-1)
    truth = logsumexp(log_p + stats.norm.logpdf(z), axis=1) + np.log(z[1] - z[0])
    table = ps.evidence(fit, cells, samples=2000, progress=False)
    np.testing.assert_allclose(table.log_evidence, truth, atol=0.02)


TAKING_ALL = {
    "impute": lambda fit, cells: ps.impute(fit, cells),
    "rates": lambda fit, cells: ps.sample_posterior(fit, cells, samples=4, sites=("w",), progress=False),
    "leave_one_out": lambda fit, cells: ps.leave_one_out(fit, cells, samples=20),
    "checks": lambda fit, cells: ps.check_predictions(fit, cells),
    "log likelihood": lambda fit, cells: ps.to_datatree(fit, cells, samples=4, log_likelihood=True),
    "technical zeros": lambda fit, cells: ps.technical_zero_probability(fit, cells),
}


@pytest.mark.parametrize("kind", [Panel, ByBatch])
@pytest.mark.parametrize("verb", TAKING_ALL)
def test_verbs_that_would_take_left_out_counts_for_observed_refuse(verb, kind):
    fit, cells = panel_fit(kind), batched()
    with pytest.raises(ModelError, match=f"{kind.__name__} leaves entries of x out of its density"):
        TAKING_ALL[verb](fit, cells)


def test_verbs_of_latents_and_draws_work():
    fit, cells = panel_fit(), batched()
    assert ps.embed(fit, cells).shape == (8, 1)
    assert ps.posterior_predictive(fit, cells, samples=3).shape == (3, 8, N_GENES)
    assert ps.normalized_expression(fit, cells).shape == (8, N_GENES)


@pytest.mark.filterwarnings("ignore:k-hat")
def test_densities_of_different_entries_are_not_compared():
    fits = {"panel": panel_fit(), "whole": panel_fit(Running)}
    with pytest.raises(ModelError, match=r"\(75% of 'panel', 100% of 'whole' are kept\)"):
        ps.compare(fits, batched(), samples=20)
    ps.compare({"panel": fits["panel"], "again": panel_fit()}, batched(), samples=20)
