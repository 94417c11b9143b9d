"""GroupMeans against a formula written apart, known nulls, donors, batches, the real markers, and what is refused."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.analysis.differential.cautions import counterparts
from pyro_scvi.analysis.differential.moments import Moments, rate_moments
from pyro_scvi.analysis.differential.weighted_means import strata_of
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.paper.data import files
from pyro_scvi.paper.data.blood import read_pbmc_3ka
from tests.support.simulate import simulated_counts

COLUMNS = ["lfc", "lfc_se", "lfc_low", "lfc_high", "z", "p_value", "q_value"]
COLUMNS += ["lfc_shrunk", "lfc_shrunk_sd", "lfsr"]
COLUMNS += ["mean_a", "detected_a", "mean_b", "detected_b", "tested"]
GROUPS = np.array(["x", "y", "z"])[np.arange(60) % 3]
EveryOther, GroupMeans = ps.differential.EveryOther, ps.differential.GroupMeans


def fitted(cells, likelihood=None, epochs=3, **options):
    model = ps.SCVI(cells.n_genes, 3, cells.n_covariates, likelihood=likelihood, n_hidden=16, n_layers=1, **options)
    return ps.fit(model, cells, epochs=epochs, validation=0, device="cpu", progress=False)


@pytest.fixture(scope="module")
def observed(cells):
    """A fit whose library sizes are the cells' totals."""
    return fitted(cells, library=ps.libraries.ObservedLibrary())


def compare(fit, cells, seed=0, groupby=GROUPS, group_a="x", group_b="y", **options):
    groups = {"groupby": groupby, "group_a": group_a, "group_b": group_b}
    return ps.differential_expression(fit, cells, **groups, estimand=GroupMeans(**options), seed=seed)


# --- the formula ---


@pytest.mark.parametrize("zeros", [True, False])
def test_moments_of_the_rate_are_those_of_draws(zeros):
    """E[w | x, z] and E[w^2 | x, z] beside 200,000 draws of w given x and z."""
    theta = {"log_mean": torch.tensor([[0.5, 1.0, -1.0]]), "log_inverse_dispersion": torch.tensor([[0.7, 1.5, 1.0]])}
    likelihood = ps.likelihoods.ZINB() if zeros else ps.likelihoods.NB()
    theta |= {"gate_logits": torch.tensor([[0.3, -1.0, 1.0]])} if zeros else {}
    x = torch.tensor([[0.0, 4.0, 0.0]])
    first, second = rate_moments(likelihood, x, theta)
    many = {name: value.expand(200_000, 1, 3) for name, value in theta.items()}
    w = likelihood.explained(x, many)["w"].double()
    se = w.std(0) / 200_000**0.5
    assert ((first - w.mean(0)).abs() < 4.5 * se).all()
    assert ((second - w.square().mean(0)).abs() < 4.5 * w.square().std(0) / 200_000**0.5).all()
    torch.testing.assert_close(first, likelihood.expected_rate(x, theta))


def by_hand(x, depth, moments):
    """Welch's test of weighted means of x / depth, one gene at a time; x, depth and moments by group."""
    found = []
    for g in range(x[0].shape[1]):
        means, spreads, sizes, counting, constant = [], [], [], [], []
        for counts, size, (m, v) in zip(x, depth, moments, strict=True):
            weight = 1 / (m[g] / size + v[g])
            weight = weight / weight.sum()
            rate = counts[:, g] / size
            mean, n = (weight * rate).sum(), 1 / (weight**2).sum()
            means.append(mean)
            spreads.append((weight**2 * (rate - mean) ** 2).sum() * n / (n - 1))
            sizes.append(n)
            counting.append((weight**2 / size).sum())
            constant.append((weight**2).sum() * v[g])
        pooled = np.average(means, weights=[len(size) for size in depth])
        variance = []
        for k in range(2):
            model = pooled * counting[k] + constant[k]
            averaged = (30 * model + (sizes[k] - 1) * spreads[k]) / (30 + sizes[k] - 1)
            variance.append(max(spreads[k], averaged, pooled * counting[k]))
        total = sum(variance)
        z = (means[0] - means[1]) / total**0.5
        degrees = total**2 / sum(variance[k] ** 2 / (sizes[k] - 1) for k in range(2))
        lfc = np.log2((means[0] + 1e-4) / (means[1] + 1e-4))
        relative = 0
        for k in range(2):
            own = constant[k] * min(1, means[k] / moments[k][0][g]) ** 2
            averaged = (30 * own + (sizes[k] - 1) * spreads[k]) / (30 + sizes[k] - 1)
            scale = max(max(spreads[k], averaged) / max(means[k], counting[k]), counting[k])
            relative += scale * max(means[k], scale) / (means[k] + 1e-4) ** 2
        se = relative**0.5 / np.log(2)
        p = 2 * stats.t.sf(abs(z), degrees)
        reach = stats.t.ppf(0.975, degrees) * se
        found.append([lfc, se, lfc - reach, lfc + reach, z, p, means[0], means[1]])
    return np.array(found)


@pytest.mark.parametrize("library", [ps.libraries.ObservedLibrary, ps.libraries.LatentLibrary, ps.libraries.NoLibrary])
def test_the_table_is_that_of_the_formula(library, cells, monkeypatch):
    """Depths are the totals over their median, whatever sizes a guide infers; moments are taken as they came."""
    fit = fitted(cells, library=library(), epochs=1)
    seen = []
    of = Moments.of
    monkeypatch.setattr(Moments, "of", lambda self, rows: seen.append(of(self, rows)) or seen[-1])
    table = compare(fit, cells)
    rows = [np.flatnonzero(group == GROUPS) for group in "xy"]
    totals = cells.counts.sum(1)
    depth = totals / np.median(totals[np.concatenate(rows)])
    expected = by_hand([cells.counts[part] for part in rows], [depth[part] for part in rows], seen)
    shown = ["lfc", "lfc_se", "lfc_low", "lfc_high", "z", "p_value", "mean_a", "mean_b"]
    assert list(table.columns) == COLUMNS
    assert table.tested.all()
    np.testing.assert_allclose(table[shown], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(table.q_value, stats.false_discovery_control(table.p_value))
    np.testing.assert_allclose(table.detected_b, (cells.counts[rows[1]] > 0).mean(0))


def test_known_size_factors_are_the_depths(cells):
    """Not the totals: a spike-in may say that one group has three times the RNA of the other."""
    known = np.where(GROUPS == "x", 2.0, 6.0)
    obs = pd.DataFrame({"size": known})
    told = ps.Cells.from_counts(cells.counts, obs=obs, size_factor="size")
    fit = fitted(told, library=ps.libraries.SizeFactor(told.columns["size"]), epochs=1)
    with pytest.warns(UserWarning, match="depths differ more than 2-fold"):
        table = compare(fit, told)
    x, y = (told.counts[group == GROUPS].mean(0) for group in "xy")
    np.testing.assert_allclose(table.mean_a / table.mean_b, 3 * x / y, rtol=1e-5)


def test_variance_of_a_group_is_between_and_within_cells(cells):
    """Over the cells of a group: variance of E[w / l | x] plus mean of Var[w / l | x], by impute and draws of w."""
    fit = fitted(cells, ps.likelihoods.NB(), library=ps.libraries.ObservedLibrary())
    rows = np.flatnonzero(GROUPS == "x")
    estimand = GroupMeans(samples=200)
    comparison = estimand.comparison(fit, cells, np.where(GROUPS == "x", 0, -1), 0)
    mean, variance = comparison.moments.of(rows)
    totals = cells.counts[rows].sum(1)
    w = ps.sample_posterior(fit, cells.take(rows), samples=4000, sites=["w"], seed=1).w.values
    relative = w / (totals / np.median(totals))[:, None]
    np.testing.assert_allclose(mean, relative.mean((0, 1)), rtol=0.05)
    np.testing.assert_allclose(variance, relative.var((0, 1)), rtol=0.1)


def test_the_floor_of_a_group_in_which_a_gene_was_never_seen():
    """10 molecules in 500 cells against none in 500: z 2.6 where a delta method or no floor would say more."""
    counts = np.zeros((1000, 1))
    counts[:10] = 1
    sides = [
        strata_of(counts, rows, np.zeros(500, int), np.ones(1000), np.array([m]), np.zeros(1))
        for rows, m in ((np.arange(500), 0.02), (np.arange(500, 1000), 1e-4))
    ]
    variances = [side.floored(np.array([0.01]))[0, 0] for side in sides]
    np.testing.assert_allclose(variances, [0.02 * 0.98 / 499, 0.01 / 500], rtol=1e-9)
    assert 0.02 / sum(variances) ** 0.5 == pytest.approx(2.59, abs=0.01)


# --- what is tested, and what stays as it is ---


def test_one_molecule_in_a_group_leaves_a_fold_change_uncertain_by_no_more_than_one_does(observed, cells):
    """Whatever the model thinks that the gene varies there: its mean is hundreds of times the data's."""
    rng = np.random.default_rng(0)
    x = cells.counts.copy()
    x[GROUPS == "y", 3] = 0
    x[np.flatnonzero(GROUPS == "y")[0], 3] = 1
    x[GROUPS == "x", 3] = rng.poisson(20, 20)
    table = compare(observed, ps.Cells.from_counts(x))
    assert table.z.iloc[3] > 6
    assert table.lfc_se.iloc[3] < 2.2
    assert table.lfc_low.iloc[3] > 1


def test_genes_with_few_counts_keep_their_row_and_are_not_tested(observed):
    counts = simulated_counts()
    counts[:, [3, 4, 5]] = 0
    counts[:9, 4] = 1  # nine molecules
    counts[7, 5] = 40  # many, in one cell of group y
    cells = ps.Cells.from_counts(counts[:, :], gene_names=observed.schema.gene_names, schema=observed.schema)
    table = compare(observed, cells, min_detected=0.06)
    assert list(np.flatnonzero(~table.tested)) == [3, 4, 5]
    assert table.loc[~table.tested, COLUMNS[:10]].isna().all(axis=None)
    assert table[["mean_a", "mean_b", "detected_a", "detected_b"]].notna().all(axis=None)
    assert table.mean_a.iloc[3] == 0
    np.testing.assert_allclose(table.q_value[table.tested], stats.false_discovery_control(table.p_value[table.tested]))
    assert compare(observed, cells, min_molecules=0, min_detected=0).tested.sum() == 20
    assert compare(observed, cells, min_molecules=6).tested.iloc[4]


def test_one_seed_gives_one_table_and_swapped_groups_swap_it(observed, cells):
    first, second, swapped = (
        compare(observed, cells, seed=3),
        compare(observed, cells, seed=3),
        compare(observed, cells, seed=3, group_a="y", group_b="x"),
    )
    pd.testing.assert_frame_equal(first, second)
    np.testing.assert_allclose(first.z, -swapped.z, rtol=0.05, atol=0.05)
    np.testing.assert_allclose(first.lfc, -swapped.lfc, rtol=0.05, atol=0.02)
    assert not first.equals(compare(observed, cells, seed=4))


def test_lazy_dense_and_sparse_counts_give_one_table(observed, cells):
    from scipy import sparse

    other = ps.Cells.from_counts(
        sparse.csr_array(cells.counts), gene_names=cells.schema.gene_names, schema=observed.schema
    )
    pd.testing.assert_frame_equal(compare(observed, cells), compare(observed, other))


# --- groups in turn ---


def test_each_group_against_the_rest_and_alone(observed, cells):
    every = compare(observed, cells, group_a=None, group_b=None)
    assert every.index.names == ["group", "gene"]
    for group in "xyz":
        alone = compare(observed, cells, group_a=group, group_b=None)
        pd.testing.assert_frame_equal(alone, every.loc[group])
        assert alone.mean_b.notna().all()
        assert alone.attrs == {"group_a": group, "group_b": "the rest"}


def test_every_other_keeps_the_least_comparison(observed, cells):
    options = {"groupby": GROUPS, "against": EveryOther()}
    table = ps.differential_expression(observed, cells, **options)
    pairs = {
        (a, b): ps.differential_expression(observed, cells, groupby=GROUPS, group_a=a, group_b=b)
        for a in "xyz"
        for b in "xyz"
        if a != b
    }
    for group in "xyz":
        others = [other for other in "xyz" if other != group]
        z = np.stack([pairs[group, other].z for other in others])
        ours, one_way = table.loc[group], (np.sign(z[0]) == np.sign(z[1])).astype(bool)
        least = z[np.abs(z).argmin(0), np.arange(20)]
        # Comparisons of pairs have depths relative to another median and other draws.
        np.testing.assert_allclose(ours.z[one_way], least[one_way], rtol=0.1, atol=0.05)
        assert (ours.p_value[~one_way] == 1).all()
        assert (ours.z[~one_way] == 0).all()
        assert set(ours.against) <= set(others)
        np.testing.assert_allclose(ours.q_value, stats.false_discovery_control(ours.p_value))
    alone = ps.differential_expression(observed, cells, group_a="y", **options)
    pd.testing.assert_frame_equal(alone, table.loc["y"])
    assert alone.attrs["group_b"] == "every other group"


# --- donors and batches ---


def test_donors_are_the_unit_of_replication(observed, cells):
    """Six donors with the same mean counts in each: the t test of their means, by hand."""
    donor = np.arange(60) // 3 % 6
    table = compare(observed, cells, replicates=donor, min_molecules=0, min_detected=0)
    again = compare(observed, cells, replicates=pd.Series(donor, index=cells.cell_names).sample(frac=1, random_state=0))
    pd.testing.assert_frame_equal(table, again)
    assert table.mean_a.notna().all()
    pooled = compare(observed, cells)
    assert np.corrcoef(table.lfc, pooled.lfc)[0, 1] > 0.95
    assert not np.allclose(table.p_value, pooled.p_value)


def exchanged(means, n):
    """The means with those of the first n genes exchanged in pairs: their sum, and all shares of it, stay."""
    return np.concatenate([means[:n].reshape(-1, 2)[:, ::-1].reshape(-1), means[n:]])


def donors(n_donors, n_cells, spread, fold, seed):
    """Two groups of donors whose 60 genes vary between donors; the first ten exchange means, ``fold`` apart."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(np.arange(2 * n_donors), n_cells)
    group = donor % 2
    means = rng.gamma(2.0, 2.0, 60) + 0.5
    means[1:10:2] = fold * means[:10:2]
    of_group = np.stack([means, exchanged(means, 10)])
    rates = of_group[group] * np.exp(rng.normal(0, spread, (2 * n_donors, 60)))[donor]
    counts = rng.poisson(rates * rng.gamma(4.0, 0.25, rates.shape))
    return ps.Cells.from_counts(counts), donor, group


def test_donors_keep_the_rate_that_cells_do_not():
    cells, donor, group = donors(5, 40, 0.3, 8.0, 0)
    fit = fitted(cells, epochs=4)
    false, power = [], []
    for replicates in (None, donor):
        table = compare(fit, cells, groupby=group, group_a=1, group_b=0, replicates=replicates)
        called = (table.q_value < 0.05).to_numpy()
        false.append(called[10:].sum())
        power.append(called[:10].sum())
    assert false[0] > 10  # of 50 that differ in their donors only
    assert false[1] <= 2
    assert power[1] >= 6


def test_differences_inside_batches_remove_a_batch_effect():
    rng = np.random.default_rng(3)
    batch = np.where(rng.random(400) < 0.5, "p", "q")
    group = np.where(rng.random(400) < np.where(batch == "p", 0.85, 0.15), "a", "b")
    means = np.where((batch == "p")[:, None], [9.0] * 5 + [3.0] * 15, 3.0)
    counts = rng.poisson(means * rng.gamma(10.0, 0.1, means.shape))
    counts[:, 19] = rng.poisson(np.where(group == "a", 6.0, 3.0))
    cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"batch": batch}), batch="batch")
    fit = fitted(cells, epochs=3)
    options = {"groupby": group, "group_a": "a", "group_b": "b"}
    with pytest.warns(UserWarning, match=r"confounded; .* a against b: 3\d%.*within_batches=True"):
        pooled = compare(fit, cells, **options)
    inside = compare(fit, cells, within_batches=True, **options)
    assert (pooled.q_value[:5] < 1e-6).all()
    assert (inside.p_value[:5] > 1e-3).all()
    assert inside.q_value.iloc[19] < 1e-6
    assert inside.lfc.iloc[19] == pytest.approx(1, abs=0.4)
    with pytest.raises(DataError, match="no batch holds cells of both groups, 'p' and 'q'"):
        compare(fit, cells, groupby=batch, group_a="p", group_b="q", within_batches=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        alone = compare(fit, cells, groupby=batch, group_a="p", group_b="q")
    first, second = (str(warning.message) for warning in caught)
    assert "p against q: 0%" in first
    assert "No batch has both groups" in first
    assert "within_batches" not in first
    assert "all cells are from one batch in p; q" in second
    assert {warning.filename for warning in caught} == {__file__}
    assert alone.z.notna().all()


def test_overlap_of_batches():
    one, other = np.array([0] * 85 + [1] * 15), np.array([0] * 15 + [1] * 85)
    assert counterparts(one, other) == pytest.approx(0.3)
    assert counterparts(one, np.repeat(one, 3)) == pytest.approx(1)
    assert counterparts(np.zeros(3, int), np.ones(5, int)) == 0


# --- known nulls and markers ---


def simulated(n, depth, seed):
    """150 genes, 30 of them 2-fold up or down in group b, whose cells are ``depth`` times deeper; one never seen."""
    rng = np.random.default_rng(seed)
    b = np.arange(n) % 2 == 1
    means = rng.gamma(0.8, 1.5, 150) + 0.05
    means[1:30:2] = 2 * means[:30:2]
    rates = np.where(b[:, None], exchanged(means, 30), means)
    rates *= np.where(b, depth, 1.0)[:, None] * rng.lognormal(0, 0.2, (n, 1))
    counts = rng.poisson(rates * rng.gamma(3.0, 1 / 3, rates.shape))
    counts[:, 140] = 0
    return counts, b


@pytest.mark.filterwarnings("ignore:.*genes? .*no count")
@pytest.mark.parametrize("depth", [1.0, 4.0])
def test_the_false_discovery_rate_is_kept_at_equal_and_unequal_depths(depth):
    false, called, found, covered = 0, 0, {400: [], 1200: []}, []
    for n, seeds in ((400, range(3)), (1200, range(1))):
        for seed in seeds:
            counts, b = simulated(n, depth, seed)
            cells = ps.Cells.from_counts(counts)
            fit = fitted(cells, epochs=2, library=ps.libraries.ObservedLibrary())
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "depths differ more than 2-fold: True against False")
                table = compare(fit, cells, groupby=b, group_a=True, group_b=False)
            calls = (table.q_value < 0.05).to_numpy()
            assert not calls[140]
            false, called = false + calls[30:].sum(), called + calls.sum()
            found[n].append(calls[:30].mean())
            truth = np.where(np.arange(150) < 30, np.where(np.arange(150) % 2, -1.0, 1.0), 0.0)
            enough = counts.sum(0) >= 50
            covered.append(((table.lfc_low <= truth) & (truth <= table.lfc_high))[enough].mean())
            if n == 1200:
                many = counts[:, :30].sum(0) > 300
                assert np.polyfit(truth[:30][many], table.lfc[:30][many], 1)[0] == pytest.approx(1, abs=0.08)
    assert false / called < 0.1
    assert 0.92 < np.mean(covered) < 0.98
    assert np.mean(found[400]) > 0.4
    assert np.mean(found[1200]) > np.mean(found[400])  # power grows with cells


@pytest.fixture(scope="module")
def blood():
    adata = ps.datasets.pbmc68k_reduced()
    cells = ps.Cells.from_anndata(adata)
    torch.manual_seed(0)
    return ps.fit(ps.SCVI(cells.n_genes, seed=0), cells, epochs=4, device="cpu", progress=False), cells


MARKERS = {
    "CD19+ B": ("CD79A", "CD79B", "MS4A1"),
    "CD56+ NK": ("NKG7", "GNLY", "GZMB"),
    "Dendritic": ("CST3", "HLA-DRA", "HLA-DPA1"),
    "CD14+ Monocyte": ("FTL", "AIF1", "LST1"),
    "CD8+ Cytotoxic T": ("NKG7", "CCL5", "CD3D"),
    "CD4+/CD25 T Reg": ("CD3D", "IL32"),
}


def test_known_markers_are_found_against_the_rest(blood):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depths differ")
        table = ps.differential_expression(*blood, groupby="bulk_labels")
    for group in table.index.unique("group"):
        of_group = table.loc[group]
        if group != "CD4+/CD45RA+/CD25- Naive T":  # of eight cells
            assert (of_group.q_value < 0.05).any(), group
        first = of_group[of_group.lfc > 0].sort_values("z", ascending=False).index[:10]
        assert set(MARKERS.get(group, ())) <= set(first), group
    never = (table.detected_a == 0) & (table.detected_b == 0)
    assert not table.tested[never].any()


def test_known_markers_of_types_in_two_donors():
    """Every type has markers, platelets of 15 cells too; at most 120 cells of a type."""
    if not (files.folder() / files.PBMC_3KA).is_file():
        pytest.skip(f"{files.PBMC_3KA} is not in {files.folder()}")
    adata = read_pbmc_3ka(files.folder()).adata
    adata = adata[adata.obs.groupby("labels", observed=True).cumcount() < 120].copy()
    cells = ps.Cells.from_anndata(adata[:, adata.X.sum(0).A1 > 0], batch="batch")
    fit = ps.fit(ps.SCVI(cells.n_genes, n_covariates=2, seed=0), cells, epochs=1, device="cpu", progress=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depths differ|groups and batches|all cells are from one batch")
        table = ps.differential_expression(fit, cells, groupby="labels")
    known = {"Platelet": "PPBP", "B": "CD79A", "NK": "NKG7", "CD14+ Mono": "CST3", "DC": "CST3", "CD8 T": "CD8A"}
    for group in table.index.unique("group"):
        of_group = table.loc[group]
        higher = of_group[of_group.lfc > 0].sort_values("z", ascending=False)
        assert (higher.q_value < 0.05).any(), group
        assert known.get(group, higher.index[0]) in higher.index[:10], group


def test_markers_against_every_other_type(blood):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depths differ")
        table = ps.differential_expression(*blood, groupby="bulk_labels", group_a="CD19+ B", against=EveryOther())
    first = table[table.lfc > 0].sort_values("z", ascending=False).index[:5]
    assert {"CD79A", "CD79B", "MS4A1"} <= set(first)


def test_random_halves_of_a_type_call_nothing(blood):
    fit, cells = blood
    rows = np.flatnonzero(cells.obs["bulk_labels"] == "Dendritic")
    shares = []
    for split in range(4):
        halves = np.full(cells.n_cells, None, dtype=object)
        order = np.random.default_rng(split).permutation(rows)
        halves[order[:120]], halves[order[120:]] = "first", "second"
        table = compare(fit, cells, groupby=halves, group_a="first", group_b="second")
        shares.append((table.p_value[table.tested] < 0.05).mean())
        assert not (table.q_value < 0.05).any()
    assert 0.03 < np.mean(shares) < 0.07


# --- cautions and refusals ---


def test_a_single_cell_is_warned_of_and_not_tested(observed, cells):
    labels = np.array(["u", "w"] + ["v"] * 58)
    with pytest.warns(UserWarning, match="a single cell is in u; w: .* no gene is tested"):
        table = compare(observed, cells, groupby=labels, group_a="u", group_b="w")
    assert not table.tested.any()
    assert table.mean_a.notna().all()


def test_unequal_depths_are_warned_of(observed):
    counts = simulated_counts()
    counts[GROUPS == "x"] *= 5
    cells = ps.Cells.from_counts(counts, gene_names=observed.schema.gene_names, schema=observed.schema)
    with pytest.warns(
        UserWarning, match=r"depths differ more than 2-fold: x against y: [4-6](\.\d)? to 1.*divided by depth"
    ):
        compare(observed, cells)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_detected": 1.5}, "min_detected must be"),
        ({"min_molecules": -1}, "min_molecules must be"),
        ({"samples": 0}, "samples must be"),
        ({"sampler": "amortized"}, "sampler must be"),
        ({"replicates": "donor", "within_batches": True}, "exclude each other"),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ModelError, match=message):
        GroupMeans(**options)


def test_groups_with_one_donor_and_cells_without_one_are_refused(observed, cells):
    donor = np.where(GROUPS == "x", 0, np.arange(60) % 4)
    with pytest.raises(DataError, match="all cells of 'x' are from one replicate"):
        compare(observed, cells, replicates=donor)
    with pytest.raises(DataError, match=r"replicates has no value for 1 of the 60 cells"):
        compare(observed, cells, replicates=[None, *donor[1:]])
    with pytest.raises(DataError, match="replicates must hold one value for each of the 60 cells"):
        compare(observed, cells, replicates=donor[:9])
    with pytest.raises(DataError, match="within_batches needs cells with batches"):
        compare(observed, cells, within_batches=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimand": "means"}, "estimand must be an object such as"),
        ({"estimand": GroupMeans}, "estimand must be an object such as"),
        ({"against": "rest"}, "against must be an object such as"),
        ({"against": EveryOther(), "estimand": ps.differential.RandomPairs()}, r"EveryOther\(\) needs"),
    ],
)
def test_questions_that_cannot_be(observed, cells, options, message):
    with pytest.raises(ModelError, match=message):
        ps.differential_expression(observed, cells, groupby=GROUPS, **options)
