"""Predictive draws and predictive checks, against draws by hand."""

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError


@pytest.fixture(scope="module")
def fitted():
    """A model with counts drawn from itself: what is checked is then true."""
    model = ps.SCVI(12, 2, n_hidden=16, n_layers=1, library=ps.libraries.LatentLibrary(5.0, 0.3), norm=None)
    with torch.no_grad():
        model.decoder.heads["log_mean"].weight.mul_(6)
    drawn = ps.prior_predictive(model, 420, seed=1)
    cells = ps.Cells.from_counts(drawn[drawn.sum(1) > 0][:400])
    fit = ps.fit(model, cells, epochs=60, validation=0, data_start=False, progress=False)
    return fit, cells


def test_prior_draws_are_counts_of_the_asked_shape_and_reproducible(fitted):
    fit, _ = fitted
    state = torch.get_rng_state()
    first, again, other = (ps.prior_predictive(fit.model, 30, seed=seed) for seed in (0, 0, 1))
    assert first.shape == (30, 12)
    assert (first >= 0).all()
    assert (first == np.round(first)).all()
    assert (first == again).all()
    assert not (first == other).all()
    assert torch.equal(state, torch.get_rng_state())


def test_prior_draws_follow_the_library():
    """log l ~ N(4, .3^2), so that the mean total of 4,000 cells is exp(4.045)."""
    model = ps.SCVI(12, 2, likelihood=ps.likelihoods.NB(), library=ps.libraries.LatentLibrary(4.0, 0.3), n_hidden=8)
    totals = ps.prior_predictive(model, 4000).astype(float).sum(1)
    assert totals.mean() == pytest.approx(np.exp(4.045), abs=5 * float(totals.std()) / 4000**0.5)


def test_prior_draws_need_covariates_and_a_density(batched_cells):
    model = ps.SCVI(20, 2, 3)
    with pytest.raises(ModelError, match="3 covariates"):
        ps.prior_predictive(model, 5)
    assert ps.prior_predictive(model, 60, gamma=batched_cells[:][1]).shape == (60, 20)
    with pytest.raises(ModelError, match="Flat"):
        ps.prior_predictive(ps.SCVI(20, 2, prior=ps.priors.Flat(2)), 5)


def test_posterior_draws_resemble_their_cells(fitted):
    fit, cells = fitted
    draws = ps.posterior_predictive(fit, cells, samples=20, seed=3)
    assert draws.dims == ("sample", "cell", "gene")
    assert draws.shape == (20, 400, 12)
    assert draws.dtype == np.int32
    assert list(draws.cell.values) == list(cells.cell_names)
    # Replicas know their cell: its depth comes back, that of its neighbour does not.
    totals = draws.sum("gene").mean("sample").values
    own, other = (np.corrcoef(totals, np.roll(cells.totals, shift))[0, 1] for shift in (0, 1))
    assert own > 5 / 400**0.5  # five standard errors of a correlation that is not there
    assert abs(other) < 5 / 400**0.5
    assert np.array_equal(draws, ps.posterior_predictive(fit, cells, samples=20, seed=3))


def test_checks_of_a_true_model_pass_and_of_a_false_one_fail(fitted):
    fit, cells = fitted
    genes, by_cell = ps.check_predictions(fit, cells, samples=100)
    inside = (genes["mean"].observed >= genes["mean"].low) & (genes["mean"].observed <= genes["mean"].high)
    assert inside.sum() >= 9  # of 12 at 90 %
    assert by_cell["total"].p.between(0.02, 0.98).mean() > 0.95
    poisson = ps.SCVI(12, 2, likelihood=ps.likelihoods.Poisson(), n_hidden=4, n_layers=1)
    wrong = ps.fit(poisson, cells, epochs=30, validation=0, progress=False)
    poor, _ = ps.check_predictions(wrong, cells, samples=100)
    observed, high = poor["variance"].observed, poor["variance"].high
    assert (observed > high).sum() >= 9  # overdispersion that a Poisson law cannot make


def test_statistics_are_those_of_the_data(fitted):
    fit, cells = fitted
    genes, by_cell = ps.check_predictions(fit, cells, samples=5, batch_size=33)
    x = np.asarray(cells.counts, dtype=float)
    np.testing.assert_allclose(genes["zero_fraction"].observed, (x == 0).mean(0))
    np.testing.assert_allclose(genes["mean"].observed, x.mean(0))
    np.testing.assert_allclose(genes["variance"].observed, x.var(0), rtol=1e-9)
    np.testing.assert_allclose(genes["dispersion"].observed, x.var(0) / x.mean(0), rtol=1e-9)
    np.testing.assert_allclose(by_cell["total"].observed, x.sum(1))


def test_a_gene_without_counts_has_no_dispersion(fitted):
    fit, cells = fitted
    counts = np.asarray(cells.counts[:30])
    counts[:, 4] = 0
    with pytest.warns(UserWarning, match="no count"):
        silent = ps.Cells.from_counts(counts)
    table = ps.check_predictions(fit, silent, samples=20)[0]["dispersion"]
    assert np.isnan(table.observed.iloc[4])
    assert np.isnan(table.p.iloc[4])
    assert table.drop(table.index[4]).notna().all(axis=None)


class Exponential(ps.likelihoods.Likelihood):
    """A law whose draws are not whole."""

    heads = ("log_mean",)

    def marginal(self, log_mean):
        return dist.Exponential((-log_mean).exp())


def test_draws_that_are_not_whole_stay_so():
    values = np.random.default_rng(0).exponential(0.6, size=(40, 5))
    cells = ps.Cells.from_counts(values, allow_non_integer=True)
    fit = ps.fit(ps.SCVI(5, 1, likelihood=Exponential(), n_hidden=4), cells, epochs=1, validation=0, progress=False)
    draws = ps.posterior_predictive(fit, cells, samples=20, batch_size=7)
    assert draws.dtype == np.float32
    assert (draws % 1 != 0).mean() > 0.9


def test_the_repr_counts_what_lies_outside_the_band():
    parts = {"observed": [1.0, 5.0, np.nan], "low": 0.0, "median": 1.0, "high": 2.0, "p": 0.5}
    table = pd.DataFrame({("mean", part): values for part, values in parts.items()}, index=list("abc"))
    cells = table.rename(columns={"mean": "total"})
    shown = repr(ps.criticism.Checks(table, cells)).splitlines()
    assert shown[1:] == [
        f"  {name} outside the band of replicas" for name in ("mean: 50% of 2 genes", "total: 50% of 2 cells")
    ]
    assert "50% of 2 genes" in ps.criticism.Checks(table, cells)._repr_html_()
