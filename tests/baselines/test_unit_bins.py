"""Factor analysis and ZIFA as probabilities of counts: unit bins against quadrature, and sums over all counts."""

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.exceptions import ConvergenceWarning

from pyro_scvi.baselines import ZIFA, FactorAnalysis
from pyro_scvi.baselines.factor_analysis import gaussian_posterior
from pyro_scvi.baselines.unit_bins import UnitBins, log_bin_probability
from pyro_scvi.baselines.zifa import model as zifa_model
from tests.conftest import simulated_counts

COUNTS = simulated_counts(200, 6)


def ends(x):
    return (-np.inf if x == 0 else np.log(x + 0.5)), np.log(x + 1.5)


def test_bins_share_out_the_line():
    bins = UnitBins.of(torch.arange(3000, dtype=torch.float64))
    log_p = bins.log_probability(torch.tensor(1.3).double(), torch.tensor(0.7).double())
    assert float(log_p.exp().sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 12.0, -12.0, 40.0, -40.0])
def test_far_bins_keep_their_digits(shift):
    below, above = torch.tensor(shift).double(), torch.tensor(shift + 1e-3).double()
    found = float(log_bin_probability(below, above, torch.tensor(False)))
    assert found - np.log(1e-3) == pytest.approx(norm.logpdf(shift + 5e-4), abs=1e-3)  # density times width


def test_start_is_the_posterior_of_factor_analysis():
    method = FactorAnalysis(2).fit(COUNTS)
    y = torch.from_numpy(np.log1p(COUNTS))
    fitted = (torch.from_numpy(a) for a in (method.model_.components_, method.model_.noise_variance_))
    loc, _ = gaussian_posterior(y - torch.from_numpy(method.model_.mean_), *fitted)
    np.testing.assert_allclose(loc, method.transform(COUNTS), atol=1e-10)


def test_factor_analysis_against_quadrature():
    method = FactorAnalysis(1).fit(COUNTS)
    mean, loading = method.model_.mean_, method.model_.components_[0]
    sd = np.sqrt(method.model_.noise_variance_)

    def joint(z, x):
        at = [(end - mean - loading * z) / sd for end in np.transpose([ends(count) for count in x])]
        return norm.pdf(z) * np.prod(norm.cdf(at[1]) - norm.cdf(at[0]))

    found = method.evidence(COUNTS[:4], samples=2000)
    for x, value, se in zip(COUNTS, found.log_evidence, found.se, strict=False):
        assert value == pytest.approx(np.log(quad(joint, -8, 8, args=(x,), limit=200)[0]), abs=5 * se + 1e-6)
    assert found.se.max() < 0.03
    assert found.khat.max() < 0.7


@pytest.fixture(scope="module")
def zifa():
    with pytest.warns(ConvergenceWarning):
        return ZIFA(1, max_iter=4).fit(COUNTS)


def of_count(zifa, z, x, gene):
    """P(x | z) of one gene by quadrature over the latent log count: kept counts are rounded, lost ones are 0."""
    eta, sigma = zifa.mean_[gene] + zifa.loadings_[gene, 0] * z, zifa.scale_[gene]
    low, high = (max(-12.0, ends(x)[0]), ends(x)[1])
    kept, _ = quad(lambda u: norm.pdf(u, eta, sigma) * -np.expm1(-zifa.decay_ * u * u), low, high, limit=200)
    lost, _ = quad(lambda u: norm.pdf(u, eta, sigma) * np.exp(-zifa.decay_ * u * u), -12, 12, limit=200)
    return kept + (lost if x == 0 else 0.0)


def test_zifa_given_z_against_quadrature(zifa):
    law = zifa._law(torch.float64)
    x = torch.tensor([[0, 1, 2, 5, 30, 0]], dtype=torch.float64)
    z = torch.tensor([[[-1.3]], [[0.4]]], dtype=torch.float64)  # (samples, cells, latents)
    expected = [
        norm.logpdf(value) + sum(np.log(of_count(zifa, value, count, gene)) for gene, count in enumerate(x[0].numpy()))
        for value in z.flatten().numpy()
    ]
    np.testing.assert_allclose(zifa_model.binned_log_joint(x, law)(z)[:, 0], expected, rtol=1e-7)


def test_zifa_probabilities_of_all_counts_sum_to_one():
    with pytest.warns(ConvergenceWarning):
        method = ZIFA(1, max_iter=3).fit(COUNTS[:, 2:3] - COUNTS[:, 2:3].min())
    found = method.evidence(np.arange(400)[:, None], samples=500)
    p = np.exp(found.log_evidence)
    assert p.sum() == pytest.approx(1, abs=5 * np.sqrt(p**2 @ found.se**2))
    assert found.se[:20].max() < 0.05


@pytest.mark.parametrize("scale", [1e-4, 1.0])
def test_gradients_are_finite_for_any_count(zifa, scale):
    law = zifa._law(torch.float64)
    law = law._replace(scale=scale * law.scale)
    x = torch.tensor([[0, 0, 1, 3, 500, 40_000]], dtype=torch.float64)
    z = torch.tensor([[[3.0]], [[-3.0]]], dtype=torch.float64, requires_grad=True)
    zifa_model.binned_log_joint(x, law)(z).sum().backward()
    assert torch.isfinite(z.grad).all()
