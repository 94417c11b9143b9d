"""Supports behind wrappers and mixtures, and when two of them are one."""

import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to

import pyro_scvi as ps
from pyro_scvi.distributions.supports import require_coordinates, same_coordinates, support_of, varying_entries
from tests.system.test_combinations import PRIORS

EACH = dist.Categorical(torch.ones(3, 2))
REAL = constraints.independent(constraints.real, 1)
LAWS = {
    "normal": (dist.Normal(torch.zeros(3), 1.0).to_event(1), REAL),
    "mixture": (dist.MixtureSameFamily(EACH, dist.Normal(torch.zeros(3, 2), 1.0)).to_event(1), REAL),
    "expanded mixture": (
        dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2), 1.0))
        .expand([3])
        .to_event(1),
        REAL,
    ),
    "mixture of intervals": (
        dist.MixtureSameFamily(EACH, dist.Uniform(torch.zeros(3, 2), torch.tensor(2.0).expand(3, 2))).to_event(1),
        constraints.independent(constraints.interval(torch.zeros(3), torch.full((3,), 2.0)), 1),
    ),
    "masked exponential": (
        dist.Exponential(torch.ones(3)).mask(True).to_event(1),
        constraints.independent(constraints.positive, 1),
    ),
    "logit of a uniform": (
        dist.TransformedDistribution(
            dist.Uniform(torch.zeros(3), torch.ones(3)), [dist.transforms.SigmoidTransform().inv]
        ).to_event(1),
        REAL,
    ),
}


@pytest.mark.parametrize("law", LAWS)
def test_support(law):
    law, expected = LAWS[law]
    require_coordinates(law, "the law")
    found = support_of(law)
    assert same_coordinates(found, expected, (3,))
    value = biject_to(found)(torch.zeros(3))
    assert value.shape == (3,)
    assert torch.isfinite(law.log_prob(value)).all()


def test_of_the_package_s_priors():
    for name in set(PRIORS) - {"VampPrior"}:
        law = getattr(ps.priors, name)(3)()
        require_coordinates(law, name)
        assert same_coordinates(support_of(law), support_of(law), (3,))


def test_supports_that_differ():
    interval = constraints.independent(constraints.interval(0.0, 2.0), 1)
    unit = constraints.independent(constraints.unit_interval, 1)
    different = [REAL, interval, unit, constraints.independent(constraints.positive, 1), constraints.simplex]
    for i, one in enumerate(different):
        for j, other in enumerate(different):
            assert same_coordinates(one, other, (3,)) == (i == j)


def test_entries_that_all_values_share_are_known():
    lower = torch.ones(3, 3).tril().bool()
    lower[0, 0] = False  # it is 1
    assert torch.equal(varying_entries(dist.LKJCholesky(3, 1.0).support, (3, 3)), lower)
    assert torch.equal(varying_entries(constraints.corr_matrix, (3, 3)), ~torch.eye(3).bool())
    bounds = constraints.interval(torch.zeros(2), torch.ones(2))
    for support in (constraints.simplex, constraints.ordered_vector, constraints.real, bounds):
        assert varying_entries(support, (2,)).all()
    assert varying_entries(constraints.positive, ())
