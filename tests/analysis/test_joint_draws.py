"""Draws of all weights and latents together, from a sampler of one's own, put back in: the pairs stay pairs."""

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.analysis.differential import GroupMeans, RandomPairs
from pyro_scvi.errors import ModelError
from tests.support.toys import N_GENES, cells_of, fit_of

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:.*have 1 or 2 cells")

EVERY = "decoder.*"
WEIGHT, BIAS = "decoder.heads.log_mean.weight", "decoder.heads.log_mean.bias"
DRAWS = 60


def all_random(n_latent=1):
    """A linear decoder of Poisson counts, whose weights are all latent."""
    model = ps.SCVI(
        N_GENES,
        n_latent,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        weight_priors={EVERY: ps.weights.NormalWeights(1.0)},
    )
    return fit_of(model.double())


def sgld(density, steps=400, size=2e-3):
    """Stochastic gradient Langevin dynamics, on all cells: ten lines of one's own."""
    torch.manual_seed(0)
    u, kept = torch.zeros(1, density.size).double(), []
    for _ in range(steps):
        u = u + 0.5 * size * density.grad(u) + size**0.5 * torch.randn_like(u)
        kept.append(u)
    return torch.cat(kept[-DRAWS * 2 :: 2])


def log_joint(sites, counts):
    """By hand: normal weights and latents, and Poisson counts."""
    weight, bias, z = (np.asarray(sites[name].detach()) for name in (WEIGHT, BIAS, "z"))
    rate = np.exp(np.einsum("sgk,snk->sng", weight, z[:, :, 0]) + bias[:, None])
    parts = stats.poisson.logpmf(counts, rate).sum((1, 2)), *(stats.norm.logpdf(a) for a in (weight, bias, z))
    return parts[0] + sum(part.reshape(len(weight), -1).sum(1) for part in parts[1:])


@pytest.fixture(scope="module")
def joint():
    """A fit, cells, and the sampler's draws of everything, half of them with the signs of z and its weights turned."""
    fit, cells = all_random(), cells_of(6)
    density = ps.log_density(fit, cells, free_globals=True)
    sites = {name: value.detach() for name, value in density.constrain(sgld(density)).items()}
    turned = torch.where(torch.arange(DRAWS) % 2 == 0, 1.0, -1.0).double()
    sites[WEIGHT], sites["z"] = sites[WEIGHT] * turned[:, None, None], sites["z"] * turned[:, None, None, None]
    return fit, cells, density, sites


def test_the_density_of_everything_is_that_by_hand(joint):
    _, cells, density, sites = joint
    np.testing.assert_allclose(density(density.unconstrain(sites)).detach(), log_joint(sites, cells.counts))


def test_answers_are_the_sampler_s_own_means(joint):
    fit, cells, _, sites = joint
    at, options = fit.with_globals(sites_of_weights(sites)), {"samples": DRAWS, "sampler": ps.Given(sites)}
    drawn = ps.sample_posterior(at, cells, sites=("z", WEIGHT, BIAS), progress=False, **options)
    for name in (WEIGHT, BIAS):
        np.testing.assert_array_equal(drawn[name], sites[name])
    loading = ps.loadings(at, samples=DRAWS)["loading"].to_numpy()
    np.testing.assert_allclose(loading, sites[WEIGHT].mean(0), rtol=1e-6)
    rate = torch.exp(torch.einsum("sgk,snk->sng", sites[WEIGHT], sites["z"][:, :, 0]) + sites[BIAS][:, None]).numpy()
    found = ps.impute(at, cells, global_draws=DRAWS, **options)
    np.testing.assert_allclose(found, rate.mean(0), rtol=1e-6)
    apart = np.exp(np.asarray(sites[WEIGHT].median(0).values @ sites["z"][:, :, 0].mean(0).T).T)  # signs cancel
    assert np.abs(found - apart * np.exp(np.asarray(sites[BIAS].mean(0)))).max() > 0.3
    replicas = ps.posterior_predictive(at, cells, global_draws=DRAWS, **options)
    np.testing.assert_allclose(replicas.mean("sample"), rate.mean(0), atol=5 * np.sqrt(rate.mean(0).max() / DRAWS))


def sites_of_weights(sites):
    return {name: sites[name] for name in (WEIGHT, BIAS)}


VERBS = {
    "impute": lambda fit, cells, sampler: ps.impute(fit, cells, samples=3, sampler=sampler),
    "posterior_predictive": lambda fit, cells, sampler: ps.posterior_predictive(fit, cells, samples=3, sampler=sampler),
    "check_predictions": lambda fit, cells, sampler: ps.check_predictions(fit, cells, samples=3, sampler=sampler),
    "leave_one_out": lambda fit, cells, sampler: ps.leave_one_out(fit, cells, samples=3, sampler=sampler),
    "normalized_expression": lambda fit, cells, sampler: ps.normalized_expression(
        fit, cells, samples=3, sampler=sampler
    ),
    "differential_expression": lambda fit, cells, sampler: ps.differential_expression(
        fit,
        cells,
        groupby=np.repeat(["a", "b"], 3),
        group_a="a",
        group_b="b",
        estimand=RandomPairs(most_pairs=9, sampler=sampler),
    ),
    "group means": lambda fit, cells, sampler: ps.differential_expression(
        fit, cells, groupby=np.repeat(["a", "b"], 3), group_a="a", group_b="b", estimand=GroupMeans(sampler=sampler)
    ),
    "sample_posterior": lambda fit, cells, sampler: ps.sample_posterior(
        fit, cells, samples=3, sites=("z", "w"), sampler=sampler, progress=False
    ),
    "to_datatree": lambda fit, cells, sampler: ps.to_datatree(
        fit, cells, samples=3, sampler=sampler, log_likelihood=True
    ),
}


@pytest.mark.parametrize("verb", VERBS)
def test_medians_beside_joint_draws_are_refused(joint, verb):
    fit, cells, _, sites = joint
    with pytest.raises(ModelError, match=r"made together with draws of \['decoder.heads.*their medians would be used"):
        VERBS[verb](fit, cells, ps.Given(sites))
    alone = ps.Given({"z": sites["z"]})  # of latents alone: conditional on the medians, as is said
    VERBS[verb](fit, cells, alone)


def test_draws_beside_other_weights_are_refused(joint):
    fit, cells, _, sites = joint
    other = fit.with_globals({name: value + 1 for name, value in sites_of_weights(sites).items()})
    with pytest.raises(ModelError, match="none of the draws was made together with these values"):
        ps.impute(other, cells, samples=4, global_draws=4, sampler=ps.Given(sites))
    one = fit.with_globals({name: value[7:8] for name, value in sites_of_weights(sites).items()})
    drawn = ps.sample_posterior(one, cells, samples=1, sampler=ps.Given(sites), progress=False)
    np.testing.assert_array_equal(drawn.z[0], sites["z"][7, :, 0])
    with pytest.raises(
        ModelError, match="there are 1 draws of each cell made together with one .*, and 2 are asked for"
    ):
        ps.impute(one, cells, samples=2, sampler=ps.Given(sites))


def test_draws_of_everything_go_back_in_as_they_are(joint):
    fit, _, _, sites = joint
    at = fit.with_globals(sites)
    torch.testing.assert_close(
        at.guide.weights.medians(), fit.with_globals(sites_of_weights(sites)).guide.weights.medians()
    )
    with pytest.raises(ModelError, match=r"got draws of \[.*'other'\]"):
        fit.with_globals(sites | {"other": sites["z"]})


def test_fewer_draws_of_weights_than_of_latents_are_refused(joint):
    fit, cells, _, sites = joint
    few = {name: value[:20] for name, value in sites_of_weights(sites).items()}
    sampler = ps.Given(sites | few)
    with pytest.raises(ModelError, match=r"draws of all latents must be of the same number.*'z': 60, .*weight': 20"):
        ps.impute(fit.with_globals(few), cells, samples=20, global_draws=20, sampler=sampler)


def test_differential_expression_says_what_can_be_done_with_draws_of_everything(joint):
    fit, cells, _, sites = joint
    groups = {"groupby": np.repeat(["a", "b"], 3), "group_a": "a", "group_b": "b"}
    at, given = fit.with_globals(sites), ps.Given(sites)
    with pytest.raises(ModelError, match="such as GroupMeans, give with_globals and ps.Given a single draw"):
        ps.differential_expression(at, cells, estimand=GroupMeans(sampler=given), **groups)
    one = {name: value[:1] for name, value in sites.items()}
    means = GroupMeans(samples=1, sampler=ps.Given(one), min_molecules=1)
    assert len(ps.differential_expression(fit.with_globals(one), cells, estimand=means, **groups)) == N_GENES
    pairs = RandomPairs(global_draws=20, sampler=given)
    with pytest.raises(ModelError, match="or by most_pairs= of RandomPairs"):
        ps.differential_expression(at, cells, estimand=pairs, **groups)
    few = RandomPairs(global_draws=2, most_pairs=4, sampler=given)
    assert len(ps.differential_expression(at, cells, estimand=few, seed=18, **groups)) == N_GENES
