"""Fits and verbs inside torch.no_grad and torch.inference_mode, which a caller may have on around all of a script."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from tests.support.fits_alone import CELLS, pair, results, trained

FEW = CELLS.take(np.arange(2))
SHORT = {"progress": False, "seed": 0}
VERBS = {
    "left out": lambda fit: ps.leave_one_out(fit, FEW, samples=20, sampler=ps.Refined(steps=2), **SHORT).elpd.values,
    "refined": lambda fit: ps.sample_posterior(fit, FEW, samples=4, sampler=ps.Refined(steps=2), **SHORT).z.values,
}


@pytest.fixture(scope="module")
def fit():
    return trained(*pair())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_fit_takes_its_gradients_and_gives_the_mode_back(fit, mode):
    with mode():
        inside = trained(*pair())
        assert not torch.is_grad_enabled()
    assert results(inside) == results(fit)
    assert not any(parameter.is_inference() for parameter in inside.model.parameters())


@pytest.mark.filterwarnings("ignore::UserWarning")  # of so few draws
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_verbs_take_theirs(fit, verb):
    with torch.inference_mode():
        inside = verb(fit)
    np.testing.assert_array_equal(inside, verb(fit))
