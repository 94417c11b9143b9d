"""Known size factors: what they do to the means, and that nothing else reads them."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from anndata import AnnData
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.simulate import simulated_counts

N = 60


@pytest.fixture(scope="module")
def adata():
    size = np.random.default_rng(3).lognormal(0.0, 0.6, N)
    counts = np.random.default_rng(4).poisson(size[:, None] * simulated_counts().mean(0))
    obs = pd.DataFrame({"sf": size, "donor": ["a", "b"] * 30}, index=[f"cell_{i}" for i in range(N)])
    return AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(20)]))


@pytest.fixture(scope="module")
def cells(adata):
    return ps.Cells.from_anndata(adata, batch="donor", size_factor="sf")


def model_of(cells, **options):
    library = ps.libraries.SizeFactor(cells.columns["sf"])
    options = {"likelihood": ps.likelihoods.Poisson(), "n_hidden": 8} | options
    return ps.SCVI(cells.n_genes, 2, cells.n_covariates, library=library, **options)


@pytest.fixture(scope="module")
def fit(cells):
    return ps.fit(model_of(cells), cells, epochs=10, progress=False)


def test_the_last_column_of_gamma_is_its_logarithm(cells, adata):
    assert cells.columns == {"donor": slice(0, 2), "sf": slice(2, 3)}
    np.testing.assert_allclose(cells.covariates[:, 2], np.log(adata.obs["sf"]), rtol=1e-5)
    again = ps.Cells.from_anndata(adata[:9].copy(), schema=ps.Schema.from_dict(cells.schema.to_dict()))
    np.testing.assert_array_equal(again.covariates, cells.covariates[:9])
    assert "size_factor" not in ps.Cells.from_anndata(adata).schema.to_dict()  # saves stay as they were


def test_the_mean_is_the_head_times_the_factor(fit, cells):
    x, gamma = cells[:5]
    z = torch.zeros(5, 1, 2)
    with torch.no_grad():
        eta = fit.model.decoder(z.squeeze(-2), gamma[:, :2])["log_mean"]  # the decoder sees donors alone
        found = fit.model.decode(z, fit.model.library(x, gamma), gamma)["log_mean"]
    mean = cells.covariates[:, 2][fit_rows(cells)].mean()
    np.testing.assert_allclose(found, eta + gamma[:, 2:] - mean, rtol=1e-4, atol=1e-5)


def fit_rows(cells):
    return cells.split_rows(0.1, seed=0)[0]


def test_the_law_is_poisson_of_that_mean(fit, cells):
    x, gamma = cells[:3]
    z = torch.zeros(3, 1, 2)
    trace = pyro.poutine.trace(pyro.poutine.condition(fit.model, data={"z": z})).get_trace(x, gamma)
    trace.compute_log_prob()
    with torch.no_grad():
        rate = fit.model.decode(z, fit.model.library(x, gamma), gamma)["log_mean"].exp().numpy()
    expected = stats.poisson.logpmf(x.numpy(), rate)
    np.testing.assert_allclose(trace.nodes["x"]["log_prob"].detach(), expected, rtol=1e-3, atol=1e-4)


def test_the_unit_of_the_factors_does_not_matter(adata, cells):
    thousand = adata.copy()
    thousand.obs["sf"] *= 1000
    other = ps.Cells.from_anndata(thousand, batch="donor", size_factor="sf")
    losses = [ps.fit(model_of(c), c, epochs=3, progress=False).history.train_loss for c in (cells, other)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_size_factors_explain_depth(fit, cells, adata):
    depth = np.log(cells.totals)
    means = ps.impute(fit, cells, quantity=ps.imputation.mean_given_no_dropout, samples=5).sum(1)
    assert np.corrcoef(np.log(means), depth)[0, 1] > 0.9
    swapped = adata.copy()
    swapped.obs["sf"] = adata.obs["sf"].to_numpy() * 10
    with pytest.warns(UserWarning, match="size factors in column 'sf' are in another unit"):
        ten = ps.Cells.from_anndata(swapped, schema=cells.schema)
    np.testing.assert_array_equal(ps.embed(fit, ten), ps.embed(fit, cells))
    again = ps.impute(fit, ten, quantity=ps.imputation.mean_given_no_dropout, samples=5).sum(1)
    np.testing.assert_allclose(again, 10 * means, rtol=1e-4)
    np.testing.assert_allclose(
        ps.normalized_expression(fit, ten, samples=3), ps.normalized_expression(fit, cells, samples=3), rtol=1e-4
    )


def test_a_fit_with_size_factors_is_saved_and_mapped(fit, cells, adata, tmp_path):
    fit.save(tmp_path / "fit")
    loaded = ps.load(tmp_path / "fit")
    np.testing.assert_array_equal(ps.impute(loaded, cells, samples=2), ps.impute(fit, cells, samples=2))
    query = adata.copy()
    query.obs["donor"] = "c"
    new = ps.Cells.from_anndata(query, schema=fit.schema, allow_new_batches=True)
    mapped = ps.map_query(fit, new, epochs=1, progress=False)
    again = ps.Cells.from_anndata(adata, schema=mapped.schema)
    assert mapped.model.library.columns == again.columns["sf"] == slice(3, 4)
    np.testing.assert_allclose(ps.impute(mapped, again, samples=2), ps.impute(fit, cells, samples=2), rtol=1e-4)


def test_what_does_not_fit_together_is_refused(adata, cells):
    without = ps.Cells.from_anndata(adata, batch="donor", covariates=["sf"])
    with pytest.raises(ModelError, match=r"library=ps.libraries.SizeFactor\(cells.columns\['sf'\]\)"):
        ps.fit(ps.SCVI(20, 2, 3), cells, epochs=1)
    with pytest.raises(ModelError, match="read them with size_factor="):
        ps.fit(model_of(cells), without, epochs=1)
    with pytest.raises(ModelError, match="columns of the library"):
        ps.SCVI(20, 2, 1, library=ps.libraries.SizeFactor(slice(2, 3)))
    with pytest.raises(ModelError, match="slice of one column"):
        ps.libraries.SizeFactor(slice(0, 2))
    with pytest.raises(SchemaError, match="size factors None, got 'sf'"):
        ps.Cells.from_anndata(adata, schema=without.schema, size_factor="sf")
    with pytest.raises(ModelError, match="different columns"):
        ps.Cells.from_anndata(adata, covariates=["sf"], size_factor="sf")
    for value, says in ((0.0, "above 0; 1 cells, such as 'cell_0', have 0"), (-1.0, "have -1"), (np.nan, "finite")):
        wrong = adata.copy()
        wrong.obs["sf"] = np.r_[value, np.ones(N - 1)]
        with pytest.raises(DataError, match=says):
            ps.Cells.from_anndata(wrong, size_factor="sf")
