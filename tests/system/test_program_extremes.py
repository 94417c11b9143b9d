"""Programs at the edges: scales far apart, latents that are all summed out, against quadrature and enumeration."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.program import cells_plate, check_inputs, register
from tests.support.toys import N_GENES, WEIGHTS, Toy, cells_of, fit_of, grid_of, on_line, toy

STANDARD = on_line(stats.norm(), -6, 6, 81)


def assert_evidence(fit, cells, expected):
    table = ps.evidence(fit, cells, samples=1000, progress=False)
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


@pytest.mark.parametrize("kind", [Scales, Wider, Narrower])
@pytest.mark.parametrize("single", [False, True])
def test_scales_of_latents_may_be_far_apart(kind, single):
    model, cells = toy(kind), cells_of(3)
    axes = {"z": STANDARD, "a": STANDARD, "b": STANDARD}
    expected = grid_of(model, cells, axes, lambda at: at["a"] + 0.5 * at["b"]).log_evidence
    fit = fit_of(model)
    if single:
        fit.model.float(), fit.guide.float()
    assert_evidence(fit, cells, expected)


def test_chains_and_refined_draws_know_these_scales():
    fit, cells = fit_of(toy(Scales)), cells_of(2)
    for sampler in (ps.Refined(), ps.HMC(chains=2, warmup=30, steps=30, least=30, leapfrog=4)):
        draws = ps.sample_posterior(fit, cells, samples=60, sites=("a", "b"), sampler=sampler, progress=False)
        for name, scale in zip("ab", Scales.scales, strict=True):
            sd = draws[name].std("sample") / scale
            assert ((sd > 0.05) & (sd < 2)).all()


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
