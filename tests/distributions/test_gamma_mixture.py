"""Quantiles of Gamma mixtures, against scipy's distribution functions."""

import numpy as np
import pytest
import torch
from scipy.stats import gamma

from pyro_scvi.distributions.gamma_mixture import gamma_mixture_quantiles

P = (0.005, 0.05, 0.5, 0.95, 0.995)


def made(components, n=300):
    rng = np.random.default_rng(components)
    shape, rate = np.exp(rng.normal(0, 1.5, (components, n))), np.exp(rng.normal(0, 2, (components, n)))
    return shape, rate, rng.dirichlet(np.ones(components), n).T


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("components", [1, 2, 25])
def test_the_probability_below_a_quantile(components, p):
    shape, rate, weight = made(components)
    found = gamma_mixture_quantiles(*(torch.tensor(of) for of in (shape, rate, weight)), p).numpy()
    told = found > 1e-30  # where it is no 0 in effect
    assert told.mean() > 0.5
    below = (weight * gamma.cdf(found * rate, shape)).sum(0)
    np.testing.assert_allclose(below[told], p, atol=2e-5)


def test_single_precision_and_the_ends():
    arguments = [torch.tensor(of) for of in made(10)]
    double = gamma_mixture_quantiles(*arguments, 0.5)
    single = gamma_mixture_quantiles(*(of.float() for of in arguments), 0.5)
    torch.testing.assert_close(single.double(), double, rtol=5e-3, atol=1e-6)
    assert (gamma_mixture_quantiles(*arguments, 0.0) == 0).all()
    assert torch.isinf(gamma_mixture_quantiles(*arguments, 1.0)).all()
