"""The laws of w, y, h and x: the conjugacy identity, moments by rejection, dispersions, libraries, a user's own."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_scvi as ps
from pyro_scvi.analysis.differential.moments import rate_moments
from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.errors import ModelError
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.dispersion import PerGene, PerGeneAndBatch

LIKELIHOODS = [ps.likelihoods.ZINB(), ps.likelihoods.NB(), ps.likelihoods.ZIP(), ps.likelihoods.Poisson()]
MEAN, R, GATE = 1.5, 0.7, 0.3
N = 2_000_000  # draws for moments, at the seed of the test fixture


def named(values):
    return pytest.mark.parametrize("likelihood", values, ids=lambda value: type(value).__name__)


def theta_of(likelihood, log_mean, log_r, gate):
    values = {"log_mean": log_mean, "log_inverse_dispersion": log_r, "gate_logits": gate}
    return {name: values[name] for name in likelihood.heads}


def random_theta(likelihood, cells=40, genes=25):
    gates = torch.tensor([-30.0, -3.0, 0.0, 3.0, 30.0]).repeat(genes // 5).expand(cells, genes)
    log_mean, log_r = 1.5 * torch.randn(cells, genes), 2 * torch.randn(cells, genes)
    log_mean[0], log_r[0] = 2.2, 4.0  # p(0) near exp(-8), which a gate of exp(-30) must not round away
    return theta_of(likelihood, log_mean, log_r, gates)


def log_densities(trace, names):
    trace.compute_log_prob()
    return sum(trace.nodes[name]["log_prob"] for name in names if name in trace.stochastic_nodes)


# --- log p(x, y, w, h | z) - log q*(y, w, h | x, z) = log p(x | z), for every single draw ---


@named(LIKELIHOODS)
@pytest.mark.parametrize("forced", [False, True], ids=["drawn h", "fair h"])
def test_exact_conditionals_obey_the_identity(likelihood, forced, float64):
    theta = random_theta(likelihood)
    x = likelihood.marginal(**theta).sample()
    x[:, :10] = 0.0  # also where a zero is unlikely
    data = {"h": torch.bernoulli(torch.full_like(x, 0.5)) * (x == 0)} if forced else {}
    q = poutine.trace(poutine.condition(likelihood.condition, data=data)).get_trace(x, theta)
    for node in q.nodes.values():  # conditioned or not, h counts as a draw of q
        node["is_observed"] = False
    p = poutine.trace(poutine.replay(likelihood.generate, trace=q)).get_trace(x, theta)
    gap = log_densities(p, "wyhx") - log_densities_of_all(q)
    torch.testing.assert_close(gap, likelihood.marginal(**theta).log_prob(x), rtol=0, atol=1e-10)


def log_densities_of_all(trace):
    trace.compute_log_prob()
    return sum(node["log_prob"] for node in trace.nodes.values() if node["type"] == "sample")


@named(LIKELIHOODS)
def test_heads_name_exactly_what_the_sites_need(likelihood):
    x = torch.zeros(2, 3)
    theta = {name: torch.zeros(2, 3) for name in likelihood.heads}
    sites = set(poutine.trace(likelihood.generate).get_trace(None, theta).stochastic_nodes)
    guided = set(poutine.trace(likelihood.condition).get_trace(x, theta).stochastic_nodes)
    assert sites == guided | {"x"}
    assert ("h" in sites) == ("gate_logits" in likelihood.heads)
    assert ("w" in sites) == ("log_inverse_dispersion" in likelihood.heads)


# --- moments of the exact conditionals against rejection: draws of the program whose x came out right ---


def moments(values):
    """Mean, variance and the standard error of each."""
    mean, variance, n = values.mean(), values.var(), len(values)
    fourth = ((values - mean) ** 4).mean()
    return torch.stack([mean, variance]), torch.stack([variance, fourth - variance**2]).div(n).sqrt()


@named(LIKELIHOODS)
@pytest.mark.parametrize("seen", [0.0, 2.0])
def test_conditional_moments_agree_with_rejection(likelihood, seen, float64):
    columns = (torch.full((N,), value) for value in (math.log(MEAN), math.log(R), GATE))
    theta = theta_of(likelihood, *columns)
    program = poutine.trace(likelihood.generate).get_trace(None, theta).nodes
    accepted = program["x"]["value"] == seen
    assert accepted.sum() > 50_000
    guide = poutine.trace(likelihood.condition).get_trace(torch.full((N,), seen), theta).nodes
    for name in "wyh":
        if name not in guide:
            continue
        expected, se = moments(program[name]["value"][accepted])
        found, se_found = moments(guide[name]["value"])
        assert ((found - expected).abs() <= 4 * (se**2 + se_found**2).sqrt() + 1e-12).all(), name


def test_conditional_means_by_formula(float64):
    likelihood = ps.likelihoods.ZINB()
    theta = theta_of(likelihood, *(torch.full((N,), v) for v in (math.log(MEAN), math.log(R), GATE)))
    rho = torch.sigmoid(likelihood.technical_zero_logits(**theta))[0]
    p0 = (1 + MEAN / R) ** -R
    pi = 1 / (1 + math.exp(-GATE))
    assert rho.item() == pytest.approx(pi / (pi + (1 - pi) * p0), rel=1e-12)
    nodes = poutine.trace(likelihood.condition).get_trace(torch.zeros(N), theta).nodes
    for name, expected in {"h": rho, "y": rho * MEAN, "w": rho * MEAN + (1 - rho) * R * MEAN / (R + MEAN)}.items():
        values = nodes[name]["value"]
        assert abs(values.mean() - expected) < 4.5 * values.std() / N**0.5, name


@pytest.mark.parametrize("log_r", [-200.0, -95.0, 95.0, 241.0])
@pytest.mark.parametrize("log_mean", [-146.0, -3.0, 6.0])
def test_conditionals_are_numbers_where_a_dispersion_overflows(log_r, log_mean):
    """As a decoder gives for a draw far out; with r without bound, w is its mean."""
    theta = {
        name: torch.tensor([[[value]]]) for name, value in (("log_mean", log_mean), ("log_inverse_dispersion", log_r))
    }
    zinb = ps.likelihoods.ZINB()
    for x in (0.0, 3.0):
        for gate in (-300.0, 0.0):
            full = theta | {"gate_logits": torch.tensor([[[gate]]])}
            mean = zinb.expected_rate(torch.tensor([[x]]), full)
            moments = rate_moments(zinb, torch.tensor([[x]]), full)
            assert all(bool(value.isfinite().all()) for value in (mean, *moments))
            if log_r > 0 and log_mean > -100:
                assert mean.item() == pytest.approx(math.exp(log_mean), rel=1e-5)


@named(LIKELIHOODS)
def test_generated_counts_follow_the_marginal(likelihood, float64):
    theta = theta_of(likelihood, *(torch.full((N,), v) for v in (math.log(MEAN), math.log(R), GATE)))
    x = likelihood.generate(None, theta)
    p = likelihood.marginal(**{k: v[:1] for k, v in theta.items()}).log_prob(torch.arange(6.0)).exp()
    frequency = torch.stack([(x == k).double().mean() for k in range(6)])
    assert ((frequency - p).abs() < 4.5 * (p * (1 - p) / N).sqrt()).all()


# --- dispersions ---


def test_dispersion_per_cell_and_gene_is_a_head():
    eta = {"log_mean": torch.zeros(4, 3), "log_inverse_dispersion": torch.randn(4, 3)}
    theta = ps.likelihoods.NB().theta(eta, torch.zeros(4, 0))
    assert theta["log_inverse_dispersion"] is eta["log_inverse_dispersion"]


def test_dispersion_per_gene_is_a_parameter():
    likelihood = ps.likelihoods.ZINB(PerGene(3))
    assert likelihood.heads == ("log_mean", "gate_logits")
    theta = likelihood.theta({"log_mean": torch.zeros(4, 3), "gate_logits": torch.zeros(4, 3)}, torch.zeros(4, 0))
    assert theta["log_inverse_dispersion"].shape == (3,)
    assert likelihood.marginal(**theta).batch_shape == (4, 3)
    assert [name for name, _ in likelihood.named_parameters()] == ["dispersion.log_inverse_dispersion"]


def test_dispersion_per_gene_and_batch_takes_the_row_of_the_batch():
    likelihood = ps.likelihoods.NB(PerGeneAndBatch(3, n_batches=2))
    rows = torch.arange(6.0).reshape(2, 3)
    likelihood.dispersion.log_inverse_dispersion.data.copy_(rows)
    gamma = torch.tensor([[0.0, 1.0, 7.0], [1.0, 0.0, -2.0], [0.0, 1.0, 0.5]])
    theta = likelihood.theta({"log_mean": torch.zeros(3, 3)}, gamma)
    torch.testing.assert_close(theta["log_inverse_dispersion"], rows[[1, 0, 1]])
    with pytest.raises(ModelError, match="expects 2 batch columns in gamma, got 1"):
        likelihood.theta({"log_mean": torch.zeros(3, 3)}, gamma[:, :1])


# --- libraries ---


def test_no_library_leaves_the_mean_to_the_head():
    library, eta = ps.libraries.NoLibrary(), torch.randn(4, 3)
    assert library(torch.ones(4, 3), torch.zeros(4, 0)) is None
    assert library.log_mean(eta, None) is eta


def test_observed_library_is_the_total_shared_out_over_genes():
    library, x = ps.libraries.ObservedLibrary(), torch.tensor([[1.0, 2.0, 5.0], [0.0, 0.0, 0.0]])
    log_library = library(x, torch.zeros(2, 0))
    torch.testing.assert_close(log_library.exp(), torch.tensor([[8.0], [1.0]]))
    means = library.log_mean(torch.randn(2, 3), log_library).exp()
    torch.testing.assert_close(means.sum(-1), torch.tensor([8.0, 1.0]))
    assert library(None, torch.zeros(5, 0)).shape == (5, 1)


def test_latent_library_is_a_site_with_the_law_of_its_batch():
    library = ps.libraries.LatentLibrary(loc=[2.0, 5.0], scale=[0.5, 0.1])
    gamma = torch.tensor([[0.0, 1.0, 9.0], [1.0, 0.0, 9.0]])
    site = poutine.trace(library).get_trace(None, gamma).nodes["l"]
    expected = dist.LogNormal(torch.tensor([[5.0], [2.0]]), torch.tensor([[0.1], [0.5]]))
    torch.testing.assert_close(site["fn"].log_prob(site["value"]), expected.log_prob(site["value"]))
    conditioned = poutine.condition(library, data={"l": torch.full((2, 1), 100.0)})
    means = library.log_mean(torch.randn(2, 4), conditioned(None, gamma)).exp()
    torch.testing.assert_close(means.sum(-1), torch.full((2,), 100.0))


def test_one_half_of_a_librarys_law_may_be_given():
    totals = torch.tensor([10.0, 100.0, 1000.0])
    located, scaled = ps.libraries.LatentLibrary(loc=6.0), ps.libraries.LatentLibrary(scale=[0.5, 0.7])
    for library in (located, scaled):
        library.start_from(totals, torch.zeros(3, 0))
    assert located.loc.tolist() == [6.0]
    assert float(located.scale) == pytest.approx(float(totals.log().std(correction=0)))
    assert scaled.scale.tolist() == pytest.approx([0.5, 0.7])
    assert scaled.loc.tolist() == pytest.approx([float(totals.log().mean())] * 2)
    with pytest.raises(ModelError, match="one entry per batch each, got 2 and 3"):
        ps.libraries.LatentLibrary(loc=[4.0, 5.0], scale=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("library", [ps.libraries.LatentLibrary, ps.libraries.ObservedLibrary])
def test_library_takes_its_law_from_the_totals_unless_it_was_given(library):
    totals = torch.tensor([10.0, 100.0, 1000.0])
    learning, given = library(), library(1.0, 0.5)
    for each in (learning, given):
        each.start_from(totals, torch.zeros(3, 0))
    assert learning.loc.item() == pytest.approx(math.log(100))
    assert learning.scale.item() == pytest.approx(math.log(10) * (2 / 3) ** 0.5)
    assert (given.loc.item(), given.scale.item()) == (1.0, 0.5)


# --- a user's own ---


class Geometric(Likelihood):
    """x ~ Geometric with mean mu: a negative binomial whose r is 1."""

    heads = ("log_mean",)

    def marginal(self, log_mean):
        return dist.Geometric(logits=-log_mean)

    def rate(self, log_mean):
        return dist.Exponential((-log_mean).exp())


class SharedGate(Likelihood):
    """One probability of technical zeros for all genes, a parameter of the likelihood."""

    heads = ("log_mean",)
    explicit = True

    def __init__(self):
        super().__init__()
        self.gate = torch.nn.Parameter(torch.tensor(-1.0))

    def theta(self, eta, gamma):
        return {**eta, "gate_logits": self.gate.expand(eta["log_mean"].shape)}

    def marginal(self, log_mean, gate_logits):
        return ps.likelihoods.ZIP().marginal(log_mean, gate_logits)


def test_geometric_is_the_negative_binomial_of_r_one():
    x, log_mean = torch.arange(5.0), torch.randn(5)
    torch.testing.assert_close(
        Geometric().marginal(log_mean).log_prob(x), NegativeBinomial(log_mean, torch.zeros(5)).log_prob(x)
    )


@pytest.mark.filterwarnings("ignore:k-hat")
@named([Geometric(), SharedGate()])
def test_user_written_likelihood_fits_embeds_and_has_evidence(likelihood, cells):
    model = ps.SCVI(cells.n_genes, 2, likelihood=likelihood, n_hidden=8)
    fit = ps.fit(model, cells, ps.guides.DiagonalNormal(model, n_hidden=8), epochs=15, batch_size=60, progress=False)
    assert fit.history.train_loss.iloc[-3:].mean() < fit.history.train_loss.iloc[:3].mean() - 1
    assert ps.embed(fit, cells).shape == (60, 2)
    found = ps.evidence(fit, cells.take(range(4)), samples=100, steps=5, rounds=1)
    assert torch.isfinite(torch.tensor(found.log_evidence.to_numpy())).all()


def test_user_written_likelihood_with_technical_zeros_inherits_the_explicit_program(float64):
    likelihood = SharedGate()
    theta = likelihood.theta({"log_mean": torch.randn(6, 4)}, torch.zeros(6, 0))
    x = pyro.distributions.Poisson(torch.ones(6, 4)).sample()
    q = poutine.trace(likelihood.condition).get_trace(x, theta)
    p = poutine.trace(poutine.replay(likelihood.generate, trace=q)).get_trace(x, theta)
    gap = log_densities(p, "wyhx") - log_densities_of_all(q)
    torch.testing.assert_close(gap, likelihood.marginal(**theta).log_prob(x), rtol=0, atol=1e-10)


def test_an_unfinished_likelihood_says_what_it_lacks():
    class NoHeads(Likelihood):
        pass

    class OtherHeads(Likelihood):
        heads = ("rate",)

    class NoMarginal(Likelihood):
        heads = ("log_mean",)

    with pytest.raises(NotImplementedError, match=r'NoHeads has no heads; .* heads = \("log_mean",\)'):
        ps.SCVI(7, 2, likelihood=NoHeads())
    with pytest.raises(ModelError, match=r"OtherHeads has the heads \('rate',\); one of them must be 'log_mean'"):
        ps.SCVI(7, 2, likelihood=OtherHeads())
    with pytest.raises(NotImplementedError, match="NoMarginal has no method marginal"):
        ps.SCVI(7, 2, likelihood=NoMarginal()).sites(marginal=True)
