"""The flow prior in either precision."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drawing_inverts_the_density_in_its_own_precision(dtype):
    law = ps.priors.Flow(3, n_hidden=8).to(dtype)()
    with torch.no_grad():
        z = law.sample((4,))
        noise = z
        for step in reversed(law.transforms):
            noise = step.inv(noise)
        again = noise
        for step in law.transforms:
            again = step(again)
        log_prob = law.log_prob(z.clone())
    assert z.dtype == log_prob.dtype == dtype
    torch.testing.assert_close(again, z, rtol=1e-5 if dtype == torch.float32 else 1e-12, atol=1e-5)


def test_every_sampler_takes_a_flow_in_float64():
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, (40, 5)))
    fit = ps.fit(
        ps.SCVI(5, 2, prior=ps.priors.Flow(2), n_hidden=8), cells, epochs=1, progress=False, dtype=torch.float64
    )
    few = cells.take(range(2))
    for sampler in (ps.Refined(steps=3), ps.Importance(steps=3, rounds=1, proposals=50)):
        assert np.isfinite(ps.sample_posterior(fit, few, samples=4, sampler=sampler, progress=False).z).all()
    assert np.isfinite(ps.evidence(fit, few, samples=50, steps=3, progress=False).log_evidence).all()
