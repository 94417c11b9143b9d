"""The contract of every baseline, on one small simulated data set."""

import json
import pkgutil
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from scipy.integrate import quad
from scipy.stats import norm
from sklearn.base import BaseEstimator, clone
from sklearn.metrics import adjusted_rand_score
from sklearn.pipeline import make_pipeline

from pyro_scvi import baselines
from pyro_scvi.baselines.inputs import dense_counts
from pyro_scvi.baselines.leiden import normalised, shared_neighbours
from pyro_scvi.errors import DataError, ModelError
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.filterwarnings("ignore:no parametric trend fits the dispersions")  # DESeq2, of 20 genes

CELLS, GENES, LATENTS = 60, 20, 2
COUNTS = simulated_counts(CELLS, GENES)
GROUP = np.arange(CELLS) % 2  # as simulated_counts makes them

Question = Callable[[Any, Any], Any]


def named(name) -> Question:
    return lambda method, counts: getattr(method, name)(counts)


class Case(NamedTuple):
    """A baseline, what it is asked of counts and of its fit, the package it needs, whether it takes unseen genes."""

    make: Callable[[], Any]
    questions: dict[str, Question] = {}
    of_fit: dict[str, Callable[[Any], Any]] = {}
    imported: str | None = None
    unseen_genes: bool = False

    @property
    def tests_groups(self):
        return "test" in self.questions

    def fitted(self, counts=COUNTS):
        method = self.make()
        return method if self.tests_groups else method.fit(counts)

    def answers(self, counts=COUNTS, method=None):
        method = self.fitted(counts) if method is None else method
        found = {name: np.asarray(ask(method, counts)) for name, ask in self.questions.items()}
        return found | {name: np.asarray(ask(method)) for name, ask in self.of_fit.items()}


SHAPES = {
    "transform": (CELLS, LATENTS),
    "score_samples": (CELLS,),
    "expected_complete_log_likelihood": (CELLS,),
    "impute": (CELLS, GENES),
    "impute_zeros": (CELLS, GENES),
    "technical_zero_probability": (CELLS, GENES),
    "normalised": (CELLS, GENES),
    "labels": (CELLS,),
    "test": (GENES, 2),
}
TEST = {"test": lambda method, counts: method.test(counts, GROUP)}


def asked(*names):
    return {name: named(name) for name in names}


CASES = {
    "FactorAnalysis": Case(lambda: baselines.FactorAnalysis(LATENTS), asked("transform", "score_samples")),
    "PCA": Case(lambda: baselines.PCA(LATENTS), asked("transform"), unseen_genes=True),
    "ZIFA": Case(
        lambda: baselines.ZIFA(LATENTS, batch_size=25),
        asked("transform", "score_samples", "expected_complete_log_likelihood", "impute", "technical_zero_probability"),
    ),
    "ZINBWaVE": Case(
        lambda: baselines.ZINBWaVE(LATENTS, tol=1e-2),
        asked("transform", "score_samples", "impute", "impute_zeros", "technical_zero_probability"),
    ),
    "MAGIC": Case(baselines.MAGIC, asked("impute"), imported="magic"),
    "SCONE": Case(baselines.SCONE, of_fit={"normalised": lambda method: method.normalised()}),
    "LeidenClusters": Case(
        lambda: baselines.LeidenClusters(resolution=0.5, n_components=5, n_neighbors=15),
        of_fit={"labels": lambda method: method.labels_},
        imported="igraph",
        unseen_genes=True,
    ),
    "SCVITools": Case(
        lambda: baselines.SCVITools(LATENTS, epochs=2, samples=50),
        asked("transform", "score_samples"),
        imported="scvi",
        unseen_genes=True,
    ),
    "DESeq2": Case(baselines.DESeq2, TEST, imported="inmoose.deseq2", unseen_genes=True),
    "MAST": Case(baselines.MAST, TEST, unseen_genes=True),
    "Wilcoxon": Case(baselines.Wilcoxon, TEST, unseen_genes=True),
}


@pytest.fixture(params=CASES)
def case(request):
    found = CASES[request.param]
    if found.imported is not None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of their own dependencies
            pytest.importorskip(found.imported, exc_type=ImportError)
    return found


@cache
def fitted_once(make):
    return make().fit(COUNTS)


@pytest.fixture
def fitted(case):
    """The method, fitted to COUNTS in one of the tests that ask for it."""
    return case.make() if case.tests_groups else fitted_once(case.make)


def test_every_baseline_has_its_row():
    exported = {name: getattr(baselines, name) for name in baselines.__all__}
    methods = {name for name, each in exported.items() if isinstance(each, type) and issubclass(each, BaseEstimator)}
    assert set(CASES) == methods


def test_answers_have_their_shape_and_are_finite(case, fitted):
    for name, answer in case.answers(method=fitted).items():
        assert answer.shape == SHAPES[name]
        assert np.isfinite(answer).all()


def test_parameters_make_the_method_anew(case):
    method = case.make()
    assert repr(clone(method).get_params()) == repr(method.get_params())


def test_pipelines_take_every_method(case):
    if not case.tests_groups:
        make_pipeline(case.make()).fit(COUNTS)


def test_an_anndata_is_refused_with_advice():
    anndata = pytest.importorskip("anndata")
    with pytest.raises(DataError, match="got AnnData; pass adata.X"):
        baselines.PCA(2).fit(anndata.AnnData(COUNTS.astype(float)))


def test_benchmark_checks_its_folder_first_and_writes_every_row(tmp_path, monkeypatch, capsys):
    from benchmarks.quality import baselines as benchmark

    with pytest.raises(SystemExit):
        benchmark.main(["--out", str(tmp_path / "none" / "table.json")])
    assert "folder that exists" in capsys.readouterr().err
    out, found = tmp_path / "table.json", iter([{"cpu_seconds": 1.0}])
    monkeypatch.setattr(benchmark, "in_a_process", lambda *_: next(found))
    with pytest.raises(StopIteration):  # the second fit fails
        benchmark.main(["--systems", "PCA", "--tasks", "cortex", "--seeds", "0", "1", "--out", str(out)])
    (row,) = json.loads(out.read_text())
    assert row["cpu_seconds"] == 1
    assert "torch" in row["versions"]


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_array, torch.as_tensor, pd.DataFrame])
def test_counts_come_in_many_forms(form):
    dense = dense_counts(form(COUNTS))
    assert dense.dtype == np.float64
    np.testing.assert_array_equal(dense, COUNTS)


def test_columns_of_a_data_frame_are_matched_by_name(case):
    """Another order of genes is the same data; a gene that the fit had must be there."""
    names = [f"gene {i}" for i in range(GENES)]
    method, frame = case.make(), pd.DataFrame(COUNTS, columns=names)
    if case.tests_groups or not case.questions:
        pytest.skip("asked of nothing but the counts of its fit")
    if "tol" in method.get_params():
        method.set_params(tol=1e-2)  # what is compared need not have converged far
    method.fit(frame)
    expected = case.answers(frame, method)
    for name, found in case.answers(frame[names[::-1]], method).items():
        np.testing.assert_array_equal(found, expected[name], name)
    with pytest.raises(
        DataError, match="1 genes of the fit are missing from the columns of counts, the first of them 'gene 3'"
    ):
        case.answers(frame.rename(columns={"gene 3": "other"}), method)
    method.fit(COUNTS)  # a fit without names asks for none
    assert not hasattr(method, "feature_names_in_")


@pytest.mark.parametrize("make", [baselines.MAST, baselines.Wilcoxon], ids=["MAST", "Wilcoxon"])
def test_groups_of_an_ordered_categorical_keep_their_order(make):
    group = np.where(GROUP, "after", "before")
    ordered = pd.Categorical(group, ["unused", "before", "after"], ordered=True)
    assert np.allclose(make().test(COUNTS, ordered).log_fold_change, -make().test(COUNTS, group).log_fold_change)


def test_sparse_counts_give_what_dense_ones_give(case, fitted):
    dense, other = case.answers(method=fitted), case.answers(sparse.csr_matrix(COUNTS))
    for name, answer in dense.items():
        np.testing.assert_array_equal(answer, other[name])


def test_equal_seed_gives_equal_answers_and_leaves_no_trace(case, fitted):
    before = np.random.get_state()[1].copy(), random.getstate(), torch.get_rng_state()  # noqa: NPY002
    threads, counts = torch.get_num_threads(), COUNTS.astype(float)
    first, second = case.answers(method=fitted), case.answers(counts)
    for name, answer in first.items():
        np.testing.assert_array_equal(answer, second[name])
    np.testing.assert_array_equal(before[0], np.random.get_state()[1])  # noqa: NPY002
    assert before[1] == random.getstate()
    assert torch.equal(before[2], torch.get_rng_state())
    assert threads == torch.get_num_threads()
    np.testing.assert_array_equal(counts, COUNTS)


@pytest.mark.parametrize("value", [-1, np.nan, np.inf])
def test_what_is_no_count_is_refused(case, fitted, value):
    counts = COUNTS.astype(float)
    counts[3, 4] = value
    with pytest.raises(DataError, match="cell 3, gene 4"):
        case.answers(counts)
    for ask in case.questions.values():
        with pytest.raises(DataError, match="cell 3, gene 4"):
            ask(fitted, counts)


def test_unseen_genes(case):
    counts = np.concatenate([COUNTS, np.zeros((CELLS, 1), int)], 1)
    if case.unseen_genes:
        assert case.answers(counts)
    else:
        with pytest.raises(DataError, match="1 genes have no count in any cell, the first of them gene 20"):
            case.fitted(counts)


def test_other_genes_are_refused(case, fitted):
    if not case.tests_groups:
        for ask in case.questions.values():
            with pytest.raises(DataError, match="fitted on 20 genes, these counts have 19"):
                ask(fitted, COUNTS[:, 1:])


def test_questions_need_a_fit(case):
    if not case.tests_groups:
        for ask in case.questions.values():
            with pytest.raises(ModelError, match="has not been fitted; call fit"):
                ask(case.make(), COUNTS)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.imported])
def test_absent_packages_are_named_with_their_extra(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setitem(sys.modules, case.imported, None)
    extra = "peer" if case.imported == "scvi" else "baselines"
    with pytest.raises(ImportError, match=rf"pip install 'pyro-scvi\[{extra}\]'"):
        case.answers()


def test_import_needs_no_extra():
    """Neither of the package nor of any of its modules."""
    optional = sorted({case.imported for case in CASES.values() if case.imported} | {"inmoose", "scanpy", "numba"})
    modules = [found.name for found in pkgutil.walk_packages(baselines.__path__, "pyro_scvi.baselines.")]
    assert {"pyro_scvi.baselines.scvi_tools", "pyro_scvi.baselines.differential.deseq2"} <= set(modules)
    code = f"import sys, {', '.join(modules)}; print([n for n in {optional} if n in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert ended.stdout == "[]\n", ended.stderr  # where old releases warn of one another


@pytest.mark.parametrize("name", ["FactorAnalysis", "PCA", "ZIFA", "ZINBWaVE"])
@pytest.mark.parametrize("n_latent", [0, GENES + 1])
def test_number_of_latents_has_limits(name, n_latent):
    with pytest.raises(ModelError, match="n_latent must be"):
        getattr(baselines, name)(n_latent).fit(COUNTS)


@pytest.mark.parametrize("name", ["ZIFA", "ZINBWaVE"])
def test_technical_zeros_have_a_probability(name):
    p = fitted_once(CASES[name].make).technical_zero_probability(COUNTS)[COUNTS == 0]
    assert ((p > 0) & (p <= 1)).all()


# --- what each of them computes ---


def test_factor_analysis_is_a_density_of_counts():
    """The Jacobian: integrated over the counts from 0 it is what log1p has above 0, a normal's upper tail."""
    method = baselines.FactorAnalysis(1).fit(np.random.default_rng(0).gamma(2.0, 2.0, (300, 1)))
    total, _ = quad(lambda x: np.exp(method.score_samples([[x]])[0]), 0, np.inf, limit=200)
    scale = method.model_.get_covariance()[0, 0] ** 0.5
    assert total == pytest.approx(norm.sf(0, method.model_.mean_[0], scale), abs=1e-7)


def test_factor_analysis_needs_genes_that_vary():
    counts = COUNTS.copy()
    counts[:, 7] = 3
    for name in ("FactorAnalysis", "ZIFA"):
        with pytest.raises(DataError, match="1 genes have the same count in every cell, the first of them gene 7"):
            CASES[name].fitted(counts)


def test_pca_scores_are_the_largest_directions():
    y = np.log1p(COUNTS)
    singular = np.linalg.svd(y - y.mean(0), compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(CASES["PCA"].answers()["transform"], axis=0), singular[:LATENTS])


def test_magic_smooths_and_keeps_depth():
    pytest.importorskip("magic", exc_type=ImportError)
    method = baselines.MAGIC(knn=3, t=2).fit(COUNTS)
    totals = COUNTS.sum(1, keepdims=True)
    depth = totals / np.median(totals)
    operator = method.model_.diff_op.toarray()  # cells x cells, rows sum to 1
    np.testing.assert_allclose(operator.sum(1), 1)
    expected = (operator @ operator @ np.sqrt(COUNTS / depth)) ** 2 * depth
    np.testing.assert_allclose(method.impute(COUNTS), expected)


def test_magic_imputes_its_own_cells_only():
    pytest.importorskip("magic", exc_type=ImportError)
    with pytest.raises(DataError, match="only the counts that it was fitted to"):
        baselines.MAGIC().fit(COUNTS).impute(COUNTS[::-1])
    with pytest.raises(ModelError, match="knn must be below the number of cells, 60; got 60"):
        baselines.MAGIC(knn=60).fit(COUNTS)


def test_magic_leaves_empty_cells_empty():
    pytest.importorskip("magic", exc_type=ImportError)
    counts = COUNTS.copy()
    counts[5] = 0
    assert np.isfinite(baselines.MAGIC().fit(counts).impute(counts)).all()


def test_magic_leaves_the_global_state_with_many_genes():
    """Above 500 genes magic itself draws from it."""
    pytest.importorskip("magic", exc_type=ImportError)
    counts = np.random.default_rng(0).poisson(3.0, (40, 520))
    before = np.random.get_state()[2]  # noqa: NPY002
    baselines.MAGIC(n_pca=10).fit(counts).impute(counts)
    assert before == np.random.get_state()[2]  # noqa: NPY002


def test_leiden_graph_is_the_overlap_of_neighbourhoods():
    points = np.random.default_rng(0).normal(size=(30, 2))
    near = [set(np.argsort(((points - point) ** 2).sum(1))[:6]) for point in points]
    expected = np.array([[len(a & b) / len(a | b) for a in near] for b in near])
    expected[expected < 1 / 15] = 0
    np.fill_diagonal(expected, 0)
    np.testing.assert_allclose(shared_neighbours(points, 6).toarray(), expected)


def test_leiden_takes_logs_of_scaled_counts():
    scanpy = pytest.importorskip("scanpy")
    totals = COUNTS.sum(1, keepdims=True)
    expected = np.log1p(COUNTS / totals * np.median(totals))
    np.testing.assert_allclose(normalised(scanpy, COUNTS.astype(float), 20), expected)
    kept = normalised(scanpy, COUNTS.astype(float), 5)
    assert 5 <= kept.shape[1] < 20  # few genes: some tie
    assert all((np.abs(expected - column[:, None]).max(0) < 1e-12).any() for column in kept.T)


def test_leiden_finds_groups_and_names_them_by_size():
    pytest.importorskip("igraph", exc_type=ImportError)
    rng = np.random.default_rng(0)
    group = np.repeat([0, 1, 2], [20, 60, 40])
    counts = rng.poisson(rng.gamma(1.0, 5.0, (3, 50))[group])
    labels = baselines.LeidenClusters(resolution=0.1, n_components=5, n_neighbors=15).fit_predict(counts)
    assert adjusted_rand_score(group, labels) == 1
    assert np.bincount(labels).tolist() == [60, 40, 20]
    few_genes = baselines.LeidenClusters(resolution=0.1, n_variable_genes=25, n_components=5, n_neighbors=15)
    assert adjusted_rand_score(group, few_genes.fit_predict(counts)) > 0.9


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"resolution": 0}, "resolution must be a positive number, got 0"),
        ({"n_neighbors": 61}, "n_neighbors must be at most the number of cells, 60; got 61"),
        ({"n_components": 21}, "n_components must be at most 20, cells or variable genes; got 21"),
        ({"n_neighbors": 1}, "n_neighbors must be an integer of 2 or more, got 1"),
    ],
)
def test_leiden_refuses_what_it_cannot_do(settings, said):
    pytest.importorskip("igraph", exc_type=ImportError)
    with pytest.raises(ModelError, match=said):
        baselines.LeidenClusters(**settings).fit(COUNTS)
