"""The choice of a space for neighbours: halves of molecules, forecasts, and metrics between decoded distributions."""

import anndata
import numpy as np
import pytest
import scipy.integrate
import scipy.spatial

pytest.importorskip("benchmarks", reason="the benchmarks are in the repository, not in the package")

import pyro_scvi as ps
from benchmarks.choice import spaces


@pytest.fixture(scope="module")
def adata():
    return anndata.AnnData(np.random.default_rng(0).negative_binomial(2, 0.1, (40, 12)).astype(np.float32))


@pytest.fixture(scope="module")
def cells(adata):
    return ps.Cells.from_anndata(adata)


@pytest.fixture(scope="module")
def fit(cells):
    return ps.fit(ps.SCVI(cells.n_genes, 2), cells, epochs=2, progress=False)


def test_halves_of_the_molecules_add_up(adata):
    rows = np.arange(0, adata.n_obs, 2)
    first, second = spaces.halves(adata, rows, 0)
    whole = ps.Cells.from_anndata(adata[rows].copy())[:][0].numpy()
    assert (first[:][0].numpy() + second == whole).all()
    assert 0.45 < second.sum() / whole.sum() < 0.55


def test_neighbours_of_the_own_kind_foretell_more_than_others():
    second = np.repeat([[40, 0, 10], [0, 40, 10]], 20, 0)
    rows = np.array([0, 39])
    kind = np.repeat([0.0, 1.0], 20)
    near = spaces.nearest(np.abs(kind[rows, None] - kind), rows)
    assert (np.sort(near, 1) < 20).all(1).tolist() == [True, False]
    assert not (near == rows[:, None]).any()
    own, wrong = (spaces.foretold(second, rows, each) for each in (near, near[::-1]))
    assert (own > wrong).all()
    # 15 neighbours and a cell of 50 molecules with the shares of all cells, (801, 801, 401) of 2003
    p = (15 * 40 + 50 * 801 / 2003, 50 * 801 / 2003, 15 * 10 + 50 * 401 / 2003)
    by_hand = (40 * np.log(p[0] / 800) + 10 * np.log(p[2] / 800)) / 50
    np.testing.assert_allclose(own[0], by_hand, rtol=1e-12)


def test_metrics_of_decoded_laws_are_those_of_their_formulas(fit, cells):
    rows = np.array([0, 3])
    p = spaces.shares(fit, cells)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-4)
    roots = np.sqrt(p)
    np.testing.assert_allclose(
        spaces.hellinger(fit, cells, rows)[1, 7], np.linalg.norm(roots[3] - roots[7]), rtol=1e-4, atol=1e-6
    )
    between = scipy.spatial.distance.jensenshannon(p[3], p[7]) ** 2
    np.testing.assert_allclose(spaces.jensen_shannon(fit, cells, rows)[1, 7], between, rtol=1e-2, atol=1e-6)


def test_the_metric_of_negative_binomials_is_the_root_of_its_information(fit, cells):
    rows = np.array([3])
    r = np.exp(np.median(spaces.unreduced(spaces.LogInverseDispersion(), fit, cells), 0))
    depth = np.median(cells.totals)
    ends = depth * spaces.shares(fit, cells)[[3, 7]]
    lengths = [
        scipy.integrate.quad(lambda m, r=r_g: np.sqrt(1 / (m + m**2 / r)), *pair)[0]
        for pair, r_g in zip(ends.T, r, strict=True)
    ]
    found = spaces.negative_binomial(fit, cells, rows)[0, 7]
    np.testing.assert_allclose(found, np.linalg.norm(lengths), rtol=1e-6)
