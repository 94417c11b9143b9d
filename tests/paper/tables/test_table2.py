"""Corruption, errors and identification of Table 2, on counts whose answers are known."""

import math

import anndata as ad
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy import sparse, stats

from pyro_scvi import baselines
from pyro_scvi.analysis.predictive.imputation import impute, mean_given_no_dropout
from pyro_scvi.data.cells import Cells
from pyro_scvi.likelihoods.negative_binomial import NB, ZINB
from pyro_scvi.model import SCVI
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.data import corruption, files
from pyro_scvi.paper.metrics import zeros
from pyro_scvi.paper.steps import Outcome
from pyro_scvi.paper.tables import table2
from pyro_scvi.training.fit import fit


def counts_of_rank_one(cells=400, genes=60, seed=0):
    rng = np.random.default_rng(seed)
    mean = np.outer(rng.gamma(4, 0.5, cells), rng.gamma(2, 1.5, genes))
    return rng.poisson(rng.gamma(3, mean / 3)).astype(float)


def test_a_tenth_of_the_counts_are_candidates_and_uniform_corruption_zeroes_them_all():
    counts = counts_of_rank_one()
    of = corruption.corrupted(counts, 0.0, seed=3)
    assert len(of.truth) + of.left_out == int(0.1 * np.count_nonzero(counts))
    assert of.zeroed.all()
    assert len(set(zip(of.cell, of.gene, strict=True))) == len(of.cell)
    assert (of.counts[of.cell, of.gene] == 0).all()
    assert np.count_nonzero(of.counts) == np.count_nonzero(counts) - len(of.truth)
    assert_allclose(of.counts.sum() + of.truth.sum(), counts.sum())


def test_counts_are_zeroed_with_zifas_probability_of_their_size():
    decay, counts = 0.4, np.tile(np.arange(1.0, 6.0), (4000, 40))
    of = corruption.corrupted(counts, decay, seed=0)
    for x in range(1, 6):
        zeroed = of.zeroed[of.truth == x]
        p = math.exp(-decay * math.log(1 + x) ** 2)
        assert abs(zeroed.mean() - p) < 5 * math.sqrt(p * (1 - p) / len(zeroed))
    assert (of.counts[of.cell, of.gene] == np.where(of.zeroed, 0, of.truth)).all()


def test_the_mask_is_a_matter_of_its_seed():
    counts = counts_of_rank_one()
    one, same, other = (corruption.corrupted(counts, 0.7, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same, strict=True))
    assert not np.array_equal(one.counts, other.counts)


def test_entries_of_cells_and_genes_that_lost_every_count_are_left_out_and_counted():
    counts = counts_of_rank_one(60, 30)
    counts[:, 5], counts[7] = 0.0, 0.0
    counts[3, 5] = counts[7, 2] = 1.0
    for seed in range(2000):
        of = corruption.corrupted(counts, 0.0, seed)
        if of.counts.shape == (59, 29):
            break
    else:
        pytest.fail("no mask emptied both the cell and the gene")
    assert of.left_out == 2
    kept = np.delete(np.delete(counts, 7, 0), 5, 1)
    assert_allclose(of.truth, kept[of.cell, of.gene])


def small():
    """Two cells, three genes: the zeros are (0, 1), zeroed from 4, and (1, 0), zeroed from 1, and (1, 2), observed."""
    counts = np.array([[2.0, 0.0, 3.0], [0.0, 5.0, 0.0]])
    cell, gene = np.array([0, 1, 0]), np.array([1, 0, 0])
    return corruption.Corrupted(counts, cell, gene, np.array([4.0, 1.0, 2.0]), np.array([True, True, False]), 0, 1.0)


def test_errors_are_of_zeroed_entries_alone():
    imputed = np.array([[90.0, 1.5, 90.0], [2.0, 90.0, 90.0]])
    found = corruption.errors(small(), imputed)
    assert found["median"] == found["mean"] == pytest.approx((2.5 + 1.0) / 2)
    assert found["mean_se"] == pytest.approx(0.75 / math.sqrt(2))
    assert corruption.errors(small(), np.array([0.0]))["mean"] == 2.5
    assert corruption.errors(small(), np.array([1.0, 2.0, 9.0]))["mean"] == pytest.approx((2 + 0) / 2)


def test_the_error_of_a_median_is_that_of_resampled_entries():
    rng = np.random.default_rng(0)
    n = 4001
    truth = rng.normal(0, 1, n)
    of = corruption.Corrupted(np.zeros((n, 1)), np.arange(n), np.zeros(n, int), truth, np.ones(n, bool), 0, 0.0)
    density = 2 * math.exp(-(0.6745**2) / 2) / math.sqrt(2 * math.pi)  # of abs of a normal at its median
    assert corruption.errors(of, np.zeros(1))["median_se"] == pytest.approx(1 / (2 * density * math.sqrt(n)), rel=0.25)


def test_cross_entropy_is_over_all_candidates_and_a_certain_mistake_has_its_price():
    p = np.array([[0.25, 0.5, 0.9], [0.8, 0.9, 0.9]])
    found = corruption.cross_entropy(small(), p)["cross_entropy"]
    assert found == pytest.approx(-(math.log(0.5) + math.log(0.8) + math.log(0.75)) / 3)
    certain = corruption.cross_entropy(small(), np.where(small().counts > 0, 1.0, 0.5))["cross_entropy"]
    assert certain == pytest.approx((2 * math.log(2) - math.log(corruption.CLIP)) / 3)


def test_no_constant_has_a_lower_cross_entropy_than_the_share_zeroed():
    of = corruption.corrupted(counts_of_rank_one(), 0.5, 0)
    base = corruption.cross_entropy(of, of.zeroed.mean(keepdims=True))["cross_entropy"]
    share = of.zeroed.mean()
    assert base == pytest.approx(-share * math.log(share) - (1 - share) * math.log(1 - share))
    assert all(corruption.cross_entropy(of, np.array([share + d]))["cross_entropy"] > base for d in (-0.05, 0.05))


def test_area_counts_pairs_of_artificial_and_other_zeros():
    score = np.array([[9.0, 0.7, 9.0], [0.2, 9.0, 0.5]])  # artificial .7 and .2, the other zero .5
    assert corruption.area(small(), score)["auc"] == 0.5
    found = corruption.identification(small(), {"rho": score, "zero": np.where(score == 0.2, 0.1, 0.9)})
    assert found["rho"]["auc"] == 0.5
    assert found["zero"]["auc"] == 0.75  # of 1 - p: .9 beats .1, .1 ties


def test_the_error_of_an_area_is_hanleys_and_mcneils():
    """Ten artificial among 110 zeros, 80 of the others below them and 20 above: an area of 0.8."""
    counts = np.zeros((11, 10))
    score = np.array([1.0] * 10 + [0.0] * 80 + [2.0] * 20).reshape(11, 10)
    first = np.zeros(10, int)
    of = corruption.Corrupted(counts, first, np.arange(10), np.ones(10), np.ones(10, bool), 0, 0.0)
    found = corruption.area(of, score)
    assert found["auc"] == pytest.approx(0.8)
    assert found["auc_se"] == pytest.approx(math.sqrt((0.16 + 9 * (2 / 3 - 0.64) + 99 * (1.28 / 1.8 - 0.64)) / 1000))


def test_errors_of_cross_entropies_and_facts_about_a_corruption():
    p = np.array([[0.25, 0.5, 0.9], [0.8, 0.9, 0.9]])
    terms = -np.log([0.5, 0.8, 0.75])
    assert corruption.cross_entropy(small(), p)["cross_entropy_se"] == pytest.approx(terms.std() / math.sqrt(3))
    of = small()
    facts = corruption.about(of)
    assert (facts["entries"], facts["candidates"]) == (of.zeroed.sum(), len(of.zeroed))
    assert facts["base_rate"] == pytest.approx(of.zeroed.mean())
    assert facts["true_median"] == np.median(of.truth[of.zeroed])


def test_uniform_corruption_asks_no_zifa(monkeypatch):
    adata = ad.AnnData(sparse.csr_matrix(counts_of_rank_one(40, 10)))
    monkeypatch.setattr(corruption.files, "read", lambda file, at_most: adata)
    of = corruption.read("cells", None, by_zifa=False, seed=0)
    assert of.decay == 0
    assert of.zeroed.all()


def test_answers_about_a_zero_are_the_laws_own():
    x = torch.tensor([[0.0, 0.0, 3.0]], dtype=torch.float64)
    mu, r, pi = (
        torch.tensor(v, dtype=torch.float64) for v in ([[[0.5, 2.0, 4.0]]], [1.5, 3.0, 0.7], [[[0.2, 0.5, 0.1]]])
    )
    theta = {"log_mean": mu.log(), "log_inverse_dispersion": r.log(), "gate_logits": torch.logit(pi)}
    found = zeros.answers(ZINB(), x, theta)
    nothing = (r / (r + mu)) ** r
    zero = pi + (1 - pi) * nothing
    assert_allclose(found[zeros.PI], pi[0])
    assert_allclose(found[zeros.ZERO], zero[0], rtol=1e-10)
    assert_allclose(found[zeros.RHO], (pi / zero)[0], rtol=1e-10)  # as if zero, where a count was seen too
    rho = (pi / zero)[0, 0, :2]
    shrunk = r * mu / (r + mu)
    assert_allclose(found[zeros.RATE][0, :2], rho * mu[0, 0, :2] + (1 - rho) * shrunk[0, 0, :2], rtol=1e-10)
    assert found[zeros.RATE][0, 2] == pytest.approx(float((r[2] + 3) / (r[2] / mu[0, 0, 2] + 1)))
    with pytest.raises(ValueError, match="take ZINB"):
        zeros.answers(NB(), x, {name: theta[name] for name in ("log_mean", "log_inverse_dispersion")})


def test_answers_of_a_fit_are_those_of_impute():
    cells = Cells.from_counts(counts_of_rank_one(70, 12))
    model = SCVI(12, 3, seed=0, n_hidden=16)
    found = fit(model, cells, epochs=2, validation=0, seed=0, progress=False)
    answers = zeros.of_fit(found, cells, samples=4, seed=5)
    assert_allclose(answers[zeros.RATE], impute(found, cells, samples=4, seed=5), rtol=1e-5)
    mu = impute(found, cells, samples=4, seed=5, quantity=mean_given_no_dropout)
    assert_allclose(answers[zeros.MEAN], mu, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:ZINB-WaVE has not converged")
def test_answers_of_zinb_wave_have_the_likelihood_of_its_fit():
    counts = counts_of_rank_one(80, 15, seed=1)
    method = baselines.ZINBWaVE(2, max_iter=10).fit(counts)
    found = zeros.of_zinb_wave(method, counts)
    r, mu = math.exp(method.zeta_[0]), found[zeros.MEAN]
    seen = np.log1p(-found[zeros.PI]) + stats.nbinom.logpmf(counts, r, r / (r + mu))
    assert np.where(counts > 0, seen, np.log(found[zeros.ZERO])).sum() == pytest.approx(method.log_likelihood_)
    assert_allclose(found[zeros.RHO] * found[zeros.ZERO], found[zeros.PI], rtol=1e-9)


def test_zifas_probabilities_are_those_of_its_zeros_and_defined_for_counts_too():
    counts = counts_of_rank_one(200, 20)
    method = baselines.ZIFA(2).fit(counts)
    found = zeros.of_zifa(method, counts)
    own = method.technical_zero_probability(counts)
    assert_allclose(found[zeros.PI][counts == 0], own[counts == 0])
    assert (found[zeros.PI][counts > 0] > 0).all()
    rng = np.random.default_rng(0)  # P(x = 0 | z) by draws of u
    eta = method.transform(counts)[0] @ method.loadings_.T + method.mean_
    u = eta + method.scale_ * rng.standard_normal((200_000, len(eta)))
    drawn = np.exp(-method.decay_ * u**2)
    assert (np.abs(found[zeros.ZERO][0] - drawn.mean(0)) < 5 * drawn.std(0) / math.sqrt(len(u))).all()


class Given:
    """Outcomes made by hand."""

    def __init__(self, of):
        self.of = of


def result(step, error=1.0):
    seed = step.settings["case"]["seed"]
    names = {"constants": ["constant 0", "gene mean"], "zifa": [""], "magic": [""]}
    asked = {"zifa": ["pi", "zero"], "magic": [], "constants": []}.get(step.function.__name__, ["pi", "rho", "zero"])
    scores = {"cross_entropy": 0.5 + seed, "cross_entropy_se": 0.01, "auc": 0.6, "auc_se": 0.02}
    found = {name: scores for name in asked}
    if step.function is table2.constants:
        found = {"base": {"cross_entropy": 0.4, "cross_entropy_se": 0.01}}
    error = {"median": error + seed, "median_se": 0.1, "mean": 2.0, "mean_se": 0.2}
    about = {"entries": 100 + seed, "left_out": 0, "base_rate": 0.3, "true_median": 1.0, "decay": 1.2}
    errors = {name: error for name in names.get(step.function.__name__, [", mu", ", E[w | x]"])}
    return about | {"seconds": 3.0, "errors": errors, "identification": found, "converged": False, "iterations": 40}


def test_rows_are_means_over_seeds_with_the_papers_numbers_beside_the_brain(monkeypatch):
    settings = [each._replace(seeds=1 if each.file == files.BRAIN else 3) for each in table2.SETTINGS]
    monkeypatch.setattr(table2, "SETTINGS", settings)

    def of(step):
        if step.function is table2.scvi_tools:
            return Outcome(None, 0.0, 0.0, "not installed: scvi-tools")
        return Outcome(result(step), 3.0, 100.0)

    rows = table2.rows(Given(of), FULL)
    by = {(row.data, row.system, row.quantity): row for row in rows}
    assert len(by) == len(rows)
    cortex = by["cortex_558, ZIFA corruption", "scVI, default, mu", table2.MEDIAN]
    assert (cortex.value, cortex.error, cortex.spread, cortex.n) == (2.0, 1.0, "sd over seeds", 3)
    assert all(math.isnan(row.paper) for row in rows if row.data != "brain10k, ZIFA corruption")
    brain = by["brain10k, ZIFA corruption", "scVI, 2017 preset, mu", table2.MEDIAN]
    assert (brain.value, brain.error, brain.spread, brain.paper) == (1.0, 0.1, "se over entries", 1.048)
    assert by["brain10k, ZIFA corruption", "ZIFA", "cross-entropy of P(h = 1 | z), nats"].paper == 1.955
    missing = by["cortex_558, uniform corruption", "scvi-tools", table2.MEDIAN]
    assert math.isnan(missing.value)
    assert "not installed" in missing.note
    assert "not converged" in by["brain10k, ZIFA corruption", "ZINB-WaVE, mu", table2.MEAN].note
    assert not [row for row in rows if "uniform" in row.data and "entropy" in row.quantity]
    assert by[
        "cortex_558, ZIFA corruption", "the share zeroed", "cross-entropy of the share zeroed, nats"
    ].value == pytest.approx(0.4)


def test_the_settings_of_a_step_hold_seed_epochs_and_draws(monkeypatch):
    steps = table2.steps(QUICK)
    fits = [step for step in steps if step.function in (table2.ours, table2.scvi_tools)]
    assert {step.settings["epochs"] for step in fits} == {QUICK.epochs}
    assert all(step.settings["seed"] == step.settings["case"]["seed"] for step in fits)
    assert all(step.needs == (step.settings["case"]["file"],) for step in steps)
    most = {
        step.settings["name"]: step.settings["epochs"] for step in table2.steps(FULL) if step.function is table2.ours
    }
    assert most["scVI, default"] is None
    assert {step.settings["case"]["file"] for step in steps} == {files.CORTEX, files.BRAIN}
