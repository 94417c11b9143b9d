"""A covariate in another unit in one file or batch: its scale is learnt from all of them, so nothing else tells."""

import warnings
from dataclasses import asdict

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from anndata.experimental import AnnCollection

import pyro_scvi as ps
from pyro_scvi.data.stores.layout import StoreSchema, fingerprint

RNG = np.random.default_rng(0)
N = 60
COUNTS = RNG.poisson(3.0, (N, 8))
SHARE = RNG.beta(2.0, 20.0, N)


def part(values, name, n=N, batch=None):
    cells = pd.Index([f"{name}{i}" for i in range(n)])
    obs = pd.DataFrame({"mito": np.asarray(values, dtype=float)[:n]}, cells)
    obs = obs if batch is None else obs.assign(batch=batch)
    return anndata.AnnData(COUNTS[:n].astype(np.float32), obs, pd.DataFrame(index=[f"g{i}" for i in range(8)]))


def from_store(parts, folder, **options):
    for name, adata in parts.items():
        adata.write_h5ad(folder / f"{name}.h5ad")
    path = ps.stores.build([folder / f"{name}.h5ad" for name in parts], folder / "store", progress=False)
    return ps.Cells.from_store(path, covariates=["mito"], **options)


def from_collection(parts, folder, **options):
    return ps.Cells.from_anndata(AnnCollection(list(parts.values())), covariates=["mito"], backed=True, **options)


def from_batches(parts, folder, **options):
    joined = anndata.concat(parts, label="sample")
    options = options or {"batch": "sample"}
    return ps.Cells.from_anndata(joined, covariates=["mito"], **options)


WAYS = {"files of a store": from_store, "parts of a collection": from_collection, "batches": from_batches}
everywhere = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

OFF = {
    "percent for a share": lambda share: 100 * share,
    "a share of a share": lambda share: share / 100,
    "a thousandth": lambda share: share / 1000,
}
NOT_OFF = {
    "the same": lambda share: share[::-1],
    "twice as many": lambda share: 2 * share,
    "wider around the same mean": lambda share: share.mean() + 1.8 * (share - share.mean()),
    "one value for all cells": lambda share: np.full(N, 100 * share.mean()),
    "elsewhere, but as wide": lambda share: share + 5 * share.std(),
}


@everywhere
@pytest.mark.parametrize("change", OFF.values(), ids=OFF.keys())
def test_another_unit_in_one_part_is_told(way, change, tmp_path):
    parts = {"a": part(SHARE, "a"), "b": part(SHARE[::-1], "b"), "c": part(change(SHARE), "c", 30)}
    with pytest.warns(
        UserWarning, match=r"'mito' is .* in (file|batch) '(c|2)', and .* in (file|batch) .*another unit there"
    ):
        way(parts, tmp_path)


@everywhere
@pytest.mark.parametrize("change", NOT_OFF.values(), ids=NOT_OFF.keys())
def test_what_differs_between_parts_otherwise_is_not(way, change, tmp_path):
    parts = {"a": part(SHARE, "a"), "b": part(change(SHARE), "b")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        way(parts, tmp_path)


def test_batches_inside_the_files_are_looked_at_too(tmp_path):
    mixed = np.where(np.arange(N) % 2, 100 * SHARE, SHARE)
    parts = {name: part(mixed, name, batch=["p", "q"] * (N // 2)) for name in "ab"}
    with pytest.warns(UserWarning, match="in batch '[pq]', and"):
        from_store(parts, tmp_path, batch="batch")


def test_a_part_of_a_query_in_another_unit_is_told(tmp_path):
    """Shares among percents lie less than two standard deviations from their mean."""
    schema = ps.Cells.from_anndata(part(100 * SHARE, "r"), covariates=["mito"]).schema
    parts = {"a": part(100 * SHARE, "a"), "b": part(SHARE, "b", 20)}
    with pytest.warns(UserWarning, match="in file 'b', and"):
        from_store(parts, tmp_path, schema=schema)


def test_a_store_that_does_not_say_its_files_is_read(tmp_path):
    """As those of earlier versions, and with a list of files that is not of these cells."""
    parts = {"a": part(SHARE, "a"), "b": part(SHARE, "b")}
    from_store(parts, tmp_path)
    expected = ps.Cells.from_store(tmp_path / "store", covariates=["mito"]).covariates
    for change in (lambda group: group["files/cells"].__setitem__(0, 7), lambda group: group.__delitem__("files")):
        with h5py.File(tmp_path / "store" / "annotations.h5ad", "r+") as file:
            change(file["uns"])
        describe(tmp_path / "store")
        np.testing.assert_array_equal(ps.Cells.from_store(tmp_path / "store", covariates=["mito"]).covariates, expected)


def describe(store):
    """Write the checksums of a store that was changed on purpose."""
    schema = StoreSchema.read(store)
    StoreSchema(**asdict(schema) | {"files": {name: fingerprint(store / name) for name in schema.files}}).write(store)
