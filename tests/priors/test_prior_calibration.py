"""Simulation-based calibration of models with donors, time points and labels: central 90 % intervals hold .90.

Of z at given global latents, and of donors' means, each simulated data set with a fit of its own.
"""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:k-hat is", "ignore:.*1 or 2 cells", "ignore:sampler_khat"),
    pytest.mark.filterwarnings("ignore:.*was not registered in the param store"),  # the decoder, which is not trained
]

GENES, GROUPS, N = 6, 5, 2000  # cells: a standard error of .007
LOADINGS = torch.tensor([0.5, -0.5, 0.4, -0.4, 0.6, -0.6])
MEANS = {"donors": np.random.default_rng(0).normal(0, 1.5, GROUPS), "times": 1.5 * np.sin(np.linspace(0, 3, GROUPS))}


def donors(name, like):
    """m_d ~ Normal(0, tau), tau ~ HalfCauchy(1)."""
    tau = pyro.sample("tau", dist.HalfCauchy(like.new_ones(())))
    return pyro.sample(name, dist.Normal(torch.zeros_like(like), tau).to_event(2))


def with_known_decoder(cells, prior, **options):
    model = ps.SCVI(
        GENES,
        1,
        cells.n_covariates,
        prior=prior,
        likelihood=ps.likelihoods.Poisson(),
        library=ps.libraries.NoLibrary(),
        decoder=ps.networks.LinearDecoder(),
        **options,
    ).double()
    with torch.no_grad():
        head = model.decoder.heads["log_mean"]
        head.weight.copy_(LOADINGS[:, None])
        head.bias.fill_(np.log(8.0))
    return ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)


def of_groups(kind):
    """Means of donors, or of time points, at a draw of them; which cells there are, gamma says alone."""
    obs = pd.DataFrame({"group": np.arange(50) % GROUPS})
    cells = ps.Cells.from_counts(np.ones((50, GENES)), obs=obs, batch="group")
    weights = {"donors": donors, "times": ps.weights.RandomWalkWeights(0.3)}[kind]
    prior = ps.priors.Conditional(1, cells.columns["group"])
    fit = with_known_decoder(cells, prior, weight_priors={"prior.loc": weights})
    draws = {"prior.loc": MEANS[kind][None, :, None]} | ({"tau": np.array([1.5])} if kind == "donors" else {})
    return fit.with_globals(draws), cells


def of_labels():
    """Three labels, a half of the cells without one."""
    obs = pd.DataFrame({"type": [[*"abc"][i // 2 % 3] if i % 2 else None for i in range(60)]})
    cells = ps.Cells.from_counts(np.ones((60, GENES)), obs=obs, labels="type")
    fit = with_known_decoder(cells, ps.priors.ByLabel(1, cells.columns["type"]))
    with torch.no_grad():
        fit.model.prior.loc.copy_(torch.tensor([[-2.0], [0.0], [2.0]]))
        fit.model.prior.log_scale.fill_(-0.5)
        fit.model.prior.logits.copy_(torch.tensor([0.5, 0.0, -0.5]))
    return fit, cells


CASES = {"donors": lambda: of_groups("donors"), "times": lambda: of_groups("times"), "labels": of_labels}


@pytest.mark.parametrize("case", CASES)
def test_intervals_of_simulated_cells_hold_what_they_say(case):
    fit, cells = CASES[case]()
    result = ps.calibrate(
        fit, N, source=ps.calibration.Prior(cells), sampler=ps.Importance(steps=30, rounds=1, proposals=300),
        draws=99, thin=1, batch_size=1000, seed=1, progress=False,
    )  # fmt: skip
    summary = result.summary.loc["z_0"]
    assert abs(summary.coverage_90 - 0.9) < 0.03, summary
    assert summary.rank_p > 1e-3, summary


SETS, EACH = 40, 20  # simulated data sets, and cells of each group
JOINT = pyro.infer.autoguide.AutoMultivariateNormal


def spread(name, like):
    """As donors, with a spread that no simulated data set has beyond a few."""
    tau = pyro.sample("tau", dist.HalfNormal(like.new_ones(())))
    return pyro.sample(name, dist.Normal(torch.zeros_like(like), tau).to_event(2))


def refitted(model, cells):
    """A fit as docs/howto/change_the_model.md has it, its global latents weighed by the cells."""
    guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1, norm=None, global_guide=JOINT)
    options = {"batch_size": 50, "data_start": False, "validation": 0, "progress": False}
    fit = ps.fit(model, cells, guide, epochs=300, learning_rate=ps.schedules.OneCycle(0.05), **options)
    rate, elbo = ps.schedules.OneCycle(0.01), ps.elbos.ImportanceWeighted(30)
    fit = ps.fit(fit.model, cells, fit.guide, epochs=60, learning_rate=rate, elbo=elbo, **options)
    return fit.with_globals(ps.sample_globals(fit, cells, batch_size=100, progress=False))


def made():
    """A fit whose decoder is not trained, of cells of donors."""
    obs = pd.DataFrame({"group": np.arange(GROUPS * EACH) % GROUPS})
    cells = ps.Cells.from_counts(np.ones((len(obs), GENES)), obs=obs, batch="group")
    prior = ps.priors.Conditional(1, cells.columns["group"])
    fit = with_known_decoder(cells, prior, weight_priors={"prior.loc": spread})
    fit.model.decoder.requires_grad_(False)
    return fit, cells


def test_intervals_of_the_means_of_donors_hold_what_they_say():
    """Means of 5 groups, and the donors' spread; the decoder is the one that simulated."""
    fit, cells = made()

    def refit(simulated):
        return refitted(made()[0].model, simulated)

    summary = ps.calibrate_globals(fit, cells, refit, SETS, seed=1, progress=False).summary
    means = summary[summary.index.str.startswith("prior.loc")]
    assert len(means) == GROUPS
    assert abs(means.coverage_90.mean() - 0.9) < 0.05, summary  # 200 ranks, those of one data set alike
    assert (summary.coverage_90 > 0.9 - 3 * 0.047).all(), summary  # 40 ranks each
    assert (summary.rank_p > 1e-3).all(), summary


def exact_draws(counts, group, n, rng):
    """Draws (n, 1 + groups) of tau and the means from their posterior, by sums over grids of z, means and tau."""
    z, m = np.linspace(-9, 9, 361), np.linspace(-6, 6, 481)
    tau = np.exp(np.linspace(np.log(0.005), np.log(4), 300))
    rate = 8 * np.exp(z[:, None] * LOADINGS.numpy())  # (z, genes)
    of_cells = stats.poisson.logpmf(counts[:, None], rate).sum(-1)  # (cells, z)
    given_m = logsumexp(of_cells[:, None] + stats.norm.logpdf(z, m[:, None]), -1)  # (cells, m)
    of_groups = np.stack([given_m[group == d].sum(0) for d in range(GROUPS)])  # (groups, m)
    prior = stats.norm.logpdf(m, 0, tau[:, None])
    joint = (prior - logsumexp(prior, 1, keepdims=True))[:, None] + of_groups  # (tau, groups, m); narrow ones too
    log_p = logsumexp(joint, -1).sum(-1) + stats.halfnorm.logpdf(tau) + np.log(tau)  # even steps of log tau
    chosen = rng.choice(len(tau), n, p=np.exp(log_p - logsumexp(log_p)))
    of_means = np.exp(joint - logsumexp(joint, -1, keepdims=True))
    means = [[rng.choice(m, p=of_means[place, d]) for d in range(GROUPS)] for place in chosen]
    return np.column_stack([tau[chosen], means])


def test_draws_of_donors_follow_the_exact_posterior():
    """Widths and places against sums over grids, on three simulated data sets."""
    rng, group = np.random.default_rng(5), np.arange(GROUPS * EACH) % GROUPS
    widths, shifts = [], []
    for _ in range(3):
        means = rng.normal(0, abs(rng.normal()), GROUPS)
        z = rng.normal(means[group])
        counts = rng.poisson(8 * np.exp(z[:, None] * LOADINGS.numpy()))
        cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"group": group}), batch="group")
        expected = exact_draws(counts, group, 2000, rng)
        found = refitted(made()[0].model, cells).guide.weights.draws(1000)
        found = np.column_stack([found["tau"].numpy(), found["prior.loc"][:, :, 0].numpy()])
        widths.append(found.std(0) / expected.std(0))
        shifts.append((found.mean(0) - expected.mean(0)) / expected.std(0))
    assert (np.abs(np.mean(widths, 0) - 1) < 0.1).all(), widths
    assert np.sqrt(np.mean(np.square(shifts))) < 0.3, shifts
