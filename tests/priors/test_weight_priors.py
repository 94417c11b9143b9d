"""Priors on parameters of every part: donors' means, time courses, and callables of one's own, against exact laws."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.discovery import Kind
from pyro_scvi.errors import ModelError, SchemaError

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:.*was not registered in the param store")

GENES = 6
TRUE_TAU = 1.5
LOADINGS = torch.tensor([0.5, -0.5, 0.4, -0.4, 0.6, -0.6])
MEAN_COUNT = 8.0
PRECISION = float((LOADINGS**2).sum() * MEAN_COUNT)  # of z given its counts, about


def donors(name, like):
    """m_d ~ Normal(0, tau), tau ~ HalfCauchy(1)."""
    tau = pyro.sample("tau", dist.HalfCauchy(like.new_ones(())))
    return pyro.sample(name, dist.Normal(torch.zeros_like(like), tau).to_event(2))


def simulated(means, n, seed=0):
    """z and cells, n of each group, with z ~ Normal(mean of the group, 1) and Poisson counts."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(len(means)), n)
    z = rng.normal(np.asarray(means)[group], 1.0)
    counts = rng.poisson(MEAN_COUNT * np.exp(z[:, None] * LOADINGS.numpy()))
    obs = pd.DataFrame({"group": group}, index=[f"c{i}" for i in range(len(group))])
    return z, ps.Cells.from_counts(counts, obs=obs, batch="group")


def with_true_decoder(cells, weight_priors):
    """One latent with a mean for each group, and the decoder that made the counts, which is not trained."""
    prior = ps.priors.Conditional(1, cells.columns["group"])
    model = ps.SCVI(
        GENES,
        1,
        cells.n_covariates,
        prior=prior,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        weight_priors=weight_priors,
    )
    head = model.decoder.heads["log_mean"].requires_grad_(False)
    head.weight.copy_(LOADINGS[:, None])
    head.bias.fill_(np.log(MEAN_COUNT))
    return model


def fitted(cells, weight_priors, epochs=40):
    model = with_true_decoder(cells, weight_priors)
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1, norm=None)
    rate = ps.schedules.OneCycle(0.1)
    return ps.fit(
        model, cells, guide, epochs=epochs, batch_size=64, learning_rate=rate, data_start=False, validation=0,
        progress=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def of_donors():
    truth = np.random.default_rng(3).normal(0, TRUE_TAU, 12)
    z, cells = simulated(truth, 25)
    return z, cells, fitted(cells, {"prior.loc": donors})


def test_donors_means_and_their_spread_are_recovered(of_donors):
    z, _, fit = of_donors
    means, variance = z.reshape(12, 25).mean(1), (1 + 1 / PRECISION) / 25
    taus = np.linspace(0.02, 8, 4000)
    log_p = stats.halfcauchy.logpdf(taus) + stats.norm.logpdf(means[:, None], 0, np.sqrt(taus**2 + variance)).sum(0)
    weights = np.exp(log_p - logsumexp(log_p))
    mean = weights @ taus
    sd = np.sqrt(weights @ (taus - mean) ** 2)
    found = {name: value.detach().numpy() for name, value in fit.guide.weights.medians().items()}
    assert abs(found["tau"] - mean) < sd
    assert abs(found["tau"] - TRUE_TAU) < 5 * sd
    shrunk = means * (weights @ (taus**2 / (taus**2 + variance)))
    assert np.abs(found["prior.loc"].ravel() - shrunk).max() < 5 * np.sqrt(variance)


def test_globals_of_the_prior_are_in_the_tree_and_in_draws(of_donors):
    _, cells, fit = of_donors
    few = cells.take(range(3))
    tree = ps.to_datatree(fit, few, samples=20)
    assert tree["posterior"]["prior.loc"].shape == (1, 20, 12, 1)
    assert tree["posterior"]["tau"].shape == (1, 20)
    drawn = ps.sample_posterior(fit, few, samples=20, sites=("z", "tau", "prior.loc"), progress=False)
    assert drawn["tau"].dims == ("sample",)
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]


def test_the_prior_of_z_moves_with_the_medians(of_donors):
    _, cells, fit = of_donors
    few = cells.take([0, 30, 60])
    loc = fit.guide.weights.medians()["prior.loc"].detach().numpy().ravel()
    points = np.linspace(-12, 12, 2001)
    rates = MEAN_COUNT * np.exp(points[:, None] * LOADINGS.numpy())
    log_x = stats.poisson.logpmf(few.counts[:, None], rates).sum(-1)
    log_z = stats.norm.logpdf(points, loc[[0, 1, 2]][:, None], 1)
    exact = logsumexp(log_x + log_z, 1) + np.log(points[1] - points[0])
    table = ps.evidence(fit, few, steps=30, progress=False)
    assert ((table.log_evidence - exact).abs() < 5 * table.se + 1e-3).all()


def test_a_random_walk_has_the_density_of_its_normal():
    walk = ps.weights.RandomWalkWeights(0.3, first=2.0)
    trace = pyro.poutine.trace(walk).get_trace("w", torch.zeros(5, 2).double())
    value, law = trace.nodes["w"]["value"], trace.nodes["w"]["fn"]
    times = np.arange(5)
    covariance = 4.0 + 0.09 * np.minimum(times[:, None], times)
    exact = stats.multivariate_normal(np.zeros(5), covariance).logpdf(value.numpy().T).sum()
    assert abs(float(law.log_prob(value)) - exact) < 1e-9
    draws = law.sample((20000,)).numpy()
    np.testing.assert_allclose(np.cov(draws[:, :, 0].T), covariance, atol=0.25)
    assert law.log_prob(law.sample((3, 4))).shape == (3, 4)


def test_a_spread_for_each_latent_is_in_two_arguments():
    """Of one latent ARDWeights are the prior of donors above, by scipy; of two each has a spread of its own."""
    prior = ps.priors.Conditional(2, slice(0, 3))
    model = ps.SCVI(GENES, 2, 3, prior=prior, weight_priors={"prior.loc": ps.weights.ARDWeights()})
    gamma, means, tau = torch.eye(3), torch.tensor([[0.3, 4.0], [-0.2, -3.0], [0.1, 5.0]]), torch.tensor([0.4, 3.0])
    given = {"prior.loc": means, "prior.loc.scale": tau}
    trace = pyro.poutine.trace(pyro.condition(model, data=given)).get_trace(torch.ones(3, GENES), gamma)
    trace.compute_log_prob()
    found = sum(trace.nodes[name]["log_prob_sum"] for name in given)
    exact = stats.halfcauchy.logpdf(tau).sum() + stats.norm.logpdf(means, 0, tau).sum()
    np.testing.assert_allclose(found, exact, rtol=1e-5)
    torch.testing.assert_close(trace.nodes["z"]["fn"].mean.squeeze(1), means)


def test_a_smooth_course_is_found_better_by_a_random_walk():
    truth = 1.5 * np.sin(np.linspace(0, 3, 15))
    _, cells = simulated(truth, 4, seed=1)
    _, test = simulated(truth, 6, seed=2)
    priors = {"free": None, "walk": {"prior.loc": ps.weights.RandomWalkWeights(0.3)}}
    fits = {name: fitted(cells, prior, epochs=90) for name, prior in priors.items()}
    free = fits["free"].model.prior.loc.detach().numpy().ravel()
    walk = fits["walk"].guide.weights.medians()["prior.loc"].detach().numpy().ravel()
    assert np.square(walk - truth).mean() < 0.6 * np.square(free - truth).mean()
    scores = {name: ps.evidence(fit, test, samples=100, steps=10, rounds=1, progress=False).log_evidence.mean()
              for name, fit in fits.items()}  # fmt: skip
    assert scores["walk"] > scores["free"]


def test_words_without_an_order_are_no_time_points():
    _, cells = simulated([0.0, 1.0, 2.0], 5)
    days = np.array(["day 2", "day 10", "day 1"])[cells.obs["group"]]
    walk = {"prior.loc": ps.weights.RandomWalkWeights()}

    def read(column):
        return ps.Cells.from_counts(cells.counts, obs=pd.DataFrame({"group": column}), categories=["group"])

    for column in (days, pd.Categorical(days)):
        with pytest.raises(SchemaError, match="'group' as steps in time, and they are words without an order"):
            fitted(read(column), walk, epochs=1)
    in_order = read(pd.Categorical(days, ["day 1", "day 2", "day 10"], ordered=True))
    assert in_order.schema.levels == (("day 1", "day 2", "day 10"),)
    assert fitted(in_order, walk, epochs=1).guide.weights.medians()["prior.loc"].shape == (3, 1)


class Slopes(ps.libraries.LatentLibrary):
    """A library with a parameter."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.1))

    def log_mean(self, eta, log_library):
        return super().log_mean(eta, log_library) + self.slope


PARTS = {
    "prior.*": lambda: {"prior": ps.priors.GaussianMixture(2, 3)},
    "library.slope": lambda: {"library": Slopes()},
    "likelihood.*": lambda: {"likelihood": ps.likelihoods.NB(ps.likelihoods.PerGene(GENES))},
    "decoder.heads.*.bias": dict,
}


def own(name, like):
    return pyro.sample(name, dist.Laplace(torch.zeros_like(like), 0.5).to_event(like.dim()))


@pytest.mark.parametrize(
    ("pattern", "prior"), [*((pattern, own) for pattern in PARTS), ("prior.*", ps.weights.NormalWeights())]
)
def test_parameters_of_every_part_may_have_any_prior(pattern, prior):

    _, cells = simulated([0.0, 1.0], 10)
    model = ps.SCVI(GENES, 2, 2, n_hidden=8, weight_priors={pattern: prior}, **PARTS[pattern]())
    names = [site.name for site in model.discovered() if site.kind is Kind.GLOBAL]
    assert names
    assert not set(names) & {name for name, _ in model.named_parameters()}
    fit = ps.fit(model, cells, epochs=2, progress=False)
    assert set(fit.guide.weights.medians()) == set(names)
    assert ps.prior_predictive(fit.model, 2, gamma=np.eye(2)).shape == (2, GENES)
    ps.evidence(fit, cells.take([0, 1]), samples=20, steps=2, rounds=1, progress=False)


def test_what_is_no_prior_of_weights_is_refused():
    def made(prior, pattern="decoder.heads.log_mean.bias"):
        return ps.SCVI(GENES, 2, weight_priors={pattern: prior}).sites()

    for wrong in (ps.weights.NormalWeights, 3.0, "normal", dist.Normal(0.0, 1.0)):
        with pytest.raises(ModelError, match=r"the prior of 'decoder.heads.log_mean.bias' must be an object"):
            made(wrong)
    with pytest.raises(ModelError, match=r"must return a tensor of shape \(6,\)"):
        made(lambda name, like: pyro.sample(name, dist.Normal(0.0, 1.0)))
    scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ModelError, match="scale.*trainable, but it is reached only through the code of the prior of"):
        made(lambda name, like: pyro.sample(name, dist.Normal(torch.zeros_like(like), scale).to_event(1)))


def test_a_prior_of_ones_own_is_loaded_with_its_model(of_donors, tmp_path):
    _, cells, fit = of_donors
    fit.save(tmp_path / "fit")
    model = with_true_decoder(cells, {"prior.loc": donors})
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1, norm=None)
    loaded = ps.load(tmp_path / "fit", model=model, guide=guide)
    options = {"samples": 50, "steps": 5, "rounds": 1, "progress": False}
    few = cells.take(range(3))
    pd.testing.assert_frame_equal(ps.evidence(loaded, few, **options), ps.evidence(fit, few, **options))


LOC, DISPERSION = {"prior.loc": ps.weights.NormalWeights()}, {"likelihood.*": ps.weights.HierarchicalWeights()}


@pytest.mark.parametrize(
    ("part", "make", "weight_priors", "leaf"),
    [
        ("prior", lambda: ps.priors.Conditional(2, slice(0, 3)), LOC, "loc"),
        ("likelihood", lambda: ps.likelihoods.NB(ps.likelihoods.PerGene(GENES)), DISPERSION, "log_inverse_dispersion"),
        ("library", lambda: ps.libraries.SizeFactor(slice(0, 1)), {}, None),
    ],
)
def test_an_object_is_a_part_of_one_model_if_its_parameters_are_latent(part, make, weight_priors, leaf):
    used = make()
    first = ps.SCVI(GENES, 2, 3, **{part: used}, weight_priors=weight_priors)
    if leaf is None:  # no parameter was taken out, and models may share it
        assert ps.SCVI(GENES, 2, 3, **{part: used}).sites(marginal=True) == first.sites(marginal=True)
        return
    for again in ({}, weight_priors, {"decoder.heads.*": ps.weights.NormalWeights()}):
        with pytest.raises(ModelError, match=f"{part}.*given to a model before.*'{leaf}'.*new object for each model"):
            ps.SCVI(GENES, 2, 3, **{part: used}, weight_priors=again)
    shared = make()
    second = ps.SCVI(GENES, 2, 3, **{part: shared})
    with pytest.raises(ModelError, match=f"'{part}.*{leaf}'.*also part of another model.*new object for each model"):
        ps.SCVI(GENES, 2, 3, **{part: shared}, weight_priors=weight_priors)
    assert second.sites()


def test_a_prior_is_whole_after_a_pattern_was_refused():
    prior = ps.priors.Conditional(2, slice(0, 3))
    with pytest.raises(ModelError, match="is called 'prior.lok'"):
        ps.SCVI(GENES, 2, 3, prior=prior, weight_priors=LOC | {"prior.lok": ps.weights.NormalWeights()})
    assert ps.SCVI(GENES, 2, 3, prior=prior, weight_priors=LOC).sites()[0].name == "prior.loc"


def test_the_first_of_two_patterns_has_a_parameter():
    prior = ps.priors.Conditional(2, slice(0, 3), scale=None)
    weight_priors = LOC | {"prior.*": ps.weights.RandomWalkWeights()}
    model = ps.SCVI(GENES, 2, 3, prior=prior, weight_priors=weight_priors)
    assert model.weights.prior_of == {"prior.loc": 0, "prior.log_scale": 1}


def test_a_bias_with_a_prior_starts_at_the_data_s_means():
    _, cells = simulated([0.0, 1.0], 10)
    name, still = "decoder.heads.log_mean.bias", ps.schedules.Constant(0.0)
    options = {"epochs": 1, "validation": 0, "learning_rate": still, "progress": False}

    def fitted_with(prior, **guided):
        model = ps.SCVI(GENES, 2, 2, n_hidden=8, weight_priors={name: prior})
        return ps.fit(model, cells, ps.guides.DiagonalNormal(model, **guided), **options)

    found = fitted_with(ps.weights.NormalWeights(3.0)).guide.weights.medians()[name]
    plain = ps.fit(ps.SCVI(GENES, 2, 2, n_hidden=8), cells, **options)
    torch.testing.assert_close(found, plain.model.decoder.heads["log_mean"].bias.detach())
    with pytest.warns(UserWarning, match="is latent and its guide does not start at the data's means"):
        fitted_with(ps.weights.NormalWeights(3.0), global_guide=pyro.infer.autoguide.AutoNormal)
    with pytest.warns(UserWarning, match="is latent and its guide does not start at the data's means"):
        fitted_with(ps.weights.HorseshoeWeights())


def test_walks_over_labels_and_over_levels_without_cells():
    _, cells = simulated([0.0, 1.0, 2.0], 10)
    days = np.array(["d1", "d10", "d3"])[cells.obs["group"]].astype(object)
    days[::2] = None
    in_order = pd.Categorical(days, ["d1", "d2", "d3", "d10"], ordered=True)
    read = ps.Cells.from_counts(cells.counts, obs=pd.DataFrame({"day": in_order}), labels="day")
    assert read.schema.label_names == ("d1", "d3", "d10")
    walk = {"prior.loc": ps.weights.RandomWalkWeights()}
    model = ps.SCVI(GENES, 2, 3, prior=ps.priors.ByLabel(2, read.columns["day"]), weight_priors=walk)
    with pytest.warns(UserWarning, match="the levels 'd2' of 'day' have no cells"):
        fit = ps.fit(model, read, epochs=1, progress=False)
    assert fit.guide.weights.medians()["prior.loc"].shape == (3, 2)


def test_a_pattern_after_one_that_took_its_parameters():
    own = {"decoder.*": ps.weights.NormalWeights(), "decoder.heads.log_mean.weight": ps.weights.LaplaceWeights()}
    with pytest.raises(ModelError, match=r"log_mean.weight'\] have a prior by an earlier pattern of weight_priors"):
        ps.SCVI(GENES, 2, decoder=ps.networks.LinearDecoder(), weight_priors=own)
