"""The peer on the contract of the baselines; the integration of its latents."""

import random
import sys

import numpy as np
import pytest
import torch
from sklearn.base import clone

from pyro_scvi.baselines.scvi_tools import Generative, SCVITools, log_zinb
from pyro_scvi.distributions.nb_log_prob import log_zero_inflated
from pyro_scvi.errors import DataError, ModelError
from tests.conftest import simulated_counts


def test_law_is_that_of_the_package():
    x = torch.from_numpy(simulated_counts()).double()
    log_mean, gate = (torch.randn(3, *x.shape, dtype=torch.float64) for _ in range(2))
    log_r = torch.randn(x.shape[1], dtype=torch.float64)
    r = log_r.exp()
    constant = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)
    found = log_zinb(x, log_mean - log_r, r, gate, constant)
    torch.testing.assert_close(found, log_zero_inflated(x, log_mean, log_r, gate), atol=1e-9, rtol=1e-9)


class NoLatents:
    """A network without latents' effect: the law of counts given the library alone."""

    px_r = torch.nn.Parameter(torch.tensor([0.5, 1.0], dtype=torch.float64))

    class decoder:  # noqa: N801
        px_scale_decoder = (lambda self, hidden: hidden.new_zeros(len(hidden), 2),)

        @staticmethod
        def px_decoder(z, batch):
            return z

        @staticmethod
        def px_dropout_decoder(hidden):
            return hidden.new_full((len(hidden), 2), -1.0)


def test_joint_has_its_priors():
    NoLatents.decoder.px_scale_decoder = (lambda hidden: hidden.new_zeros(len(hidden), 2),)
    law = Generative(NoLatents, 1.0, 0.5)
    x = torch.tensor([[3.0, 0.0]], dtype=torch.float64)
    u = torch.tensor([[[0.3, -1.0, 1.7]]], dtype=torch.float64)  # (samples, cells, latents + 1)
    normal = torch.distributions.Normal(torch.tensor([0.0, 0.0, 1.0]).double(), torch.tensor([1.0, 1.0, 0.5]).double())
    log_mean = torch.full((1, 1, 2), 1.7 - np.log(2), dtype=torch.float64)
    likelihood = log_zero_inflated(x, log_mean, NoLatents.px_r.detach(), torch.full((1, 1, 2), -1.0).double())
    torch.testing.assert_close(law.log_joint(x)(u), (normal.log_prob(u).sum(-1) + likelihood.sum(-1)))


def test_contract_and_refusals():
    assert clone(SCVITools(3, epochs=2)).get_params() == {"n_latent": 3, "epochs": 2, "samples": 1000, "seed": 0}
    with pytest.raises(ModelError, match="has not been fitted"):
        SCVITools().transform(simulated_counts())
    empty = simulated_counts()
    empty[4] = 0
    with pytest.raises(DataError, match="the first of them cell 4"):
        SCVITools().fit(empty)


def test_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-scvi\[peer\]'"):
        SCVITools().fit(simulated_counts())


@pytest.mark.filterwarnings("default")
def test_fits_and_scores():
    pytest.importorskip("scvi", reason="scvi-tools is the extra peer")
    x = simulated_counts()
    states = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    one, other = (SCVITools(3, epochs=3, samples=50).fit(x) for _ in range(2))
    assert one.transform(x).shape == (60, 3)
    score = one.score_samples(x)
    assert score.shape == (60,)
    assert np.isfinite(score).all()
    np.testing.assert_array_equal(score, other.score_samples(x))
    np.testing.assert_array_equal(states[0], np.random.get_state()[1])  # noqa: NPY002
    assert states[1] == random.getstate()
    assert torch.equal(states[2], torch.get_rng_state())
