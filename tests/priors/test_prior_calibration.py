"""Simulation-based calibration of models with donors, time points and labels: central 90 % intervals hold .90.

Of z at given global latents, and of donors' means under the guide, each simulated data set with a fit of its own.
"""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:.*1 or 2 cells", "ignore:sampler_khat"),
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


def test_intervals_of_the_means_of_donors_hold_what_they_say():
    """Means of 5 groups, and the donors' spread, under a joint guide; the decoder is the one that simulated."""
    obs = pd.DataFrame({"group": np.arange(GROUPS * EACH) % GROUPS})
    cells = ps.Cells.from_counts(np.ones((len(obs), GENES)), obs=obs, batch="group")

    def made():
        prior = ps.priors.Conditional(1, cells.columns["group"])
        fit = with_known_decoder(cells, prior, weight_priors={"prior.loc": spread})
        fit.model.decoder.requires_grad_(False)
        return fit

    def refit(simulated):
        model = made().model
        guide = ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=1, norm=None, global_guide=JOINT)
        return ps.fit(
            model, simulated, guide, epochs=60, batch_size=50, learning_rate=ps.schedules.OneCycle(0.05),
            data_start=False, validation=0, progress=False,
        )  # fmt: skip

    summary = ps.calibrate_globals(made(), cells, refit, SETS, seed=1, progress=False).summary
    means = summary[summary.index.str.startswith("prior.loc")]
    assert len(means) == GROUPS
    assert abs(means.coverage_90.mean() - 0.9) < 0.06, summary  # 200 ranks: 3 standard errors were they independent
    assert (summary.coverage_90 > 0.9 - 4 * 0.047).all(), summary  # 40 ranks each
    assert (summary.rank_p > 1e-4).all(), summary
