"""Evidence against quadrature and closed forms, its standard errors, and its warnings."""

import importlib
import itertools
import math

import numpy as np
import pandas as pd
import pyro.distributions as dist
import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.inference import modes

PRIORS = {
    "normal": lambda: ps.priors.StandardNormal(1),
    "student-t": lambda: ps.priors.StudentT(1, df=3.0),
    "mixture": lambda: ps.priors.GaussianMixture(1, components=3, seed=1),
}


def one_latent_fit(prior, library=None, dtype=torch.float64):
    generator = np.random.default_rng(0)
    cells = ps.Cells.from_counts(generator.poisson(generator.gamma(1.0, 2.0, size=(40, 12))))
    model = ps.SCVI(12, 1, prior=prior, library=library or ps.libraries.NoLibrary(), n_hidden=8, norm=None)
    return ps.fit(model, cells, epochs=20, validation=0, progress=False, dtype=dtype, device="cpu"), cells


def quadrature(fit, cells, points=4001, width=40.0):
    """Log p(x) by the trapezoidal rule over one latent."""
    x, gamma = (tensor.double() for tensor in cells[:])
    z = torch.linspace(-width, width, points, dtype=torch.float64)
    theta = fit.model.decode(z[:, None, None, None].expand(-1, len(x), 1, 1), None, gamma)
    log_joint = (
        fit.model.likelihood.marginal(**theta).log_prob(x).sum(-1) + fit.model.prior().log_prob(z[:, None])[:, None]
    )
    return (log_joint.logsumexp(0) + math.log(2 * width / (points - 1))).detach().numpy()


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_evidence_matches_quadrature(prior):
    fit, cells = one_latent_fit(prior())
    table = ps.evidence(fit, cells, samples=2000)
    error = (table.log_evidence - quadrature(fit, cells)) / table.se
    # 40 cells: the largest of as many standard normals exceeds 4 with probability 0.003.
    assert error.abs().max() < 4
    assert (error**2).mean() < 2.2
    assert table.se.max() < 0.1


def test_evidence_with_a_latent_library_matches_quadrature():
    fit, cells = one_latent_fit(ps.priors.StandardNormal(1), ps.libraries.LatentLibrary())
    table = ps.evidence(fit, cells, samples=2000)
    x, gamma = (tensor.double() for tensor in cells[:])
    z = torch.linspace(-8, 8, 201, dtype=torch.float64)
    nodes, weights = hermegauss(60)
    log_l = fit.model.library.loc.double() + fit.model.library.scale.double() * torch.as_tensor(nodes)
    weight = torch.as_tensor(weights).log() - 0.5 * math.log(2 * math.pi)
    rows = []
    for z_value in z:
        at = z_value.expand(60, len(x), 1, 1)
        theta = fit.model.decode(at, log_l[:, None, None].expand(-1, len(x), 1), gamma)
        log_p = fit.model.likelihood.marginal(**theta).log_prob(x).sum(-1)
        rows.append((log_p + weight[:, None]).logsumexp(0) + fit.model.prior().log_prob(z_value[None]))
    expected = (torch.stack(rows).logsumexp(0) + math.log(16 / 200)).detach().numpy()
    assert ((table.log_evidence - expected).abs() / table.se).max() < 4.5


def test_the_amortized_bound_is_a_bound_and_the_evidence_tightens_it():
    fit, cells = one_latent_fit(ps.priors.StandardNormal(1))
    table = ps.evidence(fit, cells, samples=500)
    assert (table.amortized_bound < table.log_evidence + 0.5).all()
    assert table.log_evidence.mean() > table.amortized_bound.mean()


def test_evidence_on_the_simplex_counts_the_jacobian():
    """A Dirichlet(1, 1) prior is uniform on [0, 1], so that quadrature over the first proportion is exact."""
    generator = np.random.default_rng(1)
    cells = ps.Cells.from_counts(generator.poisson(3.0, size=(30, 10)))
    model = ps.SCVI(10, 2, prior=ps.priors.Dirichlet(2), library=ps.libraries.NoLibrary(), n_hidden=8, norm=None)
    fit = ps.fit(model, cells, epochs=10, validation=0, progress=False, dtype=torch.float64, device="cpu")
    table = ps.evidence(fit, cells, samples=2000)
    x, gamma = (tensor.double() for tensor in cells[:])
    first = (torch.arange(2000, dtype=torch.float64) + 0.5) / 2000
    z = torch.stack([first, 1 - first], -1)[:, None, None].expand(-1, len(x), 1, 2)
    log_p = fit.model.likelihood.marginal(**fit.model.decode(z, None, gamma)).log_prob(x).sum(-1)
    expected = (log_p.logsumexp(0) - math.log(2000)).detach().numpy()
    assert ((table.log_evidence - expected).abs() / table.se).max() < 4


def test_evidence_with_an_observed_library_says_that_it_is_conditional():
    fit, cells = one_latent_fit(ps.priors.StandardNormal(1), ps.libraries.ObservedLibrary(3.0, 0.5))
    x, gamma = (tensor.double() for tensor in cells[:])
    z = torch.linspace(-12, 12, 2001, dtype=torch.float64)
    at = z[:, None, None, None].expand(-1, len(x), 1, 1)
    theta = fit.model.decode(at, x.sum(-1, keepdim=True).log(), gamma)
    log_p = fit.model.likelihood.marginal(**theta).log_prob(x).sum(-1) + fit.model.prior().log_prob(z[:, None])[:, None]
    conditional = (log_p.logsumexp(0) + math.log(24 / 2000)).detach().numpy()
    with pytest.warns(UserWarning, match="given their total"):
        table = ps.evidence(fit, cells, samples=1000)
    assert table.attrs["conditional_on_total"]
    assert ((table.log_evidence - conditional).abs() / table.se).max() < 4.5


def counts_fit(kind=ps.SCVI, likelihood=None, library=None):
    cells = ps.Cells.from_counts(np.array(list(itertools.product(range(24), repeat=2))))
    model = kind(2, 1, library=library, likelihood=likelihood or ps.likelihoods.Poisson(), n_hidden=4)
    return ps.fit(model, cells.take(range(50)), epochs=1, progress=False, validation=0), cells


@pytest.mark.filterwarnings("ignore:1 cell has no counts")
def test_poisson_counts_and_their_observed_total_have_evidence_that_sums_to_one():
    fit, cells = counts_fit(library=ps.libraries.ObservedLibrary(loc=1.5, scale=0.5))
    table = ps.evidence(fit, cells, samples=60, steps=10, rounds=1, progress=False, batch_size=600)
    assert not table.attrs["conditional_on_total"]
    assert np.exp(table.log_evidence).sum() == pytest.approx(1, abs=0.02)


class OwnMeans(ps.SCVI):
    def decode(self, z, log_library, gamma):
        theta = super().decode(z, log_library, gamma)
        return theta | {"log_mean": theta["log_mean"] + 1}


@pytest.mark.filterwarnings("ignore:1 cell has no counts")
@pytest.mark.parametrize(
    ("kind", "likelihood"), [(ps.SCVI, ps.likelihoods.NB()), (ps.SCVI, ps.likelihoods.ZIP()), (OwnMeans, None)]
)
def test_evidence_given_the_total_is_not_compared_with_others(kind, likelihood):
    observed, cells = counts_fit(kind, likelihood, ps.libraries.ObservedLibrary())
    latent, _ = counts_fit(kind, likelihood)
    with pytest.raises(ps.errors.ModelError, match="given the total"):
        ps.compare({"a": latent, "b": observed}, cells)
    poisson, _ = counts_fit(library=ps.libraries.ObservedLibrary())
    with pytest.raises(ps.errors.ModelError, match=r"\['b'\]"):
        ps.compare({"a": poisson, "b": [observed, observed]}, cells)


@pytest.mark.filterwarnings("ignore:k-hat")
@pytest.mark.parametrize(
    "law", [lambda o: dist.HalfNormal(o), lambda o: dist.Gamma(2 * o, o), lambda o: dist.Exponential(o)]
)
def test_priors_on_the_half_line_have_finite_evidence(law, cells):
    model = ps.SCVI(20, 3, prior=lambda: law(torch.ones(3)).to_event(1), n_hidden=8)
    with torch.no_grad():
        for head in model.decoder.heads.values():
            head.weight.mul_(30)  # parameters beyond what float32 can hold, a few standard deviations out
    fit = ps.fit(model, cells, epochs=2, progress=False, learning_rate=ps.schedules.Constant(1e-4))
    table = ps.evidence(fit, cells, samples=100)
    assert np.isfinite(table[["log_evidence", "se", "ess"]]).all(axis=None)


def test_evidence_of_a_flat_prior_is_refused():
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(2.0, size=(20, 6)))
    model = ps.SCVI(6, 2, prior=ps.priors.Flat(2), n_hidden=8)
    fit = ps.fit(model, cells, ps.guides.Point(model), epochs=2, progress=False)
    with pytest.raises(ModelError, match="Flat"):
        ps.evidence(fit, cells)


def test_evidence_is_reproducible_names_cells_and_leaves_the_model_as_it_was():
    fit, cells = one_latent_fit(ps.priors.StandardNormal(1))
    fit.model.train()
    before = torch.get_rng_state()
    first, second = (ps.evidence(fit, cells, samples=100, seed=2) for _ in range(2))
    assert first.equals(second)
    assert fit.model.training
    assert torch.equal(before, torch.get_rng_state())
    assert list(first.index) == list(cells.cell_names)
    assert not ps.evidence(fit, cells, samples=100, seed=3).log_evidence.equals(first.log_evidence)


def test_what_cannot_be_vouched_for_is_said():
    fit, cells = one_latent_fit(ps.priors.StandardNormal(1))
    with pytest.warns(UserWarning, match="k-hat"):
        ps.evidence(fit, cells, samples=10)  # too few draws for a tail


def test_a_user_prior_is_integrated_too():
    fit, cells = one_latent_fit(lambda: dist.Normal(torch.zeros(1, dtype=torch.float64) + 1.0, 0.5).to_event(1))
    table = ps.evidence(fit, cells, samples=1000)
    assert ((table.log_evidence - quadrature(fit, cells, width=12)).abs() / table.se).max() < 4


class Mirrored(ps.SCVI):
    def decode(self, z, log_library, gamma):
        return super().decode(10 * z.square(), log_library, gamma)


@pytest.mark.filterwarnings("ignore:.*no counts", "ignore:k-hat")
def test_modes_that_the_proposals_miss_are_found_by_annealing(monkeypatch):
    model = Mirrored(8, 1, library=ps.libraries.NoLibrary(), likelihood=ps.likelihoods.Poisson(), n_hidden=4, norm=None)
    torch.manual_seed(0)
    with torch.no_grad():
        for head in model.decoder.heads.values():
            head.weight.normal_(0, 0.3)
    counts = ps.prior_predictive(model, 300, seed=1)
    far = counts.sum(1).argsort()[260:276]  # large counts, whose z is far from 0
    cells = ps.Cells.from_counts(counts[far].astype(int))
    fit = ps.fit(model, cells, epochs=1, progress=False, learning_rate=ps.schedules.Constant(1e-6), data_start=False)
    monkeypatch.setattr(modes, "VALLEY", math.inf)  # no mode is separate
    module = importlib.import_module("pyro_scvi.analysis.evidence.evidence")
    monkeypatch.setattr(module, "CELLS_FOR_A_CHECK", 1)
    monkeypatch.setattr(module, "MOST_CHECKED", 16)
    with pytest.warns(UserWarning, match="annealing finds"):
        ps.evidence(fit, cells, samples=400, progress=False)


class Shifted(ps.libraries.ObservedLibrary):
    """An observed total that the means do not sum to."""

    def log_mean(self, eta, log_library):
        return super().log_mean(eta, log_library) + 1.0


class Scaled(ps.SCVI):
    def observe(self, x, theta, **options):
        return super().observe(x, theta | {"log_mean": theta["log_mean"] + 1.0}, **options)


@pytest.mark.filterwarnings("ignore:k-hat")
@pytest.mark.parametrize(("kind", "library"), [(ps.SCVI, Shifted), (Scaled, ps.libraries.ObservedLibrary)])
def test_poisson_counts_of_other_means_than_the_total_are_conditional_on_it(cells, kind, library):
    model = kind(cells.n_genes, 2, likelihood=ps.likelihoods.Poisson(), library=library(), n_hidden=8, n_layers=1)
    guide = ps.guides.DiagonalNormal(model)
    fit = ps.Fit(model.eval(), guide.eval(), pd.DataFrame(), cells.schema)
    with pytest.warns(UserWarning, match="evidence of the counts given their total"):
        assert ps.evidence(fit, cells.take(range(3)), samples=20).attrs["conditional_on_total"]


def test_few_cells_with_several_modes_are_annealed():
    module = importlib.import_module("pyro_scvi.analysis.evidence.evidence")
    several = np.zeros(30, bool)
    assert module._checked_rows(several) == []
    several[[4, 9]] = True
    assert module._checked_rows(several) == [4]
    assert len(module._checked_rows(np.ones(100, bool))) == 2
    assert module._checked_rows(np.zeros(400, bool)) == [0, 200]
