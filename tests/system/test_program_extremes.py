"""Programs at the edges: scales far apart, latents that are all summed out, against quadrature and enumeration."""

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, SHIFTS, WEIGHTS, Effect, Toy, cells_of, fit_of, grid_of, of_values, on_line, toy

STANDARD = on_line(stats.norm(), -6, 6, 81)


def assert_evidence(fit, cells, expected):
    table = ps.evidence(fit, cells, samples=500, progress=False)
    assert (abs(table.log_evidence - expected) / table.se.clip(1e-3)).max() < 5
    assert (table.khat < 0.7).all()


# --- scales far apart ---


class Scales(Toy):
    """Latents whose prior scales are far apart, and which matter alike."""

    scales = (1e3, 1e-3)

    def more(self):
        big, small = self.scales
        a, b = pyro.sample("a", dist.Normal(0.0, big)), pyro.sample("b", dist.Normal(0.0, small))
        return a / big + 0.5 * b / small


class Wider(Scales):
    scales = (1e5, 1.0)


class Narrower(Scales):
    scales = (1.0, 1e-4)


@pytest.mark.parametrize(("kind", "single"), [(Scales, False), (Wider, True), (Narrower, True)])
def test_scales_of_latents_may_be_far_apart(kind, single):
    model, cells = toy(kind), cells_of(2)
    axes = {"z": STANDARD, "a": STANDARD, "b": STANDARD}
    expected = grid_of(model, cells, axes, lambda at: at["a"] + 0.5 * at["b"]).log_evidence
    fit = fit_of(model)
    if single:
        fit.model.float(), fit.guide.float()
    assert_evidence(fit, cells, expected)


def test_chains_and_refined_draws_know_these_scales():
    fit, cells = fit_of(toy(Scales)), cells_of(2)
    for sampler in (ps.Refined(), ps.HMC(chains=2, warmup=20, steps=100, least=20, leapfrog=3)):
        draws = ps.sample_posterior(fit, cells, samples=40, sites=("a", "b"), sampler=sampler, progress=False)
        for name, scale in zip("ab", Scales.scales, strict=True):
            sd = draws[name].std("sample") / scale
            assert ((sd > 0.05) & (sd < 2)).all()


# --- two modes far apart, each narrow ---


class Square(ps.SCVI):
    """A latent whose sign the counts do not tell."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            e = pyro.sample("e", dist.Normal(torch.zeros(()).double(), 1.0))
            return self.observe(x, {"log_mean": LEVELS + e.square()}, marginal=marginal, mask=mask)


LEVELS = torch.tensor([0.0, 0.5, 1.0, 0.2]).double()


def test_modes_that_are_narrow_and_far_apart_are_both_counted():
    counts = np.array([[20, 23, 52, 27], [60, 70, 155, 80], [200, 230, 520, 270]])
    model = Square(4, 1, likelihood=ps.likelihoods.Poisson(), library=ps.libraries.NoLibrary())
    cells = ps.Cells.from_counts(counts)
    fit = ps.Fit(model.double().eval(), ps.guides.DiagonalNormal(model).double().eval(), pd.DataFrame(), cells.schema)
    points, mass = on_line(stats.norm(), -9, 9, 40_001)
    rate = np.exp(LEVELS.numpy() + np.square(points)[:, None])
    expected = logsumexp(stats.poisson.logpmf(counts[:, None], rate).sum(-1) + mass, 1)
    for seed in (0, 1):
        table = ps.evidence(fit, cells, seed=seed, progress=False)
        assert ((table.log_evidence - expected).abs() < 5 * table.se + 1e-3).all()


# --- what is summed out alone ---


class NoDecoder(torch.nn.Module):
    """The decoder of a program that needs none."""

    def __init__(self, n_latent, n_genes, heads, n_covariates):
        super().__init__()
        self.n_genes, self.heads = n_genes, heads

    def forward(self, z, gamma):
        return {name: z[..., :1].expand(*z.shape[:-1], self.n_genes) for name in self.heads}


class Profiles(ps.SCVI):
    """A mixture of Poisson profiles, of the total or of shares of it."""

    beside = False

    def __init__(self, library=None):
        library = library or ps.libraries.NoLibrary()
        super().__init__(N_GENES, 1, likelihood=ps.likelihoods.Poisson(), library=library, decoder=NoDecoder)
        rates = 0.5 * torch.randn(3, N_GENES, generator=torch.Generator().manual_seed(0))
        self.rates = torch.nn.Parameter(rates)

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            c = pyro.sample("c", dist.Categorical(WEIGHTS.to(self.rates)), infer={"enumerate": "parallel"})
            if self.beside:
                pyro.sample("unused", dist.Normal(0.0, 1.0))
            log_size = self.library(x, gamma)
            log_mean = self.rates[c.squeeze(-1)]
            theta = log_mean if log_size is None else log_mean.log_softmax(-1) + log_size
            return self.observe(x, {"log_mean": theta}, marginal=marginal, mask=mask)


class BesideNothing(Profiles):
    beside = True


def test_a_program_without_a_continuous_latent_is_told_what_to_do():
    for kind in (ps.guides.DiagonalNormal, ps.guides.FullRankNormal, ps.guides.Point):
        with pytest.raises(ModelError, match=r"no latent of the cells but \['c'\].*pyro.sample\('unused'"):
            kind(Profiles())
    fit, cells = fit_of(BesideNothing()), cells_of(6)
    fit.model.double()
    with torch.no_grad():
        log_p = stats.poisson.logpmf(cells.counts[:, None], fit.model.rates.exp().numpy()).sum(-1)
    joint = log_p + WEIGHTS.log().numpy()
    expected = np.logaddexp.reduce(joint, 1)
    assert_evidence(fit, cells, expected)
    draws = ps.sample_posterior(fit, cells, samples=1000, sites=("c",), progress=False).c
    found = np.stack([(draws == k).mean("sample") for k in range(3)], -1)
    np.testing.assert_allclose(found, np.exp(joint - expected[:, None]), atol=0.09)


class GlobalsAlone(ps.SCVI):
    """One rate for each gene, and a latent of the cells on which nothing depends."""

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        level = pyro.sample("level", dist.Normal(torch.zeros(self.n_genes), 1.0).to_event(1))
        with cells_plate(gamma, index, n_cells):
            pyro.sample("unused", dist.Normal(0.0, 1.0))
            return self.observe(x, {"log_mean": level.expand(len(gamma), -1)}, marginal=marginal, mask=mask)


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_programs_of_global_latents_alone_run_with_the_latent_that_is_advised():
    model, cells = GlobalsAlone(N_GENES, 1, likelihood=ps.likelihoods.Poisson()), cells_of(20)
    model.decoder.requires_grad_(False)
    fit, few = ps.fit(model, cells, epochs=2, progress=False), cells.take(range(3))
    rate = fit.guide.weights.medians()["level"].detach().exp().numpy()
    log_p = stats.poisson.logpmf(few.counts, rate)
    table = ps.evidence(fit, few, samples=500, progress=False)
    np.testing.assert_allclose(table.log_evidence, log_p.sum(1), atol=0.02)
    np.testing.assert_allclose(ps.impute(fit, few, samples=5), np.broadcast_to(rate, log_p.shape), rtol=1e-5)
    np.testing.assert_allclose(ps.leave_one_out(fit, few, samples=20, progress=False).elpd, log_p, rtol=1e-5)
    tree = ps.to_datatree(fit, few, samples=4, log_likelihood=True)
    np.testing.assert_allclose(tree["log_likelihood"].x, np.broadcast_to(log_p, (1, 4, *log_p.shape)), rtol=1e-5)


# --- mass at a bound ---


class Sparse(Toy):
    law = staticmethod(lambda: dist.Beta(0.1, 0.1))

    def more(self):
        return 2 * pyro.sample("e", self.law())


class SparseShares(Sparse):
    law = staticmethod(lambda: dist.Dirichlet(0.1 * torch.ones(2)))

    def more(self):
        return super().more()[..., 0]


class SmallShapes(Sparse):
    law = staticmethod(lambda: dist.Gamma(0.02, 1.0))


class Even(Sparse):
    law = staticmethod(lambda: dist.Beta(2.0, 2.0))


def drawn(fit):
    return ps.sample_posterior(fit, cells_of(2), samples=2, progress=False)


@pytest.mark.parametrize("kind", [Sparse, SparseShares, SmallShapes])
def test_mass_that_single_precision_cannot_hold_is_warned_of(kind):
    fit = fit_of(toy(kind))
    fit.model.float(), fit.guide.float()
    with pytest.warns(UserWarning, match="% of the distribution of 'e' lies so near"):
        drawn(fit)


@pytest.mark.filterwarnings("error:.*lies so near to a bound")
def test_other_laws_are_not_warned_of():
    fit = fit_of(toy(Even))
    fit.model.float(), fit.guide.float()
    drawn(fit)


@pytest.mark.parametrize(
    "guide", [ps.guides.DiagonalNormal, ps.guides.FullRankNormal, ps.guides.Point, lambda m: ps.guides.PerCell(m, 60)]
)
def test_the_library_size_may_be_the_only_continuous_latent(guide):
    model, cells = Profiles(ps.libraries.LatentLibrary()), cells_of(60)
    fit = ps.fit(model, cells, guide(model), epochs=2, progress=False)
    size = fit.model.library
    law = stats.lognorm(float(size.scale), scale=float(size.loc.exp()))
    total, mass = on_line(law, 1e-3, 60, 4000)
    few = cells.take(range(3))
    with torch.no_grad():
        shares = fit.model.rates.softmax(-1).double().numpy()
    log_p = stats.poisson.logpmf(few.counts[:, None, None], total[:, None, None] * shares).sum(-1) + mass[:, None]
    expected = np.logaddexp.reduce((log_p + WEIGHTS.log().numpy()).reshape(3, -1), 1)
    assert_evidence(fit, few, expected)


# --- latents of other shapes, places and supports ---

UNIFORM = on_line(stats.uniform(-1, 2), -1, 1, 81)


class OfBuffer(Toy):
    """As many latents as a buffer has numbers, the squares of which sum to .5."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.register_buffer("slopes", torch.tensor([0.5, -0.4, 0.3]))

    def more(self):
        e = pyro.sample("e", dist.Normal(torch.zeros_like(self.slopes), 1.0).to_event(1))
        return (e * self.slopes).sum(-1)


class TwoPlates(ps.SCVI):
    """The plate of the cells is entered twice; ``anew`` makes it twice."""

    anew = False

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        plate = cells_plate(gamma, index, n_cells)
        with plate:
            z = pyro.sample("z", self.prior())
        with cells_plate(gamma, index, n_cells) if self.anew else plate:
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + pyro.sample("e", dist.Normal(0.0, 1.0))
            return self.observe(x, theta, marginal=marginal, mask=mask)


class MadeAnew(TwoPlates):
    anew = True


class InDecode(ps.SCVI):
    """A latent that is sampled where z is decoded."""

    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        theta["log_mean"] = theta["log_mean"] + pyro.sample("e", dist.Normal(0.0, 1.0))
        return theta


class Below(Effect):
    """A program that runs another's, with a global latent before it."""

    def forward(self, x, gamma=None, **options):
        pyro.sample("tau", dist.HalfCauchy(1.0))
        return super().forward(x, gamma, **options)


class Matrix(Toy):
    def more(self):
        return pyro.sample("e", dist.Normal(torch.zeros(2, 2), 1.0).to_event(2)).sum((-1, -2)) / 2


class Correlation(Toy):
    """The correlation of two is uniform on [-1, 1] under LKJ(1)."""

    def more(self):
        return pyro.sample("e", dist.LKJCholesky(2, 1.0))[..., 1, 0]


class Shares(Toy):
    def more(self):
        return 2 * pyro.sample("e", dist.Dirichlet(torch.ones(2)))[..., 0] - 1


class HeavyTailed(Toy):
    def more(self):
        return pyro.sample("a", dist.HalfCauchy(0.5)).log1p() - pyro.sample("e", dist.Uniform(-1.0, 1.0))


class SizeOfCluster(ps.libraries.NoLibrary):
    """A library size for each cluster."""

    def forward(self, x, gamma):
        c = pyro.sample("c", dist.Categorical(WEIGHTS.double()), infer={"enumerate": "parallel"})
        return SHIFTS.double()[c]

    def log_mean(self, eta, log_library):
        return eta + log_library


class UnequalParts(Toy):
    def more(self):
        parts = dist.Uniform(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 3.0]))
        return pyro.sample("e", dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), parts))


def on_log_line(law, low, high, n):
    points, _ = on_line(stats.uniform(low, high - low), low, high, n)
    return np.exp(points), law.logpdf(np.exp(points)) + points + np.log((high - low) / n)


HALF_CAUCHY = on_log_line(stats.halfcauchy(scale=0.5), -12, 9, 161)
NORMAL_EFFECT = {"e": STANDARD}, lambda at: at["e"]
UNIFORM_EFFECT = {"e": UNIFORM}, lambda at: at["e"]
OTHERS = {
    OfBuffer: ({"e": STANDARD}, lambda at: 0.5**0.5 * at["e"]),
    TwoPlates: NORMAL_EFFECT,
    InDecode: NORMAL_EFFECT,
    Below: NORMAL_EFFECT,
    Matrix: NORMAL_EFFECT,
    Correlation: UNIFORM_EFFECT,
    Shares: UNIFORM_EFFECT,
    HeavyTailed: ({"a": HALF_CAUCHY, "e": UNIFORM}, lambda at: np.log1p(at["a"]) - at["e"]),
    SizeOfCluster: ({"c": of_values(WEIGHTS)}, lambda at: SHIFTS.numpy()[at["c"].astype(int)]),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_evidence_and_draws_are_those_of_quadrature(kind):
    model = toy(library=kind()) if kind is SizeOfCluster else toy(kind)
    fit, cells = fit_of(model), cells_of(2)
    axes, more = OTHERS[kind]
    grid = grid_of(model, cells, {"z": STANDARD, **axes}, more)
    assert_evidence(fit, cells, grid.log_evidence)
    sampler = ps.Importance(steps=50, rounds=2, proposals=500)
    draws = ps.sample_posterior(fit, cells, samples=500, sampler=sampler, progress=False).z.squeeze("latent")
    mean, sd = grid.moments("z")
    assert (abs(draws.mean("sample") - mean) < 5 * sd / np.sqrt(200)).all()


@pytest.mark.parametrize(
    ("kind", "message"), [(MadeAnew, "'cells' is a plate that is made twice"), (UnequalParts, "'e'")]
)
def test_what_no_trace_or_bijection_has_is_refused(kind, message):
    with pytest.raises(ModelError, match=message):
        fit_of(toy(kind))


def test_constants_in_double_precision_do_not_end_chains():
    class Doubled(Toy):
        def more(self):
            return pyro.sample("e", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1)).sum(-1)

    fit, cells = fit_of(toy(Doubled)), cells_of(2)
    fit.model.float(), fit.guide.float()
    sampler = ps.HMC(chains=2, warmup=4, steps=4, least=4, leapfrog=2)
    assert np.isfinite(ps.sample_posterior(fit, cells, samples=8, sampler=sampler, progress=False).z).all()
    assert np.isfinite(ps.annealed_evidence(fit, cells, chains=4, temperatures=4, progress=False).log_evidence).all()
