"""P(w_a < w_b) against Monte Carlo, the table and its Monte Carlo errors, pairing, and what is called when."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import betainc

import pyro_scvi as ps
from pyro_scvi.analysis.differential import AllPairs, DepthCorrected, RandomPairs, Uncorrected, expected_false_share
from pyro_scvi.analysis.differential.matched_pairs import Groups, pairs_within_batches
from pyro_scvi.distributions.gamma_ratio import Side, probability_less
from pyro_scvi.errors import DataError, ModelError, SchemaError
from tests.support.simulate import simulated_counts

COLUMNS = ["p_a_lt_b", "se", "log_bayes_factor", "lfc", "lfc_sd", "lfc_low", "lfc_high", "p_lfc"]
COLUMNS += ["expected_false_share"]
COLUMNS += ["mean_a", "detected_a", "mean_b", "detected_b"]
R = np.array([0.1, 0.5, 1.0, 3.0, 40.0])


def side(log_mean, r=None):
    return Side(torch.tensor(log_mean).double(), None if r is None else torch.tensor(r).double().log())


def sides(seed=0, n=60):
    """Two sides (1, n) with every pair of shapes and means up to 20-fold apart."""
    rng = np.random.default_rng(seed)
    r_a, r_b = rng.choice(R, size=(2, 1, n))
    return side(rng.normal(0, 1.5, (1, n)), r_a), side(rng.normal(0, 1.5, (1, n)), r_b)


# --- one pair, given z ---


def test_probability_equals_monte_carlo_over_w():
    a, b = sides()
    n = 200_000
    rng = np.random.default_rng(1)
    w_a, w_b = (rng.gamma(s.log_r.exp(), (s.log_mean - s.log_r).exp(), size=(n, 60)) for s in (a, b))
    exact, found = probability_less(a, b)[0].numpy(), (w_a < w_b).mean(0)
    se = (exact * (1 - exact) / n) ** 0.5
    assert (np.abs(found - exact) < 4 * se + 1e-9).all()
    assert exact.min() < 0.1
    assert exact.max() > 0.9


def test_probability_is_the_incomplete_beta_function():
    """mu_a = 2, r_a = 0.5; mu_b = 3, r_b = 1.5: b_a = 1/4, b_b = 1/2."""
    found = probability_less(side([[np.log(2)]], [[0.5]]), side([[np.log(3)]], [[1.5]]))
    assert found.item() == pytest.approx(betainc(0.5, 1.5, 0.25 / 0.75), rel=1e-12)
    exponential = probability_less(side([[np.log(2)]], [[1.0]]), side([[np.log(3)]], [[1.0]]))
    assert exponential.item() == pytest.approx(3 / 5)  # of exponential variables: the other's share of the means


def test_the_two_orders_sum_to_one_and_equals_have_a_half():
    a, b = sides()
    np.testing.assert_allclose(probability_less(a, b) + probability_less(b, a), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(probability_less(a, a), 0.5, rtol=0, atol=1e-12)


def test_extreme_sides_stay_finite():
    low, high = side([[-40.0, -1.0, -1.0]], [[1e-4, 1e6, 1e-6]]), side([[40.0, 1.0, 1.0]], [[1e4, 1e6, 1e-6]])
    found = probability_less(low, high)
    assert torch.isfinite(found).all()
    assert found[0, 1] == pytest.approx(1)


def test_where_w_is_its_mean_the_probability_is_an_indicator():
    found = probability_less(side([[0.0, 1.0, 2.0]]), side([[1.0, 1.0, 1.0]]))
    np.testing.assert_array_equal(found, [[1.0, 0.5, 0.0]])
    narrow = probability_less(side([[0.0, 1.0, 2.0]], np.full((1, 3), 1e6)), side([[1.0] * 3], np.full((1, 3), 1e6)))
    np.testing.assert_allclose(narrow, found, rtol=0, atol=1e-6)


def test_depth_correction_divides_by_the_sum_of_the_means():
    log_mean = torch.tensor([[[0.3, 1.0, -2.0]]])
    corrected = DepthCorrected().log_mean({"log_mean": log_mean})
    torch.testing.assert_close(corrected.exp(), log_mean.exp() / log_mean.exp().sum())
    torch.testing.assert_close(DepthCorrected().log_mean({"log_mean": log_mean + 3}), corrected)
    assert Uncorrected().log_mean({"log_mean": log_mean}) is log_mean


def test_expected_false_share_by_hand():
    """Sorted .99, .9, .5, 0: mean errors .01, (.01 + .1) / 2, (.01 + .1 + .5) / 3, (.01 + .1 + .5 + 1) / 4."""
    found = expected_false_share(np.array([0.5, 0.99, 0.0, 0.9]))
    np.testing.assert_allclose(found, [0.61 / 3, 0.01, 1.61 / 4, 0.055])


# --- the table ---


def fitted(cells, likelihood="ZINB", n_latent=3, epochs=4, batch_size=128, **options):
    law = getattr(ps.likelihoods, likelihood)()
    model = ps.SCVI(cells.n_genes, n_latent, cells.n_covariates, likelihood=law, n_hidden=16, n_layers=1, **options)
    schedule = ps.schedules.OneCycle(0.02)
    settings = {"validation": 0, "device": "cpu", "progress": False}
    return ps.fit(model, cells, epochs=epochs, batch_size=batch_size, learning_rate=schedule, **settings)


GROUPS = np.array(["x", "y", "z"])[np.arange(60) % 3]


@pytest.fixture(scope="module")
def batched_fit(batched_cells):
    torch.set_num_threads(1)  # this runs before the fixture of every test
    return fitted(batched_cells)


def compare(fit, cells, seed=0, **options):
    groups = {name: options.pop(name) for name in ("groupby", "group_a", "group_b") if name in options}
    groups = {"groupby": GROUPS, "group_a": "x", "group_b": "y"} | groups
    return ps.differential_expression(fit, cells, **groups, estimand=RandomPairs(**options), seed=seed)


def test_the_table_of_two_groups(batched_fit, batched_cells):
    table = compare(batched_fit, batched_cells)
    assert list(table.columns) == COLUMNS
    assert list(table.index) == list(batched_cells.gene_names)
    assert table.index.name == "gene"
    assert np.isfinite(table).all(axis=None)
    assert table[["p_a_lt_b", "p_lfc", "expected_false_share"]].stack().between(0, 1).all()
    assert (table.se < 0.005).all()
    assert (table.lfc_low <= table.lfc).all()
    assert (table.lfc <= table.lfc_high).all()
    x, y = (batched_cells.counts[group == GROUPS] for group in "xy")
    np.testing.assert_allclose(table[["mean_a", "mean_b"]], np.stack([x.mean(0), y.mean(0)], 1))
    np.testing.assert_allclose(table[["detected_a", "detected_b"]], np.stack([(x > 0).mean(0), (y > 0).mean(0)], 1))
    np.testing.assert_allclose(table.expected_false_share, expected_false_share(table.p_lfc.to_numpy()))
    odds = np.log(table.p_a_lt_b / (1 - table.p_a_lt_b))
    np.testing.assert_allclose(table.log_bayes_factor, odds, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("contrast", [DepthCorrected(), Uncorrected()])
@pytest.mark.parametrize("likelihood", ["ZINB", "NB", "ZIP", "Poisson"])
def test_the_table_agrees_with_draws_of_w(likelihood, contrast, cells):
    """Pairs of draws of w as sample_posterior's z and l give them, by the law of w given z, without the closed form."""
    fit, n = fitted(cells, likelihood), 2000
    table = compare(fit, cells, contrast=contrast, delta=0.3)
    torch.manual_seed(1)
    drawn = ps.sample_posterior(fit, cells, samples=n, sites=["z", "l"], seed=5)
    z, l = (torch.as_tensor(drawn[site].values) for site in "zl")  # noqa: E741
    with torch.no_grad():
        theta = fit.model.decode(z[:, :, None], l[..., None].log(), cells[:][1])
        law = fit.model.likelihood.rate(**theta)
        mean = theta["log_mean"].exp()
        w = mean if law is None else law.sample()
    if isinstance(contrast, DepthCorrected):
        w, mean = (values / mean.sum(-1, keepdim=True) for values in (w, mean))
    rng, rows = np.random.default_rng(0), np.arange(n)
    hits, changes = [], []
    for _ in range(10):
        a, b = (rng.choice(np.flatnonzero(group == GROUPS), n) for group in "xy")
        hits.append((w[rows, a] < w[rows, b]).numpy())
        changes.append((mean[rows, a] / mean[rows, b]).log2().numpy())
    hits, changes = np.concatenate(hits), np.concatenate(changes)
    # Every draw serves several of the 20,000 pairs: 6,000 is a number of independent ones that is safe.
    se = (table.se**2 + 0.25 / 6000) ** 0.5
    assert ((table.p_a_lt_b - hits.mean(0)).abs() / se).max() < 4.5
    assert ((table.lfc - changes.mean(0)).abs() < 4.5 * table.lfc_sd / 600**0.5).all()
    np.testing.assert_allclose(table.lfc_sd, changes.std(0), rtol=0.1)
    likelier = np.maximum((changes > 0.3).mean(0), (changes < -0.3).mean(0))
    assert ((table.p_lfc - likelier).abs() < 4.5 * (0.25 / 1000 + 0.25 / 6000) ** 0.5).all()
    for column, level in (("lfc_low", 2.5), ("lfc_high", 97.5)):
        error = (table[column] - np.percentile(changes, level, axis=0)) / table.lfc_sd
        assert error.abs().mean() < 0.17  # 5 % and 95 % would be off by 0.25 or more


def test_more_pairs_until_the_error_is_small(batched_fit, batched_cells):
    first, more, most = (compare(batched_fit, batched_cells, largest_se=se) for se in (0.1, 0.002, 0.001))
    assert first.se.max() > more.se.max() > most.se.max()
    assert more.se.max() <= 0.002
    assert most.se.max() <= 0.001
    one, four = (compare(batched_fit, batched_cells, largest_se=0.0, most_pairs=n) for n in (1000, 4000))
    np.testing.assert_allclose(one.se / four.se, 2, rtol=0.1)
    pd.testing.assert_frame_equal(one, first)  # of 1000 pairs, the fewest


def test_the_standard_error_is_that_of_repetitions(batched_fit, batched_cells):
    options = {"largest_se": 0.0, "most_pairs": 300}
    tables = [compare(batched_fit, batched_cells, seed=seed, **options) for seed in range(40)]
    spread = np.std([table.p_a_lt_b for table in tables], axis=0, ddof=1)
    stated = np.mean([table.se for table in tables], axis=0)
    assert np.mean(spread / stated) == pytest.approx(1, abs=0.12)  # 20 genes, 40 repetitions


def test_one_seed_gives_one_table_and_the_global_state_is_untouched(batched_fit, batched_cells):
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    batched_fit.model.train()
    first, second, other = (compare(batched_fit, batched_cells, seed=seed) for seed in (3, 3, 4))
    assert first.equals(second)
    assert not np.allclose(first.p_a_lt_b, other.p_a_lt_b, rtol=1e-9)
    assert torch.equal(states[0], torch.get_rng_state())
    assert (states[1] == np.random.get_state()[1]).all()  # noqa: NPY002
    assert batched_fit.model.training
    batched_fit.model.eval()


def test_swapping_the_groups_swaps_the_answers(batched_fit, batched_cells):
    """Up to Monte Carlo error: the pairs are drawn anew."""
    one, two = (compare(batched_fit, batched_cells, group_a=a, group_b=b, largest_se=0.002) for a, b in ("xy", "yx"))
    assert ((one.p_a_lt_b + two.p_a_lt_b - 1) / (one.se**2 + two.se**2) ** 0.5).abs().max() < 4
    n = 1000
    assert ((one.lfc + two.lfc) / (one.lfc_sd * (2 / n) ** 0.5)).abs().max() < 4
    assert ((one.p_lfc - two.p_lfc).abs() < 4 * (0.5 / n) ** 0.5).all()
    np.testing.assert_array_equal(one[["mean_a", "detected_a"]], two[["mean_b", "detected_b"]])


def test_each_group_against_the_rest(batched_fit, batched_cells):
    table = compare(batched_fit, batched_cells, group_a=None, group_b=None)
    assert list(table.columns) == COLUMNS
    assert table.index.names == ["group", "gene"]
    assert table.shape == (3 * 20, 13)
    assert list(table.index.get_level_values("group").unique()) == ["x", "y", "z"]
    for group in "xyz":
        alone = compare(batched_fit, batched_cells, group_a=group, group_b=None)
        pd.testing.assert_frame_equal(table.loc[group], alone)
        rest = batched_cells.counts[group != GROUPS]
        np.testing.assert_allclose(alone.mean_b, rest.mean(0))


def test_cells_without_a_label_are_part_of_the_rest(batched_fit, batched_cells):
    for missing in (None, np.nan):
        labels = GROUPS.astype(object)
        labels[GROUPS == "z"] = missing
        table = compare(batched_fit, batched_cells, groupby=labels, group_a=None, group_b=None, most_pairs=100)
        assert list(table.index.get_level_values("group").unique()) == ["x", "y"]
        np.testing.assert_allclose(table.loc["x"].mean_b, batched_cells.counts[GROUPS != "x"].mean(0))


def test_labels_may_be_a_column_or_values_of_any_kind(batched_fit, batched_cells):
    codes = np.arange(60) % 3
    expected = compare(batched_fit, batched_cells, most_pairs=200)
    for labels in (codes, codes.tolist(), pd.Series(codes), pd.Categorical(codes)):
        found = compare(batched_fit, batched_cells, groupby=labels, group_a=0, group_b=1, most_pairs=200)
        pd.testing.assert_frame_equal(found, expected)
    found = compare(batched_fit, batched_cells, groupby="donor", group_a="a", group_b="b", most_pairs=200)
    donor = batched_cells.obs["donor"].to_numpy()
    np.testing.assert_allclose(found.mean_a, batched_cells.counts[donor == "a"].mean(0))


def test_groups_of_one_cell(batched_fit, batched_cells):
    labels = np.full(60, "rest", dtype=object)
    labels[[4, 9]] = "one", "other"
    for options in ({"group_a": "one", "group_b": "other"}, {"group_a": "one", "group_b": None}):
        table = compare(batched_fit, batched_cells, groupby=labels, **options)
        assert np.isfinite(table).all(axis=None)
        np.testing.assert_array_equal(table.mean_a, batched_cells.counts[4])


@pytest.mark.parametrize("likelihood", ["NB", "Poisson"])
def test_bayes_factors_of_separated_genes_are_finite(likelihood):
    """Two genes that only one of the groups has, at a depth that leaves no doubt."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(20.0, size=(80, 6))
    group = np.arange(80) % 2
    counts[:, 0], counts[:, 1] = np.where(group, 400, 1), np.where(group, 1, 400)
    cells = ps.Cells.from_counts(counts)
    fit = fitted(cells, likelihood, epochs=60, batch_size=20)
    table = compare(fit, cells, groupby=group, group_a=0, group_b=1, most_pairs=1500)
    assert np.isfinite(table).all(axis=None)
    limit = np.log(2 * 1500 - 1)  # p is kept within 1 / 2M of 0 and 1, M at most 1500 pairs
    assert table.log_bayes_factor.abs().max() <= limit + 1e-9
    assert table.log_bayes_factor.iloc[0] > 4
    assert table.log_bayes_factor.iloc[1] < -4
    assert (table.expected_false_share.iloc[:2] < 0.01).all()


# --- pairs within a batch ---


@pytest.fixture(scope="module")
def three_batches():
    """Batches p (18 cells of group x, 2 of y), q (10 and 10) and r (none and 20)."""
    batch = np.repeat(["p", "q", "r"], 20)
    labels = np.repeat(["x", "y", "x", "y", "y"], [18, 2, 10, 10, 20]).astype(object)
    cells = ps.Cells.from_counts(simulated_counts(), obs=pd.DataFrame({"donor": batch}), batch="donor")
    return cells, labels, batch


def test_pairs_within_a_batch_stay_there(three_batches):
    cells, labels, batch = three_batches
    rows = [np.flatnonzero(labels == group) for group in "xy"]
    groups = Groups(None, cells, None, *rows, None, None)  # pairs are drawn by cells alone
    a, b = pairs_within_batches(groups)(np.random.default_rng(0), 5000)
    assert len(a) == len(b) == 5000
    assert (batch[a] == batch[b]).all()
    assert (labels[a] == "x").all()
    assert (labels[b] == "y").all()
    both = batch != "r"
    assert set(a) == set(np.flatnonzero(both & (labels == "x")))
    assert set(b) == set(np.flatnonzero(both & (labels == "y")))
    share = 2 / 12  # batches weigh as many pairs as their cells make without sharing one: 2 and 10
    assert abs((batch[a] == "p").mean() - share) < 4.5 * (share * (1 - share) / 5000) ** 0.5


def test_pairs_within_a_batch_remove_a_batch_effect():
    """A batch that doubles half of the genes, and groups that the batches hold unequally."""
    rng = np.random.default_rng(3)
    batch, group = (rng.random(300) < 0.5), rng.random(300)
    group = group < np.where(batch, 0.85, 0.15)
    means = np.where(batch[:, None], [9.0] * 5 + [3.0] * 15, [3.0] * 20)
    counts = rng.poisson(means * rng.gamma(10.0, 0.1, size=(300, 20)))
    cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"batch": np.where(batch, "p", "q")}), batch="batch")
    fit = fitted(cells, "NB", epochs=20, batch_size=50)
    options = {"groupby": group, "group_a": False, "group_b": True}
    across, within = (compare(fit, cells, within_batch=choice, **options) for choice in (False, True))
    assert (across.p_a_lt_b.iloc[:5] > 0.6).all()
    assert ((within.p_a_lt_b.iloc[:5] - 0.5).abs() < 0.05).all()
    assert ((within.p_a_lt_b.iloc[:5] - 0.5).abs() < (across.p_a_lt_b.iloc[:5] - 0.5) / 3).all()


def test_pairs_within_a_batch_need_batches_in_common(cells, three_batches):
    fit = fitted(cells, epochs=1)
    with pytest.raises(DataError, match="make the Cells with batch="):
        compare(fit, cells, within_batch=True)
    batched, _, batch = three_batches
    fit = fitted(batched, epochs=1)
    with pytest.raises(DataError, match="no batch holds cells of both groups"):
        compare(fit, batched, groupby=batch, group_a="p", group_b="q", within_batch=True)


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groupby": "nowhere"}, r"no column 'nowhere'; .*\['donor', 'age'\]; .* or pass one value per cell"),
        ({"groupby": GROUPS[:59]}, r"one value for each of the 60 cells, got \(59,\)"),
        ({"groupby": GROUPS[:, None]}, r"one value for each of the 60 cells, got \(60, 1\)"),
        ({"group_a": "w"}, r"no cell is in group 'w'; the groups are \['x', 'y', 'z'\]"),
        ({"group_b": "w"}, r"no cell is in group 'w'"),
        ({"group_b": "x"}, r"both groups are 'x'; name two of"),
        ({"group_a": None}, "group_b without group_a"),
        ({"groupby": ["x"] * 60, "group_b": None}, "every cell is in group 'x'"),
        ({"groupby": ["x"] * 60, "group_a": None, "group_b": None}, "every cell is in group 'x'"),
    ],
)
def test_groups_that_cannot_be_compared_are_refused(options, message, batched_fit, batched_cells):
    with pytest.raises(DataError, match=message):
        compare(batched_fit, batched_cells, **options)


def test_cells_of_another_schema_are_refused(batched_fit, cells):
    with pytest.raises(SchemaError):
        compare(batched_fit, cells)


# --- simulated truth ---


def simulated(fold=1.0, depth=1.0, n=400, seed=0):
    """60 genes, of which the first ten are ``fold`` times more or less in group b, whose cells are ``depth`` deeper."""
    rng = np.random.default_rng(seed)
    b = np.arange(n) % 2 == 1
    means = np.tile(rng.gamma(1.5, 1.5, size=60) + 0.5, (n, 1))
    means[b, :10] *= np.where(np.arange(10) % 2 == 0, fold, 1 / fold)
    means *= np.where(b, depth, 1.0)[:, None] * rng.lognormal(0, 0.2, size=(n, 1))
    counts = rng.poisson(means * rng.gamma(5.0, 0.2, size=means.shape))
    return ps.Cells.from_counts(counts, obs=pd.DataFrame({"group": np.where(b, "b", "a")}))


def simulated_fit(cells):
    return fitted(cells, "NB", n_latent=4, epochs=25, batch_size=64)


def test_changed_genes_are_called_and_others_are_not():
    cells = simulated(fold=4.0)
    table = compare(simulated_fit(cells), cells, groupby="group", group_a="a", group_b="b")
    called = table.expected_false_share < 0.05
    assert called[:10].all()  # 10 of 10
    assert not called[10:].any()  # 0 of 50
    up = np.arange(10) % 2 == 0
    assert (table.p_a_lt_b[:10][up] > 0.8).all()
    assert (table.p_a_lt_b[:10][~up] < 0.2).all()
    np.testing.assert_allclose(table.lfc[:10][up], -2, atol=0.7)  # log2 of four; shares of the depth change a bit
    np.testing.assert_allclose(table.lfc[:10][~up], 2, atol=0.7)
    assert (table.lfc_high[:10][up] < 0).all()
    assert (table.lfc_low[:10][~up] > 0).all()


def test_depth_alone_is_no_change_unless_it_is_asked_for():
    cells = simulated(depth=2.0)
    fit = simulated_fit(cells)
    corrected, laden = (
        compare(fit, cells, groupby="group", group_a="a", group_b="b", contrast=contrast)
        for contrast in (DepthCorrected(), Uncorrected())
    )
    assert not (corrected.expected_false_share < 0.05).any()  # 0 of 60
    assert ((corrected.p_a_lt_b - 0.5).abs() < 0.05).all()
    assert (corrected.lfc.abs() < 0.2).all()
    assert (laden.p_a_lt_b > 0.7).all()
    np.testing.assert_allclose(laden.lfc, -1, atol=0.25)  # log2 of a half
    default = compare(fit, cells, groupby="group", group_a="a", group_b="b")
    pd.testing.assert_frame_equal(default, corrected)


def test_random_splits_of_one_group_call_nothing():
    cells = simulated()
    fit = simulated_fit(cells)
    rng = np.random.default_rng(1)
    called = []
    for _ in range(5):
        table = compare(fit, cells, groupby=rng.permutation(400) % 2, group_a=0, group_b=1)
        called.append(int((table.expected_false_share < 0.05).sum()))
        assert (table.p_a_lt_b - 0.5).abs().max() < 0.08
    assert called == [0] * 5


def varied(fold=1.0, n=400, seed=0):
    """The first ten of 60 genes are ``fold`` times more in group b or a, in turn; the others vary within both alike.

    They follow a factor of the cell, with a standard deviation of 1.1 to 2.2 in log2.
    """
    rng = np.random.default_rng(seed)
    loading = np.where(np.arange(60) < 10, 0, rng.choice([-1, 1], 60) * rng.uniform(0.75, 1.5, 60))
    means = np.where(np.arange(60) < 10, 20, 8) * np.exp(rng.normal(size=(n, 1)) * loading)
    b = np.arange(n) % 2 == 1
    means[b, 0:10:2] *= fold
    means[~b, 1:10:2] *= fold
    return ps.Cells.from_counts(rng.poisson(means), obs=pd.DataFrame({"group": np.where(b, "b", "a")}))


@pytest.mark.parametrize("pairing", [None, AllPairs()])
def test_what_varies_within_equal_groups_is_not_called(pairing):
    """Each pair of cells differs, but as often one way as the other: p_lfc and 1 - the false share are 1/2 at most."""
    cells = varied()
    model = ps.SCVI(60, 4, likelihood=ps.likelihoods.NB(ps.likelihoods.PerGene(60)), n_hidden=16, n_layers=1)
    fit = ps.fit(model, cells, epochs=25, batch_size=64, validation=0, device="cpu", progress=False)
    for split in range(3):
        half = np.random.default_rng(split).permutation(400) % 2
        table = compare(fit, cells, groupby=half, group_a=0, group_b=1, pairing=pairing, seed=split)
        assert (table.lfc_sd > 1).sum() > 40  # cells do differ
        assert table.p_lfc.max() < 0.57
        assert table.expected_false_share.min() > 0.43


def test_a_shift_is_called_among_genes_that_vary_within_the_groups():
    cells = varied(fold=8.0)
    table = compare(simulated_fit(cells), cells, groupby="group", group_a="a", group_b="b")
    assert (table.expected_false_share[:10] < 0.05).all()
    assert table.p_lfc[:10].min() > 0.95
    assert table.p_lfc[10:].max() < 0.65  # two-sided: .87
    up = np.arange(10) % 2 == 0
    assert (np.sign(table.lfc[:10]) == np.where(up, -1, 1)).all()


def test_a_gene_that_differs_by_less_than_it_varies_is_not_called():
    """Twice as much in group b, but four times more or less from cell to cell: that shows in p_a_lt_b."""
    rng = np.random.default_rng(0)
    b = np.arange(400) % 2 == 1
    means = np.full((400, 20), 20.0)
    means[:, :4] *= np.exp2(rng.normal(0, 2, (400, 1)) + b[:, None]) / 4
    cells = ps.Cells.from_counts(rng.poisson(means))
    table = compare(fitted(cells, "NB", epochs=25, batch_size=64), cells, groupby=b, group_a=False, group_b=True)
    assert not (table.expected_false_share < 0.3).any()
    assert (table.p_a_lt_b[:4] > 0.58).all()
    assert (table.lfc[:4] < -0.5).all()


@pytest.mark.parametrize("dtype", ["string", "boolean", "Int64"])
def test_labels_may_be_of_pandas_own_types_with_missing_ones(dtype, batched_fit, batched_cells):
    values = {"string": ["x", "y", None], "boolean": [True, False, None], "Int64": [1, 2, None]}[dtype]
    labels = pd.array(values * 20, dtype=dtype)
    table = compare(batched_fit, batched_cells, groupby=labels, group_a=values[0], group_b=values[1], most_pairs=100)
    assert np.isfinite(table.p_a_lt_b).all()
    with pytest.raises(DataError, match="no cell has a label"):
        ps.differential_expression(batched_fit, batched_cells, groupby=[None] * 60)


@pytest.mark.parametrize(
    "options", [{"contrast": "laden"}, {"delta": np.nan}, {"delta": -1}, {"most_pairs": 0}, {"largest_se": -0.1}]
)
def test_options_that_cannot_be_are_refused(options, batched_fit, batched_cells):
    with pytest.raises(ModelError, match=next(iter(options))):
        compare(batched_fit, batched_cells, **options)


# --- all pairs ---


def test_all_pairs_agree_with_matched_pairs():
    cells = ps.Cells.from_counts(simulated_counts())
    model = ps.SCVI(20, 3, n_hidden=16, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(20)))
    fit = ps.fit(model, cells, epochs=20, progress=False, device="cpu")
    options = {"groupby": GROUPS, "group_a": "x", "group_b": "y", "delta": 0.3}
    matched = compare(fit, cells, largest_se=0, **options)
    states = torch.get_rng_state()
    every = compare(fit, cells, pairing=AllPairs(samples=2000), **options)
    assert torch.equal(states, torch.get_rng_state())
    assert list(every) == list(matched) == COLUMNS
    se = (matched.se**2 + every.se**2) ** 0.5
    assert ((every.p_a_lt_b - matched.p_a_lt_b).abs() / se).max() < 4.5
    np.testing.assert_allclose(every.lfc_sd, matched.lfc_sd, rtol=0.1)
    again = compare(fit, cells, pairing=AllPairs(samples=2000), **options)
    pd.testing.assert_frame_equal(every, again)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": AllPairs()}, "one dispersion per gene"),
        ({"pairing": AllPairs(), "within_batch": True}, "pairs cells of all batches"),
        ({"pairing": "all"}, r"AllPairs\(...\), or None for matched pairs, got 'all'"),
    ],
)
def test_all_pairs_that_cannot_be(batched_fit, batched_cells, options, message):
    with pytest.raises(ModelError, match=message):
        compare(batched_fit, batched_cells, **options)
