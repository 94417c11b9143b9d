"""Leave-one-out of single entries against quadrature, its transforms, and the refusal to leave cells out."""

import math

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from scipy.stats import kstest

import pyro_scvi as ps
from pyro_scvi.analysis.evidence.missed_mass import Entries, left_out, with_missed_mass
from pyro_scvi.errors import ModelError
from tests.support import toys


def by_quadrature(fit, cells, points=401, width=6.0):
    """Three arrays (cells, genes) by the trapezoidal rule over one latent.

    Log p(x_ng | x_n,-g), log p(x_ng | x_n), which has seen the entry, and P(x' < x_ng | x_n,-g).
    """
    x, gamma = (tensor.double() for tensor in cells[:])
    z = torch.linspace(-width, width, points, dtype=torch.float64)
    with torch.no_grad():
        theta = fit.model.decode(z[:, None, None, None].expand(-1, len(x), 1, 1), None, gamma)
        law = fit.model.likelihood.marginal(**theta)
        log_p = law.log_prob(x)
        joint = log_p.sum(-1, keepdim=True) + fit.model.prior().log_prob(z[:, None]).reshape(-1, 1, 1)
        without, seen = (joint - log_p).softmax(0), joint.softmax(0)
        below = sum((k < x) * law.log_prob(torch.full_like(x, k)).exp() for k in range(int(x.max())))
    sums = (without * log_p.exp()).sum(0).log(), (seen * log_p.exp()).sum(0).log(), (without * below).sum(0)
    return [values.numpy() for values in sums]


@pytest.fixture(scope="module")
def toy():
    """A fit to counts of its own model, whose latent says much about every gene."""
    torch.set_num_threads(1)
    model = ps.SCVI(12, 1, library=ps.libraries.NoLibrary(), n_hidden=8, norm=None, initial_sd=0.8, seed=3)
    with torch.no_grad():
        model.decoder.heads["log_mean"].bias += 1
        model.decoder.heads["gate_logits"].bias -= 2
        model.decoder.heads["log_inverse_dispersion"].bias += 2
    counts = ps.prior_predictive(model, 200, seed=1)
    counts = counts[(counts.sum(1) > 0) & (counts.max(1) < 200)]
    options = {"data_start": False, "validation": 0, "progress": False, "dtype": torch.float64, "device": "cpu"}
    guide = ps.guides.DiagonalNormal(model, n_hidden=8, norm=None)
    schedule = ps.schedules.Constant(1e-4)  # the decoder stays all but as it was
    fit = ps.fit(model, ps.Cells.from_counts(counts), guide, epochs=3, learning_rate=schedule, **options)
    few = ps.Cells.from_counts(counts).take(range(15))
    return fit, few, ps.leave_one_out(fit, few, samples=20_000)


def test_probabilities_match_quadrature(toy):
    fit, cells, found = toy
    without, seen, below = by_quadrature(fit, cells)
    assert found.elpd.dims == found.khat.dims == found.pit.dims == ("cell", "gene")
    assert list(found.gene.values) == list(cells.gene_names)
    assert (found.khat < 0.7).mean() > 0.9
    vouched = found.khat.values < 0.5
    error = np.abs(found.elpd.values - without)[vouched]
    assert error.max() < 0.2
    assert error.mean() < 0.1 * np.abs(seen - without)[vouched].mean()
    # The transform of x lies between P(x' < x) and P(x' <= x).
    assert (found.pit.values > below - 0.05)[vouched].all()
    assert (found.pit.values < below + np.exp(without) + 0.05)[vouched].all()


def test_transforms_are_uniform_under_the_model_and_not_under_another(toy):
    """Entries of a cell share its latent, but most of their noise is their own: p < .001 is rare under the model."""
    fit, _, _ = toy
    counts = ps.prior_predictive(fit.model, 80, seed=8)
    own = ps.Cells.from_counts(counts[(counts.sum(1) > 0) & (counts.max(1) < 200)][:50])
    pit = ps.leave_one_out(fit, own, samples=500).pit.values.ravel()
    assert pit.min() >= 0
    assert pit.max() <= 1
    assert kstest(pit, "uniform").pvalue > 0.001
    poisson = ps.Cells.from_counts(np.random.default_rng(0).poisson(counts.mean(0), size=(50, 12)))
    assert kstest(ps.leave_one_out(fit, poisson, samples=500).pit.values.ravel(), "uniform").pvalue < 1e-6


def test_entries_on_which_all_draws_agree_have_no_tail():
    log_p = torch.full((100, 1), -0.7, dtype=torch.float64)
    elpd, se, khat, pit = left_out(torch.zeros_like(log_p), log_p, torch.zeros_like(log_p).bool(), torch.zeros(1))
    assert float(elpd) == pytest.approx(-0.7)
    assert float(se) == pytest.approx(0, abs=1e-6)
    assert float(khat) == 0
    assert 0 <= float(pit) <= math.exp(-0.7)


def test_draws_under_which_an_entry_is_impossible_have_no_weight():
    log_p = torch.full((100, 1), -0.7, dtype=torch.float64)
    log_p[::2] = -torch.inf
    log_weights = torch.where(log_p.isinf(), -torch.inf, 0.0)
    found = left_out(log_weights, log_p, torch.zeros_like(log_p).bool(), torch.zeros(1))
    assert float(found[0]) == pytest.approx(-0.7)
    assert found.isfinite().all()


class Heavy(toys.Toy):
    def more(self):
        return pyro.sample("e", dist.StudentT(1.5, 0.0, 1.0))


class Skewed(toys.Toy):
    def more(self):
        return pyro.sample("e", dist.Gamma(1.0, 1.0))


class Wide(toys.Toy):
    def more(self):
        return pyro.sample("e", dist.LogNormal(0.0, 1.0))


def on_curve(law, points):
    """Points in ascending order, and the log of a law's mass around each."""
    return points, law.logpdf(points) + np.log(np.gradient(points))


AXES = {
    Heavy: on_curve(stats.t(1.5), np.sinh(np.linspace(-13, 13, 801))),
    Skewed: on_curve(stats.gamma(1.0), np.exp(np.linspace(-14, 3.5, 601))),
    Wide: on_curve(stats.lognorm(1.0), np.exp(np.linspace(-7, 5, 601))),
}
SPIKES = np.array([[0, 0, 0, 1], [0, 0, 0, 15], [12, 0, 1, 0], [30, 25, 40, 28], [1, 9, 0, 3], [0, 1, 0, 0]])


def entries_on_grid(fit, cells, axis):
    """Log p(x_ng | x_n,-g) of every entry, by a grid over z and e."""
    axes = {"z": toys.on_line(stats.norm(), -8, 8, 181), "e": axis}
    grid = toys.grid_of(fit.model, cells, axes, lambda at: at["e"].clip(max=50))
    with torch.no_grad():
        z = torch.as_tensor(grid.latents["z"])[:, None]
        eta = fit.model.decoder(z, torch.zeros(len(z), 0).double())["log_mean"].numpy()
    rate = np.exp(eta + grid.latents["e"].clip(max=50)[:, None])
    log_p = stats.poisson.logpmf(cells.counts[:, None], rate)  # (cells, points, genes)
    with np.errstate(invalid="ignore"):  # far out no count is possible, and no other one either
        prior = np.nan_to_num(grid.log_joint - log_p.sum(-1), nan=-np.inf)
    without = np.stack([prior + np.delete(log_p, g, -1).sum(-1) for g in range(toys.N_GENES)], -1)
    return logsumexp(grid.log_joint, 1)[:, None] - logsumexp(without, 1)


@pytest.mark.parametrize("kind", AXES)
def test_few_genes_and_heavy_or_skewed_latents_have_the_errors_that_are_stated(kind):
    """Each entry has a say in the posterior: resampled draws are up to .5 nats off there, with k-hat below .5."""
    fit = toys.fit_of(toys.toy(kind))
    for counts, seeds in ((toys.cells_of().counts, (0, 2)), (SPIKES, (1,))):
        cells = ps.Cells.from_counts(counts)
        expected = entries_on_grid(fit, cells, AXES[kind])
        for seed in seeds:
            found = ps.leave_one_out(fit, cells, seed=seed, progress=False)
            vouched = (found.khat.values < 0.7) & (found.sampler_khat.values < 0.7)[:, None]
            assert vouched.mean() > 0.5
            error = abs(found.elpd.values - expected)[vouched]
            assert error.max() < 0.3
            assert (error < 5 * found.se.values[vouched] + 0.01).all()


def test_a_second_look_for_one_entry_changes_no_other():
    """The entries of a batch are looked at again together, and an answer must not depend on the batch."""

    def alike(log_weights, draws):
        return Entries(torch.tensor(log_weights).double().expand(draws, 2), *torch.zeros(2, draws, 2).double())

    def prior(draws):
        return alike([5.0, 0.0] if draws < 1000 else [5.0, 5.0], draws)

    found = torch.full((4, 2), 0.25).double()
    after = with_missed_mass(found, alike([0.0, 0.0], 50), prior, torch.zeros(2).double(), weighted=True)
    assert torch.equal(after[:, 1], found[:, 1])
    assert not torch.equal(after[:, 0], found[:, 0])


def test_leaving_cells_out_is_refused_with_the_reason(toy):
    fit, cells, _ = toy
    with pytest.raises(ModelError, match=r"z_n is inferred from that cell alone.*use ps.evidence"):
        ps.leave_one_out(fit, cells, over=("cell",))


def test_one_seed_gives_one_result_and_the_global_state_is_untouched(toy):
    fit, cells, found = toy
    few = cells.take(np.flatnonzero(found.sampler_khat < 0)[:3])  # easy ones, of which a quick sampler does not warn
    torch.manual_seed(5)
    state = torch.get_rng_state()
    runs = [ps.leave_one_out(fit, few, samples=60, sampler=ps.Refined(), seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert runs[0].identical(runs[1])
    assert not runs[0].identical(runs[2])


def test_draws_that_do_not_follow_the_posterior_are_warned_of(toy):
    fit, cells, found = toy
    assert found.sampler_khat.dims == ("cell",)
    assert (found.sampler_khat < 0.7).mean() > 0.9
    with pytest.warns(UserWarning, match="sampler_khat is above 0.7"):
        poor = ps.leave_one_out(fit, cells, samples=200, sampler=ps.Amortized())
    assert (poor.sampler_khat > 0.7).mean() > 0.1


def test_an_observed_library_is_refused():
    model = ps.SCVI(12, 1, library=ps.libraries.ObservedLibrary(), n_hidden=8)
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, size=(20, 12)))
    fit = ps.fit(model, cells, epochs=1, validation=0, progress=False)
    with pytest.raises(ModelError, match="contains the entry that would be left out"):
        ps.leave_one_out(fit, cells)


@pytest.mark.filterwarnings("ignore:.*no counts", "ignore:sampler_", "ignore:k-hat")
@pytest.mark.parametrize("sampler", [ps.Importance(), ps.Refined()])
def test_a_count_that_alone_tells_the_side_of_a_latent(sampler):
    """Genes of |z|, and one of z: without it the posterior has two modes, with it one."""
    torch.manual_seed(0)
    options = {"library": ps.libraries.NoLibrary(), "likelihood": ps.likelihoods.Poisson(), "norm": None}
    model = ps.SCVI(5, 1, n_hidden=2, n_layers=1, **options).double()
    of_abs = torch.tensor([1.2, 1.0, 0.8, -0.9, 0.0]).double()
    with torch.no_grad():
        for name, value in model.decoder.named_parameters():
            if not name.startswith("heads"):
                value.copy_(torch.tensor([[1.0], [-1.0]]) if value.dim() > 1 else torch.zeros_like(value))
        of_z = torch.tensor([0.0, 0.0, 0.0, 0.0, 1.5]).double()
        model.decoder.heads["log_mean"].weight.copy_(torch.stack([of_abs + of_z, of_abs - of_z], 1))
        model.decoder.heads["log_mean"].bias.fill_(1.5)
    z = torch.tensor([1.3, -1.3, 1.5, -1.1]).double()
    rates = (1.5 + z.abs()[:, None] * of_abs + z[:, None] * of_z).exp()
    cells = ps.Cells.from_counts(torch.poisson(rates).int().numpy())
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)
    found = ps.leave_one_out(fit, cells, sampler=sampler, progress=False)
    without, _, _ = by_quadrature(fit, cells, points=4001)
    assert np.abs(found.elpd.values - without)[found.khat.values < 0.7].max() < 0.3  # log 2 without the prior's draws
    assert (found.khat.values[:, 4] < 0.7).sum() >= 2  # the others are flagged
