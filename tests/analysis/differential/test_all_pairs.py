"""The stated bound on what binning costs, and what is left of it where no bound of that kind holds."""

import numpy as np
import pytest
import torch
from scipy.special import betainc, expit, polygamma

from pyro_scvi.analysis.differential.all_pairs import over_all_pairs
from pyro_scvi.distributions.gamma_ratio import SharedDispersion

R = np.array([0.05, 0.3, 1.0, 4.0, 20.0, 300.0, 1e5])


def draws(n_a=80, n_b=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n_a, 7, generator=generator), 0.2 + 0.8 * torch.randn(n_b, 7, generator=generator)


def over_pairs(a, b):
    """Mean over all pairs of I_sigma(b - a)(r, r), (genes,)."""
    gap = b[None] - a[:, None]
    lower = betainc(R, R, expit(-np.abs(gap)))
    return np.where(gap > 0, 1 - lower, lower).mean((0, 1))


@pytest.mark.parametrize("bins", [8, 32, 200, 2000])
def test_binning_costs_no_more_than_stated(bins):
    a, b = draws()
    found = over_all_pairs(a, b, torch.tensor(R).log().float(), 0.5, bins).p
    a, b = a.double().numpy(), b.double().numpy()
    width = np.ptp(np.concatenate([a, b]), axis=0) / (bins - 1)
    error = np.abs(found - over_pairs(a, b))
    stated = width**2 / (2 * polygamma(1, R)) / 4 + SharedDispersion.ERROR
    assert (error < stated).all()
    if bins == 8:
        assert error.max() > 1e-3  # the bound is of something
    # P rises with b - a, so that moving every log mean by up to d moves it no further than this.
    assert (found <= over_pairs(a - width, b + width) + SharedDispersion.ERROR).all()
    assert (found >= over_pairs(a + width, b - width) - SharedDispersion.ERROR).all()


def test_a_change_counts_in_its_likelier_direction():
    """By hand, in log2: of six gaps 4 are beyond delta upwards and none down; 1 and 3; none and none."""
    a = torch.tensor([[0.0, 0.0, 0.0], [1.0, 4.0, 0.0]]) * np.log(2)
    b = torch.tensor([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0], [3.0, 0.0, 1.0]]) * np.log(2)
    found = over_all_pairs(a, b, torch.zeros(3), 1.001, 64)
    np.testing.assert_allclose(found.p_lfc, [4 / 6, 3 / 6, 0])


def test_unequal_numbers_of_draws_have_their_own_weights():
    a, b = draws(400, 20)
    found = over_all_pairs(a, b, torch.tensor(R).log().float(), 0.5, 2048)
    gap = (b[None] - a[:, None]).double().numpy()
    p = betainc(R, R, expit(gap))
    expected = p.mean(1).var(0, ddof=1) / 400 + p.mean(0).var(0, ddof=1) / 20
    np.testing.assert_allclose(found.se**2, expected, rtol=5e-3)
    assert found.n == 20
