"""Every prior x likelihood x guide trains, embeds and gives evidence; what makes no sense says so.

All of them with the slow tests; otherwise those in which every two of a prior, a likelihood and a guide meet.
"""

import numpy as np
import pytest
import torch
from pyro.infer import Trace_ELBO

import pyro_scvi as ps
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import ModelError
from pyro_scvi.likelihoods.dispersion import PerGene, PerGeneAndBatch
from pyro_scvi.training.fit import start_from_data
from tests.support.combinations import crossed, pairs_first

pytestmark = pytest.mark.filterwarnings("ignore:k-hat is above")  # 100 draws and one round are few

N_LATENT, SIMPLEX = 3, {"LogisticNormal", "Dirichlet"}
LIKELIHOODS = ["ZINB", "NB", "ZIP", "Poisson"]
# The point estimate last: most priors refuse it, and meet every likelihood with the four before it.
GUIDES = ["DiagonalNormal", "FullRankNormal", "InverseAutoregressiveFlow", "PerCell", "Point"]
PRIORS = [
    "StandardNormal",
    "ARDNormal",
    "StudentT",
    "Laplace",
    "GaussianMixture",
    "VampPrior",
    "Flow",
    "LogisticNormal",
    "Dirichlet",
    "Flat",
]


def make_prior(name, cells, n_latent=N_LATENT):
    if name == "VampPrior":
        return ps.priors.VampPrior(cells.n_genes, n_latent, components=5, n_hidden=8, n_layers=1)
    return getattr(ps.priors, name)(n_latent)


def make_guide(name, model, cells):
    if name == "PerCell":
        return ps.guides.PerCell(model, cells.n_cells)
    sizes = {} if hasattr(model.prior, "encoder") else {"n_hidden": 8, "n_layers": 1}
    return getattr(ps.guides, name)(model, **sizes)


def meaningful(prior, guide):
    return not getattr(ps.priors, prior).learned if guide == "Point" else prior != "Flat"


def bound(model, guide, x, gamma):
    """The evidence bound of all cells in nats per cell, by 20 draws under a fixed seed."""
    torch.manual_seed(3)
    model.eval()
    guide.eval()
    with torch.no_grad():
        return -Trace_ELBO(num_particles=20).loss(model, guide, x, gamma) / len(x)


def check_trains(model, guide, cells, rise=0.5):
    """Twenty steps raise the bound from where the data start it; the fit."""
    start_from_data(model, Minibatches(cells, torch.device("cpu")))
    x, gamma = cells[:]
    before = bound(model, guide, x, gamma)
    options = {"batch_size": 60, "validation": 0, "data_start": False, "device": "cpu", "progress": False}
    fit = ps.fit(model, cells, guide, epochs=20, learning_rate=ps.schedules.OneCycle(0.03), **options)
    assert np.isfinite(fit.history[["train_loss"]]).all(axis=None)
    assert fit.history.train_loss.iloc[-4:].mean() < fit.history.train_loss.iloc[:4].mean()
    after = bound(fit.model, fit.guide, x, gamma)
    assert after > before + rise
    return fit


def check_verbs(fit, cells):
    z = ps.embed(fit, cells)
    assert z.shape == (cells.n_cells, fit.model.n_latent)
    assert np.isfinite(z).all()
    if type(fit.model.prior).__name__ in SIMPLEX:
        np.testing.assert_allclose(z.sum(1), 1, atol=1e-5)
    if isinstance(fit.model.prior, ps.priors.Flat):
        with pytest.raises(ModelError, match="Flat has no density: the evidence does not exist"):
            ps.evidence(fit, cells)
        return
    some = cells.take(range(6))
    table = ps.evidence(fit, some, samples=100, steps=5, rounds=1)
    assert list(table.index) == list(some.cell_names)
    assert np.isfinite(table[["log_evidence", "se", "ess", "khat"]]).all(axis=None)
    assert (table.log_evidence < 0).all()
    assert table.ess.between(1, 100).all()
    has_bound = fit.guide.amortized and fit.guide.stochastic
    assert table.amortized_bound.notna().all() == has_bound
    if has_bound:  # a bound, up to the errors of 100 draws
        assert table.amortized_bound.mean() < table.log_evidence.mean() + 1


@pytest.mark.parametrize(("prior", "guide", "likelihood"), pairs_first(PRIORS, GUIDES, LIKELIHOODS))
def test_every_combination(prior, likelihood, guide, cells):
    model = ps.SCVI(
        cells.n_genes,
        N_LATENT,
        prior=make_prior(prior, cells),
        likelihood=getattr(ps.likelihoods, likelihood)(),
        n_hidden=8,
        n_layers=1,
    )
    if not meaningful(prior, guide):
        message = "Flat has no density" if prior == "Flat" else f"{prior} is learned and would collapse"
        with pytest.raises(ModelError, match=message):
            make_guide(guide, model, cells)
        return
    check_verbs(check_trains(model, make_guide(guide, model, cells), cells), cells)


LIBRARIES = [ps.libraries.NoLibrary, ps.libraries.ObservedLibrary, ps.libraries.LatentLibrary]
DISPERSIONS = {
    "per cell and gene": lambda cells: None,
    "per gene": lambda cells: PerGene(cells.n_genes),
    "per gene and batch": lambda cells: PerGeneAndBatch(cells.n_genes, cells.n_batches),
}


@pytest.mark.filterwarnings("ignore:with an ObservedLibrary this is")
@pytest.mark.parametrize(("dispersion", "library", "likelihood"), pairs_first(DISPERSIONS, LIBRARIES, ["ZINB", "NB"]))
def test_dispersions_and_libraries(dispersion, library, likelihood, batched_cells):
    cells = batched_cells
    law = getattr(ps.likelihoods, likelihood)(DISPERSIONS[dispersion](cells))
    model = ps.SCVI(cells.n_genes, N_LATENT, cells.n_covariates, likelihood=law, library=library(), n_hidden=8)
    guide = ps.guides.DiagonalNormal(model, encode_covariates=True, n_hidden=8)
    fit = check_trains(model, guide, cells)
    check_verbs(fit, cells)


def test_library_law_per_batch(batched_cells):
    cells = batched_cells
    library = ps.libraries.LatentLibrary([4.0, 4.3], [0.5, 0.4])
    model = ps.SCVI(cells.n_genes, N_LATENT, cells.n_covariates, library=library, n_hidden=8)
    check_verbs(check_trains(model, make_guide("FullRankNormal", model, cells), cells), cells)
    assert library.loc.tolist() == pytest.approx([4.0, 4.3])


WEIGHT_PRIORS = [  # first the one with most sites, which every guide meets
    {"decoder.heads.*.weight": ps.weights.HorseshoeWeights()},
    {"decoder.heads.log_mean.weight": ps.weights.NormalWeights()},
    {"decoder.layers.linear.0.weight": ps.weights.ARDWeights()},
    {"likelihood.dispersion.log_inverse_dispersion": ps.weights.HierarchicalWeights()},
]


@pytest.mark.parametrize(
    ("guide", "priors"),
    crossed(["DiagonalNormal", "InverseAutoregressiveFlow", "Point", "PerCell"], WEIGHT_PRIORS),
    ids=lambda value: value if isinstance(value, str) else type(next(iter(value.values()))).__name__,
)
def test_weight_priors(priors, guide, cells):
    likelihood = ps.likelihoods.ZINB(PerGene(cells.n_genes))
    model = ps.SCVI(cells.n_genes, N_LATENT, likelihood=likelihood, n_hidden=8, n_layers=1, weight_priors=priors)
    q = make_guide(guide, model, cells)
    assert len(q.weights.loc) > 0
    before = [loc.detach().clone() for loc in q.weights.loc]
    fit = check_trains(model, q, cells)
    assert all(not torch.equal(a, b) for a, b in zip(before, fit.guide.weights.loc, strict=True))
    check_verbs(fit, cells)


@pytest.mark.parametrize(("n_latent", "likelihood"), crossed([1, 2], LIKELIHOODS))
def test_few_latents(n_latent, likelihood, cells):
    law = getattr(ps.likelihoods, likelihood)()
    model = ps.SCVI(cells.n_genes, n_latent, likelihood=law, n_hidden=8, n_layers=1)
    check_verbs(check_trains(model, make_guide("FullRankNormal", model, cells), cells), cells)


@pytest.mark.parametrize("prior", ["Flow", "LogisticNormal", "Dirichlet"])
def test_priors_that_need_two_latents(prior, cells):
    with pytest.raises(ModelError, match=rf"{prior} needs n_latent >= 2"):
        make_prior(prior, cells, n_latent=1)


@pytest.mark.parametrize(("prior", "n_latent"), [("StandardNormal", 1), ("Dirichlet", 2), ("LogisticNormal", 2)])
def test_flow_guides_need_two_coordinates(prior, n_latent, cells):
    model = ps.SCVI(cells.n_genes, n_latent, prior=make_prior(prior, cells, n_latent), n_hidden=8)
    with pytest.raises(ModelError, match="needs two or more latents"):
        make_guide("InverseAutoregressiveFlow", model, cells)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ps.priors.StandardNormal(0),
        lambda: ps.priors.StudentT(3, df=0.0),
        lambda: ps.priors.Dirichlet(3, concentration=-1.0),
        lambda: ps.priors.GaussianMixture(3, components=0),
        lambda: ps.priors.VampPrior(20, 3, components=0),
        lambda: ps.priors.VampPrior(20, 3, components=4, pseudo_cells=torch.ones(5, 20)),
    ],
)
def test_priors_check_their_arguments(make):
    with pytest.raises(ModelError):
        make()


def test_per_cell_guides_know_their_cells_by_row(cells):
    model = ps.SCVI(cells.n_genes, N_LATENT, n_hidden=8)
    guide = make_guide("PerCell", model, cells)
    x, _ = cells[:10]
    with pytest.raises(ModelError, match="made for 60 cells, got 10; pass index="):
        guide(x)
    assert guide(x, index=torch.arange(10))["z"].shape == (10, 1, N_LATENT)
