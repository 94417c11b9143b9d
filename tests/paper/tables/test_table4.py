"""Scores of embeddings, choices of genes and rows of Table 4, on cells whose answers are known."""

import math

import anndata
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy import sparse
from sklearn.linear_model import LinearRegression
from sklearn.metrics import silhouette_score

from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.data import files, pbmc
from pyro_scvi.paper.metrics import embedding_scores as scores
from pyro_scvi.paper.steps import Outcome
from pyro_scvi.paper.tables import table4


def test_explained_pools_metrics_by_their_variance():
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((5000, 2))
    known, noise = 3 * latents[:, 0] + 5, rng.standard_normal(5000)
    both = np.column_stack((known, noise))
    r2 = scores.explained(latents, both)
    assert r2 == pytest.approx(known.var() / (known.var() + noise.var()), abs=2e-3)  # .9, not the mean of 1 and 0
    residual = both - LinearRegression().fit(latents, both).predict(latents)
    assert r2 == pytest.approx(1 - (residual**2).sum() / ((both - both.mean(0)) ** 2).sum())


def test_what_labels_explain_is_the_variance_between_their_means():
    labels, batch = np.array(["a", "a", "b", "b"]), np.array(["p", "q", "p", "q"])
    quality = np.array([[0.0], [2.0], [4.0], [6.0]])
    assert scores.explained(scores.one_hot(labels), quality) == pytest.approx(16 / 20)
    assert scores.explained(scores.one_hot(batch), quality) == pytest.approx(4 / 20)
    assert scores.explained(scores.one_hot(labels, batch), quality) == pytest.approx(1.0)


def two_clouds(apart, n=60):
    rng = np.random.default_rng(1)
    return rng.standard_normal((2 * n, 3)) + apart * np.repeat([0.0, 1.0], n)[:, None], np.repeat(["a", "b"], n)


def test_types_far_apart_have_the_best_scores_and_types_at_random_none():
    latents, labels = two_clouds(50.0)
    found = scores.of_types(latents, labels)
    assert found["silhouette"] == pytest.approx(silhouette_score(latents, labels))
    assert (found["ari"], found["nmi"], found["accuracy"]) == pytest.approx((1.0, 1.0, 1.0))
    mixed = scores.of_types(latents, np.tile(["a", "b"], 60))
    assert abs(mixed["ari"]) < 0.05
    assert mixed["accuracy"] < 0.7


def test_a_cell_has_no_vote_on_its_own_type():
    """With 15 voters among 16 cells, 8 of each type, the other type always has the majority of 8 to 7."""
    latents = np.random.default_rng(0).standard_normal((16, 2))
    assert scores.of_types(latents, np.repeat(["a", "b"], 8))["accuracy"] == 0.0


def test_batch_entropy_is_1_where_batches_are_mixed_and_0_where_they_are_apart():
    latents, batch = two_clouds(1000.0, n=200)
    assert scores.batch_entropy(latents, batch) == 0.0
    mixed = scores.batch_entropy(latents, np.tile(["a", "b"], 200))
    assert mixed == pytest.approx(1 - 1 / (2 * 50 * math.log(2)), abs=0.01)  # less the bias of 50 draws
    uneven = np.where(np.random.default_rng(0).random(400) < 0.2, "a", "b")
    assert scores.batch_entropy(latents, uneven) > 0.95


def test_most_variable_genes_are_those_of_log_counts():
    logs = np.random.default_rng(0).random((50, 6)) * np.array([0.1, 3.0, 0.2, 2.0, 0.3, 1.0])
    counts = np.expm1(logs)
    counts[0, 0] = 4.0  # one outlier in counts is none in logs
    found = pbmc.most_variable(sparse.csr_matrix(counts), 3)
    assert_allclose(found, np.sort(np.argsort(-np.log1p(counts).var(0))[:3]))
    assert_allclose(found, [1, 3, 5])


def test_quality_of_cells_without_the_authors_metrics_is_z_scored_and_types_of_one_batch_are_trusted(monkeypatch):
    rng = np.random.default_rng(0)
    counts = rng.poisson(1.0, (40, 9)).astype(np.int32)
    counts[:, 4] = 0
    adata = anndata.AnnData(sparse.csr_matrix(counts))
    adata.obs["batch"] = ["pbmc3k"] * 25 + ["frozen_pbmc_donor_A"] * 15
    adata.obs["labels"] = rng.choice(["B", "NK"], 40)
    for name in ("n_umi", "n_genes", "pct_mt", "pct_ribo"):
        adata.obs[name] = rng.integers(1, 100, 40)
    monkeypatch.setattr(files, "read", lambda file, at_most: adata)
    blood = pbmc.read(files.PBMC_3KA, None)
    assert blood.adata.n_vars == 8
    assert_allclose(blood.quality.mean(0), 0, atol=1e-12)
    assert_allclose(blood.quality.std(0), 1)
    assert_allclose(blood.metrics[:, 0], np.log(adata.obs["n_umi"]))
    assert (blood.labelled == (blood.batch == "pbmc3k")).all()
    assert set(blood.gamma) <= set(blood.adata.obs)


class Given:
    """Outcomes made by hand."""

    def __init__(self, of):
        self.of = of


def outcome(step):
    if step.function is table4.scvi_tools:
        return Outcome(None, 0.0, 0.0, "not installed: scvi-tools")
    if step.function is table4.references:
        known = {"labels": 0.235, "batch": 0.139, "labels and batch": 0.374}
        return Outcome(known | {"cells": 50, "labelled": 30, "genes": 7}, 1.0, 10.0)
    seed, gamma = step.settings["seed"], step.settings.get("quality")
    found = dict.fromkeys(table4.QUANTITIES, 0.4) | {"seconds": 2.0}
    return Outcome(found | {"r2": 0.3 + 0.1 * seed - (0.2 + 0.01 * seed) * (gamma is True)}, 2.0, 10.0)


def test_rows_pair_gamma_by_seed_and_set_the_paper_beside_its_own_cells(monkeypatch):
    monkeypatch.setattr(table4, "SETTINGS", [each._replace(seeds=3) for each in table4.SETTINGS])
    rows = table4.rows(Given(outcome), FULL)
    by = {(row.data, row.system, row.quantity): row for row in rows}
    assert len(by) == len(rows)
    r2 = table4.QUANTITIES["r2"]
    difference = by["pbmc_3kA", "scVI, default", f"{r2}, with gamma less without"]
    assert (difference.value, difference.error, difference.n) == pytest.approx((-0.21, 0.01, 3))
    assert difference.note == "lower with gamma: yes"
    separation = by["pbmc_3kA", "scVI, default", f"{table4.QUANTITIES['silhouette']}, with gamma less without"]
    assert separation.note == "equal within one sd, or better: yes"
    assert table4._kept("silhouette", -0.02, 0.01) == "equal within one sd, or better: no"
    assert table4._kept("r2", 0.01, 0.1) == "lower with gamma: no"
    fitted = by["pbmc_8k4k_hvg", "scVI, 2017 preset, without gamma", r2]
    assert (fitted.value, fitted.error, fitted.paper) == pytest.approx((0.4, 0.1, 0.366))
    assert math.isnan(by["pbmc_3kA", "scVI, 2017 preset, without gamma", r2].paper)
    assert by["pbmc_8k4k_hvg", table4.SEED_CHOICE, table4.QUANTITIES["silhouette"]].paper == 0.321
    assert by["pbmc_8k4k_hvg", "types and batch", r2].value == 0.374
    missing = by["pbmc_3kA", "scvi-tools, without batch", table4.QUANTITIES["silhouette"]]
    assert math.isnan(missing.value)
    assert "not installed" in missing.note


def test_a_reference_that_is_missing_costs_its_rows_alone(tmp_path):
    def without(step):
        return Outcome(None, 0, 0, "not finished") if step.function is table4.references else outcome(step)

    rows = {(row.system, row.quantity): row for row in table4.rows(Given(without), FULL)}
    assert rows["types alone", table4.QUANTITIES["r2"]].note == "not finished"
    assert rows["PCA", table4.QUANTITIES["r2"]].value == pytest.approx(0.3)
    (picture,) = table4.pictures(Given(without), FULL, tmp_path)
    assert picture.file.is_file()


def test_cells_are_scaled_by_their_recorded_depth_to_its_mean():
    x = np.array([[2.0, 4.0], [3.0, 0.0]])
    assert table4.RecordedDepth(np.array([10.0, 30.0]))(x).tolist() == [[4.0, 8.0], [2.0, 0.0]]


def test_the_constants_are_the_protocols():
    assert (scores.VOTERS, scores.NEIGHBOURS) == (15, 50)
    assert table4.N_LATENTS == 10


def test_models_differ_in_gamma_alone_and_steps_hold_their_settings():
    steps = [step for step in table4.steps(QUICK) if step.function is table4.ours]
    assert {step.settings["epochs"] for step in steps} == {QUICK.epochs}
    pairs = {(s.settings["quality"], s.settings["batch"]) for s in steps}
    assert pairs == {(False, False), (True, False), (True, True)}
    for gamma in (False, True):
        of = [step.settings for step in steps if not step.settings["batch"] and step.settings["quality"] == gamma]
        fits = {(each["case"]["file"], each["name"], each["seed"]) for each in of}
        assert len(fits) == len(of)
        assert {file for file, _, _ in fits} == {files.PBMC_8K4K, files.PBMC_3KA}
        assert {name for _, name, _ in fits} == set(table4.EPOCHS)
