"""Annealed importance sampling against quadrature, against ``evidence``, and what it refuses."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.analysis.evidence.test_evidence import PRIORS, one_latent_fit, quadrature


@pytest.mark.parametrize("prior", PRIORS.values(), ids=PRIORS.keys())
def test_annealed_evidence_matches_quadrature(prior):
    fit, cells = one_latent_fit(prior())
    table = ps.annealed_evidence(fit, cells, temperatures=100, batch_size=40)
    error = (table.log_evidence - quadrature(fit, cells)) / table.se
    assert error.abs().max() < 4.5  # 40 cells, 32 runs each
    assert (error**2).mean() < 2.5
    assert table.se.max() < 0.15
    assert list(table.index) == list(cells.cell_names)


def test_it_agrees_with_evidence_where_there_are_more_latents():
    """3 latents and a library size; the proposals of the one take no part in the other."""
    model = ps.SCVI(20, 3, n_hidden=16, n_layers=1, norm=None, initial_sd=0.6, seed=2)
    counts = ps.prior_predictive(model, 150, seed=1)
    cells = ps.Cells.from_counts(counts + (np.arange(20) == 0))
    fit = ps.fit(model, cells, epochs=20, validation=0, progress=False, dtype=torch.float64, device="cpu")
    some = cells.take(range(12))
    annealed, direct = ps.annealed_evidence(fit, some, temperatures=200), ps.evidence(fit, some)
    error = (annealed.log_evidence - direct.log_evidence) / np.hypot(annealed.se, direct.se)
    assert error.abs().max() < 4.5
    assert annealed.se.max() < 0.5
    assert (annealed.ess > 5).all()


def test_too_few_temperatures_are_too_low_on_average_and_less_certain():
    fit, cells = one_latent_fit(PRIORS["normal"]())
    exact = quadrature(fit, cells)
    few, many = (ps.annealed_evidence(fit, cells, temperatures=t, batch_size=40) for t in (3, 100))
    assert few.se.mean() > 3 * many.se.mean()
    assert few.ess.mean() < many.ess.mean()
    assert np.abs(few.log_evidence - exact).mean() > np.abs(many.log_evidence - exact).mean()


@pytest.mark.filterwarnings("ignore:with an ObservedLibrary")
def test_an_observed_library_is_treated_as_by_evidence():
    fit, cells = one_latent_fit(PRIORS["normal"](), ps.libraries.ObservedLibrary())
    some = cells.take(range(6))
    annealed, direct = ps.annealed_evidence(fit, some, temperatures=60), ps.evidence(fit, some)
    assert np.abs(annealed.log_evidence - direct.log_evidence).max() < 5 * np.hypot(annealed.se, direct.se).max()


def test_one_seed_gives_one_table_and_the_global_state_is_untouched():
    fit, cells = one_latent_fit(PRIORS["normal"]())
    some = cells.take(range(4))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    tables = [ps.annealed_evidence(fit, some, temperatures=10, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(state, torch.get_rng_state())
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_a_flat_prior_has_no_evidence():
    model = ps.SCVI(12, 1, prior=ps.priors.Flat(1), n_hidden=8, norm=None)
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, size=(20, 12)))
    fit = ps.fit(model, cells, ps.guides.Point(model, n_hidden=8), epochs=1, validation=0, progress=False)
    with pytest.raises(ModelError, match="Flat has no density"):
        ps.annealed_evidence(fit, cells)
