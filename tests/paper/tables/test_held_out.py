"""Steps on held-out cells: what is fitted never sees them, and every score is what its name says."""

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse, stats
from sklearn.model_selection import train_test_split
from torch.distributions import Normal, kl_divergence

import pyro_scvi as ps
from pyro_scvi import baselines
from pyro_scvi.baselines.evidence import Evidence
from pyro_scvi.errors import DataError, FitError
from pyro_scvi.inference.evaluation import bound_terms, evaluating
from pyro_scvi.paper import systems
from pyro_scvi.paper.data import files
from pyro_scvi.paper.tables import held_out
from pyro_scvi.paper.tables.independent_genes import IndependentGenes
from tests.conftest import simulated_counts

CASE = {"file": files.CORTEX, "n": 60, "least": 40, "test_cells": 10}


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Writes counts (cells, genes) as the cortex file of a data folder of its own."""

    def write(counts, names=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        obs = pd.DataFrame({"labels": np.where(np.arange(len(counts)) % 2, "a", "b")}, index=names)
        obs.index = obs.index.astype(str)
        adata = anndata.AnnData(sparse.csr_matrix(counts.astype(np.int32)), obs=obs)
        adata.write_h5ad(folder / files.CORTEX)
        monkeypatch.setenv("PYRO_SCVI_DATA", str(folder))

    return write


@pytest.fixture(scope="module")
def fit():
    cells = ps.Cells.from_counts(simulated_counts())
    model, options = ps.presets.default(cells)
    return ps.fit(model, cells, epochs=3, progress=False, device="cpu", **options)


def test_split_keeps_what_training_cells_decide(file):
    counts = simulated_counts(100, 12)
    train, test = train_test_split(np.arange(100), test_size=0.25, random_state=0)
    counts[train[:40], 3] = 0  # seen only in cells beyond the smallest training set
    counts[test[2]] = 0
    counts[train[50]] = 0
    file(counts)
    of = held_out.split(**CASE)
    assert of.left_out == {"genes": 1, "train_cells": 1, "test_cells": 1}
    kept = [gene for gene in range(12) if gene != 3]
    np.testing.assert_array_equal(of.train.counts.toarray(), counts[np.delete(train[:60], 50)][:, kept])
    np.testing.assert_array_equal(of.test.counts.toarray(), counts[np.delete(test[:10], 2)][:, kept])
    assert of.everything.n_cells == 98
    smaller = held_out.split(**CASE | {"n": 40})
    np.testing.assert_array_equal(smaller.test.counts.toarray(), of.test.counts.toarray())
    np.testing.assert_array_equal(smaller.train.counts.toarray(), of.train.counts[:40].toarray())


def test_test_cells_change_no_fitted_parameter(file, monkeypatch):
    """Shuffled, with other counts, and with a count in a gene that no training cell has."""
    counts = simulated_counts(100, 12)
    _, test = train_test_split(np.arange(100), test_size=0.25, random_state=0)
    counts[:, 5] = 0
    rng = np.random.default_rng(1)
    order = np.arange(100)
    order[test] = rng.permutation(test)
    changed = counts[order]
    changed[test] = rng.poisson(9, (len(test), 12))
    np.testing.assert_array_equal(np.delete(changed, test, 0), np.delete(counts, test, 0))
    found = []
    for matrix, names in ((counts, range(100)), (changed, order)):
        file(matrix, names)
        found.append(fitted_parameters(monkeypatch))
    for first, second in zip(*found, strict=True):
        assert len(first) > 1
        for a, b in zip(first, second, strict=True):
            np.testing.assert_array_equal(a, b)


def unscored(monkeypatch):
    """Fits alone: no score of a test cell is computed."""
    columns = dict.fromkeys(("log_evidence", "se", "ess", "khat", "amortized_bound"), np.zeros(1))
    monkeypatch.setattr(held_out, "evidence", lambda *arguments, **options: pd.DataFrame(columns))
    for owner in (baselines.FactorAnalysis, baselines.ZIFA):
        evidence = Evidence(*(columns[name] for name in Evidence._fields))
        monkeypatch.setattr(owner, "evidence", lambda *arguments, evidence=evidence, **options: evidence)


def fitted_parameters(monkeypatch):
    """Of every system that the steps fit: arrays of all that they learned, in the order of the steps."""
    made = []

    def keep(owner, name):
        original = getattr(owner, name)

        def kept(*arguments, **options):
            made.append(original(*arguments, **options))
            return made[-1]

        monkeypatch.setattr(owner, name, kept)

    with monkeypatch.context() as monkeypatch:
        keep(systems, "fitted")
        unscored(monkeypatch)
        for owner in (baselines.FactorAnalysis, baselines.ZIFA, baselines.ZINBWaVE, IndependentGenes):
            keep(owner, "fit")
        settings = {"name": "scVI, default", "seed": 0, "epochs": 2, "rate": None, "kl": 1.0, "samples": 10, "refit": 1}
        held_out.ours(CASE, **settings)
        for step in (held_out.factor_analysis, held_out.zifa):
            step(CASE, samples=10)
        held_out.zinb_wave(CASE, tol=1e-3, max_iter=10)
        held_out.independent_genes(CASE)
    fit, factors, zifa, wave, floor = made
    states = [*fit.model.state_dict().values(), *fit.guide.state_dict().values()]
    return (
        [tensor.numpy() for tensor in states],
        [factors.model_.mean_, factors.model_.components_, factors.model_.noise_variance_],
        [zifa.mean_, zifa.loadings_, zifa.scale_, zifa.decay_],
        [wave.alpha_mu_, wave.alpha_pi_, wave.beta_mu_, wave.zeta_, wave.W_],
        [floor.log_mean_.numpy(), floor.log_r_.numpy()],
    )


def bound(fit, cells):
    with evaluating(fit.model, fit.guide, 5):
        return bound_terms(fit.guide, *cells[:], 100)[0].mean(0).numpy()


def test_conditional_is_the_bound_and_the_divergence(fit):
    """With the divergence in closed form: both latents have a normal law, l on the log scale."""
    cells = ps.Cells.from_counts(simulated_counts(seed=1))
    x, gamma = cells[:]
    with evaluating(fit.model, fit.guide, 0):
        code = fit.guide.encode(x, gamma, None)
        of_z = Normal(code.loc["z"], code.scale["z"]), Normal(torch.zeros_like(code.loc["z"]), 1.0)
        of_l = Normal(code.loc["l"], code.scale["l"]), fit.model.library.law(gamma).base_dist
        kl = sum(kl_divergence(*laws).sum(-1) for laws in (of_z, of_l))
    gap = held_out.conditional(fit, cells) - bound(fit, cells)
    assert kl.mean() > 1
    assert gap.mean() == pytest.approx(float(kl.mean()), abs=0.3)  # 100 draws a cell on either side


def test_refit_raises_the_bound_and_leaves_the_law_and_the_fit_alone(fit):
    cells = ps.Cells.from_counts(simulated_counts(seed=1))
    law = {name: value.clone() for name, value in fit.model.state_dict().items()}
    guide = {name: value.clone() for name, value in fit.guide.state_dict().items()}
    refitted = held_out.encoder_refitted(fit, cells, 30)
    for name, value in law.items():
        assert torch.equal(refitted.model.state_dict()[name], value)
        assert torch.equal(fit.model.state_dict()[name], value)
    assert all(torch.equal(fit.guide.state_dict()[name], value) for name, value in guide.items())
    assert bound(refitted, cells).mean() > bound(fit, cells).mean() + 1


def test_clusters_that_are_apart():
    labels = np.repeat(["a", "b", "c"], 20)
    cells = ps.Cells.from_counts(simulated_counts(), obs=pd.DataFrame({"labels": labels}))
    latents = np.repeat(np.eye(3) * 100, 20, 0) + np.random.default_rng(0).normal(size=(60, 3))
    found = held_out.clustering(lambda: latents, cells)
    assert found["ari"] == found["nmi"] == 1
    assert found["silhouette"] > 0.95
    mixed = held_out.clustering(lambda: latents[np.random.default_rng(0).permutation(60)], cells)
    assert mixed["ari"] < 0.1
    assert held_out.clustering(lambda: latents, ps.Cells.from_counts(simulated_counts())) == {}


def test_floor_finds_its_law():
    rng = np.random.default_rng(0)
    mean, r = np.array([0.5, 4.0, 30.0]), np.array([0.3, 2.0, 10.0])
    counts = rng.negative_binomial(r, r / (r + mean), (20_000, 3))
    floor = IndependentGenes().fit(counts)
    np.testing.assert_allclose(floor.log_mean_.exp(), mean, rtol=0.05)
    np.testing.assert_allclose(floor.log_r_.exp(), r, rtol=0.06)
    fitted = floor.log_r_.exp().numpy()
    expected = stats.nbinom.logpmf(counts[:50], fitted, fitted / (fitted + counts.mean(0))).sum(1)
    np.testing.assert_allclose(floor.score_samples(counts[:50]), expected, rtol=1e-6)
    with pytest.raises(DataError, match="1 genes have no count in any cell"):
        IndependentGenes().fit(counts * [1, 0, 1])


@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")
def test_a_search_that_fails_is_no_result():
    counts = np.array([[1e306, 1.0], [1.0, 3.0]])
    with pytest.raises(FitError, match="the dispersion of a gene by itself is not found"):
        IndependentGenes().fit(counts)


@pytest.mark.parametrize("name", systems.MODELS)
def test_z_as_a_parameter_is_the_same_encoder_without_noise_or_prior(cells, name):
    model, options = systems.as_parameter(systems.MODELS[name])(cells)
    _, original = systems.MODELS[name](cells)
    guide = options["guide"]
    assert isinstance(model.prior, ps.priors.Flat)
    assert isinstance(guide, ps.guides.Point)
    assert guide.model is model
    made = original["guide"].arguments if "guide" in original else {"seed": 0}
    assert {k: v for k, v in guide.arguments.items() if k != "model"} == {k: v for k, v in made.items() if k != "model"}
    fit = ps.fit(model, cells, **options | {"epochs": 1, "validation": 0, "device": "cpu", "progress": False})
    assert ps.embed(fit, cells).shape == (60, 10)


@pytest.mark.parametrize("name", systems.CANDIDATES)
def test_candidates_can_be_fitted(cells, name):
    fit = systems.fitted(name, cells, seed=0, epochs=1)
    assert np.isfinite(ps.embed(fit, cells)).all()
