"""Comparison of models: paired differences, their errors, and what cannot be compared."""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError


@pytest.fixture(scope="module")
def table_and_parts():
    rng = np.random.default_rng(0)
    counts = rng.negative_binomial(0.7, 0.1, size=(160, 15)) + (np.arange(15) == 0)
    train, test = ps.Cells.from_counts(counts).split(held_out=40, seed=0)

    def fitted(likelihood, seed):
        model = ps.SCVI(15, 2, likelihood=likelihood, n_hidden=8, n_layers=1, seed=seed)
        return ps.fit(model, train, epochs=40, validation=0, seed=seed, progress=False)

    fits = {
        "poisson": fitted(ps.likelihoods.Poisson(), 0),
        "nb": [fitted(ps.likelihoods.NB(ps.likelihoods.PerGene(15)), seed) for seed in range(2)],
    }
    return ps.compare(fits, test, samples=200), fits, test


def test_the_law_that_made_the_data_wins(table_and_parts):
    table, _, _ = table_and_parts
    assert list(table.index) == ["nb", "poisson"]
    assert table.difference["nb"] == 0
    assert table.difference["poisson"] < -5 * table.difference_se["poisson"]
    assert table.difference_se["poisson"] < np.hypot(*table.se)


def test_the_columns_are_what_they_say(table_and_parts):
    table, fits, test = table_and_parts
    single = ps.evidence(fits["poisson"], test, samples=200)
    assert table.log_evidence["poisson"] == pytest.approx(single.log_evidence.mean())
    assert table.se["poisson"] == pytest.approx(single.log_evidence.sem())
    refits = [ps.evidence(fit, test, samples=200).log_evidence.mean() for fit in fits["nb"]]
    assert table.log_evidence["nb"] == pytest.approx(np.mean(refits))
    assert table.refit_sd["nb"] == pytest.approx(np.std(refits, ddof=1))
    assert np.isnan(table.refit_sd["poisson"])
    assert table.bound_gap["poisson"] == pytest.approx((single.log_evidence - single.amortized_bound).mean())
    pair = np.mean([ps.evidence(fit, test, samples=200).log_evidence for fit in fits["nb"]], 0)
    assert table.difference_se["poisson"] == pytest.approx((single.log_evidence - pair).sem())
    assert list(table.fits) == [2, 1]
    assert table.parameters["poisson"] == sum(p.numel() for p in fits["poisson"].model.parameters())


def test_no_fit_is_an_error(table_and_parts):
    with pytest.raises(ModelError, match="at least one"):
        ps.compare({}, table_and_parts[2])


def test_leave_one_out_in_place_of_fits_is_refused_with_the_reason(table_and_parts):
    _, fits, test = table_and_parts
    with pytest.warns(UserWarning, match="sampler_khat is above 0.7"):  # two steps are few
        entries = ps.leave_one_out(fits["poisson"], test.take(range(3)), samples=30, sampler=ps.Refined(steps=2))
    with pytest.raises(ModelError, match=r"compare takes fits, got Dataset for 'loo'.*inferred from that cell alone"):
        ps.compare({"poisson": fits["poisson"], "loo": entries}, test)
    with pytest.raises(ModelError, match="no fit for 'empty'"):
        ps.compare({"poisson": fits["poisson"], "empty": []}, test)


class Rounded(ps.likelihoods.Likelihood):
    """A density that scores counts without complaint."""

    heads = ("log_mean",)

    def marginal(self, log_mean):
        return dist.Normal(log_mean.exp(), torch.ones_like(log_mean))


def test_a_density_of_counts_is_told_and_not_compared_with_their_probability(table_and_parts):
    _, fits, test = table_and_parts
    few, model = test.take(range(3)), ps.SCVI(15, 2, likelihood=Rounded(), n_hidden=8, n_layers=1)
    density = ps.fit(model, test, epochs=1, validation=0, progress=False)
    with pytest.warns(UserWarning, match="log density of x, which is no log probability of counts"):
        table = ps.evidence(density, few, samples=50)
    assert table.attrs["density"]
    assert not ps.evidence(fits["poisson"], few, samples=50).attrs["density"]
    with pytest.raises(ModelError, match=r"\['normal'\] give x a continuous distribution: their evidence is a density"):
        ps.compare({"normal": density, "poisson": fits["poisson"]}, few)
