"""Every verb for every prior x likelihood, on the CPU and, where there is one, on a CUDA device.

All of them with the slow tests; otherwise those in which every two of a verb, a prior and a likelihood meet.
"""

import numpy as np
import pyro.distributions as dist
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from pyro_scvi.export.arviz import to_datatree
from tests.support.combinations import pairs_first
from tests.support.short_evidence import compared
from tests.support.simulate import simulated_counts
from tests.system.test_combinations import LIKELIHOODS, PRIORS, make_guide, make_prior

pytestmark = [  # few draws and one round
    pytest.mark.filterwarnings("ignore:k-hat is above"),
    pytest.mark.filterwarnings("ignore:sampler_khat is above"),
]

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]  # training/test_fit.py says where there is no CUDA
N_CELLS, N_GENES, N_LATENT = 12, 8, 3
QUICK = ps.Importance(steps=3, rounds=1, proposals=40)
FITS = {}


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def fit_and_cells(prior, likelihood, device):
    """One fit for all verbs of a combination."""
    if (prior, likelihood, device) not in FITS:
        cells = ps.Cells.from_counts(simulated_counts(N_CELLS, N_GENES))
        law = getattr(ps.likelihoods, likelihood)()
        model = ps.SCVI(
            N_GENES, N_LATENT, prior=make_prior(prior, cells), likelihood=law, n_hidden=8, n_layers=1, initial_sd=0.1
        )
        guide = make_guide("Point" if prior == "Flat" else "DiagonalNormal", model, cells)
        fit = ps.fit(model, cells, guide, epochs=2, validation=0, device=device, progress=False)
        FITS[prior, likelihood, device] = fit, cells
    return FITS[prior, likelihood, device]


def is_finite(values, *shape):
    values = np.asarray(values)
    return values.shape == shape and np.isfinite(values).all()


def embed(fit, cells):
    assert is_finite(ps.embed(fit, cells), N_CELLS, N_LATENT)


def sample_posterior(fit, cells):
    for sampler in (QUICK, ps.HMC(chains=2, warmup=3, steps=3, leapfrog=2, least=4)):
        draws = ps.sample_posterior(fit, cells, samples=8, sites=("z", "l", "w", "y", "h"), sampler=sampler)
        assert is_finite(draws.z, 8, N_CELLS, N_LATENT)
        assert is_finite(draws.w, 8, N_CELLS, N_GENES)
        seen = np.asarray(cells.counts) > 0
        assert (draws.y.values[:, seen] == np.asarray(cells.counts)[seen]).all()
        assert (draws.h.values[:, seen] == 0).all()


def evidence(fit, cells):
    assert np.isfinite(ps.evidence(fit, cells, samples=40, steps=3, rounds=1).log_evidence).all()


def annealed_evidence(fit, cells):
    table = ps.annealed_evidence(fit, cells, chains=4, temperatures=4, leapfrog=2)
    assert np.isfinite(table.log_evidence).all()


def compare(fit, cells):
    table = compared({"a": fit}, cells.take(range(2)), samples=20)
    assert np.isfinite(table.log_evidence["a"])


def leave_one_out(fit, cells):
    found = ps.leave_one_out(fit, cells, samples=40, sampler=QUICK)
    assert is_finite(found.elpd, N_CELLS, N_GENES)
    assert found.pit.min() >= 0
    assert found.pit.max() <= 1


def impute(fit, cells):
    assert is_finite(ps.impute(fit, cells, samples=3), N_CELLS, N_GENES)
    assert is_finite(ps.impute(fit, cells, samples=3, quantiles=(0.1, 0.9)), 2, N_CELLS, N_GENES)


def technical_zero_probability(fit, cells):
    if type(fit.model.likelihood).__name__ in ("NB", "Poisson"):
        with pytest.raises(ModelError, match="no zero is technical"):
            ps.technical_zero_probability(fit, cells)
        return
    assert is_finite(ps.technical_zero_probability(fit, cells, samples=3), N_CELLS, N_GENES)


def differential_expression(fit, cells):
    labels = np.arange(N_CELLS) % 2
    table = ps.differential_expression(
        fit, cells, groupby=labels, group_a=0, group_b=1, estimand=ps.differential.RandomPairs(most_pairs=200)
    )
    assert np.isfinite(table.to_numpy()).all()


def prior_predictive(fit, cells):
    assert is_finite(ps.prior_predictive(fit.model, 5), 5, N_GENES)


def posterior_predictive(fit, cells):
    assert is_finite(ps.posterior_predictive(fit, cells, samples=2), 2, N_CELLS, N_GENES)


def check_predictions(fit, cells):
    genes, by_cell = ps.check_predictions(fit, cells, samples=4)
    assert genes.drop(columns="dispersion", level=0).notna().all(axis=None)
    assert by_cell.notna().all(axis=None)


def calibrate(fit, cells):
    found = ps.calibrate(fit, 6, sampler=QUICK, draws=19, thin=1)
    assert found.ranks.isin(range(20)).all(axis=None)


def export(fit, cells):
    options = {"log_likelihood": True, "posterior_predictive": True, "prior_predictive": True}
    tree = to_datatree(fit, cells, samples=4, sampler=QUICK, **options)
    assert is_finite(tree["log_likelihood"]["x"], 1, 4, N_CELLS, N_GENES)
    assert is_finite(tree["log_prior"]["z"], 1, 4, N_CELLS)


VERBS = [
    embed,
    sample_posterior,
    evidence,
    annealed_evidence,
    compare,
    leave_one_out,
    impute,
    technical_zero_probability,
    differential_expression,
    prior_predictive,
    posterior_predictive,
    check_predictions,
    calibrate,
    export,
]
NEED_A_DENSITY = {
    sample_posterior,
    evidence,
    annealed_evidence,
    compare,
    leave_one_out,
    prior_predictive,
    calibrate,
    export,
}


@pytest.mark.parametrize(
    ("verb", "prior", "likelihood"),
    pairs_first(VERBS, PRIORS, LIKELIHOODS),
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_verb(verb, prior, likelihood, fit_and_cells):
    if prior == "Flat" and verb in NEED_A_DENSITY:
        with pytest.raises(ModelError, match="Flat"):
            verb(*fit_and_cells)
        return
    verb(*fit_and_cells)


# --- what no verb takes ---


@pytest.fixture(scope="module")
def plain():
    torch.set_num_threads(1)  # this runs before the fixture of every test
    cells = ps.Cells.from_counts(simulated_counts(N_CELLS, N_GENES))
    model = ps.SCVI(N_GENES, 2, n_hidden=8, n_layers=1)
    return ps.fit(model, cells, epochs=1, validation=0, device="cpu", progress=False), cells


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda fit, cells: ps.sample_posterior(fit, cells, samples=0),
            "samples must be an integer of 1 or more",
        ),
        (lambda fit, cells: ps.sample_posterior(fit, cells, samples=2.5), "samples must be an integer"),
        (lambda fit, cells: ps.sample_posterior(fit, cells, batch_size=0), "batch_size must be"),
        (lambda fit, cells: ps.sample_posterior(fit, cells, sites="zw"), "sites must be names in a list"),
        (lambda fit, cells: ps.evidence(fit, cells, samples=1), "samples must be an integer of 2 or more"),
        (lambda fit, cells: ps.evidence(fit, cells, steps=-1), "steps must be"),
        (lambda fit, cells: ps.annealed_evidence(fit, cells, temperatures=0), "temperatures must be"),
        (lambda fit, cells: ps.annealed_evidence(fit, cells, chains=1), "chains must be an integer of 2"),
        (lambda fit, cells: ps.leave_one_out(fit, cells, samples=1), "samples must be"),
        (lambda fit, cells: ps.impute(fit, cells, samples=0), "samples must be"),
        (lambda fit, cells: ps.impute(fit, cells, quantiles=[1.5]), "quantiles must be between 0 and 1"),
        (lambda fit, cells: ps.technical_zero_probability(fit, cells, batch_size=-1), "batch_size must be"),
        (lambda fit, cells: ps.posterior_predictive(fit, cells, samples=0), "samples must be"),
        (lambda fit, cells: ps.check_predictions(fit, cells, interval=90), "interval must be between 0 and 1, got 90"),
        (lambda fit, cells: ps.prior_predictive(fit.model, 0), "n_cells must be"),
        (
            lambda fit, cells: ps.prior_predictive(fit.model, 5, gamma=torch.zeros(7, 0)),
            r"got \(7, 0\)",
        ),
        (lambda fit, cells: to_datatree(fit, cells, samples=0), "samples must be"),
        (lambda fit, cells: ps.compare([fit], cells), "takes fits by name"),
        (lambda fit, cells: ps.HMC(chains=0), "chains must be"),
        (lambda fit, cells: ps.HMC(leapfrog=0), "leapfrog must be"),
        (lambda fit, cells: ps.HMC(warmup=-3), "warmup must be"),
        (lambda fit, cells: ps.Refined(steps=-1), "steps must be"),
        (lambda fit, cells: ps.Importance(proposals=1), "proposals must be"),
    ],
)
def test_numbers_that_cannot_be_are_refused(call, message, plain):
    with pytest.raises(ModelError, match=message):
        call(*plain)


def improper():
    return dist.ImproperUniform(dist.constraints.real_vector, (), (2,))


@pytest.mark.parametrize("prior", [improper, lambda: dist.Normal(torch.zeros(2), 1.0).mask(False).to_event(1)])
@pytest.mark.parametrize("verb", [evidence, annealed_evidence, sample_posterior, leave_one_out, calibrate, export])
def test_an_improper_prior_of_a_users_own_is_refused(verb, prior, plain):
    _fit, cells = plain
    model = ps.SCVI(N_GENES, 2, prior=prior, n_hidden=8, n_layers=1)
    guide = ps.guides.Point(model, n_hidden=8, n_layers=1)
    other = ps.fit(model, cells, guide, epochs=1, validation=0, device="cpu", progress=False)
    with pytest.raises(ModelError, match="has no density"):
        verb(other, cells)


class Geometric(ps.likelihoods.Likelihood):
    """A law of counts alone, without w, y and h."""

    heads = ("log_mean", "gate_logits")

    def marginal(self, log_mean, gate_logits):
        return dist.ZeroInflatedDistribution(dist.Geometric(logits=-log_mean), gate_logits=gate_logits)


@pytest.mark.parametrize("verb", [differential_expression, impute, technical_zero_probability])
def test_a_law_without_w_is_refused_where_w_is_asked_for(verb, plain):
    _, cells = plain
    model = ps.SCVI(N_GENES, 2, likelihood=Geometric(), n_hidden=8, n_layers=1)
    fit = ps.fit(model, cells, epochs=1, validation=0, device="cpu", progress=False)
    with pytest.raises(ModelError, match="explicit"):
        verb(fit, cells)
