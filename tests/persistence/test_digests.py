"""Digests of counts and annotations: one for equal content in every form, another for any change."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data import counts as counting
from pyro_scvi.persistence.digests import digest_of_counts, digests_of_columns
from tests.support.simulate import simulated_counts

N = 40


@pytest.fixture
def matrix():
    return simulated_counts(N).astype(np.float32)


@pytest.fixture
def adata(matrix):
    obs = pd.DataFrame({"kind": ["a", "b", None, "a"] * (N // 4), "age": np.arange(N) / 3}, [f"c{i}" for i in range(N)])
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])]))


def shuffled(matrix):
    """CSR whose genes lie in no order, with zeros that are stored."""
    found = sparse.csr_array(np.ones_like(matrix))
    rows = np.repeat(np.arange(N), matrix.shape[1])
    found.indices = found.indices.reshape(N, -1)[:, ::-1].ravel().copy()
    found.data = matrix[rows, found.indices]
    found.has_sorted_indices = False
    return found


@pytest.mark.parametrize(
    "form",
    [
        np.asfortranarray,
        lambda x: x.astype(np.int32),
        lambda x: x.astype(np.uint16),
        lambda x: x.astype(">f8"),
        sparse.csr_array,
        lambda x: sparse.csr_array(x.astype(np.int64)),
        sparse.csc_array,
        shuffled,
    ],
)
def test_counts_in_memory_have_one_digest(matrix, form):
    cells = ps.Cells.from_counts(form(matrix))
    assert digest_of_counts(cells.counts) == digest_of_counts(matrix)


def test_counts_on_disk_have_the_same(adata, matrix, tmp_path):
    expected = digest_of_counts(matrix)
    adata.write_h5ad(tmp_path / "dense.h5ad")
    adata.X = sparse.csr_matrix(adata.X)
    adata[:, ::-1].copy().write_h5ad(tmp_path / "reversed.h5ad")
    ps.stores.build(tmp_path / "reversed.h5ad", tmp_path / "store", progress=False)
    schema = ps.Cells.from_anndata(adata).schema
    for name in ("dense", "reversed"):
        backed = ad.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        assert digest_of_counts(ps.Cells.from_anndata(backed, schema=schema, backed=True).counts) == expected
    stored = ps.Cells.from_store(tmp_path / "store", schema=schema)
    assert digest_of_counts(stored.counts) == expected
    assert digest_of_counts(stored.take(np.arange(N)[::-1]).counts) == digest_of_counts(matrix[::-1])


def test_blocks_are_no_part_of_it(matrix, monkeypatch):
    expected = digest_of_counts(matrix)
    monkeypatch.setattr(counting, "_BLOCK_ENTRIES", 3 * matrix.shape[1])
    assert digest_of_counts(matrix) == digest_of_counts(sparse.csr_array(matrix)) == expected


def test_a_change_that_keeps_all_totals_is_seen(matrix):
    place = np.ix_([5, 6], [3, 4])
    changed = matrix + 1
    before = digest_of_counts(changed)
    changed[place] += np.array([[1, -1], [-1, 1]])
    for one in (changed, matrix[:, ::-1], matrix[::-1], matrix.reshape(N // 2, -1)):
        assert digest_of_counts(one) != before != digest_of_counts(matrix)


def test_columns_have_one_digest_in_memory_and_from_a_file(adata, tmp_path):
    before = digests_of_columns(adata.obs)
    adata.write_h5ad(tmp_path / "in.h5ad")  # strings become categories
    assert digests_of_columns(ad.read_h5ad(tmp_path / "in.h5ad").obs) == before
    assert before["kind"] != before["age"]


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("kind", lambda column: column.iloc[::-1].to_numpy()),
        ("kind", lambda column: column.fillna("missing")),
        ("kind", lambda column: column.replace("b", "c")),
        ("age", lambda column: column + 1e-9),
        ("age", lambda column: column.where(column > 0)),
        ("kind", lambda column: pd.Categorical(column, ["b", "a"], ordered=True)),
    ],
)
def test_a_change_of_a_column_is_seen(adata, name, change):
    before, other = digests_of_columns(adata.obs), {"kind": "age", "age": "kind"}[name]
    adata.obs[name] = change(adata.obs[name])
    after = digests_of_columns(adata.obs)
    assert after[name] != before[name]
    assert after[other] == before[other]


def test_bytes_between_numbers_are_no_part_of_it(monkeypatch):
    """pandas leaves them as memory happens to be; here they are set."""
    values = np.arange(N, dtype=np.longdouble) / 3
    same = values.copy()
    same.view(np.uint8).reshape(N, -1)[:, 10:] = 7  # a number of 80 bits leaves them as they were
    if not np.array_equal(values, same):
        pytest.skip("long doubles have other bits here")

    def digest_with(found):
        monkeypatch.setattr(pd, "factorize", lambda column: (np.arange(N), found))
        return digests_of_columns(pd.DataFrame({"d": values}))

    assert digest_with(values) == digest_with(same) != digest_with(values + 1)
