"""to_datatree and prior_sensitivity: what every group holds, its names, its way through netCDF and through ArviZ."""

import sys

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.analysis.prior_sensitivity import prior_sensitivity
from pyro_scvi.errors import ModelError, SchemaError
from pyro_scvi.export.arviz import to_datatree
from pyro_scvi.guides.program_runs import theta_at
from pyro_scvi.inference.samplers import Draws
from tests.support.simulate import simulated_counts
from tests.support.toys import Toy, cells_of, fit_of, toy

LARGE = {"log_likelihood": True, "posterior_predictive": True, "prior_predictive": True}
SAMPLERS = {
    "amortized": ps.Amortized(),
    "refined": ps.Refined(steps=5),
    "importance": ps.Importance(steps=5, rounds=1, proposals=60),
    "hmc": ps.HMC(chains=3, warmup=10, steps=5, leapfrog=2, least=4),
}


def fitted(cells, n_latent=3, **options):
    model = ps.SCVI(cells.n_genes, n_latent, cells.n_covariates, n_hidden=8, n_layers=1, **options)
    guide = ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, guide, epochs=4, validation=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def named_cells():
    genes = [f"g{i}" for i in range(12)]
    return ps.Cells.from_counts(simulated_counts(17, 12), gene_names=genes, cell_names=[f"c{i}" for i in range(17)])


@pytest.fixture(scope="module")
def fit(named_cells):
    torch.set_num_threads(1)  # this runs before the fixture of every test
    return fitted(named_cells)


@pytest.fixture(scope="module")
def covariate_fit(batched_cells):
    torch.set_num_threads(1)
    return fitted(batched_cells, library=ps.libraries.LatentLibrary([4.0, 5.0], [0.3, 0.6]))


def flat(value):
    """(chain, draw, ...) as (samples, ...)."""
    return torch.as_tensor(value.values).flatten(0, 1)


def theta_of(fit, cells, group):
    """Parameters of the likelihood, float64 (samples, cells, genes), at the draws of a group."""
    gamma = torch.as_tensor(cells.covariates)
    log_l = flat(group.l)[..., None].log() if "l" in group else None
    with torch.no_grad():
        fit.model.eval()
        theta = fit.model.decode(flat(group.z)[:, :, None], log_l, gamma)
    return {name: np.asarray(value, dtype=float) for name, value in theta.items()}


# --- groups, dimensions, names ---


def test_groups_dimensions_and_coordinates(fit, named_cells):
    tree = to_datatree(fit, named_cells, samples=6, sites=["z", "l", "w", "y", "h"], **LARGE)
    assert isinstance(tree, xr.DataTree)
    of_genes, of_cells = ("chain", "draw", "cell", "gene"), ("chain", "draw", "cell")
    expected = {
        "posterior": {"z": (*of_cells, "latent"), "l": of_cells, "w": of_genes, "y": of_genes, "h": of_genes},
        "log_prior": {"z": of_cells, "l": of_cells},
        "sample_stats": {"lp": of_cells, "khat": ("cell",), "ess": ("cell",)},
        "prior": {"z": (*of_cells, "latent"), "l": of_cells},
        "observed_data": {"x": ("cell", "gene")},
        "log_likelihood": {"x": of_genes},
        "posterior_predictive": {"x": of_genes},
        "prior_predictive": {"x": of_genes},
    }
    found = {name: {v: group[v].dims for v in group.data_vars} for name, group in tree.children.items()}
    assert found == expected
    sizes = {"chain": 1, "draw": 6, "cell": 17, "gene": 12, "latent": 3}
    for group in tree.children.values():
        assert dict(group.sizes) == {dim: sizes[dim] for dim in group.sizes}
        assert list(group.cell.values) == list(named_cells.cell_names)
        if "gene" in group.dims:
            assert list(group.gene.values) == list(named_cells.gene_names)
    assert list(tree.posterior.latent.values) == [0, 1, 2]
    assert list(tree.posterior.draw.values) == list(range(6))


def test_only_what_is_asked_for_has_samples_times_genes(fit, named_cells):
    tree = to_datatree(fit, named_cells)
    assert set(tree.children) == {"posterior", "log_prior", "sample_stats", "prior", "observed_data"}
    assert set(tree.posterior.data_vars) == {"z", "l"}
    assert tree.posterior.sizes["draw"] == 200
    assert not any({"draw", "gene"} <= set(group.dims) for group in tree.children.values())
    for name in LARGE:
        assert set(to_datatree(fit, named_cells, samples=2, **{name: True}).children) - set(tree.children) == {name}


def test_numbers_are_as_short_as_they_may_be(fit, named_cells):
    tree = to_datatree(fit, named_cells, samples=4, sites=["z", "l", "w", "y", "h"], **LARGE)
    counts = [tree.observed_data.x, tree.posterior.y, tree.posterior_predictive.x, tree.prior_predictive.x]
    assert {value.dtype for value in counts} == {np.dtype(np.int32)}
    assert tree.posterior.h.dtype == np.int8
    real = [tree.posterior.z, tree.posterior.l, tree.posterior.w, tree.log_likelihood.x, tree.sample_stats.lp]
    assert {value.dtype for value in [*real, tree.log_prior.z, tree.prior.l]} == {np.dtype(np.float32)}


def test_counts_that_are_not_whole_are_kept():
    """In the second of three batches only, so that the type has to change on the way."""
    counts = simulated_counts(12, 8).astype(np.float32)
    fit = fitted(ps.Cells.from_counts(counts))
    counts[5, 3] = 2.5
    cells = ps.Cells.from_counts(counts, allow_non_integer=True)
    tree = to_datatree(fit, cells, samples=3, sites=["y", "h"], batch_size=4)
    assert tree.observed_data.x.dtype == tree.posterior.y.dtype == np.float32
    np.testing.assert_array_equal(tree.observed_data.x, counts)
    assert (tree.posterior.y[:, :, 5, 3] == 2.5).all()


def test_predictions_beyond_int32_are_kept():
    cells = ps.Cells.from_counts(simulated_counts(12, 8))
    fit = fitted(cells, library=ps.libraries.LatentLibrary(25.0, 0.1), likelihood=ps.likelihoods.Poisson())
    tree = to_datatree(fit, cells, samples=3, prior_predictive=True)
    assert tree.prior_predictive.x.dtype == np.float32
    ratio = tree.prior_predictive.x.sum("gene") / tree.prior.l
    np.testing.assert_allclose(ratio, 1.0, atol=1e-3)  # the sum is Poisson of mean l, 7e10 counts


def test_attributes_say_how_the_tree_was_made(fit, named_cells):
    tree = to_datatree(fit, named_cells, samples=2, seed=7)
    library = {
        "creation_library": "pyro-scvi",
        "creation_library_version": ps.__version__,
        "creation_library_language": "Python",
        "inference_library": "pyro",
        "inference_library_version": pyro.__version__,
    }
    run = {"sampler": "Amortized()", "seed": 7}
    assert tree.attrs == tree.posterior.attrs == tree.sample_stats.attrs == library | run
    assert tree.prior.attrs == tree.observed_data.attrs == library


def test_covariates_are_constant_data(covariate_fit, batched_cells):
    tree = to_datatree(covariate_fit, batched_cells, samples=2)
    assert tree.constant_data.gamma.dims == ("cell", "covariate")
    assert list(tree.constant_data.covariate.values) == ["donor=a", "donor=b", "age"]
    np.testing.assert_array_equal(tree.constant_data.gamma, batched_cells.covariates)


# --- draws ---


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_posterior_and_diagnostics_are_those_of_sample_posterior(sampler, fit, named_cells):
    options = {"samples": 12, "sites": ["z", "l", "w", "y", "h"], "sampler": sampler, "seed": 3, "batch_size": 7}
    tree, draws = to_datatree(fit, named_cells, **options, **LARGE), ps.sample_posterior(fit, named_cells, **options)
    chains = tree.posterior.sizes["chain"]
    assert chains == getattr(sampler, "chains", 1)
    for site in options["sites"]:
        for chain in range(chains):
            expected = draws[site].isel(sample=slice(chain, None, chains))
            np.testing.assert_array_equal(tree.posterior[site].isel(chain=chain), expected)
    diagnostics = set(draws.data_vars) - set(options["sites"])
    assert diagnostics == set(tree.sample_stats.data_vars) - {"lp"}
    for name in diagnostics:
        np.testing.assert_array_equal(tree.sample_stats[name], draws[name].astype(np.float32))


class ThreeChains:
    """Draws that say which draw and chain they are."""

    def draw(self, guide, x, gamma, samples):
        z = torch.arange(float(samples)).reshape(-1, 1, 1, 1).expand(-1, len(x), 1, 3)
        return Draws({"z": z, "l": torch.full((samples, len(x), 1), 50.0)}, dict, chains=3)


def test_chains_are_a_dimension(fit, named_cells):
    tree = to_datatree(fit, named_cells, samples=11, sampler=ThreeChains(), **LARGE)  # the last 2 make no round
    np.testing.assert_array_equal(tree.posterior.z[:, :, 0, 0], [[0, 3, 6], [1, 4, 7], [2, 5, 8]])
    for group in ("posterior", "prior", "log_prior", "log_likelihood", "posterior_predictive", "prior_predictive"):
        assert tree[group].sizes["chain"] == tree[group].sizes["draw"] == 3
    np.testing.assert_allclose(
        tree.log_prior.z[:, :, 0], stats.norm.logpdf(tree.posterior.z[:, :, 0]).sum(-1), rtol=1e-5
    )


def test_fewer_samples_than_chains_are_refused(fit, named_cells):
    with pytest.raises(ModelError, match="3 chains need at least 3 samples, got 2"):
        to_datatree(fit, named_cells, samples=2, sampler=ThreeChains())


def test_the_same_seed_gives_the_same_tree(fit, named_cells):
    one, again, other = (to_datatree(fit, named_cells, samples=3, seed=seed, **LARGE) for seed in (0, 0, 1))
    assert one.identical(again)
    for group in ("posterior", "prior", "posterior_predictive", "prior_predictive"):
        assert not one[group].to_dataset().equals(other[group].to_dataset())


def test_what_is_asked_for_beside_the_draws_does_not_change_them(fit, named_cells):
    small, large = (to_datatree(fit, named_cells, samples=3, batch_size=5, **more) for more in ({}, LARGE))
    for name, group in small.children.items():
        assert group.to_dataset().identical(large[name].to_dataset())


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_global_state_is_untouched(sampler, fit, named_cells):
    fit.model.train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    to_datatree(fit, named_cells, samples=6, sampler=sampler, **LARGE)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert fit.model.training
    assert not list(pyro.get_param_store())
    fit.model.eval()


# --- densities ---


def log_law(name, x, theta):
    """The marginal law of counts, by scipy."""
    mean = np.exp(theta["log_mean"])
    if "log_inverse_dispersion" in theta:
        r = np.exp(theta["log_inverse_dispersion"])
        counts = stats.nbinom.logpmf(x, r, r / (r + mean))
    else:
        counts = stats.poisson.logpmf(x, mean)
    if "gate_logits" not in theta:
        return counts
    gate = theta["gate_logits"]
    return np.where(x == 0, np.logaddexp(-np.logaddexp(0, -gate), counts - np.logaddexp(0, gate)), 0) + np.where(
        x > 0, counts - np.logaddexp(0, gate), 0
    )


@pytest.mark.parametrize("likelihood", ["ZINB", "NB", "ZIP", "Poisson"])
@pytest.mark.parametrize("library", [ps.libraries.LatentLibrary, ps.libraries.NoLibrary])
def test_log_likelihood_is_the_law_at_the_draws(likelihood, library, named_cells):
    fit = fitted(named_cells, likelihood=getattr(ps.likelihoods, likelihood)(), library=library())
    tree = to_datatree(fit, named_cells, samples=5, batch_size=7, log_likelihood=True)
    expected = log_law(likelihood, named_cells.counts, theta_of(fit, named_cells, tree.posterior))
    np.testing.assert_allclose(flat(tree.log_likelihood.x), expected, rtol=2e-4, atol=2e-4)
    assert ("l" in tree.posterior) == ("l" in tree.log_prior) == ("l" in tree.prior) == fit.model.library.latent


PRIORS = {
    "normal": (ps.priors.StandardNormal(3), lambda z: stats.norm.logpdf(z).sum(-1)),
    "student": (ps.priors.StudentT(3, df=4.0), lambda z: stats.t(4).logpdf(z).sum(-1)),
    "dirichlet": (
        ps.priors.Dirichlet(3, 1.5),
        lambda z: np.apply_along_axis(lambda p: stats.dirichlet.logpdf(p / p.sum(), [1.5] * 3), -1, z),
    ),
}


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("sampler", ["amortized", "importance"])
def test_log_prior_is_the_density_of_z_and_of_the_library(prior, sampler, batched_cells):
    law, log_density = PRIORS[prior]
    fit = fitted(batched_cells, prior=law, library=ps.libraries.LatentLibrary([4.0, 5.0], [0.3, 0.6]))
    tree = to_datatree(fit, batched_cells, samples=4, sampler=SAMPLERS[sampler], log_likelihood=True)
    z, l = (tree.posterior[site].values.astype(float) for site in "zl")  # noqa: E741
    np.testing.assert_allclose(tree.log_prior.z, log_density(z), rtol=1e-4, atol=1e-4)
    in_a = batched_cells.covariates[:, 0] == 1
    loc, scale = np.where(in_a, 4.0, 5.0), np.where(in_a, 0.3, 0.6)
    np.testing.assert_allclose(tree.log_prior.l, stats.lognorm.logpdf(l, scale, scale=np.exp(loc)), rtol=1e-4)
    together = tree.log_prior.z + tree.log_prior.l + tree.log_likelihood.x.sum("gene")
    np.testing.assert_allclose(tree.sample_stats.lp, together, rtol=1e-5)


def test_global_latents_are_at_their_medians(named_cells):
    likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(12))
    fit = fitted(
        named_cells, likelihood=likelihood, weight_priors={"likelihood.dispersion.*": ps.weights.HierarchicalWeights()}
    )
    tree = to_datatree(fit, named_cells, samples=3, log_likelihood=True, prior_predictive=True)
    sites = {"z": flat(tree.posterior.z)[:, :, None], "l": flat(tree.posterior.l)[..., None]}
    x, gamma = named_cells[:]
    with torch.no_grad():
        theta = theta_at(fit.model, x, gamma, {**fit.guide.weights.medians(), **sites})
    theta = {name: value.detach().double().numpy() for name, value in theta.items()}
    np.testing.assert_allclose(
        flat(tree.log_likelihood.x), log_law("NB", named_cells.counts, theta), rtol=2e-4, atol=2e-4
    )


class ShiftedLibrary(ps.libraries.LatentLibrary):
    """A library size whose location is a parameter."""

    def __init__(self):
        super().__init__(4.0, 0.3)
        self.shift = torch.nn.Parameter(torch.tensor([0.5]))

    def law(self, gamma):
        law = super().law(gamma)
        return pyro.distributions.LogNormal(law.loc + self.shift, law.scale)


def test_the_prior_has_global_latents_at_their_medians_too(named_cells):
    fit = fitted(named_cells, library=ShiftedLibrary(), weight_priors={"library.shift": ps.weights.NormalWeights(9.0)})
    log_l = np.log(to_datatree(fit, named_cells, samples=300).prior.l.values).reshape(-1)
    loc = 4.0 + float(fit.guide.weights.medians()["library.shift"].detach())
    assert stats.kstest(log_l, "norm", (loc, 0.3)).pvalue > 1e-4


# --- draws of the prior, and predictions ---


def test_draws_of_the_prior_follow_it(covariate_fit, batched_cells):
    tree = to_datatree(covariate_fit, batched_cells, samples=200, batch_size=13)
    z = tree.prior.z.values.reshape(-1)
    assert stats.kstest(z, "norm").pvalue > 1e-4
    in_a = batched_cells.covariates[:, 0] == 1
    for of_batch, loc, scale in ((in_a, 4.0, 0.3), (~in_a, 5.0, 0.6)):
        log_l = np.log(tree.prior.l.values[0][:, of_batch]).reshape(-1)
        assert stats.kstest(log_l, "norm", (loc, scale)).pvalue > 1e-4
    assert len(np.unique(z)) > 0.999 * z.size  # no two batches, draws or cells share theirs
    assert abs(np.corrcoef(z, tree.posterior.z.values.reshape(-1))[0, 1]) < 0.03


@pytest.mark.parametrize("sampler", ["amortized", "hmc"])
def test_predictions_are_poisson_at_their_own_latents(sampler, named_cells):
    """Residuals in units of the law's sd have mean 0 and variance 1, which draws of other latents would not."""
    fit = fitted(named_cells, likelihood=ps.likelihoods.Poisson())
    with torch.no_grad():
        fit.model.decoder.heads["log_mean"].weight.mul_(4)
    tree = to_datatree(
        fit,
        named_cells,
        samples=99,
        sampler=SAMPLERS[sampler],
        batch_size=7,
        posterior_predictive=True,
        prior_predictive=True,
    )
    for drawn, latents in ((tree.posterior_predictive.x, tree.posterior), (tree.prior_predictive.x, tree.prior)):
        mean = np.exp(theta_of(fit, named_cells, latents)["log_mean"])
        usual = mean > 0.5
        residual = ((flat(drawn).numpy() - mean) / np.sqrt(mean))[usual]
        assert abs(residual.mean()) < 5 / residual.size**0.5
        assert residual.var() == pytest.approx(1, abs=0.06)
        other = (flat(drawn).numpy()[::-1] - mean) / np.sqrt(mean)
        assert other[usual].var() > 1.3  # so that draws out of order would be noticed


def test_totals_that_are_given_and_totals_of_new_cells(named_cells):
    library = ps.libraries.ObservedLibrary(4.0, 0.5)
    fit = fitted(named_cells, library=library, likelihood=ps.likelihoods.Poisson())
    tree = to_datatree(fit, named_cells, samples=200, posterior_predictive=True, prior_predictive=True)
    assert "l" not in tree.posterior
    seen, new = (tree[f"{name}_predictive"].x.sum("gene") for name in ("posterior", "prior"))
    error = (seen.mean(("chain", "draw")) - named_cells.totals) / np.sqrt(named_cells.totals / 200)
    assert abs(error).max() < 4.5
    log_sd = np.log(new.values.clip(1)).std()
    assert log_sd == pytest.approx((0.25 + np.exp(-4)) ** 0.5, rel=0.1)
    assert np.log(new.values.clip(1)).std(1).min() > 0.4  # a new total for each draw


# --- refusals ---


def test_refusals(fit, named_cells):
    with pytest.raises(ModelError, match=r"no site \['mu'\]; its sites are \('z', 'l', 'w', 'y', 'h'\)"):
        to_datatree(fit, named_cells, sites=["z", "mu"])
    without = fitted(named_cells, library=ps.libraries.NoLibrary())
    with pytest.raises(ModelError, match=r"no site \['l'\]; its sites are \('z', 'w', 'y', 'h'\)"):
        to_datatree(without, named_cells, sites=["l"])
    with pytest.raises(SchemaError, match=r"schema=fit\.schema"):
        to_datatree(fit, ps.Cells.from_counts(named_cells.counts[:, ::-1]))


def test_a_prior_without_density_is_refused(named_cells):
    model = ps.SCVI(12, 2, prior=ps.priors.Flat(2), n_hidden=8)
    fit = ps.fit(model, named_cells, ps.guides.Point(model), epochs=1, validation=0, device="cpu", progress=False)
    with pytest.raises(ModelError, match="Flat has no density"):
        to_datatree(fit, named_cells)


# --- netCDF ---


def test_netcdf_gives_the_tree_back(covariate_fit, batched_cells, tmp_path):
    pytest.importorskip("h5netcdf", reason="netCDF files need h5netcdf, of the extra arviz")
    sites = ["z", "l", "w", "y", "h"]
    tree = to_datatree(covariate_fit, batched_cells, samples=6, sites=sites, sampler=SAMPLERS["hmc"], **LARGE)
    tree.to_netcdf(tmp_path / "tree.nc", engine="h5netcdf")
    with xr.open_datatree(tmp_path / "tree.nc", engine="h5netcdf") as found:
        assert found.identical(tree)
        for name, group in tree.children.items():
            assert {v: found[name][v].dtype for v in group.data_vars} == {v: group[v].dtype for v in group.data_vars}
        assert list(found.constant_data.covariate.values) == ["donor=a", "donor=b", "age"]


# --- ArviZ ---


@pytest.fixture
def azs():
    return pytest.importorskip("arviz_stats", reason="the extra arviz is not installed")


@pytest.fixture(scope="module")
def hmc_tree(fit, named_cells):
    torch.set_num_threads(1)
    sampler = ps.HMC(chains=4, warmup=60, steps=60, leapfrog=6)
    return to_datatree(fit, named_cells, samples=400, sampler=sampler, log_likelihood=True)


def test_arviz_reads_the_chains(azs, named_cells):
    """Without a library the sampler's own coordinates are z, and its R-hat is ArviZ's."""
    fit = fitted(named_cells, library=ps.libraries.NoLibrary())
    tree = to_datatree(fit, named_cells, samples=60, sampler=SAMPLERS["hmc"])
    np.testing.assert_allclose(azs.rhat(tree).z.max("latent"), tree.sample_stats.rhat, rtol=1e-4)
    assert tree.sample_stats.rhat.max() > 1.2  # so that chains taken apart wrongly would be noticed
    assert azs.ess(tree).z.sizes == {"cell": 17, "latent": 3}


def test_arviz_summary_and_intervals(azs, hmc_tree):
    table = azs.summary(hmc_tree, var_names=["z", "l"], round_to="none")
    assert len(table) == 17 * 4
    mean = hmc_tree.posterior.mean(("chain", "draw"))
    assert table.loc["l[c3]", "mean"] == pytest.approx(float(mean.l.sel(cell="c3")), rel=1e-4)
    assert table.loc["z[c3, 1]", "mean"] == pytest.approx(float(mean.z.sel(cell="c3", latent=1)), abs=1e-4)
    interval = azs.hdi(hmc_tree, prob=0.9)
    inside = (hmc_tree.posterior.l >= interval.l[:, 0]) & (hmc_tree.posterior.l <= interval.l[:, 1])
    assert abs(inside.mean(("chain", "draw")) - 0.9).max() < 0.02


# ArviZ warns from the first entry on whose k-hat is high; the test says how many may be
@pytest.mark.filterwarnings("ignore:Estimated shape parameter of Pareto:UserWarning")
def test_arviz_leaves_entries_out(azs, hmc_tree, named_cells):
    found = azs.loo(hmc_tree, pointwise=True)
    assert found.n_data_points == 17 * 12
    assert found.elpd_i.sizes == {"cell": 17, "gene": 12}
    assert float((found.pareto_k < 0.7).mean()) > 0.98
    inverse = np.exp(-hmc_tree.log_likelihood.x.astype(float)).mean(("chain", "draw"))
    quiet = found.pareto_k < 0.2  # where smoothing changes little, it is the harmonic mean
    assert quiet.sum() > 30
    np.testing.assert_allclose(found.elpd_i.values[quiet], -np.log(inverse).values[quiet], atol=0.02)
    assert found.elpd < float(hmc_tree.log_likelihood.x.mean(("chain", "draw")).sum()) + found.p


# --- sensitivity ---


def of_cells(tree, *positions):
    return tree.map_over_datasets(lambda group: group.isel(cell=list(positions)) if "cell" in group.dims else group)


def test_each_cell_has_the_sensitivities_that_arviz_finds_for_it_alone(azs, hmc_tree):
    table = prior_sensitivity(hmc_tree)
    assert list(table.columns) == ["prior", "prior_noise", "likelihood", "likelihood_noise"]
    assert table.index.names == ["cell", "variable"]
    assert list(table.index[:5]) == [("c0", "z[0]"), ("c0", "z[1]"), ("c0", "z[2]"), ("c0", "l"), ("c1", "z[0]")]
    for cell in (0, 11):
        rows = table.loc[f"c{cell}"]
        for column in ("prior", "likelihood"):
            alone = azs.psense(of_cells(hmc_tree, cell), group=column)
            np.testing.assert_allclose(rows[column], [*alone.z.values[0], float(alone.l[0])], rtol=1e-3, atol=1e-5)


def test_other_cells_do_not_matter(azs, hmc_tree):
    """Weights of all cells together are another thing: they hide what the likelihood says of each."""
    table, some = prior_sensitivity(hmc_tree), prior_sensitivity(of_cells(hmc_tree, 3, 8))
    pd.testing.assert_frame_equal(some, table.loc[["c3", "c8"]])
    pooled = azs.psense(hmc_tree, group="likelihood")
    own = table.likelihood.unstack()
    shared = np.corrcoef(pooled.l.values, own["l"])[0, 1]
    assert shared < 0.5
    gap = abs(np.log(pooled.l.values / own["l"]))
    assert np.median(gap) > 0.3


def test_parts_of_the_prior(azs, hmc_tree):
    for name in "zl":
        found = prior_sensitivity(hmc_tree, priors=[name]).prior.loc["c5"]
        alone = azs.psense(of_cells(hmc_tree, 5), group="prior", group_var_names=name)
        np.testing.assert_allclose(found, [*alone.z.values[0], float(alone.l[0])], rtol=1e-3, atol=1e-5)
    wide = prior_sensitivity(hmc_tree, step=0.1).likelihood.loc["c5"]
    alone = azs.psense(of_cells(hmc_tree, 5), group="likelihood", alphas=(0.9, 1.1))
    np.testing.assert_allclose(wide, [*alone.z.values[0], float(alone.l[0])], rtol=1e-3, atol=1e-5)


def conjugate_tree(x, sd, draws, seed=0):
    """Cells with one latent z ~ N(0, 1) and one observation x ~ N(z, sd^2): exact draws of z given x."""
    rng = np.random.default_rng(seed)
    precision = 1 + 1 / sd**2
    z = rng.normal(x / sd**2 / precision, precision**-0.5, size=(2, draws // 2, len(x)))
    log_prior, log_likelihood = stats.norm.logpdf(z), stats.norm.logpdf(x, z, sd)
    dims = ("chain", "draw", "cell")
    cell = {"cell": [f"c{i}" for i in range(len(x))]}
    return xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"z": ((*dims, "latent"), z[..., None])}, {**cell, "latent": [0]}),
            "log_prior": xr.Dataset({"z": (dims, log_prior)}, cell),
            "sample_stats": xr.Dataset({"lp": (dims, log_prior + log_likelihood)}, cell),
        }
    )


def test_every_latent_of_the_cells_has_its_rows(azs):
    """A scalar by its name, an array by its places: each as z is alone; discrete ones have none."""
    x = np.array([0.5, 3.0])
    trees = {name: conjugate_tree(x, 1.0, 400, seed) for seed, name in enumerate(("age", "shape"))}
    z, twice = trees["age"].posterior.z, trees["shape"].posterior.z
    posterior = xr.Dataset(
        {
            "age": z[..., 0].drop_vars("latent"),
            "shape": (("chain", "draw", "cell", "rows", "columns"), np.stack([twice.values, z.values], -2)),
            "tau": (("chain", "draw"), z.values[:, :, 0, 0]),
            "c": (("chain", "draw", "cell"), z.values[..., 0].round()),
        }
    )
    for name, tree in trees.items():
        tree["log_prior"] = tree.log_prior.to_dataset().rename(z=name)
        tree["posterior"] = posterior
    table = prior_sensitivity(trees["age"])
    assert list(table.loc["c0"].index) == ["age"]
    own = prior_sensitivity(conjugate_tree(x, 1.0, 400, 0))
    np.testing.assert_allclose(table, own)
    both = prior_sensitivity(trees["shape"])
    assert list(both.loc["c1"].index) == ["shape[0, 0]", "shape[1, 0]"]
    of_first = prior_sensitivity(conjugate_tree(x, 1.0, 400, 1))
    np.testing.assert_allclose(both.xs("shape[0, 0]", level="variable"), of_first)


def global_tree(x=(0.5, 3.0)):
    """A tree of two cells, and global latents of which one has the draws and densities of the second cell's z."""
    tree = conjugate_tree(np.array(x), 1.0, 400)
    posterior, log_prior, stats_ = (tree[g].to_dataset() for g in ("posterior", "log_prior", "sample_stats"))
    draws = ("chain", "draw")
    tau = np.stack([posterior.z.values[:, :, 1, 0], np.arange(400.0).reshape(2, 200) % 7], -1)
    posterior["tau"] = ((*draws, "tau_dim_0"), tau)
    log_prior["tau"], log_prior["other"] = (draws, log_prior.z.values[..., 1] - 1), (draws, np.ones((2, 200)))
    stats_["log_q_global"] = draws, stats_.lp.values[..., 1] + 5
    tree["posterior"], tree["log_prior"], tree["sample_stats"] = posterior, log_prior, stats_
    return tree


def test_global_latents_have_rows_of_no_cell(azs):
    """Those of a cell with the same draws and densities: the guide's density is the posterior's, up to a constant."""
    own, table = prior_sensitivity(conjugate_tree(np.array([0.5, 3.0]), 1.0, 400)), prior_sensitivity(global_tree())
    assert list(table.index[-2:]) == [("all cells", "tau[0]"), ("all cells", "tau[1]")]
    pd.testing.assert_frame_equal(table.iloc[:2], own)
    np.testing.assert_allclose(table.loc["all cells", "tau[0]"], own.loc["c1", "z[0]"], rtol=1e-6)
    assert list(prior_sensitivity(global_tree(), priors=["z"]).index) == list(own.index)
    of_tau = prior_sensitivity(global_tree(), priors=["tau"])
    pd.testing.assert_frame_equal(of_tau, table.iloc[2:])


def test_globals_whose_guide_is_their_prior_depend_on_it_alone(azs, cells):
    model = ps.SCVI(
        cells.n_genes,
        2,
        cells.n_covariates,
        likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes)),
        weight_priors={"likelihood.dispersion.*": ps.weights.NormalWeights(0.3)},
    )
    fit = ps.fit(model, cells, epochs=1, validation=0, progress=False)
    (name,) = fit.guide.weights.supports
    with torch.no_grad():
        for loc, log_scale, sd in ((0.0, np.log(0.3), 0.3), (1.0, np.log(0.05), 0.05)):
            fit.guide.weights.loc[0].fill_(loc)
            fit.guide.weights.log_scale[0].fill_(log_scale)
            tree = to_datatree(fit, cells.take(range(3)), samples=400)
            values = tree.posterior[name].values.reshape(400, -1)
            expected = stats.norm.logpdf(values, loc, sd).sum(1)
            np.testing.assert_allclose(tree.sample_stats.log_q_global.values[0], expected, rtol=1e-4)
            prior = stats.norm.logpdf(values, 0.0, 0.3).sum(1)
            np.testing.assert_allclose(tree.log_prior[name].values[0], prior, rtol=1e-4, atol=1e-4)
            rows = prior_sensitivity(tree, priors=[name]).loc["all cells"]
            if loc == 0:
                assert not (rows.likelihood > 1e-3).any()
                assert rows.prior.mean() > 2 * rows.prior_noise.mean()
            else:
                assert rows.likelihood.mean() > 2 * rows.likelihood_noise.mean()


class Correlated(Toy):
    """A Cholesky factor of each cell, and one that all cells share."""

    def forward(self, *args, **options):
        self.shared = pyro.sample("S", dist.LKJCholesky(2, torch.full((), 2.0).double()))
        return super().forward(*args, **options)

    def more(self):
        own = pyro.sample("L", dist.LKJCholesky(2, torch.full((), 2.0).double()))
        return own[..., 1, 0] + self.shared[1, 0]


def test_numbers_that_no_draw_changes_have_no_sensitivity(azs):
    tree = to_datatree(fit_of(toy(Correlated)), cells_of(2), samples=400, sampler=ps.Importance())
    table = prior_sensitivity(tree)
    found = [variable for _, variable in table.index]
    assert found == 2 * ["z[0]", "L[1, 0]", "L[1, 1]"] + ["S[1, 0]", "S[1, 1]"]
    assert table.notna().all(axis=None)


def test_globals_without_a_density_are_left_out_and_it_is_said(azs):
    fit = fit_of(toy(Correlated))
    draws = {name: value.numpy() for name, value in fit.guide.weights.draws(50).items()}
    tree = to_datatree(fit.with_globals(draws), cells_of(2), samples=400, sampler=ps.Importance())
    with pytest.warns(UserWarning, match="with_globals gives draws without one.*no rows of 'all cells'"):
        table = prior_sensitivity(tree)
    assert set(table.index.get_level_values("cell")) == {"cell_0", "cell_1"}
    with pytest.raises(ModelError, match="with_globals gives draws without one"):
        prior_sensitivity(tree, priors=["S"])


def exact_sensitivity(x, sd, low, high, alphas):
    """Cumulative Jensen-Shannon distance to the scaled posterior per unit of log2 alpha, by a grid over the draws."""
    t = np.linspace(low, high, 100_001)

    def law(prior, likelihood):
        precision = prior + likelihood / sd**2
        return stats.norm(likelihood * x / sd**2 / precision, precision**-0.5)

    def distance(f, g):
        """The linear terms of both divergences cancel."""
        total = sum(u * np.log2(2 * u / (f + g)) for u in (f, g))
        return np.sqrt(np.trapezoid(total, t) / np.trapezoid(f + g, t))

    p, slopes = law(1, 1), []
    for alpha, powers in alphas:
        q = law(*powers)
        moved = max(distance(p.cdf(t), q.cdf(t)), distance(p.sf(t), q.sf(t)))  # the sign of a latent means nothing
        slopes.append(moved / abs(np.log2(alpha)))
    return np.mean(slopes)


@pytest.mark.parametrize("sd", [0.5, 2.0])
def test_sensitivities_of_a_conjugate_normal(azs, sd):
    x = np.array([0.5, 3.0])
    tree = conjugate_tree(x, sd, 40_000)
    table = prior_sensitivity(tree)
    draws = tree.posterior.z.values
    for i, value in enumerate(x):
        ends = draws[..., i, 0].min(), draws[..., i, 0].max()
        found = table.loc[f"c{i}", "z[0]"]
        prior = exact_sensitivity(value, sd, *ends, [(a, (a, 1)) for a in (0.99, 1.01)])
        likelihood = exact_sensitivity(value, sd, *ends, [(a, (1, a)) for a in (0.99, 1.01)])
        assert found.prior == pytest.approx(prior, abs=3 * found.prior_noise)
        assert found.likelihood == pytest.approx(likelihood, abs=3 * found.likelihood_noise)
        assert max(prior, likelihood) > 10 * max(found.prior_noise, found.likelihood_noise)


def test_noise_is_what_monte_carlo_error_alone_gives(azs):
    """Where the density says nothing of the latent, the sensitivity is noise; noise shrinks as draws grow."""
    means = []
    for draws in (200, 3200):
        tree = conjugate_tree(np.full(200, 1.0), 1.0, draws)
        unrelated = conjugate_tree(np.full(200, 1.0), 1.0, draws, seed=1)
        tree["posterior"] = unrelated["posterior"]
        mean = prior_sensitivity(tree).mean()
        assert mean.prior == pytest.approx(mean.prior_noise, rel=0.15)
        assert mean.likelihood == pytest.approx(mean.likelihood_noise, rel=0.15)
        means.append(mean)
    assert (means[0] / means[1]).between(3.2, 5).all()  # the root of 16


def test_draws_off_the_posterior_are_warned_about(azs, fit, named_cells, hmc_tree):
    tree = to_datatree(fit, named_cells, samples=400)
    bad = float((tree.sample_stats.khat > 0.7).mean())
    assert bad > 0.1
    with pytest.warns(
        UserWarning, match=rf"k-hat is above 0.7 for {bad:.0%} of the cells.*ps.Importance\(\)"
    ) as caught:
        prior_sensitivity(tree)
    assert caught[0].filename == __file__


def test_models_without_library_names_that_repeat_and_equal_draws(azs, named_cells):
    fit = fitted(named_cells, library=ps.libraries.NoLibrary())
    tree = to_datatree(fit, named_cells, samples=100, sampler=SAMPLERS["refined"])
    tree["sample_stats"] = tree.sample_stats.to_dataset().drop_vars("khat")
    tree = tree.map_over_datasets(lambda group: group.assign_coords(cell=["same"] * 17) if "cell" in group else group)
    tree.posterior.z[:, :, 4, 1] = 1.0
    tree.log_prior.z[:, :, 9] = -3.0
    tree.log_prior.z[:, :60, 11] = -2.0  # enough that differ, but none in the tail
    table = prior_sensitivity(tree)
    assert len(table) == 17 * 3
    assert list(table.index[:4]) == [("same", "z[0]"), ("same", "z[1]"), ("same", "z[2]"), ("same", "z[0]")]
    assert list(table.prior.isna().to_numpy().nonzero()[0]) == [13, 27, 28, 29, 33, 34, 35]
    assert list(table.likelihood.isna().to_numpy().nonzero()[0]) == [13]


def test_too_few_draws_are_refused(azs):
    with pytest.raises(ModelError, match="needs at least 25 different draws"):
        prior_sensitivity(conjugate_tree(np.ones(2), 1.0, 24))
    assert prior_sensitivity(conjugate_tree(np.ones(2), 1.0, 26)).notna().all(axis=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree.drop_nodes("log_prior"), "lacks.*log_prior"),
        (lambda tree: tree.drop_nodes("sample_stats"), "lacks.*sample_stats"),
        (lambda tree: tree.drop_nodes("posterior"), "lacks.*posterior"),
    ],
)
def test_trees_without_what_is_needed_are_refused(azs, change, message):
    with pytest.raises(ModelError, match=message):
        prior_sensitivity(change(conjugate_tree(np.ones(1), 1.0, 20)))


def test_sensitivity_of_what_is_not_there_is_refused(azs, fit, named_cells):
    with pytest.raises(ModelError, match="lacks.*'w'"):
        prior_sensitivity(conjugate_tree(np.ones(1), 1.0, 20), priors=["w"])
    with pytest.raises(ModelError, match="no latent of the cells"):
        prior_sensitivity(to_datatree(fit, named_cells, samples=4, sites=["h"]))


def test_the_tree_needs_no_arviz_and_sensitivity_says_what_to_install(fit, named_cells, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("arviz")] + ["arviz_base", "arviz_stats"]:
        monkeypatch.setitem(sys.modules, name, None)
    tree = to_datatree(fit, named_cells, samples=4)
    with pytest.raises(ImportError, match=r"pip install 'pyro-scvi\[arviz\]'"):
        prior_sensitivity(tree)
