"""Every sampler against quadrature on a few latents, its diagnostics, its refusals, and that it runs everywhere."""

import math

import numpy as np
import pyro
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.inference import proposals
from pyro_scvi.inference.evaluation import evaluating, weigh
from pyro_scvi.inference.hmc import bulk_ess
from pyro_scvi.inference.importance import Proposal, SamplingBudget
from pyro_scvi.inference.pareto_khat import pareto_khat
from pyro_scvi.inference.proposals import weighted
from tests.support.simulate import simulated_counts

N_CELLS = 6  # at which the exact moments are found
ALL = {
    "amortized": ps.Amortized(),
    "refined": ps.Refined(steps=5),
    "importance": ps.Importance(steps=5, rounds=1, proposals=60),
    "hmc": ps.HMC(chains=2, warmup=5, steps=5, leapfrog=2, least=4),
}


def axis(low, high, points):
    """Midpoints of ``points`` equal parts, and the width of each."""
    width = (high - low) / points
    return low + width * (torch.arange(points, dtype=torch.float64) + 0.5), width


def plane():
    """z on a square: sites by name (nodes, ...) and log volumes (nodes,)."""
    nodes, width = axis(-7, 7, 201)
    z = torch.cartesian_prod(nodes, nodes)
    return {"z": z}, torch.full_like(z[:, 0], 2 * math.log(width))


def triangle():
    """z = (a, (1 - a) b, (1 - a) (1 - b)) on the simplex, dz = (1 - a) da db."""
    nodes, width = axis(0, 1, 140)
    a, b = torch.cartesian_prod(nodes, nodes).T
    return {"z": torch.stack([a, (1 - a) * b, (1 - a) * (1 - b)], -1)}, torch.log1p(-a) + 2 * math.log(width)


def line_and_library():
    """One latent z and the library size l, on the scale of log l."""
    nodes, width = axis(-7, 7, 201)
    log_l, step = axis(0, 8, 201)
    z, log_l = torch.cartesian_prod(nodes, log_l).T
    return {"z": z[:, None], "l": log_l.exp()}, log_l + math.log(width * step)


class Toy:
    """A fit to counts that its decoder gave rise to, so that a cell's posterior is far from normal, and its moments."""

    def __init__(self, prior, n_latent, grid, library=None, sd=0.8):
        torch.manual_seed(1)
        library = library or ps.libraries.NoLibrary()
        decoder = ps.networks.MLPDecoder(n_hidden=8, norm=None, initial_sd=sd, head_sd=None)
        model = ps.SCVI(12, n_latent, prior=prior, library=library, decoder=decoder, seed=3)
        with torch.no_grad():
            if not library.latent:
                model.decoder.heads["log_mean"].bias += 0.5
            counts = model(None, torch.zeros(100, 0), marginal=False)
        counts = counts[counts.sum(-1) > 0][:60]
        counts[0] += 1  # no gene without counts
        guide = ps.guides.DiagonalNormal(model, n_hidden=8, norm=None)
        self.cells = ps.Cells.from_counts(counts).take(range(len(counts) - N_CELLS, len(counts)))
        schedule = ps.schedules.OneCycle(0.03)
        options = {"validation": 0, "data_start": False, "device": "cpu", "progress": False, "dtype": torch.float64}
        self.fit = ps.fit(
            model, ps.Cells.from_counts(counts), guide, epochs=40, learning_rate=schedule, batch_size=20, **options
        )
        self.x, self.gamma = (tensor.double() for tensor in self.cells[:])
        self.mean, self.sd = self.moments(*grid())

    @torch.no_grad()
    def moments(self, sites, log_volume):
        """Posterior mean and sd of every site, (cells, coordinates), by quadrature."""
        model, parts = self.fit.model, []
        for rows in torch.arange(len(log_volume)).split(4000):
            z = sites["z"][rows]
            log_p = model.prior().log_prob(z) + log_volume[rows]
            log_l = None
            if "l" in sites:
                l = sites["l"][rows]  # noqa: E741
                log_p += torch.distributions.LogNormal(model.library.loc, model.library.scale).log_prob(l)
                log_l = l.log()[:, None, None].expand(-1, N_CELLS, 1)
            z = z[:, None, None].expand(-1, N_CELLS, 1, -1)
            theta = model.decode(z, log_l, self.gamma)
            parts.append(log_p[:, None] + model.likelihood.marginal(**theta).log_prob(self.x).sum(-1))
        weights = torch.cat(parts).softmax(0)  # (nodes, cells)
        values = torch.cat([value.reshape(len(value), -1) for value in sites.values()], -1)
        mean = weights.T @ values
        return mean, torch.einsum("nc,nci->ci", weights, (values[:, None] - mean).square()).sqrt()

    def draw(self, sampler, samples, seed=1):
        """Draws (samples, cells, coordinates) of all sites, and the diagnostics."""
        with evaluating(self.fit.model, self.fit.guide, seed):
            found = sampler.draw(self.fit.guide, self.x, self.gamma, samples)
            return joined(found.sites), found.diagnose()


def joined(sites):
    return torch.cat([sites[name].flatten(2) for name in ("z", "l") if name in sites], -1)


TOYS = {
    "normal": lambda: Toy(ps.priors.StandardNormal(2), 2, plane),
    "mixture": lambda: Toy(ps.priors.GaussianMixture(2, components=3, seed=1), 2, plane, sd=0.7),
    "dirichlet": lambda: Toy(ps.priors.Dirichlet(3, concentration=1.2), 3, triangle, sd=1.2),
    "library": lambda: Toy(
        ps.priors.StandardNormal(1), 1, line_and_library, ps.libraries.LatentLibrary(loc=3.5, scale=0.6), sd=0.7
    ),
}


@pytest.fixture(scope="module", params=TOYS)
def toy(request):
    torch.set_num_threads(1)  # this runs before the fixture of every test
    return TOYS[request.param]()


def scores(mean, variance, toy, se_mean, se_variance):
    """Errors of mean and variance, (2, cells, coordinates), in standard errors."""
    return torch.stack([(mean - toy.mean) / se_mean, (variance - toy.sd.square()) / se_variance])


def weighted_scores(draws, log_weights, toy):
    """The same for importance-weighted draws, with the standard errors of the delta method."""
    w = log_weights.softmax(0)[..., None]
    mean = (w * draws).sum(0)
    square = (draws - mean).square()
    variance = (w * square).sum(0)
    se = [(w * (value - centre)).square().sum(0).sqrt() for value, centre in ((draws, mean), (square, variance))]
    return scores(mean, variance, toy, *se)


def plain_scores(draws, toy, n_mean, n_variance):
    """The same for unweighted draws (samples, cells, coordinates) that count for n independent ones."""
    square = (draws - draws.mean(0)).square()
    return scores(draws.mean(0), square.mean(0), toy, draws.std(0) / n_mean**0.5, square.std(0) / n_variance**0.5)


LIMIT = 4.5  # the largest of 36 standard normals exceeds it with probability 0.0003


def test_weights_repair_the_means_of_the_amortized_draws(toy):
    fit, n = toy.fit, 20_000
    draws, diagnostics = toy.draw(ps.Amortized(), n)
    with evaluating(fit.model, fit.guide, 1):
        sites, log_q = fit.guide.draw(toy.x, toy.gamma, n)
        log_weights, _ = weigh(fit.guide, toy.x, toy.gamma, sites, log_q)
    assert torch.equal(joined(sites), draws)
    assert plain_scores(draws, toy, n, n).abs().max() > 10
    vouched = diagnostics["khat"] < 0.5  # where the weights have a variance, so that standard errors mean something
    assert vouched.sum() >= 2
    # Means only: a normal q is too light in the tails for the weights to vouch for variances as well.
    assert weighted_scores(draws, log_weights, toy)[0, vouched].abs().max() < LIMIT
    torch.testing.assert_close(diagnostics["ess"], 1 / log_weights.softmax(0).square().sum(0))


def test_weights_make_the_refined_draws_exact(toy):
    """Mean and variance over runs, whose spread gives the errors: those of weighted squares have heavy tails."""
    runs, khats = [], []
    for seed in range(16):
        draws, diagnostics = toy.draw(ps.Refined(), 4000, seed)
        runs.append(torch.stack([draws.mean(0), draws.var(0)]))
        khats.append(diagnostics["khat"])
    vouched = torch.stack(khats).mean(0) < 0.5  # each run fits a proposal of its own, and its khat varies
    assert vouched.sum() >= N_CELLS / 2
    found = torch.stack(runs)[:, :, vouched]
    error = found.mean(0) - torch.stack([toy.mean, toy.sd.square()])[:, vouched]
    # The largest of 36 of Student's t with 15 degrees of freedom exceeds it with probability 0.0004.
    assert (error / (found.std(0) / 4)).abs().max() < 6.5


def test_importance_agrees_with_quadrature(toy):
    n = 8000
    draws, diagnostics = toy.draw(ps.Importance(proposals=n), n)
    assert draws.shape == (n, N_CELLS, toy.mean.shape[-1])
    vouched = diagnostics["khat"] < 0.7
    assert vouched.sum() >= N_CELLS - 1
    assert (diagnostics["ess"] > n / 8).all()
    count = 1 / (1 / diagnostics["ess"] + 1 / n)[:, None]  # the weighted draws' error and that of resampling them
    assert plain_scores(draws, toy, count, count)[:, vouched].abs().max() < LIMIT


def test_hmc_agrees_with_quadrature(toy):
    chains, n = 32, 3200
    draws, diagnostics = toy.draw(ps.HMC(chains=chains, warmup=60, leapfrog=6, least=4), n)
    mixed = diagnostics["rhat"] < 1.05
    assert mixed.sum() >= N_CELLS - 2
    assert (diagnostics["divergences"] < 0.01 * n).all()
    by_chain = draws.unflatten(0, (-1, chains))
    counts = bulk_ess(by_chain), bulk_ess((by_chain - toy.mean).square())
    assert plain_scores(draws, toy, *counts)[:, mixed].abs().max() < LIMIT
    assert all(count[mixed].min() > 200 for count in counts)
    if not isinstance(toy.fit.model.prior, ps.priors.Dirichlet):  # there it is found in unconstrained coordinates
        torch.testing.assert_close(diagnostics["ess"], counts[0].amin(-1))


def test_refinement_and_adaptation_raise_the_effective_draws(toy):
    n = 2000
    ess = [toy.draw(sampler, n)[1]["ess"].mean() for sampler in (ps.Amortized(), ps.Importance(proposals=n))]
    assert ess[0] < ess[1]
    assert ess[1] > n / 4


def test_cells_whose_proposal_fails_are_tried_again():
    toy, budget = TOYS["normal"](), SamplingBudget(samples=1000, steps=0, rounds=0)
    runs = []
    for attempts in (1, 2):
        with evaluating(toy.fit.model, toy.fit.guide, 3):
            runs.append(weighted(toy.fit.guide, toy.x, toy.gamma, budget, attempts=attempts))
    once, twice = runs
    failed = once.khat > 0.7
    assert 0 < failed.sum() < N_CELLS  # without refinement or adaptation
    better = twice.khat < once.khat
    assert better.any()
    assert not better[~failed].any()
    for name in set(once._fields) - {"several"}:  # whether a cell has several modes does not change
        first, second = getattr(once, name), getattr(twice, name)
        changed = (first != second).reshape(-1, *first.shape[int(first.dim() > 1) :]).any(0)
        changed = changed.any(-1) if changed.dim() > 1 else changed  # over coordinates
        assert torch.equal(changed, better)
    torch.testing.assert_close(twice.khat, pareto_khat(twice.log_weights))
    torch.testing.assert_close(twice.ess, 1 / twice.log_weights.softmax(0).square().sum(0))


def test_cells_that_are_tried_again_have_gradient_steps(monkeypatch):
    """Newton steps that led far away would lead there again."""

    def astray(density_of, loc, scale, **options):
        return Proposal(loc + 50 * scale, torch.diag_embed(scale))

    monkeypatch.setattr(proposals, "fitted_normal", astray)
    toy, budget, runs = TOYS["normal"](), SamplingBudget(samples=1000, steps=100, rounds=0), []
    for attempts in (1, 2):
        with evaluating(toy.fit.model, toy.fit.guide, 3):
            runs.append(weighted(toy.fit.guide, toy.x, toy.gamma, budget, attempts=attempts))
    once, twice = runs
    assert not (once.khat <= 0.7).any()
    assert (twice.khat < 0.7).all()


# --- every sampler, prior and likelihood ---

PRIORS = {
    "StandardNormal": ps.priors.StandardNormal,
    "StudentT": ps.priors.StudentT,
    "GaussianMixture": ps.priors.GaussianMixture,
    "Dirichlet": ps.priors.Dirichlet,
}


def tiny_fit(prior=None, likelihood=None, guide=None, n_cells=7, **options):
    cells = ps.Cells.from_counts(simulated_counts(n_cells, 6))
    model = ps.SCVI(6, 3, prior=prior, likelihood=likelihood, n_hidden=8, n_layers=1, **options)
    q = ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1) if guide is None else guide(model)
    return ps.fit(model, cells, q, epochs=2, validation=0, device="cpu", progress=False), cells


def check(found, sampler, cells, samples):
    names = ["rhat", "ess", "divergences"] if isinstance(sampler, ps.HMC) else ["khat", "ess"]
    assert set(found.data_vars) == {*names, "z", "w", "y", "h"}
    for name in names:
        assert found[name].dims == ("cell",)
    assert np.isfinite(found.to_array().values).all()
    assert (found.ess > 0).all()
    assert found.sizes == {"sample": samples, "cell": cells.n_cells, "latent": 3, "gene": 6}
    assert (found.z.std("sample") > 0).all()
    assert (found.w > 0).all()


@pytest.mark.parametrize("likelihood", ["ZINB", "NB", "ZIP", "Poisson"])
@pytest.mark.parametrize("prior", PRIORS)
def test_every_sampler_draws_under_every_prior_and_likelihood(prior, likelihood):
    fit, cells = tiny_fit(PRIORS[prior](3), getattr(ps.likelihoods, likelihood)())
    for sampler in ALL.values():
        found = ps.sample_posterior(fit, cells, samples=30, sites=["z", "w", "y", "h"], sampler=sampler)
        check(found, sampler, cells, 30)
        if prior == "Dirichlet":
            np.testing.assert_allclose(found.z.sum("latent"), 1, atol=1e-5)


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL.keys())
@pytest.mark.parametrize("guide", [ps.guides.FullRankNormal, ps.guides.InverseAutoregressiveFlow])
def test_every_sampler_starts_from_every_amortized_guide(guide, sampler):
    fit, cells = tiny_fit(guide=lambda model: guide(model, n_hidden=8, n_layers=1))
    found = ps.sample_posterior(fit, cells, samples=30, sites=["z", "w", "y", "h"], sampler=sampler)
    check(found, sampler, cells, 30)


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL.keys())
def test_every_sampler_holds_random_weights_at_their_medians(sampler):
    fit, cells = tiny_fit(weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights()})
    found = ps.sample_posterior(fit, cells, samples=30, sites=["z", "w", "y", "h"], sampler=sampler)
    check(found, sampler, cells, 30)


def test_a_guide_without_an_encoder_needs_a_refined_sampler():
    fit, cells = tiny_fit(guide=lambda model: ps.guides.PerCell(model, 7))
    with pytest.raises(ModelError, match=r"PerCell cannot encode cells; take ps\.Refined\(\)"):
        ps.sample_posterior(fit, cells)
    for name in ("refined", "importance", "hmc"):
        found = ps.sample_posterior(fit, cells, samples=30, sites=["z", "w", "y", "h"], sampler=ALL[name])
        check(found, ALL[name], cells, 30)


@pytest.mark.parametrize("name", ["refined", "importance", "hmc"])
def test_a_prior_without_a_density_is_refused(name):
    fit, cells = tiny_fit(ps.priors.Flat(3), guide=lambda model: ps.guides.Point(model, n_hidden=8))
    with pytest.raises(ModelError, match="Flat has no density"):
        ps.sample_posterior(fit, cells, sampler=ALL[name])


def test_draws_of_a_point_are_not_vouched_for():
    fit, cells = tiny_fit(guide=lambda model: ps.guides.Point(model, n_hidden=8))
    found = ps.sample_posterior(fit, cells, samples=30)
    assert float(found.z.std("sample").max()) < 1e-6
    assert np.isinf(found.khat).all()
    assert (found.ess == 1).all()


@pytest.mark.parametrize("sampler", ALL.values(), ids=ALL.keys())
def test_one_seed_gives_one_set_of_draws_and_the_global_state_is_untouched(sampler):
    fit, cells = tiny_fit()
    fit.model.train()
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    first, second, other = (
        ps.sample_posterior(fit, cells, samples=9, sites=["z", "l", "w", "y", "h"], sampler=sampler, seed=seed)
        for seed in (4, 4, 5)
    )
    assert first.identical(second)
    for site in "zlw":
        assert not np.allclose(first[site], other[site])
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert fit.model.training
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_few_draws_are_as_many_as_asked_for(samples):
    fit, cells = tiny_fit(n_cells=3)
    for sampler in ALL.values():
        assert ps.sample_posterior(fit, cells, samples=samples, sampler=sampler).sizes["sample"] == samples
