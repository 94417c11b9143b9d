"""DESeq2, MAST and Wilcoxon on one contract, against R (shared/golden/de.npz) and against SciPy.

Perturbed once each, and seen to fail here: the degrees of freedom and both ratios of MAST, the size factors of DESeq2,
the direction of every fold change, the correction for ties.
"""

import logging
import sys

import numpy as np
import pandas as pd
import pytest
from scipy import sparse, stats
from sklearn.base import clone

from pyro_scvi.baselines.differential.deseq2 import DESeq2
from pyro_scvi.baselines.differential.mast import MAST, detection_ratio, level_ratio
from pyro_scvi.baselines.differential.wilcoxon import Wilcoxon
from pyro_scvi.baselines.normalization.scalings import NoScaling, TotalScaling
from pyro_scvi.errors import DataError
from tests.conftest import simulated_counts

LOGGER = logging.getLogger(__name__)
TESTS = [DESeq2(), MAST(), Wilcoxon()]


@pytest.fixture
def golden(data_path):
    return dict(np.load(data_path("../golden/de.npz")))


@pytest.fixture(params=TESTS, ids=lambda test: type(test).__name__)
def method(request):
    if isinstance(request.param, DESeq2):
        pytest.importorskip("inmoose", reason="DESeq2 needs inmoose, of the extra baselines")
    return request.param


def report(name, ours, theirs):
    """Deviations, logged; shown with pytest -o log_cli_level=INFO."""
    deviation = np.abs(ours - theirs)
    LOGGER.info("%s: %d genes, at most %.3g, median %.3g", name, len(ours), deviation.max(), np.median(deviation))
    return deviation


# --- against R ---


def test_deseq2_is_that_of_r(golden):
    pytest.importorskip("inmoose", reason="DESeq2 needs inmoose, of the extra baselines")
    found = DESeq2().test(golden["counts"].T, golden["group"])
    assert report("DESeq2 log10 p", np.log10(found.p_value), np.log10(golden["deseq2_pos_p"])).max() < 1e-4
    assert report("DESeq2 lfc", found.log_fold_change, golden["deseq2_pos_lfc"]).max() < 1e-5


def test_mast_is_that_of_r(golden):
    found = MAST().test(golden["counts"].T, golden["group"])
    y = np.log2(golden["counts"].T + 1)
    parts = y[golden["group"] == 0], y[golden["group"] == 1]
    plain = level_ratio(*parts)[1]  # R is not consistent where all detected values are equal
    assert (~plain).sum() == 7
    assert report("MAST p", found.p_value[plain], golden["mast_plain_p"][plain]).max() < 1e-12
    LOGGER.info("dropped: %s, R: %s", found.p_value[~plain].round(4).to_dict(), golden["mast_plain_p"][~plain])
    # By default MAST shrinks: not the same figure, but the same order of genes.
    known = np.isfinite(golden["mast_p"])
    assert np.median(report("default MAST p", found.p_value[known], golden["mast_p"][known])) < 0.01
    assert stats.spearmanr(found.p_value[known], golden["mast_p"][known])[0] > 0.98


def test_wilcoxon_is_that_of_scipy(golden):
    x, second = golden["counts"].T, golden["group"] == 1
    found = Wilcoxon().test(x, golden["group"])
    scaled = x / x.sum(1, keepdims=True)
    for gene in (0, 5, 116):
        by_scipy = stats.mannwhitneyu(scaled[second, gene], scaled[~second, gene], method="asymptotic").pvalue
        assert found.p_value[gene] == pytest.approx(by_scipy, rel=1e-9)
    assert stats.spearmanr(found.p_value, golden["deseq2_pos_p"])[0] > 0.6


# --- formulas ---


def test_mast_adds_the_two_likelihood_ratios():
    """Both parts from maximised log likelihoods of a Bernoulli and of a normal law, written out."""
    y, second = np.log2(simulated_counts(50, 8) + 1), np.arange(50) < 20
    detection, level = detection_ratio(y[~second], y[second])[0], level_ratio(y[~second], y[second])[0]
    for gene in range(1, 8):
        seen = y[:, gene] > 0
        parts = [seen[second], seen[~second]]
        bernoulli = [stats.bernoulli.logpmf(part, part.mean()).sum() for part in (*parts, seen)]
        assert detection[gene] == pytest.approx(2 * (bernoulli[0] + bernoulli[1] - bernoulli[2]))
        values = y[seen, gene]
        means = np.where(second[seen], values[second[seen]].mean(), values[~second[seen]].mean())
        sd = [np.sqrt(np.mean((values - mean) ** 2)) for mean in (means, values.mean())]
        normal = [stats.norm.logpdf(values, m, s).sum() for m, s in zip((means, values.mean()), sd, strict=True)]
        assert level[gene] == pytest.approx(2 * (normal[0] - normal[1]))
    p = MAST().test(simulated_counts(50, 8), second).p_value
    np.testing.assert_allclose(p[1:], stats.chi2.sf(detection + level, 2)[1:])


def test_mast_drops_the_degree_of_freedom_of_a_part_with_nothing_to_compare():
    x = np.ones((20, 5), dtype=int)
    group = np.arange(20) < 8
    x[:, 1] = group  # seen in one group only
    x[::2, 2] = 0  # all detected values equal
    x[:, 3] = np.arange(20) + 1  # detected everywhere
    x[:, 4] = 0
    p = MAST().test(x, group).p_value
    y = np.log2(x + 1)
    parts = y[~group], y[group]
    detection, level = detection_ratio(*parts)[0], level_ratio(*parts)[0]
    assert p[0] == p[4] == 1
    np.testing.assert_allclose(p[1:3], stats.chi2.sf(detection[1:3], 1))
    assert p[3] == pytest.approx(stats.chi2.sf(level[3], 1))
    assert level[3] > 10


@pytest.mark.parametrize("test", [MAST(TotalScaling()), Wilcoxon()])
def test_scaling_takes_depth_out(test):
    x = simulated_counts(80, 15)
    group = np.arange(80) % 4 < 2  # not the groups of the simulation
    deep = np.where(group[:, None], 8 * x, x)
    unscaled = clone(test).set_params(scaling=NoScaling())
    assert np.median(test.test(deep, group).p_value) > 0.1
    assert np.median(unscaled.test(deep, group).p_value) < 0.01


# --- the contract ---


@pytest.mark.filterwarnings("ignore:no parametric trend fits")
def test_table(method):
    x = simulated_counts(40, 6) + 1
    x[20:, 3] += 5 * x[20:, 3] + 40
    group = np.where(np.arange(40) < 20, "a", "b")
    found = method.test(pd.DataFrame(x, columns=list("uvwxyz")), group)
    assert list(found.columns) == ["p_value", "log_fold_change"]
    assert list(found.index) == list("uvwxyz")
    assert found.index.name == "gene"
    assert found.p_value.idxmin() == "x"
    assert found.log_fold_change["x"] > 1  # second group over first
    swapped = method.test(sparse.csr_matrix(x), np.where(np.arange(40) < 20, "z", "b"))
    np.testing.assert_allclose(swapped.p_value, found.p_value, rtol=1e-4)
    np.testing.assert_allclose(swapped.log_fold_change, -found.log_fold_change, rtol=1e-3, atol=1e-3)
    assert clone(method).get_params() == method.get_params()


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (np.zeros(40), "two values, got 1"),
        (np.arange(40) % 3, "two values, got 3"),
        (np.arange(39) % 2, "one label for each of 40 cells"),
        (np.array([None, *["a", "b"] * 20][:40], dtype=object), "1 have none"),
    ],
)
def test_refuses_groups(method, group, message):
    with pytest.raises(DataError, match=message):
        method.test(simulated_counts(40, 6), group)


def test_refuses_counts(method):
    x = simulated_counts(40, 6).astype(float)
    x[3, 2] = np.nan
    with pytest.raises(DataError, match="cell 3, gene 2"):
        method.test(x, np.arange(40) % 2)
    x[3] = 0
    with pytest.raises(DataError, match="1 cells have no count, the first of them cell 3"):
        method.test(x, np.arange(40) % 2)


def test_deseq2_refuses_what_is_not_raw():
    with pytest.raises(DataError, match="integer counts"):
        DESeq2().test(np.log1p(simulated_counts(40, 6)), np.arange(40) % 2)


def test_deseq2_says_where_it_takes_another_trend():
    pytest.importorskip("inmoose", reason="DESeq2 needs inmoose, of the extra baselines")
    with pytest.warns(UserWarning, match="no parametric trend fits the dispersions"):
        DESeq2().test(simulated_counts(40, 6) + 1, np.arange(40) % 2)


def test_deseq2_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "inmoose.deseq2", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-scvi\[baselines\]'"):
        DESeq2().test(simulated_counts(40, 6), np.arange(40) % 2)


@pytest.mark.filterwarnings("ignore:no parametric trend fits")
def test_a_gene_without_counts(method):
    x = simulated_counts(40, 6)
    x[:, 2] = 0
    found = method.test(x, np.arange(40) % 2)
    assert found.p_value[2] == 1 or np.isnan(found.p_value[2])
    assert found.p_value.drop(2).notna().all()
