"""Models that take a few lines, against references that share no code: priors by cell, batch effects, sparse loadings.

The lines that a user writes for each are in ``docs/howto/change_the_model.md``.
"""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, SVI
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.program import cells_plate, check_inputs, register

pytestmark = pytest.mark.filterwarnings(
    "ignore:k-hat is above", "ignore:.*1 or 2 cells", "ignore:sampler_khat", "ignore:.*was not registered in the param"
)

GENES = 4
WEIGHT, BIAS = "decoder.heads.log_mean.weight", "decoder.heads.log_mean.bias"
POINTS = np.linspace(-10, 10, 1501)
N = 6
DONORS, TYPES = np.arange(N) % 2, [1, None, 0, None, 1, None]
NAMES = "bt"  # of the types, sorted


# --- verbs with priors that know the cell, and with random weights ---


def few_cells():
    words = [None if kind is None else NAMES[kind] for kind in TYPES]
    obs = pd.DataFrame({"donor": np.array(["a", "b"])[DONORS], "type": words}, [f"c{i}" for i in range(N)])
    counts = np.random.default_rng(1).poisson(2.0, (N, GENES))
    return ps.Cells.from_counts(counts, obs=obs, batch="donor", labels="type")


CELLS = few_cells()
KINDS = {
    "conditional": lambda: {"prior": ps.priors.Conditional(1, CELLS.columns["donor"], scale=0.7)},
    "by label": lambda: {"prior": ps.priors.ByLabel(1, CELLS.columns["type"])},
    "random weights": lambda: {"weight_priors": {WEIGHT: ps.weights.NormalWeights(), BIAS: ps.weights.ARDWeights()}},
}
of_every = pytest.mark.parametrize("kind", KINDS)


def untrained(kind):
    """A linear decoder of Poisson counts that does not see gamma, in double precision, away from its start."""
    model = ps.SCVI(
        GENES,
        1,
        CELLS.n_covariates,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        decoder_columns=[],
        **KINDS[kind](),
    ).double()
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.copy_(0.8 * torch.randn(value.shape).double() + 0.3 * name.endswith("bias"))
    return model, ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1, norm=None).double()


def fit_of(model, guide):
    return ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), CELLS.schema)


def arrays(fit):
    """Numbers of the model by name, random ones at their medians."""
    values = {**dict(fit.model.named_parameters()), **fit.guide.weights.medians()}
    return {name: value.detach().numpy() for name, value in values.items()}


def log_prior(fit):
    """Log p(z) (cells, points), by scipy."""
    held = arrays(fit)
    if isinstance(fit.model.prior, ps.priors.Conditional):
        return stats.norm.logpdf(POINTS, held["prior.loc"][DONORS], 0.7)
    if not isinstance(fit.model.prior, ps.priors.ByLabel):
        return np.tile(stats.norm.logpdf(POINTS), (N, 1))
    parts = stats.norm.logpdf(POINTS, held["prior.loc"], np.exp(held["prior.log_scale"]))
    shares = held["prior.logits"] - logsumexp(held["prior.logits"])
    mixture = logsumexp(parts + shares[:, None], 0)
    return np.stack([mixture if kind is None else parts[kind] for kind in TYPES])


def log_counts(fit):
    """Log p(x_ng | z) (cells, points, genes), and the rates (points, genes)."""
    held = arrays(fit)
    rates = np.exp(POINTS[:, None] * held[WEIGHT].ravel() + held[BIAS])
    return stats.poisson.logpmf(CELLS.counts[:, None], rates), rates


def exact(fit):
    """Weights of the points under the posterior (cells, points), and log evidence (cells,)."""
    log_joint = log_prior(fit) + log_counts(fit)[0].sum(-1) + np.log(POINTS[1] - POINTS[0])
    total = logsumexp(log_joint, 1)
    return np.exp(log_joint - total[:, None]), total


@of_every
def test_svi_by_hand_gives_a_fit_whose_evidence_is_that_of_quadrature(kind):
    model, guide = untrained(kind)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.03}), MeanFieldELBO())
    x, gamma = (tensor.double() for tensor in CELLS[:])
    losses = [svi.step(x, gamma) for _ in range(40)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    fit = fit_of(model, guide)
    table = ps.evidence(fit, CELLS, samples=500, steps=20, progress=False)
    assert ((table.log_evidence - exact(fit)[1]).abs() < 5 * table.se + 1e-3).all()


@of_every
def test_chains_have_the_moments_of_quadrature(kind):
    fit = fit_of(*untrained(kind))
    sampler = ps.HMC(chains=4, warmup=30, steps=10, rounds=1, leapfrog=5, least=60)
    draws = ps.sample_posterior(fit, CELLS, samples=240, sampler=sampler, progress=False)
    weights, _ = exact(fit)
    mean = weights @ POINTS
    sd = np.sqrt(weights @ POINTS**2 - mean**2)
    error = sd / np.sqrt(draws.ess.values.clip(10))
    assert (np.abs(draws.z[..., 0].mean("sample") - mean) < 5 * error).all()
    assert np.abs(draws.z[..., 0].std("sample") / sd - 1).max() < 0.5


@of_every
def test_left_out_entries_are_those_of_quadrature(kind):
    fit = fit_of(*untrained(kind))
    by_gene, _ = log_counts(fit)
    rest = log_prior(fit)[..., None] + by_gene.sum(-1, keepdims=True) - by_gene
    expected = logsumexp(rest + by_gene, 1) - logsumexp(rest, 1)
    found = ps.leave_one_out(fit, CELLS, samples=4000, sampler=ps.Importance(proposals=4000, steps=20))
    good = found.khat.values < 0.5  # a gene that alone says where a cell is cannot be left out by weights
    assert good.mean() > 0.6
    assert np.abs(found.elpd.values - expected)[good].max() < 0.1


@of_every
def test_predictions_are_those_of_the_posterior_of_each_cell(kind):
    fit, sampler = fit_of(*untrained(kind)), ps.Importance(proposals=1000, steps=20)
    found = ps.posterior_predictive(fit, CELLS, samples=400, sampler=sampler).mean("sample").values
    weights, _ = exact(fit)
    rates = log_counts(fit)[1]
    mean, variance = weights @ rates, weights @ (rates + rates**2) - (weights @ rates) ** 2
    # The draws are of 1,000 weighted ones: twice the variance of independent ones is an upper bound.
    assert (np.abs(found - mean) < 5 * np.sqrt(2 * variance / 400)).all()
    checks = ps.check_predictions(fit, CELLS, samples=5, sampler=sampler)
    np.testing.assert_allclose(checks.genes["mean"]["observed"], CELLS.counts.mean(0))


# --- batch effects of each gene, shrunk, with gamma out of the network ---

N_GENES_SHIFTED, BATCHES, EACH = 8, 2, 60
MEAN_COUNT = 6.0


class BatchEffects(ps.SCVI):
    """Effects of batches on each gene, drawn to zero as far as the genes together say."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        effect = pyro.sample("effect", dist.Normal(torch.zeros(self.n_covariates, self.n_genes), sd).to_event(2))
        with self.weights.drawn_into(self), cells_plate(gamma, index, n_cells):
            theta = self.decode(pyro.sample("z", self.prior_of(gamma)), self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + gamma @ effect
            return self.observe(x, theta, marginal=marginal, mask=mask)


@pytest.fixture(scope="module")
def shifted():
    """Planted effects, cells of two batches, and a fit whose decoder is the one that made them and is not trained."""
    rng = np.random.default_rng(0)
    loadings = np.array([0.6, -0.6, 0.5, -0.5, 0.4, 0.0, 0.0, 0.0])
    planted = rng.normal(0, 0.6, (BATCHES, N_GENES_SHIFTED))
    batch, z = np.repeat(np.arange(BATCHES), EACH), rng.normal(size=BATCHES * EACH)
    counts = rng.poisson(MEAN_COUNT * np.exp(z[:, None] * loadings + planted[batch]))
    cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"batch": batch}), batch="batch")
    model = BatchEffects(
        N_GENES_SHIFTED,
        1,
        BATCHES,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        decoder_columns=[],
    )
    head = model.decoder.heads["log_mean"].requires_grad_(False)
    head.weight.copy_(torch.as_tensor(loadings)[:, None])
    head.bias.fill_(np.log(MEAN_COUNT))
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1, norm=None)
    options = {"epochs": 80, "batch_size": 60, "learning_rate": ps.schedules.OneCycle(0.1), "data_start": False}
    return planted, cells, ps.fit(model, cells, guide, validation=0, progress=False, **options)


def test_planted_batch_effects_are_recovered(shifted):
    planted, cells, fit = shifted
    draws = ps.sample_posterior(fit, cells.take([0]), samples=400, sites=("effect", "sd"), progress=False)
    found, sd = draws.effect.mean("sample").values, draws.effect.std("sample").values
    assert np.abs(found - planted).max() < 0.25
    assert (np.abs(found - planted) < 5 * np.maximum(sd, 0.03)).all()
    assert abs(float(draws.sd.mean()) - 0.6) < 0.3
    assert fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0]


def test_effects_without_z_are_those_of_their_exact_posterior(shifted):
    """Of genes without loadings, the sum of counts is enough: quadrature over the effect, given the sd found."""
    _, cells, fit = shifted
    draws = ps.sample_posterior(fit, cells.take([0]), samples=400, sites=("effect", "sd"), progress=False)
    points = np.linspace(-3, 3, 4001)
    sums = np.stack([cells.counts[b * EACH : (b + 1) * EACH].sum(0) for b in range(BATCHES)])[:, 5:, None]
    log_p = stats.poisson.logpmf(sums, EACH * MEAN_COUNT * np.exp(points))
    log_p = log_p + stats.norm.logpdf(points, 0, float(draws.sd.median()))
    weights = np.exp(log_p - logsumexp(log_p, -1, keepdims=True))
    mean = weights @ points
    sd = np.sqrt(weights @ points**2 - mean**2)
    assert (np.abs(draws.effect.mean("sample").values[:, 5:] - mean) < sd).all()
    assert (np.abs(draws.effect.std("sample").values[:, 5:] / sd - 1) < 0.5).all()


def test_the_network_does_not_see_the_batch(shifted):
    _, cells, fit = shifted
    assert fit.model.decoder.heads["log_mean"].covariates is None
    at = fit.guide.weights.medians()["effect"].detach().numpy()
    rates = {batch: ps.impute(fit, cells.take([0]), batches=[batch], quantity=ps.imputation.mean_given_no_dropout)
             for batch in (0, 1)}  # fmt: skip
    np.testing.assert_allclose(np.log(rates[1] / rates[0])[0], at[1] - at[0], rtol=1e-3, atol=1e-3)


# --- sparse loadings of 20 genes, against NUTS over everything ---

SPARSE_GENES, SPARSE_CELLS = 20, 12


@pytest.fixture(scope="module")
def sparse():
    """Counts of one latent that a quarter of the genes follow, and a model with Laplace loadings and a known bias."""
    rng = np.random.default_rng(2)
    loadings = np.where(np.arange(SPARSE_GENES) % 4 == 0, rng.choice([-0.8, 0.8], SPARSE_GENES), 0.0)
    counts = rng.poisson(4.0 * np.exp(rng.normal(size=(SPARSE_CELLS, 1)) * loadings))
    model = ps.SCVI(
        SPARSE_GENES,
        1,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        weight_priors={WEIGHT: ps.weights.LaplaceWeights(0.5)},
    )
    model.decoder.heads["log_mean"].requires_grad_(False).bias.fill_(np.log(4.0))
    return model, ps.Cells.from_counts(counts)


def by_hand(u, counts):
    """The log density of 20 loadings, then 12 latents."""
    weight, z = u[:SPARSE_GENES], u[SPARSE_GENES:]
    eta = z[:, None] * weight + np.log(4.0)
    parts = -weight.abs().sum() / 0.5 - SPARSE_GENES * np.log(1.0), -0.5 * z.square().sum()
    constant = -0.5 * SPARSE_CELLS * np.log(2 * np.pi) - torch.lgamma(counts + 1).sum()
    return sum(parts) + (counts * eta - eta.exp()).sum() + constant


def products(u):
    """Loading times latent (draws, genes x cells), which no turn of signs changes."""
    return (u[:, :SPARSE_GENES, None] * u[:, None, SPARSE_GENES:]).flatten(1)


def chain(potential, seed, draws=250, warmup=150):
    pyro.set_rng_seed(seed)
    kernel = NUTS(potential_fn=potential, max_tree_depth=6)
    start = {"u": 0.1 * torch.randn(SPARSE_GENES + SPARSE_CELLS).double()}
    mcmc = MCMC(kernel, draws, warmup, initial_params=start, disable_progbar=True)
    mcmc.run()
    return products(mcmc.get_samples()["u"])


def test_the_density_of_sparse_loadings_is_that_by_hand(sparse):
    model, cells = sparse
    fit = ps.Fit(model.double().eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)
    density = ps.log_density(fit, cells, free_globals=True)
    assert (density.names, density.size) == ((WEIGHT, "z"), SPARSE_GENES + SPARSE_CELLS)
    u, counts = torch.randn(5, density.size).double(), torch.as_tensor(cells.counts).double()
    expected = torch.stack([by_hand(one, counts) for one in u])
    torch.testing.assert_close(density(u).detach(), expected)


@pytest.mark.slow  # two chains of NUTS, and a fit
def test_sparse_loadings_agree_with_nuts_over_everything(sparse):
    """NUTS on our density and on one by hand, within Monte Carlo error; a fit with a joint guide within the widths."""
    model, cells = sparse
    joint = pyro.infer.autoguide.AutoMultivariateNormal
    guide = ps.guides.PerCell(model, cells.n_cells, global_guide=joint)
    rate = ps.schedules.OneCycle(0.05)
    fit = ps.fit(
        model, cells, guide, epochs=800, learning_rate=rate, data_start=False, validation=0, dtype=torch.float64,
        progress=False,
    )  # fmt: skip
    density = ps.log_density(fit, cells, free_globals=True)
    counts = torch.as_tensor(cells.counts).double()
    ours = chain(lambda at: -density(at["u"][None]).sum(), 0)
    theirs = chain(lambda at: -by_hand(at["u"], counts), 1)
    size_of = pyro.ops.stats.effective_sample_size
    sizes = [size_of(draws[None], chain_dim=0, sample_dim=1).clamp(10) for draws in (ours, theirs)]
    sd = theirs.std(0)
    error = sd * (1 / sizes[0] + 1 / sizes[1]).sqrt()
    away = (ours.mean(0) - theirs.mean(0)).abs() / error
    assert float(away.max()) < 5
    assert float(away.square().mean()) < 2.5
    # The guide has no encoder, so z is found anew, at the medians of its loadings.
    drawn = ps.sample_posterior(fit, cells, samples=400, sampler=ps.Refined(), sites=("z", WEIGHT), progress=False)
    loadings, z = torch.as_tensor(drawn[WEIGHT].values)[..., 0], torch.as_tensor(drawn.z.values)[..., 0]
    found = products(torch.cat([loadings, z], 1))
    apart = ((found.mean(0) - theirs.mean(0)) / sd).square().mean().sqrt()
    assert float(apart) < 0.5, float(apart)
