"""Predictive draws and predictive checks, against draws by hand."""

import copy

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

import pyro_scvi as ps
from pyro_scvi.analysis.predictive.check_statistics import Statistics, moments
from pyro_scvi.errors import ModelError, SchemaError


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


def test_named_covariates_of_prior_draws_are_matched_by_name(batched_cells):
    model = ps.SCVI(20, 2, batched_cells.n_covariates, n_hidden=8)
    fit = ps.fit(model, batched_cells, epochs=2, progress=False, device="cpu")
    names = batched_cells.schema.column_names
    frame = pd.DataFrame(batched_cells.covariates, columns=list(names))
    expected = ps.prior_predictive(fit.model, 60, gamma=batched_cells.covariates)
    for given in (
        frame,
        frame[list(names[::-1])],
        frame.set_axis(range(len(names)), axis=1),
        frame.to_xarray().to_array(),
    ):
        given = given.T if isinstance(given, xr.DataArray) else given
        np.testing.assert_array_equal(ps.prior_predictive(fit.model, 60, gamma=given), expected)
    for wrong in (frame.rename(columns={names[0]: "other"}), frame[[names[0], *names]].iloc[:, : len(names)]):
        with pytest.raises(SchemaError, match="gamma has the columns .*the fit has"):
            ps.prior_predictive(fit.model, 60, gamma=wrong)
    with pytest.warns(UserWarning, match=f"gamma column {batched_cells.schema.covariates[0]!r} lies .* as in obs"):
        ps.prior_predictive(fit.model, 60, gamma=frame.assign(**{batched_cells.schema.covariates[0]: 40.0}))
    with pytest.raises(SchemaError, match=r"the model is of no fit.*gamma\.to_numpy\(\)"):
        ps.prior_predictive(model, 60, gamma=frame)
    assert ps.prior_predictive(model, 60, gamma=frame.to_numpy()).shape == (60, 20)


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


def inside(statistic):
    return ((statistic.observed >= statistic.low) & (statistic.observed <= statistic.high)).mean()


def simulated(model, n_cells, seed):
    drawn = ps.prior_predictive(model, n_cells, seed=seed)
    return ps.Cells.from_counts(drawn[drawn.sum(1) > 0])


def test_checks_of_a_false_model_fail(fitted):
    _, cells = fitted
    poisson = ps.SCVI(12, 2, likelihood=ps.likelihoods.Poisson(), n_hidden=4, n_layers=1)
    wrong = ps.fit(poisson, cells, epochs=15, validation=0, progress=False)
    poor = ps.check_predictions(wrong, cells.take(range(60)), samples=19)
    for name in ("variance", "variance_given_mean", "pit"):  # overdispersion that a Poisson law cannot make
        assert (poor.genes[name].observed > poor.genes[name].high).sum() >= 9
        assert poor.genes.attrs["outside"][name]["p"] == pytest.approx(1 / 20)
        assert "p = 0.05" in repr(poor).split(f"{name}: ")[1].splitlines()[0]


SAMPLERS = {"own": ps.Amortized(), "new": ps.criticism.NewLatents()}


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_p_values_of_the_fits_own_cells_are_uniform(fitted, sampler):
    """Of 4 data sets, 12 genes and 6 statistics, which hang together: 90 % with a standard error of some 3 points."""
    fit, _ = fitted
    sets = [simulated(fit.model, 30, seed) for seed in range(4)]
    checks = [ps.check_predictions(fit, one, samples=19, sampler=sampler, seed=s) for s, one in enumerate(sets)]
    shares = [inside(check.genes[name]) for check in checks for name in check.genes.columns.unique(0)]
    assert np.mean(shares) == pytest.approx(0.9, abs=0.09)
    ps_of_cells = np.concatenate([check.cells["total"].p for check in checks])
    assert ps_of_cells.mean() == pytest.approx(0.5, abs=4 / (12 * len(ps_of_cells)) ** 0.5)
    assert ps_of_cells.var() == pytest.approx(1 / 12, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_bands_hold_their_share_of_genes(fitted, sampler):
    """Each set has a seed of its own: under one seed all of them would be compared with the same few data sets."""
    fit, _ = fitted
    checks = [ps.check_predictions(fit, simulated(fit.model, 60, s), sampler=sampler, seed=s) for s in range(60)]
    for name in checks[0].genes.columns.unique(0):
        assert np.mean([inside(check.genes[name]) for check in checks]) == pytest.approx(0.9, abs=0.03)
    shares = [inside(check.genes[name]) for check in checks for name in check.genes.columns.unique(0)]
    assert np.mean(shares) == pytest.approx(0.9, abs=0.02)


def test_a_dispersion_wrong_by_a_factor_is_seen():
    """Cells of a model whose variance about the means is larger: r smaller by 2.7."""
    likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(12))
    model = ps.SCVI(12, 1, likelihood=likelihood, n_hidden=8, n_layers=1, library=ps.libraries.LatentLibrary(5.0, 0.3))
    fit = ps.fit(model, simulated(model, 300, 1), epochs=10, validation=0, progress=False)
    truth = copy.deepcopy(fit.model)
    with torch.no_grad():
        truth.likelihood.dispersion.log_inverse_dispersion.sub_(1.0)
    data, new = (simulated(m, 80, 5) for m in (truth, fit.model)), ps.criticism.NewLatents()
    wrong, right = (ps.check_predictions(fit, cells, samples=19, sampler=new) for cells in data)
    for name in ("variance_given_mean", "pit"):
        assert wrong.genes[name].p.mean() < 0.25
        assert wrong.genes.attrs["outside"][name]["p"] <= 0.1
        assert right.genes[name].p.mean() > 0.2  # 1/2, with a standard error of .08 for 12 genes
        assert right.genes.attrs["outside"][name]["p"] > 0.1


def test_pit_and_variance_given_the_mean_by_hand():
    """One gene: x among five replicas, with ties at random places; (x - mu)^2 / v with the law of total variance."""
    statistics = Statistics()
    replicas = torch.tensor([0.0, 1.0, 1.0, 3.0, 4.0])[:, None, None]
    law = dist.Normal(torch.tensor([1.0, 3.0])[:, None, None], 2.0)
    statistics.add(torch.tensor([[1.0]]), replicas, moments(law))
    values = statistics.of_genes()
    places = (1 + 3 * np.random.default_rng(0).random(200_000)) / 6  # one below, two ties and itself
    assert values["pit"].value.item() == pytest.approx(12 * np.mean((places - 0.5) ** 2), abs=1e-3)
    assert values["variance_given_mean"].value.item() == pytest.approx((1 - 2) ** 2 / (4 + 1))
    assert values["mean"].of_replicas.item() == pytest.approx(1.8)


def test_a_cell_is_checked_alike_beside_others(fitted):
    fit, cells = fitted
    few, some = cells.take(range(9)), cells.take([2, 5])
    whole = ps.check_predictions(fit, few, samples=5)
    again = ps.check_predictions(fit, few, samples=5, batch_size=4)
    pd.testing.assert_frame_equal(whole.genes, again.genes, rtol=1e-5)
    pd.testing.assert_frame_equal(whole.cells.iloc[[2, 5]], ps.check_predictions(fit, some, samples=5).cells, rtol=1e-5)


def test_draws_from_elsewhere_are_compared_with_refined_ones(fitted):
    fit, cells = fitted
    few = cells.take(range(2))
    draws = ps.sample_posterior(fit, few, samples=30, sites=("z", "l"), diagnostics=False)
    given = ps.check_predictions(fit, few, samples=3, sampler=ps.Given(draws))
    assert given.cells["total"].notna().all(axis=None)


def test_new_latents_need_a_prior_with_draws(fitted):
    _, cells = fitted
    model = ps.SCVI(12, 2, prior=ps.priors.Flat(2))
    flat = ps.fit(model, cells, ps.guides.Point(model), epochs=1, progress=False)
    with pytest.raises(ModelError, match="Flat"):
        ps.check_predictions(flat, cells.take(range(2)), sampler=ps.criticism.NewLatents())


def test_statistics_are_those_of_the_data(fitted):
    fit, cells = fitted
    cells = cells.take(range(50))
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
        f"  {name} outside the band of simulated cells" for name in ("mean: 50% of 2 genes", "total: 50% of 2 cells")
    ]
    assert "50% of 2 genes" in ps.criticism.Checks(table, cells)._repr_html_()
