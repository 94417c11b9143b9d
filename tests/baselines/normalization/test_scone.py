"""SCONE's scalings, regression, scores and choice, by identities and by formulas written out anew.

Perturbed once each, and seen to fail here: the trims and weights of TMM, the geometric mean of RLE, the quantile, the
ties of the full quantile, the intercept of the regression, the sign of every score, the swap of medoids.
"""

import itertools

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.metrics import silhouette_score

from pyro_scvi.baselines.normalization.scalings import RLE, TMM, FullQuantile, NoScaling, TotalScaling, UpperQuartile
from pyro_scvi.baselines.normalization.scone import SCALINGS, SCONE, SEED_CHOICE, Normalisation, grid, quality_metrics
from pyro_scvi.baselines.normalization.scone_scores import Known, components, medoids, scores
from pyro_scvi.errors import DataError, ModelError
from tests.conftest import simulated_counts


def counts(n_cells=60, n_genes=40, seed=0):
    return simulated_counts(n_cells, n_genes, seed)


@pytest.fixture(scope="module")
def fitted():
    groups = np.arange(60) % 2
    controls = {"negative_controls": np.arange(20), "positive_controls": np.arange(40) >= 20}
    return SCONE().fit(counts(), bio=groups, batch=np.arange(60) % 3, **controls)


# --- scalings ---


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=lambda s: s.name)
def test_depth_alone_is_taken_out(scaling):
    """Cells that differ by a factor only are equal afterwards; nothing else of them changes."""
    depth = np.array([1.0, 2.0, 5.0, 10.0])
    x = depth[:, None] * counts(1, 30)[0].astype(float)
    scaled = scaling(x)
    np.testing.assert_allclose(scaled, np.tile(scaled[0], (4, 1)))
    np.testing.assert_allclose(scaled[0], x.mean(0))


def test_no_scaling_is_none():
    np.testing.assert_array_equal(NoScaling()(counts()), counts())


def test_totals_are_equal():
    x = counts().astype(float)
    np.testing.assert_allclose(TotalScaling()(x).sum(1), x.sum(1).mean())


@pytest.mark.parametrize("scaling", [TMM(), RLE()], ids=lambda s: s.name)
def test_a_few_genes_that_change_do_not_move_the_others(scaling):
    """A cell with one gene 100 times higher: the total is misled, a trimmed mean or a median is not."""
    x = np.tile(np.arange(5.0, 45.0), (6, 1))
    x[0, 7] *= 100
    scaled = scaling(x)
    np.testing.assert_allclose(np.delete(scaled[0], 7), np.delete(scaled[1], 7))
    assert TotalScaling()(x)[0, 0] < 0.5 * TotalScaling()(x)[1, 0]


def test_trimmed_mean_is_its_formula():
    x = counts(8, 40) * np.random.default_rng(0).uniform(0.9, 1.1, (8, 40))  # no ties
    totals = x.sum(1)
    quartile = [np.quantile(row, 0.75) / total for row, total in zip(x, totals, strict=True)]
    r = int(np.argmin(np.abs(np.array(quartile) - np.mean(quartile))))
    log_factors = [log_tmm(x[n], x[r], totals[n], totals[r]) for n in range(8)]
    effective = totals * 2 ** (np.array(log_factors) - np.mean(log_factors))
    np.testing.assert_allclose(TMM()(x), x / effective[:, None] * effective.mean())


def log_tmm(x, reference, total, total_reference):
    genes = [g for g in range(len(x)) if x[g] > 0 and reference[g] > 0]
    m = {g: np.log2(x[g] / total) - np.log2(reference[g] / total_reference) for g in genes}
    a = {g: (np.log2(x[g] / total) + np.log2(reference[g] / total_reference)) / 2 for g in genes}
    n = len(genes)

    def inner(values, share):
        low = int(n * share) + 1
        average = {g: 1 + sum(v < values[g] for v in values.values()) for g in genes}
        last = {g: sum(v <= values[g] for v in values.values()) for g in genes}
        return {g for g in genes if low <= (average[g] + last[g]) / 2 <= n + 1 - low}

    kept = inner(m, 0.3) & inner(a, 0.05)
    weight = {
        g: 1 / ((total - x[g]) / total / x[g] + (total_reference - reference[g]) / total_reference / reference[g])
        for g in kept
    }
    return sum(weight[g] * m[g] for g in kept) / sum(weight.values())


def test_ratios_and_quartiles_are_their_formulas():
    x = counts(8, 30).astype(float)
    geometric = [np.exp(sum(np.log(v) for v in x[:, g] if v > 0) / 8) for g in range(30)]
    logs = [[np.log(row[g] / geometric[g]) for g in range(30) if row[g] > 0] for row in x]
    ratios = np.exp([np.median(of_cell) for of_cell in logs])
    np.testing.assert_allclose(RLE()(x), x / ratios[:, None] * ratios.mean())
    quartiles = np.array([np.quantile(row[row > 0], 0.75) for row in x])
    np.testing.assert_allclose(UpperQuartile()(x), x / quartiles[:, None] * quartiles.mean())


def test_size_factors_are_those_of_deseq2(data_path):
    golden = np.load(data_path("../golden/de.npz"))
    x = golden["counts"].T.astype(float)
    relative = x.sum(1) / RLE()(x).sum(1) / golden["deseq2_poscounts_sf"]
    np.testing.assert_allclose(relative, relative[0], rtol=1e-10)


def test_full_quantile_gives_all_cells_one_law_and_equals_stay_equal():
    x = np.array([[0.0, 0, 3, 9], [1, 2, 4, 5], [7, 5, 1, 0]])
    np.testing.assert_allclose(FullQuantile()(x)[1:], [[1 / 3, 1, 4, 7], [7, 4, 1, 1 / 3]])
    np.testing.assert_allclose(FullQuantile()(x)[0], [2 / 3, 2 / 3, 4, 7])


# --- regression ---


def test_regression_takes_quality_and_batch_out_and_leaves_biology():
    rng = np.random.default_rng(0)
    bio, batch, quality = np.arange(90) % 2, np.arange(90) % 5 // 2, rng.normal(size=(90, 2))  # unequal batches
    slopes = rng.normal(size=(2, 6)) / 4
    x = np.exp(3 + bio[:, None] + 0.5 * batch[:, None] + quality @ slopes) - 1
    method = SCONE([Normalisation(NoScaling(), 2, batch=True, bio=True)]).fit(x, qc=quality, batch=batch, bio=bio)
    adjusted = method.normalised()
    at_mean = 3 + 0.5 + quality.mean(0) @ slopes  # of the batches and of quality
    np.testing.assert_allclose(adjusted, at_mean + bio[:, None] * np.ones(6))
    np.testing.assert_array_equal(method.normalised(Normalisation(NoScaling())), np.log1p(x))


def test_seed_choice_is_depth_scaling_and_quality(fitted):
    residual = fitted.normalised(SEED_CHOICE)
    y = np.log1p(TotalScaling()(counts().astype(float)))
    design = np.column_stack((np.ones(60), fitted.quality_))
    expected = y - fitted.quality_ @ np.linalg.lstsq(design, y, rcond=None)[0][1:]
    np.testing.assert_allclose(residual, expected)
    assert fitted.quality_.shape == (60, 8)
    assert SEED_CHOICE.name == "total, all QC"


# --- scores ---


def test_components_are_singular_vectors():
    for shape in ((50, 7), (7, 50)):
        x = np.random.default_rng(0).normal(size=shape)
        z = (x - x.mean(0)) / x.std(0)
        expected = np.linalg.svd(z, full_matrices=False)[0][:, :3]
        np.testing.assert_allclose(np.abs(np.sum(components(x) * expected, 0)), 1)


def test_medoids_are_the_best():
    points = np.random.default_rng(1).normal(size=(14, 2)) + 4 * np.eye(2)[np.arange(14) % 2]
    distance = np.linalg.norm(points[:, None] - points, axis=-1)
    for k in (2, 3):
        best = min(itertools.combinations(range(14), k), key=lambda c: distance[:, c].min(1).sum())
        assert set(medoids(distance, k)) == set(best)


def test_scores_are_their_formulas():
    rng = np.random.default_rng(0)
    bio, batch = np.arange(60) % 2, np.arange(60) % 3
    x = rng.normal(size=(60, 12)) + 2 * np.outer(bio, np.ones(12))
    quality = rng.normal(size=(60, 2))
    found = scores(x, Known(bio, batch, quality, quality, bio[:, None] * 1.0, np.arange(60)))
    u = np.linalg.svd((x - x.mean(0)) / x.std(0), full_matrices=False)[0][:, :3]
    assert found["BIO_SIL"] == pytest.approx(silhouette_score(u, bio))
    assert found["BATCH_SIL"] == pytest.approx(-silhouette_score(u, batch))
    assert found["PAM_SIL"] >= found["BIO_SIL"] > 0.3
    shares = []
    for factors in (quality, bio[:, None]):
        design = np.column_stack((np.ones(60), factors))
        fitted = design @ np.linalg.solve(design.T @ design, design.T @ u)
        shares.append(1 - np.square(u - fitted).sum() / np.square(u - u.mean(0)).sum())
    assert found["EXP_QC_COR"] == found["EXP_UV_COR"] == pytest.approx(-shares[0])
    assert found["EXP_WV_COR"] == pytest.approx(shares[1])
    relative = x - np.median(x, axis=0)
    assert found["RLE_MED"] == pytest.approx(-np.mean([np.median(row) ** 2 for row in relative]))
    spread = [np.quantile(row, 0.75) - np.quantile(row, 0.25) for row in relative]
    assert found["RLE_IQR"] == pytest.approx(-np.var(spread, ddof=1))


def test_table_ranks_all_candidates(fitted):
    table = fitted.table_
    assert len(table) == len(grid(8, batch=True, bio=True)) == 2 * 6 * 9
    assert not table.isna().any(axis=None)
    ranks = table.drop(columns="mean_rank").round(10).rank().mean(axis=1)
    np.testing.assert_allclose(table["mean_rank"], ranks)
    assert table["mean_rank"].is_monotonic_decreasing
    assert fitted.best_.name == table.index[0]
    assert "TMM, 3 QC, batch, bio" in table.index


def test_without_labels_only_what_is_known_is_scored():
    candidates = [Normalisation(NoScaling()), Normalisation(TotalScaling(), 1)]
    table = SCONE(candidates).fit(sparse.csr_matrix(counts())).table_
    known = ["PAM_SIL", "EXP_QC_COR", "RLE_MED", "RLE_IQR", "mean_rank"]
    assert list(table.columns[table.notna().all()]) == known
    again = SCONE(candidates).fit(counts()).table_
    assert again.equals(table)


def test_quality_metrics_are_distinct():
    metrics = quality_metrics(counts().astype(float))
    assert metrics.shape == (60, 10)
    x = counts()[3]
    share = np.sort(x / x.sum())[::-1]
    positive = share[share > 0]
    np.testing.assert_allclose(metrics[3, :3], [np.log(x.sum()), np.log((x > 0).sum()), -positive @ np.log(positive)])
    np.testing.assert_allclose(metrics[3, 3:7], np.cumsum(share)[[0, 1, 3, 7]])
    np.testing.assert_allclose(metrics[3, 7], (x == 1).sum() / (x > 0).sum())


def test_contract_and_refusals(fitted):
    assert clone(SCONE(seed=3)).get_params() == {"candidates": None, "seed": 3}
    with pytest.raises(ModelError, match="0 to 8 are possible"):
        fitted.normalised(Normalisation(TotalScaling(), 9))
    with pytest.raises(ModelError, match="needs fit\\(counts, batch=labels\\)"):
        SCONE([Normalisation(TotalScaling(), batch=True)]).fit(counts())
    with pytest.raises(ModelError, match="at least one Normalisation"):
        SCONE([]).fit(counts())
    with pytest.raises(DataError, match="bio must have a value for each of 60 cells"):
        SCONE().fit(counts(), bio=np.ones(59))
    with pytest.raises(ModelError, match="has not been fitted"):
        SCONE().normalised()
    empty = counts()
    empty[4] = 0
    with pytest.raises(DataError, match="1 cells have no count, the first of them cell 4"):
        SCONE().fit(empty)


def test_refuses_what_it_cannot_rank():
    plain = Normalisation(NoScaling())
    with pytest.raises(ModelError, match=r"different names, but several are \['none, 0 QC'\]"):
        SCONE([plain, plain]).fit(counts())
    quality = np.ones((60, 2))
    quality[7, 1] = np.inf
    with pytest.raises(DataError, match="qc must be finite; cell 7 is not"):
        SCONE().fit(counts(), qc=quality)
    for labels in (np.zeros(60), np.arange(60)):
        with pytest.raises(DataError, match="bio must have 2 levels or more, fewer than 60 cells"):
            SCONE().fit(counts(), bio=labels)
    with pytest.raises(ModelError, match="is confounded: its regression has 3 columns of rank 2"):
        SCONE([Normalisation(NoScaling(), 0, True, True)]).fit(counts(), batch=np.arange(60) % 2, bio=np.arange(60) % 2)


def test_keeps_its_own_counts_and_a_refused_fit_changes_nothing():
    x = counts().astype(float)
    method = SCONE([Normalisation(NoScaling())]).fit(x)
    before = method.normalised()
    method.set_params(candidates=[Normalisation(NoScaling(), 9)])
    with pytest.raises(ModelError, match="0 to 8 are possible"):
        method.fit(counts(50), bio=np.arange(50) % 2)
    x[:] = 1
    np.testing.assert_array_equal(method.normalised(), before)
