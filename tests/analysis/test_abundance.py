"""differential_abundance: against a reference of its own, and errors over samples against simulated samples."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

import pyro_scvi as ps
from pyro_scvi.errors import DataError, ModelError

N = 120
KIND = np.arange(N) % 2 == 1


def simulated():
    """Cells of two kinds, which differ in all genes."""
    rng = np.random.default_rng(3)
    rates = np.where(KIND[:, None], 1.0, 4.0) ** (np.arange(12) % 3 - 1) * 4.0
    return rng.poisson(rates).astype(np.float32)


@pytest.fixture(scope="module")
def cells():
    return ps.Cells.from_counts(simulated())


def fit_of(cells, guide=ps.guides.DiagonalNormal, **options):
    model = ps.SCVI(cells.n_genes, 2, n_hidden=16, n_layers=1, **options)
    return ps.fit(model, cells, guide(model, n_hidden=16, n_layers=1), epochs=10, batch_size=32, progress=False)


@pytest.fixture(scope="module")
def fit(cells):
    return fit_of(cells)


def design_of(samples_a=3, samples_b=3, n=N):
    sample = np.arange(n) // 4 % (samples_a + samples_b)
    return np.where(sample < samples_a, "control", "treated"), np.array([f"s{place}" for place in sample])


def log_densities(fit, cells):
    """Log q(z_n | x_m) of all pairs of cells (n, m), by the network and scipy."""
    x = torch.as_tensor(np.asarray(cells.counts))
    with torch.no_grad():
        code = fit.guide.encoder(x, torch.zeros(len(x), 0))
        if isinstance(fit.guide, ps.guides.FullRankNormal):
            tril = fit.guide.scale_tril(fit.guide.encode(x, torch.zeros(len(x), 0), None))[:, :2, :2].numpy()
            found = [
                multivariate_normal(m, lower @ lower.T).logpdf(code.loc)
                for m, lower in zip(code.loc, tril, strict=True)
            ]
            return np.stack(found, 1)
        m, s = code.loc.double().numpy(), code.log_scale.exp().double().numpy()
    return norm.logpdf(m[:, None], m[None], s[None]).sum(-1)


def densities_by_hand(log_p, samples):
    """Log q_s(z_n) by sample, each cell left out of its own."""
    everything = range(len(log_p))

    def density(n, name):
        others = [m for m in everything if samples[m] == name and m != n]
        return logsumexp(log_p[n, others]) - np.log(len(others))

    return {name: np.array([density(n, name) for n in everything]) for name in np.unique(samples)}


def ratio_by_hand(density, in_b):
    of_a = [values for name, values in density.items() if name not in in_b]
    of_b = [density[name] for name in in_b]
    return logsumexp(of_b, 0) - np.log(len(of_b)) - logsumexp(of_a, 0) + np.log(len(of_a))


@pytest.mark.parametrize("guide", [ps.guides.DiagonalNormal, ps.guides.FullRankNormal])
def test_log_ratio_and_p_value_are_those_of_a_reference(cells, guide):
    fit = fit_of(cells, guide)
    groups, samples = design_of(2, 3)
    table = ps.differential_abundance(fit, cells, groups, samples, batch_size=50)
    density = densities_by_hand(log_densities(fit, cells), samples)
    expected = ratio_by_hand(density, ["s2", "s3", "s4"])
    np.testing.assert_allclose(table.log_ratio, expected, atol=1e-3)
    exchanged = [ratio_by_hand(density, in_b) for in_b in combinations(density, 3)]
    far = np.abs(exchanged) >= np.abs(expected) - 1e-6
    np.testing.assert_allclose(table.p_value, np.mean(far, 0), atol=1e-12)
    sorted_p = np.sort(table.p_value)
    for p, q_value in zip(table.p_value[:10], table.q_value[:10], strict=True):
        later = [q * N / (rank + 1) for rank, q in enumerate(sorted_p) if q >= p]
        assert q_value == pytest.approx(min(later))


def test_se_is_the_jackknife_over_samples(fit, cells):
    groups, samples = design_of(2, 3)
    density = densities_by_hand(log_densities(fit, cells), samples)
    variance = 0.0
    for names in (["s0", "s1"], ["s2", "s3", "s4"]):
        left = [logsumexp([density[other] for other in names if other != name], 0) for name in names]
        variance = variance + (len(names) - 1) / len(names) * np.square(left - np.mean(left, 0)).sum(0)
    table = ps.differential_abundance(fit, cells, groups, samples)
    np.testing.assert_allclose(table.se, np.sqrt(variance), rtol=1e-3, atol=1e-4)


def sampled(rng, shares, n_each=40):
    """Rows of cells, and sample of each, with a share of the second kind in each sample; no cell twice in a sample."""
    of_kind = [np.flatnonzero(~KIND), np.flatnonzero(KIND)]
    rows, names = [], []
    for place, share in enumerate(shares):
        n_second = rng.binomial(n_each, share)
        for kind, n in zip(of_kind, (n_each - n_second, n_second), strict=True):
            rows += list(rng.choice(kind, n, replace=False))
        names += [f"s{place}"] * n_each
    return np.array(rows), np.array(names)


def test_a_kind_that_is_three_times_as_frequent_is_found(fit, cells):
    rng = np.random.default_rng(0)
    rows, samples = sampled(rng, [0.2] * 5 + [0.6] * 5)
    groups = np.where(np.isin(samples, [f"s{i}" for i in range(5)]), "control", "treated")
    table = ps.differential_abundance(fit, cells.take(rows), groups, samples)
    means = table.groupby(KIND[rows]).mean()
    np.testing.assert_allclose(means.log_ratio, np.log([0.4 / 0.8, 0.6 / 0.2]), atol=0.35)
    assert (means.se < 0.35).all()
    assert (table.q_value < 0.05).mean() > 0.9


def test_errors_are_over_samples_and_few_are_called_where_groups_do_not_differ(fit, cells):
    """Samples vary more than cells alone would make them: shares of the second kind from .1 to .9."""
    rng, ratios, errors, called = np.random.default_rng(1), [], [], []
    probes = [0, 1]  # one cell of each kind, in no sample
    for _ in range(40):
        rows, samples = sampled(rng, rng.beta(2, 2, 8))
        groups = np.where(np.isin(samples, ["s0", "s1", "s2", "s3"]), "a", "b").astype(object)
        everything = np.concatenate([probes, rows])
        table = ps.differential_abundance(
            fit, cells.take(everything), [None, None, *groups], [None, None, *samples], permutations=200, batch_size=400
        )
        ratios.append(table.log_ratio.iloc[:2])
        errors.append(table.se.iloc[:2])
        called.append(table.p_value.iloc[:2] <= 0.1)
    spread = np.std(ratios, axis=0)
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(errors), 0)) / spread, 1.0, atol=0.4)
    assert np.mean(called) < 0.2


def test_cells_of_other_groups_and_without_a_sample_have_a_row_but_no_say(fit, cells):
    groups, samples = design_of()
    some = ps.differential_abundance(fit, cells.take(range(72)), groups[:72], samples[:72])
    left_out = np.arange(N) >= 72
    for other_groups, other_samples in (
        (np.where(left_out, "third", groups), samples),
        (groups, np.where(left_out, None, samples)),
    ):
        table = ps.differential_abundance(
            fit, cells, other_groups, other_samples, group_a="control", group_b="treated", batch_size=50
        )
        np.testing.assert_allclose(table.iloc[:72].drop(columns="q_value"), some.drop(columns="q_value"), atol=1e-4)
        assert np.isfinite(table).all().all()


def test_groups_the_other_way_round_change_the_sign_and_columns_of_obs_are_named(fit):
    groups, samples = design_of(3, 2)
    obs = pd.DataFrame({"condition": groups, "donor": samples})
    named = ps.Cells.from_counts(simulated(), obs=obs)
    table = ps.differential_abundance(fit, named, "condition", "donor")
    back = ps.differential_abundance(fit, named, "condition", "donor", group_a="treated", group_b="control")
    np.testing.assert_allclose(table.log_ratio, -back.log_ratio)
    np.testing.assert_array_equal(table.p_value, back.p_value)
    assert table.attrs["group_b"] == "treated"
    assert table.attrs["samples"] == ["s0", "s1", "s2", "s3", "s4"]


def test_more_samples_than_can_be_exchanged_are_exchanged_at_random(fit, cells):
    groups, samples = design_of(6, 6)
    exact = ps.differential_abundance(fit, cells, groups, samples)
    some = ps.differential_abundance(fit, cells, groups, samples, permutations=600)
    assert (exact.p_value * 924).round(6).apply(float.is_integer).all()
    np.testing.assert_allclose(some.p_value, exact.p_value, atol=0.09)
    assert some.p_value.min() >= 1 / 601


def test_what_cannot_be_answered_is_named(fit, cells):
    groups, samples = design_of()
    one = np.where(groups == "control", "s0", samples)
    lonely = np.where(np.arange(N) == 0, "s9", samples)
    crossed = np.arange(N).astype(str) + "x"
    refused = {
        r"group 'control' has 1 sample": lambda: ps.differential_abundance(fit, cells, groups, one),
        r"\['s9'\] have one cell each": lambda: ps.differential_abundance(fit, cells, groups, lonely),
        r"have cells of both groups": lambda: ps.differential_abundance(fit, cells, groups, np.arange(N) % 5),
        r"have one cell each": lambda: ps.differential_abundance(fit, cells, groups, crossed),
        r"name two groups": lambda: ps.differential_abundance(fit, cells, np.arange(N) % 3, samples),
        r"got 'control' and 'x'": lambda: ps.differential_abundance(
            fit, cells, groups, samples, group_a="control", group_b="x"
        ),
        r"no column 'donor'": lambda: ps.differential_abundance(fit, cells, groups, "donor"),
        r"permutations must": lambda: ps.differential_abundance(fit, cells, groups, samples, permutations=0),
        r"Point has no density": lambda: ps.differential_abundance(
            fit_of(cells, ps.guides.Point), cells, groups, samples
        ),
    }
    for says, call in refused.items():
        with pytest.raises((DataError, ModelError), match=says):
            call()
