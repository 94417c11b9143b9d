"""P(w_a < w_b) from the table of a shared dispersion, and over all pairs, against the incomplete beta function."""

import numpy as np
import pytest
import torch
from scipy.special import betainc, betaln, expit

from pyro_scvi.analysis.differential.all_pairs import AllPairs, over_all_pairs
from pyro_scvi.distributions.gamma_ratio import SharedDispersion, Side, less_for, probability_less
from pyro_scvi.errors import ModelError

LOG_R = torch.tensor([-14.0, -7.0, -2.0, -0.5, 0.0, 0.7, 2.0, 4.0, 8.0, 13.0, 18.0])


def exact(gap, log_r):
    """I_sigma(gap)(r, r) from the smaller share of the two, where the digits are; far out by its first term."""
    r = np.exp(log_r)
    far = np.exp(np.minimum(-r * np.abs(gap) - log_r - betaln(r, r), 0))
    lower = np.where(np.abs(gap) > 40, far, betainc(r, r, expit(-np.abs(gap))))
    return np.where(gap > 0, 1 - lower, lower)


@pytest.mark.parametrize("reach", [0.5, 3.0, 12.0])
def test_the_table_errs_by_less_than_it_states(reach):
    """Gaps up to ``reach`` standard deviations of log (w_b / w_a), for r from 1e-6 to 7e7."""
    table = SharedDispersion(LOG_R)
    steps = torch.linspace(-reach, reach, 4001)[:, None]
    gap = steps / table.per_unit * (table.STEPS / table.REACH)
    found = table.at(gap).double().numpy()
    error = np.abs(found - exact(gap.double().numpy(), LOG_R.double().numpy()))
    assert error.max() < SharedDispersion.ERROR
    assert error.max() > 1e-8  # it is a table: an error of nothing would mean that nothing was compared
    np.testing.assert_allclose(found + table.at(-gap).double().numpy(), 1, atol=1e-7)


def test_equal_means_have_a_half_and_far_ones_certainty():
    table = SharedDispersion(LOG_R)
    np.testing.assert_array_equal(table.at(torch.zeros(1, len(LOG_R))), 0.5)
    ends = table.at(torch.tensor([[-1e9], [1e9]]).expand(2, len(LOG_R)))
    np.testing.assert_allclose(ends, [[0.0] * len(LOG_R), [1.0] * len(LOG_R)], atol=SharedDispersion.ERROR)
    assert torch.isnan(table.at(torch.full((1, len(LOG_R)), torch.nan))).all()


def test_the_fastest_exact_way_is_taken():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(7, len(LOG_R), generator=generator) for _ in range(2))
    shared, own = Side(a, LOG_R), Side(a, LOG_R.expand(7, -1))
    assert isinstance(less_for(shared), SharedDispersion)
    assert less_for(own) is probability_less
    assert less_for(Side(a, None)) is probability_less
    by_table = less_for(shared)(shared, Side(b, LOG_R))
    np.testing.assert_allclose(by_table, probability_less(own, Side(b, LOG_R.expand(7, -1))), atol=1e-5)


# --- all pairs ---


def draws(n=300, seed=0):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0, [0.1, 0.5, 1.0, 2.0], (n, 4)), rng.normal([0.0, 0.3, -1.0, 4.0], 0.7, (n, 4))
    return torch.tensor(a).float(), torch.tensor(b).float(), torch.tensor([2.0, -1.0, 0.5, 6.0])


def every_pair(a, b, log_r):
    gap = (b[None] - a[:, None]).double().numpy()  # (a, b, genes)
    return gap / np.log(2), exact(gap, log_r.double().numpy())


@pytest.mark.parametrize(("bins", "error"), [(2048, 2e-5), (256, 4e-4)])
def test_all_pairs_by_convolution_are_all_pairs(bins, error):
    a, b, log_r = draws()
    lfc, p = every_pair(a, b, log_r)
    found = over_all_pairs(a, b, log_r, 0.5, bins)
    np.testing.assert_allclose(found.p, p.mean((0, 1)), atol=error)
    np.testing.assert_allclose(found.lfc_mean, lfc.mean((0, 1)), atol=1e-5)
    np.testing.assert_allclose(found.lfc_sd, lfc.std((0, 1)), rtol=1e-5)
    likelier = np.maximum((lfc > 0.5).mean((0, 1)), (lfc < -0.5).mean((0, 1)))
    np.testing.assert_allclose(found.p_lfc, likelier, atol=1e-4)
    assert ((np.abs(lfc) > 0.5).mean((0, 1)) > likelier + 0.02).all()  # genes that change both ways
    width = (torch.maximum(a.amax(0), b.amax(0)) - torch.minimum(a.amin(0), b.amin(0))).numpy() / (bins - 1) / np.log(2)
    low, high = np.quantile(lfc.reshape(-1, 4), [0.025, 0.975], axis=0)
    assert (np.abs(found.lfc_low - low) < 2 * width + 1e-3).all()
    assert (np.abs(found.lfc_high - high) < 2 * width + 1e-3).all()
    of_a, of_b = p.mean(1), p.mean(0)
    np.testing.assert_allclose(found.se, np.sqrt((of_a.var(0, ddof=1) + of_b.var(0, ddof=1)) / len(a)), rtol=2e-3)


def test_the_standard_error_is_the_spread_over_samples():
    found = [over_all_pairs(*draws(100, seed), 0.5, 512) for seed in range(300)]
    spread = np.std([one.p for one in found], axis=0, ddof=1)
    stated = np.sqrt(np.mean([one.se**2 for one in found], axis=0))
    np.testing.assert_allclose(stated / spread, 1, atol=4 / np.sqrt(2 * 300))  # 4 standard errors of a spread
    assert (spread > 2 * np.sqrt(0.25 / 100**2)).all()  # of independent pairs: those that share a draw are not


def test_equal_values_of_all_draws_are_no_fault():
    a, b = torch.zeros(10, 3), torch.full((10, 3), 0.7)
    found = over_all_pairs(a, b, torch.zeros(3), 0.5, 64)
    np.testing.assert_allclose(found.p, expit(0.7), atol=1e-5)  # r = 1: exponential variables
    np.testing.assert_allclose(found.se, 0, atol=1e-6)
    same = over_all_pairs(a, a, torch.zeros(3), 0.5, 64)
    np.testing.assert_allclose(same.p, 0.5, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"samples": 1}, {"samples": 2.5}, {"bins": 1}])
def test_numbers_that_cannot_be(wrong):
    with pytest.raises(ModelError, match=f"{next(iter(wrong))} must be an integer of 2 or more"):
        AllPairs(**wrong)
