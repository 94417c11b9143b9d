"""Programs with latents of their own: every verb against quadrature and enumeration, which share no code with it."""

import itertools

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, TraceEnum_ELBO
from scipy import stats
from scipy.special import betaln, logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.log_joint import log_joint
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.inference.evaluation import entries_given_others, evaluating
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support import toys
from tests.support.toys import AFTER, N_GENES, SHIFTS, WEIGHTS, cells_of, fit_of, grid_of, of_values, on_line, toy

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above", "ignore:sampler_khat is above")

STANDARD = on_line(stats.norm(), -8, 8, 401)
PRIOR = on_line(stats.norm(), -8, 8, 161)
CHOICES = {"c": of_values(WEIGHTS)}


def chain_shift(at):
    return SHIFTS.numpy()[at["c"].astype(int)] - 0.8 * at["d"]


def cluster_grid(model, cells, z=STANDARD):
    return grid_of(model, cells, {"z": z, **CHOICES}, lambda at: SHIFTS.numpy()[at["c"].astype(int)])


def chain_grid(model, cells, z=STANDARD):
    """Enumerated c and d: the law of d depends on c, so its mass is added by hand."""
    flat = (np.arange(2), np.zeros(2))
    grid = grid_of(model, cells, {"z": z, **CHOICES, "d": flat}, chain_shift)
    c, d = (grid.latents[name].astype(int) for name in "cd")
    return grid._replace(log_joint=grid.log_joint + np.log(AFTER.numpy()[c, d]))


GRIDS = {
    toys.Effect: lambda model, cells: grid_of(model, cells, {"z": STANDARD, "e": STANDARD}, lambda at: at["e"]),
    toys.Cluster: cluster_grid,
    toys.Chain: chain_grid,
    toys.Positive: lambda model, cells: grid_of(
        model,
        cells,
        {
            "z": PRIOR,
            "a": on_line(stats.lognorm(0.5, scale=np.exp(0.2)), 1e-6, 12, 241),
            "b": on_line(stats.beta(2, 3), 0, 1, 41),
        },
        lambda at: np.log(at["a"]) + at["b"],
    ),
}
LATENTS = {
    toys.Effect: ("z", "e"),
    toys.Cluster: ("z", "c"),
    toys.Chain: ("z", "c", "d"),
    toys.Positive: ("z", "a", "b"),
}


@pytest.fixture(scope="module", params=GRIDS, ids=lambda kind: kind.__name__)
def case(request):
    """A model, its fit, cells, and the posterior on a grid."""
    model, cells = toy(request.param), cells_of()
    return request.param, fit_of(model), cells, GRIDS[request.param](model, cells)


def test_evidence_is_that_of_quadrature(case):
    _, fit, cells, grid = case
    for seed in range(2):
        table = ps.evidence(fit, cells, samples=2000, seed=seed, progress=False)
        assert (abs(table.log_evidence - grid.log_evidence) / table.se.clip(1e-3)).max() < 5
        assert (table.khat < 0.7).all()


def test_annealed_evidence_is_that_of_quadrature(case):
    _, fit, cells, grid = case
    table = ps.annealed_evidence(fit, cells.take(range(3)), chains=60, temperatures=80, progress=False)
    assert (abs(table.log_evidence - grid.log_evidence[:3]) / table.se.clip(1e-2)).max() < 5


def assert_moments(draws, grid, names, effective):
    """Within 5 standard errors of so many independent draws."""
    for name in names:
        mean, sd = grid.moments(name)
        values = draws[name].values.reshape(*draws[name].shape[:2]).astype(float)
        assert (abs(values.mean(0) - mean) < 5 * sd / np.sqrt(effective) + 1e-3).all(), name
        assert (abs(values.std(0) - sd) < 0.15 * sd + 0.03).all(), name


def test_draws_have_the_moments_of_quadrature(case):
    kind, fit, cells, grid = case
    sampler = ps.Importance(proposals=4000)
    draws = ps.sample_posterior(fit, cells, samples=2000, sites=LATENTS[kind], sampler=sampler, progress=False)
    assert_moments(draws, grid, LATENTS[kind], 500)


def test_so_do_those_of_chains():
    fit, few = fit_of(toy(toys.Effect)), cells_of(3)
    sampler = ps.HMC(chains=4, warmup=60, steps=50, least=200, leapfrog=5)
    draws = ps.sample_posterior(fit, few, samples=800, sites=("z", "e"), sampler=sampler, progress=False)
    assert_moments(draws, GRIDS[toys.Effect](fit.model, few), ("z", "e"), 100)


def test_leaving_an_entry_out_is_that_of_quadrature(case):
    """Log p(x_g | the others) = log p(x) - log p(the others), the second from a grid without the gene."""
    kind, fit, cells, grid = case
    found = ps.leave_one_out(fit, cells, samples=4000, sampler=ps.Importance(proposals=8000), progress=False)
    genes = range(N_GENES if fit.guide.coordinates.enumerated else 1)  # few, as the other grids are large
    exact, below = without_each_entry(fit.model, kind, cells, grid, genes)
    elpd, khat, pit = (found[name].values[:, : len(genes)] for name in ("elpd", "khat", "pit"))
    # Beyond a k-hat of .7 the weights have no mean, and seeds differ by .1 and more, unless most of it is summed out.
    vouched = (khat < 0.7) | (len(genes) > 1)
    assert vouched.mean() > 0.5
    np.testing.assert_allclose(elpd[vouched], exact[vouched], atol=0.1)
    assert (pit[vouched] > below[vouched] - 0.05).all()
    assert (pit[vouched] < (below + np.exp(exact))[vouched] + 0.05).all()


@pytest.mark.parametrize("kind", [toys.Cluster, toys.Chain])
def test_leaving_an_entry_out_sums_over_discrete_latents(kind):
    """At one draw of z everything is a sum over their values, and no weights are left to be unstable."""
    fit, cells = fit_of(toy(kind)), cells_of()
    x, gamma = (one.double() for one in cells[:])
    at = torch.full((1, 8, 1, 1), 0.3).double()
    with evaluating(fit.model, fit.guide, 0):
        found, below = entries_given_others(fit.guide, x, gamma, {"z": at})
    grid = GRIDS[kind](fit.model, cells, (np.array([0.3]), np.zeros(1)))
    expected, _ = without_each_entry(fit.model, kind, cells, grid, range(N_GENES))
    np.testing.assert_allclose(found[0], expected, atol=1e-10)
    assert ((below >= 0) & (below <= 1 + 1e-9)).all()


class Silent(toys.Toy):
    """Half of the cells have no counts."""

    def more(self):
        on = pyro.sample("c", dist.Bernoulli(torch.tensor(0.5).double()), infer={"enumerate": "parallel"})
        return torch.where(on > 0, 0.0, -np.inf).double()


def test_values_under_which_a_count_is_impossible_are_no_nan():
    fit, x = fit_of(toy(Silent)), torch.tensor([[0, 0, 0, 0], [2, 0, 0, 0], [2, 1, 0, 0]]).double()
    with evaluating(fit.model, fit.guide, 0):
        found, below = entries_given_others(fit.guide, x, x[:, :0], {"z": torch.zeros(1, 3, 1, 1).double()})
        rate = fit.model.decoder(torch.zeros(1, 1).double(), torch.zeros(1, 0).double())["log_mean"].exp().numpy()
    log_p = stats.poisson.logpmf(x.numpy(), rate)
    for cell, gene in ((1, 0), (1, 1), (2, 0)):
        others = log_p[cell].sum() - log_p[cell, gene]
        silent = [np.log(0.5)] if (cell, gene) == (1, 0) else []  # the other counts are possible without any
        expected = np.log(0.5) + log_p[cell].sum() - logsumexp([np.log(0.5) + others, *silent])
        assert float(found[0, cell, gene]) == pytest.approx(expected, abs=1e-10)
    assert found.isfinite().all()
    assert below.isfinite().all()


def without_each_entry(model, kind, cells, grid, genes):
    """Log p(x_g | the other counts), and P(x' < x_g | the other counts), each (cells, genes)."""
    rate, found = rates(model, kind, grid), []
    for x, joint, evidence in zip(cells.counts, grid.log_joint, grid.log_evidence, strict=True):
        for g in genes:
            without = joint - stats.poisson.logpmf(x[g], rate[:, g])
            others = logsumexp(without)
            found.append((evidence - others, np.exp(without - others) @ stats.poisson.cdf(x[g] - 1, rate[:, g])))
    return np.moveaxis(np.reshape(found, (cells.n_cells, len(genes), 2)), -1, 0)


def rates(model, kind, grid):
    """Mean counts (points, genes) on the grid."""
    more = {
        toys.Effect: lambda at: at["e"],
        toys.Cluster: lambda at: SHIFTS.numpy()[at["c"].astype(int)],
        toys.Chain: chain_shift,
        toys.Positive: lambda at: np.log(at["a"]) + at["b"],
    }[kind](grid.latents)
    z = torch.as_tensor(grid.latents["z"])[:, None]
    with torch.no_grad():
        eta = model.decoder(z, torch.zeros(len(z), 0).double())["log_mean"].numpy()
    return np.exp(eta + more[:, None])


def test_imputed_values_are_those_of_quadrature(case):
    """E[w | x], which is E[mu | x] for Poisson counts."""
    kind, fit, cells, grid = case
    weights = np.exp(grid.log_joint - grid.log_evidence[:, None])
    rate = rates(fit.model, kind, grid)
    expected = weights @ rate
    sd = np.sqrt(weights @ rate**2 - expected**2)
    found = ps.impute(fit, cells, samples=2000, sampler=ps.Importance(proposals=4000))
    assert (abs(found - expected) < 5 * sd * np.sqrt(4 / 2000) + 1e-3).all()


def test_the_bound_is_below_the_evidence_and_the_held_out_loss_is_its_own(case):
    _, fit, cells, grid = case
    table = ps.evidence(fit, cells, samples=200, progress=False)
    assert (table.amortized_bound < grid.log_evidence + 0.5).all()
    x, gamma = (t.double() for t in cells[:])
    torch.manual_seed(0)
    with torch.no_grad():
        losses = [MeanFieldELBO().loss(fit.model, fit.guide, x, gamma) for _ in range(300)]
    bound = -np.mean(losses) / cells.n_cells
    assert abs(bound - table.amortized_bound.mean()) < 5 * np.std(losses) / cells.n_cells / np.sqrt(100)


def test_a_calibrated_sampler_has_uniform_ranks(case):
    """Of 200 simulated cells; the smallest of a handful of p-values, p > 1e-4 in all but one run in 2,000."""
    _, fit, _, _ = case
    found = ps.calibrate(fit, 200, sampler=ps.Importance(proposals=400), draws=19, thin=2, progress=False)
    assert found.summary.rank_p.min() > 1e-4


# --- a cluster that is summed out is a mixture ---


@pytest.fixture(scope="module")
def pair():
    return toy(prior=toys.clusters), toy(prior=toys.mixture)


def test_the_log_joint_is_that_of_the_mixture(pair):
    x, gamma = (t.double() for t in cells_of()[:])
    u = torch.linspace(-3, 3, 40).double().reshape(5, 8, 1)
    summed, closed = (log_joint(model, x, gamma, {})(u) for model in pair)
    torch.testing.assert_close(summed, closed, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("guide", [ps.guides.DiagonalNormal, ps.guides.FullRankNormal, ps.guides.Point])
def test_losses_are_those_of_the_mixture(guide):
    """Under every KL weight; the library's divergence is in closed form in both."""
    options = {"library": ps.libraries.LatentLibrary()}
    histories = []
    for prior in (toys.clusters, toys.mixture):
        model = toy(prior=prior, **options)
        fit = ps.fit(
            model,
            cells_of(40),
            guide(model),
            epochs=3,
            batch_size=10,
            dtype=torch.float64,
            kl_weight=ps.schedules.WarmUp(epochs=2),
            progress=False,
        )
        histories.append(fit.history[["train_loss", "held_out_loss", "kl"]].to_numpy())
    np.testing.assert_allclose(*histories, rtol=1e-9)


def test_the_cluster_s_posterior_is_that_of_bayes(pair):
    """P(c | z) over draws of z is the responsibility; on the grid, its mean given x."""
    model, cells = pair[0], cells_of()
    axes = {"z": (np.linspace(-6, 6, 801), np.zeros(801)), **CHOICES}
    grid = grid_of(model, cells, axes, lambda at: np.zeros(len(at["z"])))
    means = toys.MEANS.numpy()[grid.latents["c"].astype(int), 0]
    grid = grid._replace(log_joint=grid.log_joint + stats.norm.logpdf(grid.latents["z"], means, 0.5))
    draws = ps.sample_posterior(
        fit_of(model), cells, samples=4000, sites=("c",), sampler=ps.Importance(proposals=8000), progress=False
    )
    weights = np.exp(grid.log_joint - grid.log_evidence[:, None])
    for value in range(3):
        expected = weights @ (grid.latents["c"] == value)
        assert (abs((draws.c == value).mean("sample") - expected) < 0.06).all()


def test_pyro_s_enumerating_bound_is_the_same():
    """Without a divergence in closed form the two estimators agree draw by draw."""
    model = toy(prior=toys.clusters)
    guide = ps.guides.DiagonalNormal(model).double()
    x, gamma = (t.double() for t in cells_of()[:])
    losses = []
    for elbo in (MeanFieldELBO(), TraceEnum_ELBO(max_plate_nesting=2)):
        torch.manual_seed(3)
        losses.append(float(torch.as_tensor(elbo.loss(model, guide, x, gamma))))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


def test_other_bounds_are_refused_beside_what_is_summed_out():
    cells, options = cells_of(20), {"epochs": 1, "dtype": torch.float64, "progress": False}
    summing = TraceEnum_ELBO(max_plate_nesting=2)
    ps.fit(toy(toys.Cluster), cells, elbo=summing, **options)
    with pytest.raises(ModelError, match=r"Trace_ELBO does not sum out \['c'\]"):
        ps.fit(toy(toys.Cluster), cells, elbo=pyro.infer.Trace_ELBO(), **options)
    with pytest.raises(ModelError, match="cannot weigh"):
        ps.fit(toy(toys.Cluster), cells, elbo=summing, kl_weight=ps.schedules.ConstantKL(0.5), **options)


def test_w_y_and_h_follow_the_cluster():
    """W is mu for Poisson counts: its draws take the values of the cluster that is drawn beside it."""
    model = toy(toys.Cluster)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.zero_()
    options = {"samples": 50, "sampler": ps.Importance(proposals=100), "progress": False}
    draws = ps.sample_posterior(fit_of(model), cells_of(), sites=("w", "c"), **options)
    expected = np.exp(SHIFTS.numpy()[draws.c.values])
    np.testing.assert_allclose(draws.w.values, np.broadcast_to(expected[..., None], draws.w.shape), rtol=1e-6)


# --- fits by three ways ---


def test_fit_hand_written_svi_and_nuts_agree():
    """Evidence of two trained fits by quadrature, and the posterior of one cell by NUTS on the same program."""
    cells = cells_of(60)
    few = cells.take(range(4))
    fitted = ps.fit(toy(toys.Effect), cells, epochs=20, validation=0, dtype=torch.float64, progress=False)
    model = toy(toys.Effect)
    guide = ps.guides.DiagonalNormal(model).double()
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.005}), MeanFieldELBO())
    x, gamma = (t.double() for t in cells[:])
    with pyro.get_param_store().scope():
        losses = [svi.step(x, gamma) for _ in range(60)]
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    by_hand = ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), cells.schema)
    for fit in (fitted, by_hand):
        table = ps.evidence(fit, few, samples=2000, progress=False)
        exact = GRIDS[toys.Effect](fit.model, few)
        assert (abs(table.log_evidence - exact.log_evidence) / table.se.clip(1e-3)).max() < 5
    x, gamma = (t.double() for t in few[:])
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        pyro.set_rng_seed(0)
        kernel = pyro.infer.NUTS(lambda: fitted.model(x, gamma), jit_compile=False)
        chain = pyro.infer.MCMC(kernel, num_samples=200, warmup_steps=80, disable_progbar=True)
        chain.run()
    exact = GRIDS[toys.Effect](fitted.model, few)
    mean, sd = exact.moments("e")
    drawn = {name: value.reshape(200, 4).numpy() for name, value in chain.get_samples().items()}
    assert (abs(drawn["e"].mean(0) - mean) < 5 * sd / np.sqrt(30)).all()
    table = ps.evidence(fitted, few, samples=2000, progress=False)
    for n in range(4):
        log_evidence, se = evidence_of_draws(fitted.model, few.counts[n], drawn["z"][:, n], drawn["e"][:, n])
        assert abs(log_evidence - exact.log_evidence[n]) < 5 * se + 0.01
        assert abs(log_evidence - table.log_evidence.iloc[n]) < 5 * np.hypot(se, table.se.iloc[n]) + 0.01
        assert se < 0.1


def evidence_of_draws(model, counts, z, e):
    """Log p(x) of one cell by importance sampling from a t law fitted to draws of a chain, and its standard error."""
    law = stats.multivariate_t([z.mean(), e.mean()], np.cov(z, e), df=5, seed=0)
    points = law.rvs(4000)
    with torch.no_grad():
        eta = model.decoder(torch.as_tensor(points[:, :1]), torch.zeros(4000, 0).double())["log_mean"].numpy()
    log_x = stats.poisson.logpmf(counts, np.exp(eta + points[:, 1:])).sum(1)
    log_weights = log_x + stats.norm.logpdf(points).sum(1) - law.logpdf(points)
    weights = np.exp(log_weights - log_weights.max())
    se = weights.std() / weights.mean() / np.sqrt(len(weights))
    return log_weights.max() + np.log(weights.mean()), se


# --- a Dirichlet process mixture against enumeration ---

RATES = np.array([[1.0, 6.0, 1.0, 2.0], [5.0, 1.0, 2.0, 2.0], [2.0, 2.0, 7.0, 1.0]])


class Sticks(ps.SCVI):
    """A Dirichlet process mixture of known rates, cut off at three components, with a learned concentration."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        alpha = pyro.sample("alpha", dist.Gamma(torch.tensor(2.0).double(), 1.0))
        with pyro.plate("sticks", 2, dim=-1):
            broken = pyro.sample("broken", dist.Beta(torch.tensor(1.0).double(), alpha))
        one = torch.ones(1).double()
        weights = torch.cat([broken, one]) * torch.cat([one, (1 - broken).cumprod(-1)])
        with cells_plate(gamma, index, n_cells):
            pyro.sample("unused", dist.Normal(0.0, 1.0))
            c = pyro.sample("c", dist.Categorical(weights), infer={"enumerate": "parallel"})
            log_mean = torch.as_tensor(RATES).log()[c.squeeze(-1)]
            return self.observe(x, {"log_mean": log_mean}, marginal=marginal, mask=mask)


def sticks_by_enumeration(counts):
    """Log p(x) of all cells and E[alpha | x]: all assignments, sticks in closed form, alpha by quadrature.

    For n_k cells in component k the mean of the product of their weights is that of v_k^n_k (1 - v_k)^(n_l, l > k).
    """
    log_x = stats.poisson.logpmf(counts[:, None], RATES).sum(-1)
    alpha, mass = on_line(stats.gamma(2), 1e-4, 30, 3000)
    joint = np.zeros_like(alpha)
    for choice in itertools.product(range(3), repeat=len(counts)):
        n = np.bincount(choice, minlength=3)
        broken = [betaln(1 + n[k], alpha + n[k + 1 :].sum()) - betaln(1, alpha) for k in range(2)]
        joint += np.exp(sum(broken) + log_x[range(len(counts)), choice].sum())
    weights = joint * np.exp(mass)
    return np.log(weights.sum()), (weights @ alpha) / weights.sum()


def test_a_dirichlet_process_mixture_is_that_of_enumeration():
    """The joint density of concentration and sticks over Sobol points; nothing depends on the normal of each cell."""
    sample = ps.Cells.from_counts(np.array([[1, 7, 0, 2], [6, 0, 2, 1], [0, 5, 2, 2], [1, 2, 8, 0]]))
    model = toy(Sticks)
    fit = ps.Fit(model.eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), sample.schema)
    density = ps.log_density(fit, sample, free_globals=True)
    assert density.names == ("alpha", "broken", "unused")
    assert density.size == 1 + 2 + 4
    law = stats.t(7, scale=np.sqrt([0.8, 1.5, 1.5]))
    free = law.ppf(stats.qmc.Sobol(3, seed=0).random(512))
    u = torch.as_tensor(np.hstack([free, np.zeros((512, 4))]))
    log_weights = density(u).numpy() - 4 * stats.norm.logpdf(0) - law.logpdf(free).sum(1)
    log_evidence, mean = sticks_by_enumeration(sample.counts)
    assert logsumexp(log_weights) - np.log(512) == pytest.approx(log_evidence, abs=0.02)
    alpha = density.constrain(u)["alpha"].numpy().reshape(-1)
    assert np.exp(log_weights - logsumexp(log_weights)) @ alpha == pytest.approx(mean, abs=0.02)
