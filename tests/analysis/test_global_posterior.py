"""sample_globals: global latents against exact posteriors by quadrature, which share no code with the package."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError, SchemaError
from tests.support.toys import N_GENES, SHIFTS, WEIGHTS, Cluster, Toy, cells_of, fit_of, toy

TOO_FAR = pytest.mark.filterwarnings("ignore:k-hat is")  # few draws, and guides that nobody fitted

QUIET = {"progress": False}
FEW = {"samples": 50, "cell_samples": 4, "progress": False}


class Level(Toy):
    """A level m that all cells share, on which z has no influence: the posterior of m is that of one number."""

    def forward(self, *args, **options):
        self.level = pyro.sample("m", dist.Normal(torch.zeros(()).double(), 1.0))
        return super().forward(*args, **options)

    def more(self):
        return self.level


class LevelOfClusters(Level, Cluster):
    """The same, with a cluster that is summed out."""

    def more(self):
        return self.level + Cluster.more(self)


class Wide(Level):
    """Without a latent of the cells in the law of x."""

    def decode(self, z, log_library, gamma):
        return super().decode(torch.zeros_like(z), log_library, gamma)


def fit_with(kind, loc=0.0, scale=0.2, guide=ps.guides.DiagonalNormal):
    """A fit whose guide of m is this normal."""
    fit = fit_of(toy(kind), guide)
    with torch.no_grad():
        fit.guide.weights.loc[0].fill_(loc)
        fit.guide.weights.log_scale[0].fill_(np.log(scale))
    return fit


def posterior_of_m(fit, cells, clusters=((0.0, 1.0),)):
    """Mean and sd of m by a grid over m and z; ``clusters`` are shifts and their probabilities."""
    z, m = np.linspace(-6, 6, 241), np.linspace(-3, 3, 601)
    with torch.no_grad():
        eta = fit.model.decoder(torch.as_tensor(z)[:, None], torch.zeros(len(z), 0).double())["log_mean"].numpy()
    x, log_p = cells.counts, stats.norm.logpdf(m)
    if isinstance(fit.model, Wide):
        eta = eta[[120]].repeat(len(z), 0)
    for counts in x:
        parts = []
        for shift, share in clusters:
            rate = np.exp(eta[:, None] + m[None, :, None] + shift)  # (z, m, genes)
            parts.append(stats.poisson.logpmf(counts, rate).sum(-1) + stats.norm.logpdf(z)[:, None] + np.log(share))
        log_p = log_p + logsumexp(np.concatenate(parts), 0)
    weights = np.exp(log_p - logsumexp(log_p))
    mean = weights @ m
    return mean, np.sqrt(weights @ m**2 - mean**2)


@pytest.mark.integration
@pytest.mark.parametrize("kind", [Level, Wide, LevelOfClusters])
def test_draws_follow_the_posterior_of_a_number(kind):
    cells = cells_of(30)  # so many that the posterior has one mode
    clusters = list(zip(SHIFTS.numpy(), WEIGHTS.numpy(), strict=True)) if kind is LevelOfClusters else [(0.0, 1.0)]
    fit = fit_with(kind)
    mean, sd = posterior_of_m(fit, cells, clusters)
    fit = fit_with(kind, mean + 0.7 * sd, 1.3 * sd)  # a guide that is off and too wide
    draws = ps.sample_globals(fit, cells, samples=400, cell_samples=200, batch_size=30, **QUIET)
    assert draws.khat < 0.7
    assert abs(float(draws.m.mean()) - mean) < 0.2 * sd
    assert abs(float(draws.m.std()) / sd - 1) < 0.15


@pytest.mark.fast
@TOO_FAR
def test_weights_are_those_of_ten_lines_of_numpy():
    """With one draw of z for each cell: p(m) prod_n p(x_n, z_n | m) / q(z_n) / q(m), at the draws of the verb."""
    fit, cells = fit_with(Level, scale=0.3), cells_of(5)
    seen = []
    original = fit.guide.draw
    fit.guide.draw = lambda *args: seen.append(original(*args)) or seen[-1]
    drawn = []
    of_guide = fit.guide.weights.weighed_draws
    fit.guide.weights.weighed_draws = lambda n: drawn.append(of_guide(n)) or drawn[-1]
    found = ps.sample_globals(fit, cells, samples=20, cell_samples=1, **QUIET)
    (sites, log_q), (m, log_q_m) = seen[0], drawn[0]
    prior = stats.norm.logpdf(sites["z"][0, :, 0, 0].numpy()) - log_q[0].numpy()  # the same for all m
    with torch.no_grad():
        eta = fit.model.decoder(sites["z"][0, :, 0], torch.zeros(5, 0).double())["log_mean"].numpy()
    m = m["m"].numpy()
    log_w = prior.sum() + stats.norm.logpdf(m) - log_q_m.numpy()
    log_w += stats.poisson.logpmf(cells.counts, np.exp(eta + m[:, None, None])).sum((1, 2))
    weights = np.exp(log_w - logsumexp(log_w))  # 20 draws are too few to smooth a tail
    assert found.ess == pytest.approx(1 / (weights**2).sum(), rel=1e-6)
    times = np.array([(found.m.values == one).sum() for one in m])
    assert (np.abs(times - 20 * weights) < 1).all()
    assert found.khat == np.inf


@pytest.mark.fast
@TOO_FAR
def test_draws_depend_on_the_seed_and_not_on_the_batch_size_nor_move_the_global_state():
    fit, cells = fit_with(Level), cells_of(12)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    draws = [ps.sample_globals(fit, cells, batch_size=n, seed=5, **FEW) for n in (3, 12)]
    assert torch.equal(torch.get_rng_state(), state)
    np.testing.assert_allclose(draws[0].m, draws[1].m, rtol=1e-10)
    assert draws[0].khat == pytest.approx(draws[1].khat, rel=1e-6)
    other = ps.sample_globals(fit, cells, seed=6, **FEW)
    assert not np.array_equal(other.m, draws[0].m)


@pytest.mark.fast
@TOO_FAR
def test_draws_go_into_with_globals():
    fit, cells = fit_with(Level, scale=0.1), cells_of(12)
    draws = ps.sample_globals(fit, cells, **FEW)
    assert draws.m.dims == ("sample",)
    assert draws.sizes["sample"] == 50
    given = fit.with_globals(draws)
    again = ps.sample_posterior(given, cells, samples=50, sites=("m",), progress=False)
    np.testing.assert_array_equal(np.sort(again.m), np.sort(draws.m))


@pytest.mark.fast
def test_a_guide_far_from_the_posterior_is_told():
    with pytest.warns(UserWarning, match="k-hat is .* do not follow their posterior. Fit for more epochs"):
        ps.sample_globals(fit_with(Level, loc=3.0, scale=0.05), cells_of(12), samples=200, cell_samples=4, **QUIET)


@pytest.mark.fast
@TOO_FAR
def test_fewer_cells_than_those_of_the_fit_are_told():
    fit, cells = fit_with(Level, scale=0.1), cells_of(12)
    known = ps.Fit(fit.model, fit.guide, fit.history, fit.schema, {**fit.settings, "n_cells": 12})
    ps.sample_globals(known, cells, **FEW)
    with pytest.warns(UserWarning, match="trained on 12 cells.* given 11 cells: pass all cells of the fit"):
        ps.sample_globals(known, cells.take(range(11)), **FEW)


@pytest.mark.fast
def test_what_has_no_weights_is_refused():
    cells, level = cells_of(6), fit_with(Level)
    with pytest.raises(ModelError, match="for models with global latents, and this one has none"):
        ps.sample_globals(fit_of(toy()), cells, **FEW)
    with pytest.raises(ModelError, match="density is not known: pass the fit that with_globals was called on"):
        ps.sample_globals(level.with_globals({"m": np.zeros(4)}), cells, **FEW)
    with pytest.raises(ModelError, match="guide's density, and Point has none"):
        ps.sample_globals(fit_of(toy(Level), ps.guides.Point), cells, **FEW)
    with pytest.raises(ModelError, match="PerCell cannot encode cells"):
        ps.sample_globals(fit_of(toy(Level), lambda model: ps.guides.PerCell(model, 6)), cells, **FEW)
    with pytest.raises(SchemaError):
        ps.sample_globals(level, ps.Cells.from_counts(np.ones((4, N_GENES + 1))), **FEW)
    with pytest.raises(ModelError, match="expected Cells"):
        ps.sample_globals(level, cells.counts, **FEW)
    for name in ("samples", "cell_samples", "batch_size"):
        with pytest.raises(ModelError, match=f"{name} must be an integer of 1 or more"):
            ps.sample_globals(level, cells, **FEW | {name: 0})
    with pytest.raises(ModelError, match="progress must be True or False"):
        ps.sample_globals(level, cells, **FEW | {"progress": "no"})
