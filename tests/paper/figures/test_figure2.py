"""Figure 2: draws of cells, scores of genes, their agreement with the arrays, and the rows that are made of them."""

import math

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.analysis.differential import DepthCorrected, Uncorrected
from pyro_scvi.baselines import AUTHORS_START, idr, reproducibility
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.data.blood import Blood
from pyro_scvi.paper.figures import figure2
from pyro_scvi.paper.metrics import concordance
from pyro_scvi.paper.metrics.concordance import AUC, MIXTURE, RHO, SPEARMAN, judged, significance
from pyro_scvi.paper.steps import Outcome
from tests.support.simulate import simulated_counts


def blood(n_genes=400):
    """60 cells, 12 of them dendritic; every second gene has a reference."""
    rng = np.random.default_rng(0)
    labels = np.where(np.arange(60) % 5 == 0, "DC", np.where(np.arange(60) % 5 < 3, "B", "T"))
    counts = sparse.csr_matrix(rng.poisson(1.0, (60, n_genes)))
    adata = AnnData(counts, obs=pd.DataFrame({"labels": labels}, index=[f"c{i}" for i in range(60)]))
    matched = np.arange(n_genes) % 2 == 0
    p = rng.permutation((np.arange(matched.sum()) + 0.5) / matched.sum()) ** 3
    return Blood("test", adata, ("B", "DC"), "B", None, matched, p, p < np.quantile(p, 0.25), p)


def test_significance_is_finite_and_of_double_precision():
    found = significance(np.array([1.0, np.exp(-300.0), 0.0, np.nan]))
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, [0, 300, -math.log(np.finfo(np.float64).tiny), 0])
    assert significance(np.array([1e-30], dtype=np.float32)) == pytest.approx(30 * math.log(10), rel=1e-6)


def test_the_arrays_own_order_is_perfect_and_its_reverse_worthless():
    of = blood()
    score = np.full(len(of.matched), 1e6)  # of genes without a reference nothing is asked
    score[of.matched] = -np.log(of.p)
    found, reverse = judged(of, score), judged(of, -score)
    assert (found[AUC], found[SPEARMAN]) == (1, pytest.approx(1))
    assert (reverse[AUC], reverse[SPEARMAN]) == (0, pytest.approx(-1))
    assert found[RHO] > 0.9


def test_the_mixture_is_that_of_the_authors_start():
    of = blood()
    score = np.zeros(len(of.matched))
    score[of.matched] = -np.log(of.p) + np.random.default_rng(1).normal(0, 2, of.matched.sum())
    expected = idr(score[of.matched], -np.log(of.p), starts=[AUTHORS_START])
    found = judged(of, score)
    assert (found[MIXTURE], found[RHO]) == (expected.mixture_weight, expected.rho)


@pytest.mark.parametrize("kind", ["ties", "opposite", "two values"])
def test_the_mixture_of_scores_that_say_nothing_ends_and_is_finite(kind, monkeypatch):
    of, calls = blood(), []
    expectation = reproducibility.expectation
    monkeypatch.setattr(reproducibility, "expectation", lambda *given: (calls.append(1), expectation(*given))[1])
    score = np.zeros(len(of.matched))
    score[of.matched] = {"ties": np.round(-np.log(of.p)), "opposite": np.log(of.p), "two values": of.p < 0.5}[kind]
    found = judged(of, score)
    assert all(math.isfinite(value) for value in found.values())
    assert len(calls) <= 21 * (reproducibility.LONGEST_EM + 2) + 1


def test_draws_are_of_both_groups_with_replacement_and_each_cell_once():
    of = blood()
    first, second = figure2.drawn(of, 100, seed=3)
    labels = of.adata.obs["labels"].to_numpy()
    assert set(labels[first]) == {"B"}
    assert set(labels[second]) == {"DC"}
    assert len(second) == len(set(second)) <= 12
    assert len(figure2.drawn(of, 5, seed=3)[0]) <= 5
    assert all(np.array_equal(*pair) for pair in zip(figure2.drawn(of, 100, 3), (first, second), strict=True))
    assert not np.array_equal(figure2.drawn(of, 20, 4)[0], figure2.drawn(of, 20, 3)[0])


@pytest.fixture(scope="module")
def fitted():
    counts = simulated_counts(60, 20)
    counts[::2, 0] += 60  # even cells have far more of the first gene
    cells = ps.Cells.from_counts(counts)
    return ps.fit(ps.SCVI(20), cells, epochs=30, validation=0, progress=False, device="cpu"), cells


def test_the_score_of_a_model_is_that_of_differential_expression(fitted):
    rows = np.arange(0, 60, 2), np.arange(1, 40, 2)
    labels = np.full(60, "rest", dtype=object)
    labels[rows[0]], labels[rows[1]] = "a", "b"
    fit, cells = fitted
    both = cells.take(np.concatenate(rows))
    for contrast in (DepthCorrected(), Uncorrected()):
        table = ps.differential_expression(
            fit, both, groupby=["a"] * 30 + ["b"] * 20, group_a="a", group_b="b", seed=5,
            estimand=ps.differential.RandomPairs(contrast=contrast, largest_se=0.0, most_pairs=300),
        )  # fmt: skip
        found = figure2.with_noise(fit, cells, rows, contrast, pairs=300, seed=5)
        np.testing.assert_array_equal(found, table["log_bayes_factor"].abs())


def test_means_alone_are_surer_than_rates_and_clipped_to_what_the_pairs_resolve(fitted):
    rows = np.arange(0, 60, 2), np.arange(1, 60, 2)
    means = figure2.means_only(*fitted, rows, pairs=300, seed=0)
    rates = figure2.with_noise(*fitted, rows, DepthCorrected(), pairs=300, seed=0)
    assert means.mean() > rates.mean()
    assert means[0] > rates[0] > rates[1:].mean()
    of_two = figure2.means_only(*fitted, rows, pairs=2, seed=0)  # 0, 1 or 2 of them: p is 1/4, 1/2 or 3/4
    assert np.isclose(of_two[:, None], [0, math.log(3)]).any(1).all()
    assert of_two[0] == pytest.approx(math.log(3))


class Made:
    """Outcomes by system, in place of computed ones."""

    def __init__(self, scores, missing):
        self.scores, self.missing = scores, missing

    def of(self, step):
        if step.function is figure2.peer:
            return Outcome(None, 0, 0, self.missing)
        if step.function is figure2.arrays:
            column = {key: [0.6] for key in figure2.QUANTITIES}
            facts = {"genes": 200, "positives": 50, "groups": [500, 50], "distinct": [[90, 40], [92, 42]]}
            return Outcome({"arrays": column, "shuffled": {key: [0.4, 0.6] for key in column}, **facts}, 1, 1)
        name, seed = step.settings["name"], step.settings.get("seed", 0)
        values = self.scores.get(name, [0.5, 0.5])
        columns = {key: [value + 0.1 * seed for value in values] for key in figure2.QUANTITIES}
        scores = {"a": columns, "b": columns} if step.function is figure2.ours else {"-log p": columns}
        return Outcome({"scores": scores, "seconds": 3.0}, 3, 100)


def test_rows_hold_every_system_whichever_way_it_falls():
    made = Made({"scVI, default": [0.7, 0.9], figure2.WILCOXON: [0.6, 0.7]}, "not installed: scvi")
    rows = {(row.data, row.system, row.quantity): row for row in figure2.rows(made, FULL)}
    ours = rows["pbmc_3kA", "scVI, default: a", "AUC"]
    assert (ours.value, ours.n, ours.seeds, ours.spread) == (pytest.approx(0.85), 2, (0, 1), "sd over draws")
    assert ours.error == pytest.approx(math.sqrt(0.02))  # over draws, of the mean over seeds
    assert ours.note == "by fit: 0.800, 0.900"
    lead = rows["pbmc_3kA", "scVI, default: a", "AUC less Wilcoxon rank-sum's"]
    assert lead.note == "at least -0.02: yes"
    assert rows["pbmc_3kA", "scVI, 2017 preset: a", "AUC less Wilcoxon rank-sum's"].note == "at least -0.02: no"
    assert rows["pbmc_3kA", "scVI, default: a", "AUC less DESeq2's"].note == "at least 0: yes"
    assert rows["pbmc_3kA", "scVI, 2017 preset: a", "AUC"].note == "one fit"
    assert (lead.value, lead.error) == (pytest.approx(0.2), pytest.approx(math.sqrt(0.005)))  # paired
    for system, reason in (("scvi-tools", "not installed: scvi"), ("edgeR", figure2.NO_EDGER)):
        assert math.isnan(rows["pbmc4k_top2000", system, "AUC"].value)
        assert rows["pbmc4k_top2000", system, "AUC"].note == reason
    assert rows["pbmc_3kA", "the data", "different dendritic cells in a draw"].value == 41
    assert {system for _, system, _ in rows} >= {*figure2.TESTS, figure2.OF_ARRAYS, figure2.AT_RANDOM}


def test_a_collapsed_mixture_is_said():
    assert "rho says little" in figure2._of_fits(figure2.MIXTURE, [[1.0, 0.995]], ())
    assert figure2._of_fits(figure2.AUC, [[1.0, 0.995]], ()) == ""


def test_missing_tests_and_arrays_cost_their_rows_alone():
    class Without(Made):
        def of(self, step):
            lost = step.function is figure2.arrays or step.settings.get("name") == figure2.WILCOXON
            return Outcome(None, 0, 0, "not finished") if lost else super().of(step)

    rows = {(row.system, row.quantity): row for row in figure2.rows(Without({}, "not installed"), FULL)}
    assert rows[figure2.OF_ARRAYS, "AUC"].note == rows[figure2.WILCOXON, "AUC"].note == "not finished"
    assert ("scVI, default: a", "AUC less DESeq2's") in rows
    assert ("scVI, default: a", "AUC less Wilcoxon rank-sum's") not in rows


def test_steps_hold_what_they_depend_on():
    for step in (*figure2.steps(FULL), *figure2.steps(QUICK)):
        assert step.settings["case"].keys() == {"file", "at_most", "draws", "size"}
        assert set(step.needs) == {step.settings["case"]["file"], "microarray_reference.csv"}
    fits = [step.settings for step in figure2.steps(FULL) if step.function is figure2.ours]
    assert {(fit["name"], fit["epochs"], fit["seed"]) for fit in fits} == {
        ("scVI, 2017 preset", 115, 0),
        ("scVI, 2017 preset", 82, 0),
        ("scVI, default", None, 0),
        ("scVI, default", None, 1),
    }


def test_a_test_scores_the_gene_that_differs_highest():
    second = np.arange(40) % 2 == 1
    counts = np.random.default_rng(0).poisson(5.0, (40, 60)).astype(float)
    counts[second, 2] += 20
    for name in (figure2.WILCOXON, "Welch t", "MAST"):
        score = concordance.significance(figure2.TESTS[name](counts, second))
        assert score.argmax() == 2
        assert score[2] > 10
