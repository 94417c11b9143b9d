"""A file of results is continued by its own run only: other counts, genes, annotations or arguments are refused."""

from functools import partial

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.errors import DataError
from tests.support.cli_runs import one_line, run, succeed
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.faults

N = 40
OPTIONS = {"block": 16, "progress": False}


@pytest.fixture(scope="module")
def adata():
    obs = pd.DataFrame({"kind": ["a", "b"] * (N // 2), "age": np.arange(N) / 3}, [f"c{i}" for i in range(N)])
    matrix = simulated_counts(N).astype(np.float32) + 1
    return ad.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(matrix.shape[1])]))


@pytest.fixture(scope="module")
def fit(adata):
    cells = ps.Cells.from_anndata(adata)
    return ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=4), cells, epochs=1, progress=False, device="cpu")


def genes_put_right(adata):
    adata.var_names = list(adata.var_names[::-1])


def counts_put_right(adata):
    adata.X[np.ix_([5, 6], [3, 4])] += np.array([[1, -1], [-1, 1]], np.float32)  # all totals stay


def kinds_put_right(adata):
    adata.obs["kind"] = ["b", "a"] * (N // 2)


def a_column_more(adata):
    adata.obs["sex"] = "f"


CHANGES = [
    (genes_put_right, "counts"),
    (counts_put_right, "counts"),
    (kinds_put_right, "obs column 'kind'"),
    (a_column_more, "obs column 'sex'"),
]


@pytest.mark.parametrize(("change", "named"), CHANGES)
@pytest.mark.parametrize("out", ["out.zarr", "out.h5ad"])
@pytest.mark.parametrize("source", ["in.h5ad", "in.store"])
def test_infer_after_the_input_was_put_right_is_refused(adata, fit, tmp_path, change, named, out, source):
    fit.save(tmp_path / "fit")
    command = ["infer", tmp_path / "fit", tmp_path / source, "--out", tmp_path / out, "--no-progress"]
    for given in (adata, adata.copy()):
        if given is not adata:
            change(given)
        given.write_h5ad(tmp_path / "in.h5ad")
        if source == "in.store":
            ps.stores.build(tmp_path / "in.h5ad", tmp_path / f"{id(given)}", progress=False).rename(tmp_path / source)
        if given is adata:
            succeed(*command)
            before = (ad.read_zarr if out.endswith("zarr") else ad.read_h5ad)(tmp_path / out)
            if source == "in.store":
                (tmp_path / source).rename(tmp_path / "earlier")
    said = one_line(run(*command))
    assert f"holds results of another run: {named} differ" in said
    assert "choose another path" in said
    after = (ad.read_zarr if out.endswith("zarr") else ad.read_h5ad)(tmp_path / out)
    np.testing.assert_array_equal(after.obsm["X_pyro_scvi"], before.obsm["X_pyro_scvi"])


def test_a_job_with_other_counts_adds_no_rows(adata, fit, tmp_path):
    given = adata.copy()
    ps.shards.write(fit, ps.Cells.from_anndata(given), tmp_path / "o.zarr", {"z": ps.embed}, shard=(0, 2), **OPTIONS)
    counts_put_right(given)
    cells = ps.Cells.from_anndata(given)
    with pytest.raises(DataError, match="another run: counts differ"):
        ps.shards.write(fit, cells, tmp_path / "o.zarr", {"z": ps.embed}, shard=(1, 2), **OPTIONS)
    assert np.isnan(ad.read_zarr(tmp_path / "o.zarr").obsm["z"][16:32]).all()


def test_a_run_goes_on_from_another_form_of_the_same_cells(adata, fit, tmp_path):
    adata.write_h5ad(tmp_path / "in.h5ad")
    ps.stores.build(tmp_path / "in.h5ad", tmp_path / "store", progress=False)
    of_integers = adata.copy()
    of_integers.X = sparse.csr_matrix(adata.X.astype(int))
    forms = [
        ps.Cells.from_anndata(adata, schema=fit.schema),
        ps.Cells.from_anndata(of_integers, schema=fit.schema),
        ps.Cells.from_anndata(ad.read_h5ad(tmp_path / "in.h5ad", backed="r"), schema=fit.schema, backed=True),
        ps.Cells.from_store(tmp_path / "store", schema=fit.schema),
    ]
    fit.save(tmp_path / "fit")
    left = [
        ps.shards.write(one, cells, tmp_path / "out.zarr", {"z": ps.embed}, shard=(i, 4), block=10, progress=False)
        for i, cells in enumerate(forms)
        for one in [ps.load(tmp_path / "fit") if i % 2 else fit]
    ]
    assert left == [3, 2, 1, 0]
    found = ad.read_zarr(tmp_path / "out.zarr")
    np.testing.assert_allclose(found.obsm["z"], ps.embed(fit, forms[0]), atol=1e-5)


def scaled(fit, cells, seed, by):
    return ps.embed(fit, cells, seed=seed) * np.float32(np.sum(np.asarray(by, float)))


LONG = np.zeros(3000)
OTHER = np.where(np.arange(3000) == 1500, 1.0, 0.0)  # their reprs are the same


@pytest.mark.parametrize(
    "kind", [np.asarray, list, lambda x: {"by": x}["by"], pd.Series, lambda x: pd.DataFrame({"q": x})]
)
def test_long_arguments_are_compared_whole(adata, fit, tmp_path, kind):
    cells = ps.Cells.from_anndata(adata)
    write = partial(ps.shards.write, fit, cells, tmp_path / "o.zarr", **OPTIONS)
    write({"z": partial(scaled, by=kind(LONG))})
    write({"z": partial(scaled, by=kind(LONG.copy()))})
    with pytest.raises(DataError, match="another run: verb 'z' differ"):
        write({"z": partial(scaled, by=kind(OTHER))})


def beside(fit, cells, seed, reference):
    return ps.embed(fit, cells, seed=seed)


def test_cells_fits_and_spaces_among_the_arguments_are_compared(adata, fit, tmp_path):
    cells, changed = ps.Cells.from_anndata(adata), adata.copy()
    counts_put_right(changed)
    others = ps.Cells.from_anndata(changed)
    other = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=4), others, epochs=2, progress=False, device="cpu")
    pairs = {"cells": (cells, others), "fit": (fit, other), "module": (fit.model, other.model)}
    pairs["space"] = tuple(ps.spaces.Expression(components=2).fitted(one, cells) for one in (fit, other))
    for name, (one, another) in pairs.items():
        write = partial(ps.shards.write, fit, cells, tmp_path / f"{name}.zarr", **OPTIONS)
        write({"z": partial(beside, reference=one)})
        assert write({"z": partial(beside, reference=one)}) == 0
        with pytest.raises(DataError, match="another run: verb 'z' differ"):
            write({"z": partial(beside, reference=another)})


def test_the_object_of_a_method_is_compared(adata, fit, tmp_path):
    cells = ps.Cells.from_anndata(adata)
    one, another = (ps.spaces.Expression(components=2).fitted(fit, cells.take(np.arange(n))) for n in (40, 30))
    write = partial(ps.shards.write, fit, cells, tmp_path / "o.zarr", **OPTIONS)
    write({"z": one.place})
    assert write({"z": one.place}) == 0
    with pytest.raises(DataError, match="another run: verb 'z' differ"):
        write({"z": another.place})


def test_a_fit_of_the_same_weights_and_another_prior_is_another(adata, tmp_path):
    cells = ps.Cells.from_anndata(adata)
    models = [
        ps.SCVI(cells.n_genes, 2, n_hidden=4, prior=prior)
        for prior in (ps.priors.StandardNormal(2), ps.priors.Laplace(2))
    ]
    fits = [ps.fit(model, cells, epochs=1, progress=False, device="cpu") for model in models]
    fits[1].model.load_state_dict(fits[0].model.state_dict())
    fits[1].guide.load_state_dict(fits[0].guide.state_dict())
    ps.shards.write(fits[0], cells, tmp_path / "o.zarr", {"z": ps.embed}, **OPTIONS)
    with pytest.raises(DataError, match="another run: fit differ"):
        ps.shards.write(fits[1], cells, tmp_path / "o.zarr", {"z": ps.embed}, **OPTIONS)


def test_counts_that_change_in_place_meanwhile_are_told(adata, fit, tmp_path):
    many = np.tile(adata.X, (200, 1))  # beyond what HDF5 keeps of a file
    names = pd.DataFrame(index=[f"c{i}" for i in range(len(many))])
    ad.AnnData(many, obs=names, var=adata.var).write_h5ad(tmp_path / "in.h5ad")
    cells = ps.Cells.from_anndata(ad.read_h5ad(tmp_path / "in.h5ad", backed="r"), backed=True)
    with h5py.File(tmp_path / "in.h5ad") as file:
        offset = file["X"].id.get_offset()
    asked = []

    def embed(fit, part, seed):
        asked.append(1)
        if len(asked) == 3:  # the first call tells the columns
            with open(tmp_path / "in.h5ad", "r+b") as file:
                file.seek(offset)
                file.write(np.ascontiguousarray(many[:, ::-1]).tobytes())
        return ps.embed(fit, part, seed=seed)

    with pytest.raises(DataError, match=r"counts were changed while results were computed.*out.zarr may hold"):
        ps.shards.write(fit, cells, tmp_path / "out.zarr", {"X_e": embed}, block=len(many) // 4, progress=False)
