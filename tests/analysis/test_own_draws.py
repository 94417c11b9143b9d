"""Draws and densities of one's own, and averages over global latents, against quadrature and conjugacy."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy import stats
from scipy.special import gammaln

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError, DataError, ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, Cluster, cells_of, fit_of, grid_of, on_line, toy

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:.*have 1 or 2 cells")

BIAS = "decoder.heads.log_mean.bias"
SHAPE, RATE = 3.0, 2.0


class Rates(ps.SCVI):
    """Counts with a Gamma rate that all cells share, whose posterior is conjugate; z takes no part."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        rate = pyro.sample("rate", dist.Gamma(torch.tensor(SHAPE).double(), RATE))
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior_of(gamma))
            theta = {"log_mean": rate.log() + 0 * z[..., 0, :1] + torch.zeros(self.n_genes)}
            return self.observe(x, theta, marginal=marginal, mask=mask)


def shared(n=8):
    cells = cells_of(n)
    return fit_of(toy(Rates)), cells


def moments(cells):
    """Shape and rate of the conjugate posterior."""
    return SHAPE + cells.counts.sum(), RATE + cells.counts.size


@pytest.mark.parametrize("kind", [ps.SCVI, Cluster])
def test_the_density_integrates_to_the_evidence(kind):
    cells, fit = cells_of(3), fit_of(toy(kind))
    density = ps.log_density(fit, cells)
    u = torch.linspace(-9, 9, 1501).double()
    values = density(u[:, None, None].expand(-1, 3, 1)).detach()
    total = torch.logsumexp(values, 0).numpy() + np.log(float(u[1] - u[0]))
    table = ps.evidence(fit, cells, steps=30, progress=False)
    assert ((table.log_evidence - total).abs() < 5 * table.se + 1e-4).all()
    if kind is ps.SCVI:
        grid = grid_of(fit.model, cells, {"z": on_line(stats.norm(), -9, 9, 1501)}, lambda at: 0 * at["z"])
        np.testing.assert_allclose(total, grid.log_evidence, atol=1e-4)


def test_the_density_has_the_jacobian_gradients_and_inverses():
    cells = cells_of(3)
    fit = fit_of(toy(library=ps.libraries.LatentLibrary(1.0, 0.5)))
    density = ps.log_density(fit, cells)
    assert (density.names, density.size, density.dtype) == (("z", "l"), 2, torch.float64)
    u = torch.randn(4, 3, 2).double()
    sites = density.constrain(u)
    assert sites["z"].shape == (4, 3, 1, 1)
    torch.testing.assert_close(sites["l"], u[..., 1:].exp())
    torch.testing.assert_close(density.unconstrain(sites), u)
    with torch.no_grad():
        eta = fit.model.decoder(u[..., :1], torch.zeros(3, 0).double())["log_mean"].log_softmax(-1)
    rates = (eta + u[..., 1:]).exp().numpy()
    z, log_l = u.numpy()[..., 0], u.numpy()[..., 1]
    # The law of log l is normal: the Jacobian turns the LogNormal into it.
    exact = (
        stats.norm.logpdf(z) + stats.norm.logpdf(log_l, 1.0, 0.5) + stats.poisson.logpmf(cells.counts, rates).sum(-1)
    )
    np.testing.assert_allclose(density(u.numpy()), exact)
    numeric = (density(u + torch.tensor([1e-5, 0])) - density(u - torch.tensor([1e-5, 0]))) / 2e-5
    torch.testing.assert_close(density.grad(u)[..., 0], numeric.detach(), rtol=1e-4, atol=1e-4)
    for wrong in (torch.zeros(4, 3, 3), torch.zeros(3, 2), torch.zeros(4, 2, 2)):
        with pytest.raises(ModelError, match=r"u must have shape \(samples, 3, 2\)"):
            density(wrong)


def test_free_globals_are_the_joint_density():
    fit, cells = shared(3)
    density = ps.log_density(fit, cells, free_globals=True)
    assert (density.names, density.size) == (("rate", "z"), 4)
    u = torch.randn(5, 4).double()
    rate, z = u[:, 0].exp().numpy(), u[:, 1:].numpy()
    exact = stats.gamma.logpdf(rate, SHAPE, scale=1 / RATE) + u[:, 0].numpy() + stats.norm.logpdf(z).sum(1)
    exact += stats.poisson.logpmf(cells.counts.ravel(), rate[:, None]).sum(1)
    np.testing.assert_allclose(density(u.numpy()), exact)
    sites = density.constrain(u)
    assert sites["rate"].shape == (5,)
    assert sites["z"].shape == (5, 3, 1, 1)
    torch.testing.assert_close(density.unconstrain(sites), u)
    at = torch.linspace(-2, 3, 2001).double()
    grid = torch.cat([at[:, None], torch.zeros(2001, 3)], 1)
    weights = density(grid).detach().softmax(0)
    a, b = moments(cells)
    assert float(weights @ at.exp()) == pytest.approx(a / b, rel=1e-3)
    with pytest.raises(ModelError, match="free_globals=True needs global latents"):
        ps.log_density(fit_of(toy()), cells, free_globals=True)


def nuts(density, draws=80, warmup=40):
    """Pyro's own NUTS on the density of one chain."""
    kernel = pyro.infer.NUTS(potential_fn=lambda at: -density(at["u"][None]).sum(), max_tree_depth=5)
    start = {"u": torch.zeros(density.size).double()}
    mcmc = pyro.infer.MCMC(kernel, draws, warmup, initial_params=start, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples()["u"]


def test_nuts_over_everything_comes_back_in():
    fit, cells = shared(4)
    density = ps.log_density(fit, cells, free_globals=True)
    sites = density.constrain(nuts(density))
    a, b = moments(cells)
    sd = np.sqrt(a) / b
    assert abs(float(sites["rate"].mean()) - a / b) < sd
    at = fit.with_globals({"rate": sites["rate"]})
    drawn = ps.sample_posterior(at, cells, samples=80, sites=("z", "rate"), sampler=ps.Given(sites), progress=False)
    np.testing.assert_array_equal(drawn["rate"], sites["rate"])
    np.testing.assert_array_equal(drawn["z"], sites["z"].squeeze(-2))


def exact_draws(cells, n, seed=0):
    a, b = moments(cells)
    return torch.as_tensor(np.random.default_rng(seed).gamma(a, 1 / b, n))


def log_predictive(cells, test):
    """Negative binomial: counts given all of a shared rate's posterior."""
    a, b = moments(cells)
    x = test.counts
    total, n = x.sum(1), x.shape[1]
    log_p = gammaln(a + total) - gammaln(a) + a * np.log(b / (b + n)) - total * np.log(b + n)
    return log_p - gammaln(x + 1).sum(1)


def test_averaged_evidence_is_the_posterior_predictive():
    fit, cells = shared(2)
    at, test = fit.with_globals({"rate": exact_draws(cells, 40)}), cells_of(3, seed=4)
    quick = {"samples": 20, "steps": 2, "rounds": 0, "progress": False}
    table = ps.evidence(at, test, global_draws=40, **quick)
    exact = log_predictive(cells, test)
    assert ((table.log_evidence - exact).abs() < 4 * table.se + 1e-3).all()
    assert (table.se > 1e-3).all()
    plugged = ps.evidence(at, test, **quick)
    assert np.abs(plugged.log_evidence - exact).max() > 0.02
    both = ps.compare({"a": at, "b": fit_of(toy())}, test, samples=20, global_draws=3, progress=False)
    assert both.attrs["global_latents"] == {"a": "averaged over 3 draws"}


def test_expression_and_replicas_are_averaged_over_globals():
    fit, cells = shared(2)
    rates = exact_draws(cells, 40)
    at = fit.with_globals({"rate": rates})
    np.testing.assert_allclose(
        ps.impute(at, cells, samples=40, global_draws=40), np.full((2, N_GENES), float(rates.mean())), rtol=1e-6
    )
    low, high = ps.impute(at, cells, samples=40, global_draws=40, quantiles=(0.1, 0.9))
    expected = np.quantile(rates, [0.1, 0.9])
    np.testing.assert_allclose([low[0, 0], high[0, 0]], expected, rtol=1e-6)
    replicas = ps.posterior_predictive(at, cells, samples=2000, global_draws=40)
    spread = float(rates.mean() + rates.var())
    assert float(replicas.var("sample").mean()) == pytest.approx(spread, rel=0.1)
    with pytest.raises(ModelError, match="samples must be at least global_draws"):
        ps.impute(at, cells, samples=3, global_draws=4)
    with pytest.raises(ModelError, match="this one has none"):
        ps.impute(fit_of(toy()), cells, global_draws=4)


def test_pairs_take_turns_at_draws_of_globals():
    weight = "decoder.heads.log_mean.weight"
    likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(N_GENES))
    model = toy(likelihood=likelihood, weight_priors={weight: ps.weights.NormalWeights()})
    fit, cells = fit_of(model), cells_of(8)
    draws = torch.randn(3, N_GENES, 4).double()
    z = np.where(np.arange(8) < 4, -1.5, 1.5)[:, None] + np.random.default_rng(0).normal(size=(5000, 8, 1))
    options = {"sampler": ps.Given({"z": z}), "largest_se": 0, "most_pairs": 3000}
    at = fit.with_globals({weight: draws})
    table = of_pairs(at, cells, global_draws=3, **options)
    alone = [of_pairs(fit.with_globals({weight: one[None]}), cells, **options) for one in draws]
    p = np.stack([one.p_a_lt_b for one in alone])
    assert np.abs(table.p_a_lt_b - p.mean(0)).max() < 0.04
    np.testing.assert_allclose(table.se, p.std(0, ddof=1) / np.sqrt(3), atol=0.03)
    assert table.se.max() > 5 * alone[0].se.max()


def of_pairs(fit, cells, **options):
    """Pairs of the first four cells with the last four."""
    groups = {"groupby": np.repeat(["a", "b"], 4), "group_a": "a", "group_b": "b"}
    return ps.differential_expression(fit, cells, **groups, estimand=ps.differential.RandomPairs(**options))


def test_what_global_draws_of_pairs_need():
    with pytest.raises(ModelError, match="AllPairs"):
        ps.differential.RandomPairs(global_draws=2, pairing=ps.differential.AllPairs(samples=10))
    with pytest.raises(ModelError, match="most_pairs must be at least twice global_draws"):
        ps.differential.RandomPairs(global_draws=6, most_pairs=10)
    for wrong in (0, -1, 1.5, True, "3"):
        with pytest.raises(ModelError, match="global_draws"):
            ps.differential.RandomPairs(global_draws=wrong)
    with pytest.raises(ModelError, match="this one has none"):
        of_pairs(fit_of(toy()), cells_of(8), global_draws=2)


def test_globals_at_draws_are_what_every_verb_uses(tmp_path):
    fit, cells = shared(3)
    at = fit.with_globals({"rate": torch.tensor([1.0, 2.0, 4.0])})
    assert float(at.guide.weights.medians()["rate"]) == 2.0
    assert float(fit.guide.weights.medians()["rate"].detach()) != 2.0
    np.testing.assert_allclose(ps.impute(at, cells, samples=2), 2.0)
    tree = ps.to_datatree(at, cells, samples=3)
    assert sorted(tree["posterior"]["rate"].values.ravel()) == [1, 2, 4]
    again = fit.with_globals(tree["posterior"].to_dataset())
    assert float(again.guide.weights.medians()["rate"]) == 2.0
    assert at.guide.weights.draws(5)["rate"].shape == (5,)
    with pytest.raises(CheckpointError, match="draws of your own"):
        at.save(tmp_path / "fit")


@pytest.mark.parametrize(
    ("draws", "match"),
    [
        ({"rate": torch.tensor([-1.0])}, "outside its support"),
        ({"rate": torch.tensor([1.0, torch.inf])}, "draws of 'rate' must be finite, got 1 values"),
        ({"rate": torch.ones(3) + 1j}, "draws of 'rate' must be real numbers"),
        ({"rate": torch.ones(3, 2)}, r"draws of 'rate' must have shape \(samples, \)"),
        ({"other": torch.ones(3)}, r"global latents are \['rate'\], got draws of \['other'\]"),
        (torch.ones(3), "a dict of sites, or an xarray Dataset"),
        ({"rate": "high"}, "draws"),
    ],
)
def test_what_is_no_draw_of_globals_is_refused(draws, match):
    with pytest.raises(ModelError, match=match):
        shared(2)[0].with_globals(draws)


def test_given_draws_find_their_cells_in_any_order():
    cells, fit = cells_of(6), fit_of(toy())
    z = np.random.default_rng(0).normal(size=(30, 6, 1))
    by_position = ps.Given({"z": z})
    drawn = ps.sample_posterior(fit, cells, samples=30, sampler=by_position, batch_size=4, progress=False)
    np.testing.assert_array_equal(drawn.z, z)
    named = xr.Dataset({"z": (("sample", "cell", "latent"), z)}, {"cell": list(cells.cell_names)})
    turned = cells.take([4, 0, 2])
    drawn = ps.sample_posterior(fit, turned, samples=30, sampler=ps.Given(named), progress=False)
    np.testing.assert_array_equal(drawn.z, z[:, [4, 0, 2]])
    chains = xr.Dataset({"z": (("chain", "draw", "cell", "latent"), z.reshape(2, 15, 6, 1))}, named.coords)
    tree = ps.to_datatree(fit, cells, samples=30, sampler=ps.Given(chains))
    np.testing.assert_allclose(tree["posterior"]["z"], z.reshape(2, 15, 6, 1), rtol=1e-6)
    few = ps.sample_posterior(fit, cells, samples=7, sampler=by_position, progress=False)
    assert {*few.z.values.ravel()} <= {*z.ravel()}
    mean = ps.impute(fit, cells, samples=30, sampler=by_position)
    with torch.no_grad():
        rates = fit.model.decoder(torch.as_tensor(z), torch.zeros(6, 0).double())["log_mean"].exp().mean(0)
    np.testing.assert_allclose(mean, rates)


def test_given_draws_that_do_not_fit_are_refused():
    cells, fit = cells_of(4), fit_of(toy())

    def refused(match, draws, cells=cells, **options):
        with pytest.raises(ModelError, match=match):
            ps.sample_posterior(fit, cells, sampler=ps.Given(draws), progress=False, **{"samples": 3} | options)

    z = np.zeros((3, 4, 1))
    refused("3 draws of each cell, and 5 are asked for", {"z": z}, samples=5)
    refused(r"draws must have shape .* with 2 cells", {"z": z}, cells=cells.take([0, 1]))
    refused(r"\['z'\] are missing", {"y": z})
    refused("must be .samples, cells. and an event", {"z": np.zeros((3, 4, 2))})
    for wrong in (np.nan, np.inf):
        refused(
            "draws of 'z' must be finite, got 1 values", {"z": np.where(np.arange(12).reshape(3, 4, 1) == 5, wrong, z)}
        )
    refused("draws of 'z' must be real numbers, got torch.complex128", {"z": z + 1j})
    with_sizes = fit_of(toy(library=ps.libraries.LatentLibrary(1.0, 0.5)))
    for n_z, n_l in ((3, 2), (2, 3)):
        draws = {"z": z[:n_z], "l": np.ones((n_l, 4, 1))}
        with pytest.raises(ModelError, match=rf"of the same number, .*'z': {n_z}, 'l': {n_l}"):
            ps.impute(with_sizes, cells, samples=2, sampler=ps.Given(draws))
    named = xr.Dataset({"z": (("sample", "cell", "latent"), z)}, {"cell": ["a", "b", "c", "d"]})
    others = ps.Cells.from_counts(cells.counts, cell_names=["e", "f", "g", "h"])
    with pytest.raises(DataError, match="the draws has no row for 4 of the 4 cells, such as 'e'"):
        ps.sample_posterior(fit, others, samples=3, sampler=ps.Given(named), progress=False)
    with pytest.raises(ModelError, match="dimensions"):
        ps.Given(xr.Dataset({"z": (("a", "b"), np.zeros((2, 2)))}))
    with pytest.raises(ModelError, match="draws of the cells that it was made for"):
        ps.calibrate(fit, 4, sampler=ps.Given({"z": z}), draws=19, progress=False)


@pytest.mark.filterwarnings("ignore:cell names occur more than once")
def test_draws_of_cells_that_share_a_name_are_told_apart_by_their_order_or_refused():
    counts = np.arange(4 * N_GENES).reshape(4, N_GENES) + 1
    cells = ps.Cells.from_counts(counts, cell_names=["same", "same", "c", "d"])
    fit = fit_of(toy())
    z = np.random.default_rng(0).normal(size=(3, 4, 1))
    named = xr.Dataset({"z": (("sample", "cell", "latent"), z)}, {"cell": list(cells.cell_names)})
    options = {"samples": 3, "sampler": ps.Given(named), "progress": False}
    np.testing.assert_array_equal(ps.sample_posterior(fit, cells, **options).z, z)
    np.testing.assert_array_equal(ps.sample_posterior(fit, cells.take([3, 2]), **options).z, z[:, [3, 2]])
    for rows in ([0, 1, 3, 2], [1, 2]):
        with pytest.raises(DataError, match="the draws names rows more than once, such as 'same'"):
            ps.sample_posterior(fit, cells.take(rows), **options)


def test_cells_with_the_same_counts_are_told_by_their_covariates():
    obs = pd.DataFrame({"batch": ["a", "b", "a", "b"]})
    cells = ps.Cells.from_counts(np.ones((4, N_GENES)), obs=obs, batch="batch")
    model = ps.SCVI(N_GENES, 1, 2, n_hidden=4).double()
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)
    draws = {"z": np.arange(8.0).reshape(2, 4, 1), "l": np.ones((2, 4))}
    drawn = ps.sample_posterior(fit, cells, samples=2, sampler=ps.Given(draws), progress=False)
    np.testing.assert_array_equal(drawn.z[..., 0], [[0, 1, 0, 1], [4, 5, 4, 5]])  # equal cells have equal posteriors


def test_no_draws_to_compare_over_are_refused_for_every_model():
    with pytest.raises(ModelError, match="global_draws must be"):
        ps.compare({"no global latents": fit_of(toy())}, cells_of(2), global_draws=0, progress=False)
