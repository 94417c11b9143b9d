"""Extremes of counts, depth and size: finite losses, gradients and answers of every verb."""

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data.count_checks import LARGEST_EXACT_COUNT
from pyro_scvi.errors import DataError
from pyro_scvi.likelihoods.base import updated_rate
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.filterwarnings(
    "ignore:k-hat is above",  # few draws
    "ignore:sampler_khat is above",
    "ignore:.*implausibly large count",
    "ignore:.*ha(s|ve) no counts",
    "ignore:no start of the optimiser",
)

N, GENES = 24, 10
SITES = ("z", "l", "w", "y", "h")
QUICK = ps.Importance(steps=2, rounds=1, proposals=30)
SAMPLERS = {
    "Amortized": ps.Amortized(),
    "Refined": ps.Refined(steps=2),
    "Importance": QUICK,
    "HMC": ps.HMC(chains=2, warmup=2, steps=2, rounds=1, leapfrog=1, least=4),
}


def plain():
    return simulated_counts(N, GENES)


def with_large_counts():
    counts = plain()
    counts[3], counts[:, 4], counts[7, 7] = 10**7, 10**7, LARGEST_EXACT_COUNT
    return counts


def with_depths_of_six_decades():
    """One count in the first cell to a million in the last."""
    rng = np.random.default_rng(0)
    depth = np.geomspace(1, 1e6, N).round().astype(int)
    return np.array([rng.multinomial(n, rng.dirichlet(np.ones(GENES))) for n in depth])


def with_empty_cells_and_genes():
    counts = plain()
    counts[[0, 5, 23]], counts[:, [0, 9]] = 0, 0
    return counts


def one_count_in_all():
    counts = np.zeros((N, GENES), dtype=int)
    counts[3, 4] = 1
    return counts


SEED = 1
COUNTS = {
    "large counts": with_large_counts,
    "depths of six decades": with_depths_of_six_decades,
    "empty cells and genes": with_empty_cells_and_genes,
    "one count in all": one_count_in_all,
    "all at once": lambda: np.where(with_empty_cells_and_genes() == 0, 0, with_large_counts()),
}


def cells_of(counts, batch=None):
    obs = pd.DataFrame({"kind": ["B", "T"] * (counts.shape[0] // 2)})
    return ps.Cells.from_counts(counts, obs=obs if batch is None else obs.assign(batch=batch), batch=batch and "batch")


def fit_of(cells, n_latent=2, batch_size=8, **options):
    # Of 12 seeds, 0 and 3 end with a q(l) of cells with large counts so wide that gradients overflow. The loss tells.
    model = ps.SCVI(cells.n_genes, n_latent, cells.n_covariates, n_hidden=8, n_layers=1, seed=SEED, **options)
    return ps.fit(model, cells, epochs=3, batch_size=batch_size, seed=SEED, progress=False, device="cpu")


def check_gradients(fit, cells):
    for part in (fit.model, fit.guide):
        part.train()
    x, gamma = cells[:]
    loss = pyro.infer.TraceMeanField_ELBO().differentiable_loss(fit.model, fit.guide, x, gamma)
    parameters = [*fit.model.parameters(), *fit.guide.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    for part in (fit.model, fit.guide):
        part.eval()


def verbs(fit, cells):
    """What every verb says, as arrays by name; diagnostics apart, which may be infinite where they should."""
    few = cells.take([0, 3, 7, 23])  # with no count, large ones, the largest that is taken, the deepest
    for name, sampler in SAMPLERS.items():
        draws = ps.sample_posterior(fit, few, samples=8, sites=SITES, sampler=sampler)
        yield from ((f"{site} by {name}", draws[site]) for site in SITES)
    yield "embed", ps.embed(fit, cells)
    table = ps.evidence(fit, few, samples=30, steps=2, rounds=1)
    yield "evidence", table[["log_evidence", "se", "ess", "amortized_bound"]]
    yield "annealed", ps.annealed_evidence(fit, few, chains=2, temperatures=3, leapfrog=1).log_evidence
    yield "left out", ps.leave_one_out(fit, few, samples=30, sampler=QUICK)["elpd"]
    yield "impute", ps.impute(fit, cells, samples=5)
    yield "no dropout", ps.impute(fit, cells, samples=5, quantity=ps.imputation.mean_given_no_dropout)
    yield "quantiles", ps.impute(fit, cells, samples=5, quantiles=(0.1, 0.9))
    yield "technical", ps.technical_zero_probability(fit, cells, samples=5)
    yield (
        "differential",
        ps.differential_expression(
            fit, cells, groupby="kind", group_a="B", estimand=ps.differential.RandomPairs(most_pairs=200)
        ),
    )
    yield "prior predictive", ps.prior_predictive(fit.model, 4, gamma=cells[:4][1])
    yield "posterior predictive", ps.posterior_predictive(fit, cells, samples=3)
    checks = ps.check_predictions(fit, cells, samples=5)
    yield "checks of genes", checks.genes.drop(columns="dispersion", level=0)
    yield "checks of cells", checks.cells
    tree = ps.to_datatree(fit, few, samples=8, sampler=QUICK, log_likelihood=True, posterior_predictive=True)
    yield "log likelihood", tree["log_likelihood"]["x"]
    yield "log prior", tree["log_prior"]["z"]


def check(fit, cells):
    assert np.isfinite(fit.history[["train_loss", "held_out_loss", "kl"]]).all(axis=None)
    assert all(bool(value.isfinite().all()) for part in (fit.model, fit.guide) for value in part.state_dict().values())
    check_gradients(fit, cells)
    bad = [name for name, values in verbs(fit, cells) if not np.isfinite(np.asarray(values, dtype=float)).all()]
    assert bad == []


@pytest.mark.parametrize("name", COUNTS)
def test_extreme_counts(name):
    cells = cells_of(COUNTS[name]())
    check(fit_of(cells), cells)


def test_extreme_counts_are_the_same_where_they_are_sparse():
    fits = [fit_of(cells_of(form(COUNTS["all at once"]()))) for form in (np.asarray, sparse.csr_array)]
    for dense, compressed in zip(*(fit.model.parameters() for fit in fits), strict=True):
        torch.testing.assert_close(dense, compressed)


@pytest.mark.parametrize("likelihood", ["NB", "ZIP", "Poisson"])
def test_extreme_counts_under_other_laws(likelihood):
    cells = cells_of(COUNTS["all at once"]())
    fit = fit_of(cells, likelihood=getattr(ps.likelihoods, likelihood)())
    assert np.isfinite(fit.history[["train_loss", "kl"]]).all(axis=None)
    check_gradients(fit, cells)
    assert np.isfinite(ps.embed(fit, cells)).all()
    assert np.isfinite(ps.impute(fit, cells)).all()


@pytest.mark.parametrize("n_latent", [1, 200])
def test_few_and_many_latents(n_latent):
    cells = cells_of(plain())
    check(fit_of(cells, n_latent), cells)


@pytest.mark.parametrize("levels", [1, N])
@pytest.mark.filterwarnings("ignore:.*(have 1 or 2 cells|are held out):UserWarning")
def test_one_batch_and_a_batch_for_every_cell(levels):
    cells = cells_of(plain(), [f"donor {i % levels}" for i in range(N)])
    assert cells.n_covariates == levels
    check(fit_of(cells), cells)


@pytest.mark.filterwarnings("ignore:.*(have 1 or 2 cells|are held out):UserWarning")
def test_500_batches():
    counts = simulated_counts(1000, 5)
    cells = cells_of(counts, [f"donor {i % 500}" for i in range(1000)])
    fit = fit_of(cells, batch_size=250)
    check_gradients(fit, cells)
    assert np.isfinite(ps.embed(fit, cells)).all()
    swapped = ps.impute(fit, cells, batches=["donor 499"], quantity=ps.imputation.mean_given_no_dropout)
    assert np.isfinite(swapped).all()


def test_minibatches_of_one_cell():
    cells = cells_of(COUNTS["all at once"]())
    model = ps.SCVI(GENES, 2, n_hidden=8, n_layers=1)
    fit = ps.fit(model, cells, epochs=2, batch_size=1, progress=False, device="cpu")
    assert fit.settings["n_cells"] == N - 2
    assert np.isfinite(fit.history.train_loss).all()
    assert np.isfinite(ps.embed(fit, cells, batch_size=1)).all()


@pytest.mark.slow
def test_60_000_genes():
    matrix = sparse.random_array((12, 60_000), density=0.02, format="csr", random_state=0)
    matrix.data = np.ceil(matrix.data * 20)
    cells = cells_of(matrix)
    fit = fit_of(cells)
    check_gradients(fit, cells)
    few = cells.take(range(3))
    assert np.isfinite(fit.history.train_loss).all()
    assert np.isfinite(ps.embed(fit, cells)).all()
    assert np.isfinite(ps.impute(fit, few, samples=3)).all()
    assert np.isfinite(ps.technical_zero_probability(fit, few, samples=3)).all()
    assert np.isfinite(ps.sample_posterior(fit, few, samples=2, sites=SITES).w).all()
    assert np.isfinite(ps.evidence(fit, few, samples=30, steps=3, rounds=1).log_evidence).all()
    table = ps.differential_expression(
        fit, cells, groupby="kind", group_a="B", estimand=ps.differential.RandomPairs(most_pairs=64)
    )
    assert len(table) == 60_000
    assert np.isfinite(table.to_numpy()).all()


def test_counts_beyond_float32_are_refused():
    assert cells_of(np.full((2, 2), LARGEST_EXACT_COUNT)).totals[0] == 2 * LARGEST_EXACT_COUNT
    with pytest.raises(DataError, match="cell '0', gene 'gene_0' holds 16777217.*scaled"):
        cells_of(np.full((2, 2), LARGEST_EXACT_COUNT + 1))


def test_the_rate_of_w_keeps_its_digits_where_a_zero_is_technical():
    """Gamma(r, r / mu) given h = 1: with 1 added and taken away again, a rate below 6e-8 becomes 0 and w infinite."""
    rate = torch.tensor([1e-12, 1e-5, 1.0])
    law = pyro.distributions.Gamma(torch.ones(3), rate)
    assert torch.equal(updated_rate(law, torch.zeros(3), torch.ones(3)).rate, rate)
    torch.testing.assert_close(updated_rate(law, torch.zeros(3), torch.zeros(3)).rate, rate + 1)
