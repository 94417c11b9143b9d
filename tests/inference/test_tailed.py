"""Proposals for priors with heavy tails: density and draws, which priors have them, and evidence by quadrature."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.inference.importance import Mixture, Proposal
from pyro_scvi.inference.tailed import Tailed, reaching
from pyro_scvi.utils.random_state import seeded
from tests.support.toys import Toy, fit_of, grid_of, on_line, toy

LOC = torch.tensor([[1.0, -2.0]]).double()
TRIL = torch.tensor([[[0.5, 0.0], [0.3, 0.4]]]).double()
HEAVY = torch.tensor([False, True])


def mixture():
    parts = Proposal(torch.stack([LOC, LOC + 3]), torch.stack([TRIL, 0.5 * TRIL]))
    return Mixture(parts, torch.tensor([[0.7], [0.3]]).double().log())


@pytest.mark.parametrize("core", [Proposal(LOC, TRIL), mixture()])
def test_the_density_is_that_of_the_draws(core):
    """By the mass of boxes: inside, along the tail, and across it."""
    tailed = reaching(core, HEAVY)
    first = torch.linspace(-30, 30, 1201).double()
    second = (torch.linspace(-9, 9, 1201).double()).sinh()
    grid = torch.stack(torch.meshgrid(first, second, indexing="ij"), -1)
    mass = tailed.log_prob(grid.reshape(-1, 1, 2)).exp().reshape(1201, 1201)
    mass = mass * 0.05 * 0.015 * (1 + second.square()).sqrt()
    assert float(mass.sum()) == pytest.approx(1, abs=0.01)
    with seeded(0):
        draws = tailed.sample(40_000)[:, 0]
    for low, high in ((-3, -1), (-100, -10), (10, 100)):
        inside = (second > low) & (second < high)
        found = ((draws[:, 1] > low) & (draws[:, 1] < high)).double().mean()
        expected = float(mass[:, inside].sum())
        assert abs(float(found) - expected) < 5 * (expected / 40_000) ** 0.5 + 0.02 * expected


def test_proposals_stay_what_they_are_where_no_tail_is_heavy():
    core = Proposal(LOC, TRIL)
    assert reaching(core, torch.zeros(2, dtype=torch.bool)) is core
    assert isinstance(reaching(core, HEAVY), Tailed)


def of_parts(law):
    return dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), law(torch.zeros(2), torch.tensor([1.0, 2.0])))


@pytest.mark.parametrize(
    ("law", "heavy"),
    [
        (lambda: dist.StudentT(1.5, 0.0, 3.0), True),
        (lambda: dist.Cauchy(100.0, 0.1), True),
        (lambda: dist.TransformedDistribution(dist.StudentT(3.0), dist.transforms.ExpTransform()), True),
        (lambda: of_parts(dist.Cauchy), True),
        (lambda: of_parts(dist.Normal), False),
        (lambda: dist.StudentT(30.0), False),
        (lambda: dist.Normal(1e4, 1e-3), False),
        (lambda: dist.Laplace(0.0, 5.0), False),
        (lambda: dist.LogNormal(0.0, 2.0), False),
        (lambda: dist.HalfCauchy(0.5), False),  # its logarithm has exponential tails
        (lambda: dist.Gamma(0.1, 1.0), False),
        (lambda: dist.Beta(0.5, 0.5), False),
        (lambda: dist.Uniform(-1.0, 1.0), False),
    ],
)
def test_tails_are_judged_by_the_density_of_coordinates(law, heavy):
    class Of(Toy):
        def more(self):
            return 0 * pyro.sample("e", law())

    assert fit_of(toy(Of)).guide.heavy_tailed.tolist() == [False, heavy]


def test_tails_are_judged_for_each_coordinate():
    law = dist.Normal(torch.zeros(3), 1.0)
    model = ps.SCVI(5, 3, prior=lambda: law.to_event(1))
    assert not ps.guides.DiagonalNormal(model).heavy_tailed.any()
    heavy = ps.SCVI(5, 3, prior=ps.priors.StudentT(3), library=ps.libraries.LatentLibrary())
    assert ps.guides.DiagonalNormal(heavy).heavy_tailed.tolist() == [True, True, True, False]


def with_effect(df):
    class WithEffect(Toy):
        def more(self):
            return pyro.sample("e", dist.StudentT(df, 0.0, 1.0))

    return WithEffect


def on_sinh_line(law, far, n):
    """Midpoints, dense near 0, and the log of a law's mass around each."""
    edges = np.linspace(-np.arcsinh(far), np.arcsinh(far), n + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    return np.sinh(middle), law.logpdf(np.sinh(middle)) + np.log(np.cosh(middle)) + np.log(edges[1] - edges[0])


@pytest.mark.filterwarnings("ignore:1 cell has no counts", "ignore:k-hat is above")
@pytest.mark.parametrize("df", [1.0, 1.5])
def test_evidence_has_the_mass_in_the_tails_of_the_prior(df):
    """Of a cell without counts, half of the prior of e counts: without the tails .1 and .03 nats are missed."""
    fit, cells = fit_of(toy(with_effect(df))), ps.Cells.from_counts(np.array([[0, 0, 0, 0], [1, 2, 1, 1]]))
    axes = {"z": on_line(stats.norm(), -7, 7, 141), "e": on_sinh_line(stats.t(df), 1e7, 3001)}
    expected = grid_of(fit.model, cells, axes, lambda at: np.minimum(at["e"], 50)).log_evidence
    tables = [ps.evidence(fit, cells, seed=seed, progress=False) for seed in range(6)]
    error = np.array([table.log_evidence - expected for table in tables])
    assert (abs(error / [table.se for table in tables]) < 5).all()
    assert (abs(error.mean(0)) < (0.06 if df == 1 else 0.04)).all()
