"""Lazy counts: every function gives the same for the same cells wherever their counts lie, or refuses them."""

import copy
import pickle

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from anndata import AnnData
from anndata.experimental import AnnCollection
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import Source, row_blocks
from pyro_scvi.data.lazy_counts import GenesOf
from pyro_scvi.errors import DataError, ModelError
from tests.support.short_evidence import compared

N, GENES = 40, 12
WAYS = ("store", "backed CSR", "backed dense", "collection", "query")


def calibrated(fit, cells):
    source = ps.calibration.AggregatePosterior(cells, sampler=ps.Amortized())
    return ps.calibrate(fit, 20, source=source, sampler=ps.Amortized(), draws=19, thin=1)


VERBS = {
    "embed": lambda fit, cells: ps.embed(fit, cells, batch_size=16),
    "sample_posterior": lambda fit, cells: ps.sample_posterior(fit, cells, samples=8),
    "evidence": lambda fit, cells: ps.evidence(fit, cells.take(range(3)), samples=50, steps=5),
    "compare": lambda fit, cells: compared({"one": fit, "two": fit}, cells.take([5, 2]), samples=50),
    "impute": lambda fit, cells: ps.impute(fit, cells, samples=3),
    "technical_zero_probability": lambda fit, cells: ps.technical_zero_probability(fit, cells, samples=3),
    "differential_expression": lambda fit, cells: ps.differential_expression(
        fit, cells, groupby="kind", group_a="B", group_b="T"
    ),
    "posterior_predictive": lambda fit, cells: ps.posterior_predictive(fit, cells, samples=2),
    "check_predictions": lambda fit, cells: ps.check_predictions(fit, cells, samples=3),
    "leave_one_out": lambda fit, cells: ps.leave_one_out(fit, cells.take([9, 3]), samples=50, sampler=ps.Amortized()),
    "annealed_evidence": lambda fit, cells: ps.annealed_evidence(fit, cells.take([4, 1]), chains=2, temperatures=3),
    "calibrate": lambda fit, cells: calibrated(fit, cells).ranks,
    "to_datatree": lambda fit, cells: ps.to_datatree(fit, cells, samples=3),
    "preset": lambda fit, cells: ps.presets.nature_methods_2018(cells)[0].library._buffers,
}


def make_adata(form=sparse.csr_matrix):
    rng = np.random.default_rng(0)
    counts = rng.poisson(rng.gamma(1.0, 2.0, (N, GENES))) + np.eye(N, GENES, dtype=int)
    counts[:, 0] += 1
    obs = pd.DataFrame(
        {"kind": np.where(np.arange(N) % 3, "B", "T"), "donor": np.where(np.arange(N) < 25, "a", "b")},
        index=[f"c{i}" for i in range(N)],
    )
    return AnnData(form(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


@pytest.fixture(scope="module")
def everywhere(tmp_path_factory):
    """The same cells by where their counts lie; nothing is held in memory but for the first."""
    folder, adata = tmp_path_factory.mktemp("sources"), make_adata()
    adata.write_h5ad(folder / "csr.h5ad")
    make_adata(np.asarray).write_h5ad(folder / "dense.h5ad")
    adata[:25].write_h5ad(folder / "first.h5ad")
    adata[25:].write_h5ad(folder / "second.h5ad")
    shuffled = np.random.default_rng(1).permutation(GENES)
    adata[:, shuffled].write_h5ad(folder / "shuffled.h5ad")
    names = {"backed CSR": "csr", "backed dense": "dense", "first": "first", "second": "second"}
    files = {way: anndata.read_h5ad(folder / f"{name}.h5ad", backed="r") for way, name in names.items()}
    for name in ("csr", "shuffled"):
        ps.stores.build(folder / f"{name}.h5ad", folder / name, progress=False)
    memory = Cells.from_anndata(adata, batch="donor")
    yield {
        "memory": memory,
        "store": Cells.from_store(folder / "csr", batch="donor"),
        "query": Cells.from_store(folder / "shuffled", schema=memory.schema),
        "backed CSR": Cells.from_anndata(files["backed CSR"], batch="donor", backed=True),
        "backed dense": Cells.from_anndata(files["backed dense"], batch="donor", backed=True),
        "collection": Cells.from_anndata(AnnCollection([files["first"], files["second"]]), batch="donor", backed=True),
    }
    for file in files.values():
        file.file.close()


@pytest.fixture(scope="module")
def fit(everywhere):
    return fitted(everywhere["memory"])


def fitted(cells):
    model = ps.SCVI(cells.n_genes, n_latent=2, n_covariates=cells.n_covariates, n_hidden=8)
    return ps.fit(model, cells, epochs=3, batch_size=16, progress=False)


@pytest.fixture
def from_disk(monkeypatch):
    """No counts are held in memory however few they are."""
    monkeypatch.setattr("pyro_scvi.data.minibatches.RESIDENT_BYTES", 0)


def numbers(found):
    """All arrays of numbers in a result, by name."""
    if isinstance(found, np.ndarray):
        return {"": found}
    if isinstance(found, pd.DataFrame):
        return found.select_dtypes("number").to_dict("series")
    if isinstance(found, xr.DataTree):
        return {f"{group.path}/{k}": v.values for group in found.subtree for k, v in group.data_vars.items()}
    if isinstance(found, xr.DataArray):
        return {"": found.values}
    if isinstance(found, xr.Dataset):
        return {name: variable.values for name, variable in found.data_vars.items()}
    if isinstance(found, tuple):
        return {f"{i} {k}": v for i, part in enumerate(found) for k, v in numbers(part).items()}
    return {k: np.asarray(v) for k, v in (found if isinstance(found, dict) else vars(found)).items() if np.size(v)}


def check_same(found, expected):
    found, expected = numbers(found), numbers(expected)
    assert found.keys() == expected.keys()
    assert found
    for name, values in expected.items():
        if np.asarray(values).dtype.kind in "iufb":
            np.testing.assert_allclose(found[name], values, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("way", WAYS)
class TestTheSameEverywhere:
    def test_counts(self, everywhere, way):
        cells, memory = everywhere[way], everywhere["memory"]
        assert isinstance(cells.counts, Source)
        for index in (slice(None), [3, 1, 1, -1], slice(30, 20, -2), [7], np.arange(N) % 7 == 0, []):
            for found, expected in zip(cells[index], memory[index], strict=True):
                np.testing.assert_array_equal(found, expected)
                assert found.dtype == expected.dtype
        np.testing.assert_array_equal(cells.totals, memory.totals)
        assert cells.schema == memory.schema
        pd.testing.assert_frame_equal(cells.obs, memory.obs, check_dtype=False, check_categorical=False)
        with pytest.raises(IndexError):
            cells[[N]]

    @pytest.mark.usefixtures("from_disk")
    def test_training(self, everywhere, fit, way):
        found = fitted(everywhere[way])
        for part, expected in ((found.model, fit.model), (found.guide, fit.guide)):
            for name, value in expected.state_dict().items():
                np.testing.assert_allclose(part.state_dict()[name], value, rtol=1e-6, atol=1e-6, err_msg=name)
        check_same(found.history.drop(columns="seconds"), fit.history.drop(columns="seconds"))

    def test_parts(self, everywhere, way):
        parts = [everywhere[at].split(7, seed=2) for at in (way, "memory")]
        for found, expected in zip(*parts, strict=True):
            np.testing.assert_array_equal(found[:][0], expected[:][0])
            assert repr(found).split(";")[0] == repr(expected).split(";")[0]


@pytest.mark.usefixtures("from_disk")
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.filterwarnings("ignore:.*(do not follow the posterior|k-hat is above):UserWarning")
def test_every_verb_says_the_same(everywhere, fit, verb):
    expected = VERBS[verb](fit, everywhere["memory"])
    for way in ("store", "backed CSR", "collection"):
        check_same(VERBS[verb](fit, everywhere[way]), expected)


def test_blocks_are_small_and_complete(everywhere, monkeypatch):
    monkeypatch.setattr("pyro_scvi.data.counts._BLOCK_ENTRIES", 5 * GENES)
    rows = np.arange(N)[::-1]
    for cells in everywhere.values():
        blocks = list(row_blocks(cells.counts, rows))
        assert [block.shape[0] for _, block in blocks] == [5] * 8
        expected = everywhere["memory"][rows][0]
        for place, block in blocks:
            dense = block if isinstance(block, np.ndarray) else block.toarray()
            np.testing.assert_array_equal(dense, expected[place])


def test_sums_of_genes_that_are_selected(everywhere):
    """Genes left out do not count, and a gene of zeros is seen to have none."""
    source = GenesOf(everywhere["store"].counts, np.array([4, -1, 2]))
    counts = everywhere["memory"][:][0].numpy()
    np.testing.assert_array_equal(source.totals, counts[:, [4, 2]].sum(1))
    np.testing.assert_array_equal(source.detected, [(counts[:, 4] > 0).sum(), 0, (counts[:, 2] > 0).sum()])


def test_with_batch_keeps_the_source(everywhere):
    assert everywhere["store"].with_batch("b").counts is everywhere["store"].counts


# --- what a source refuses ---


@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
def test_backed_counts_are_validated(tmp_path, form):
    adata = make_adata(form)
    adata.X[31, 5] = 0.5
    adata.write_h5ad(tmp_path / "cells.h5ad")
    file = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(DataError, match=r"raw integer counts; cell 'c31', gene 'g5' holds 0\.5"):
        Cells.from_anndata(file, backed=True)
    cells = Cells.from_anndata(file, backed=True, allow_non_integer=True)
    assert cells[31][0][0, 5] == 0.5
    file.file.close()


def test_an_implausible_count_in_a_file_is_warned_of(tmp_path):
    adata = make_adata(np.asarray)
    adata.X[3, 5] = 2e6
    adata.write_h5ad(tmp_path / "cells.h5ad")
    file = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.warns(UserWarning, match="cell 'c3', gene 'g5'") as caught:
        Cells.from_anndata(file, backed=True)
    assert [warning.filename for warning in caught] == [__file__]
    file.file.close()


def test_what_cannot_stay_in_place(tmp_path):
    adata = make_adata(sparse.csc_matrix)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    file = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(DataError, match=r"X of .*cells.h5ad is stored by genes"):
        Cells.from_anndata(file, backed=True)
    with pytest.raises(DataError, match="Use Cells.take"):
        Cells.from_anndata(file[:5], backed=True)
    file.file.close()
    with pytest.raises(DataError, match=r"not a matrix on disk .*without backed=True"):
        Cells.from_anndata(adata, backed=True)
    with pytest.raises(DataError, match="a backed AnnData or an AnnCollection, got ndarray"):
        Cells.from_anndata(np.ones((3, 3)), backed=True)
    adata.layers["counts"] = adata.X.copy()
    with pytest.raises(DataError, match=r"ps\.stores\.build"):
        Cells.from_anndata(adata, layer="counts", backed=True)


def test_a_layer_and_common_genes_of_a_collection():
    first, second = make_adata(), make_adata()[:, 2:].copy()
    second.obs_names = [f"d{i}" for i in range(N)]
    for each in (first, second):
        each.layers["counts"] = each.X.copy()
        each.X = np.log1p(each.X.toarray())
    collection = AnnCollection([first, second], join_vars="inner", label="file")
    cells = Cells.from_anndata(collection, layer="counts", batch="file", backed=True)
    expected = np.vstack([first.layers["counts"].toarray()[:, 2:], second.layers["counts"].toarray()])
    rows = np.random.default_rng(0).permutation(2 * N)
    np.testing.assert_array_equal(cells[rows][0], expected[rows])
    assert cells.n_batches == 2


# --- writing results row by row ---


@pytest.mark.parametrize("options", [{}, {"quantiles": (0.1, 0.9)}])
def test_impute_writes_into_what_it_is_given(everywhere, fit, tmp_path, options):
    import h5py

    cells = everywhere["store"]
    expected = ps.impute(fit, cells, samples=3, batch_size=16, **options)
    mapped = np.lib.format.open_memmap(tmp_path / "found.npy", "w+", np.float32, expected.shape)
    assert ps.impute(fit, cells, samples=3, batch_size=16, out=mapped, **options) is mapped
    np.testing.assert_array_equal(np.load(tmp_path / "found.npy"), expected)
    with h5py.File(tmp_path / "found.h5", "w") as file:
        found = file.create_dataset("imputed", expected.shape, "f4", chunks=True)
        ps.impute(fit, cells, samples=3, batch_size=16, out=found, **options)
        np.testing.assert_array_equal(found[...], expected)


def test_technical_zeros_write_into_what_they_are_given(everywhere, fit):
    cells = everywhere["store"]
    out = np.full((N, GENES), np.nan)
    assert ps.technical_zero_probability(fit, cells, samples=3, out=out) is out
    np.testing.assert_array_equal(out, ps.technical_zero_probability(fit, cells, samples=3))


def test_a_place_of_another_shape_is_refused(everywhere, fit):
    for out in (np.empty((N, GENES + 1)), np.empty((2, N, GENES)), [[0.0]]):
        with pytest.raises(ModelError, match=r"out must be an array of shape \(40, 12\)"):
            ps.impute(fit, everywhere["memory"], out=out)
    with pytest.raises(ModelError, match=r"shape \(1, 40, 12\)"):
        ps.impute(fit, everywhere["memory"], quantiles=[0.5], out=np.empty((N, GENES)))
    with pytest.raises(ModelError, match="out must be"):
        ps.technical_zero_probability(fit, everywhere["memory"], out=np.empty(3))


@pytest.mark.parametrize("send", [copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("form", [sparse.csr_matrix, np.asarray])
def test_an_open_file_cannot_go_to_another_process_and_a_store_can(tmp_path, form, send):
    make_adata(form).write_h5ad(tmp_path / "in.h5ad")
    backed = Cells.from_anndata(anndata.read_h5ad(tmp_path / "in.h5ad", backed="r"), backed=True)
    for cells in (backed, backed.take([3, 1])):
        with pytest.raises(DataError, match="open HDF5 file, which cannot be copied or sent .*take a store"):
            send(cells)
    stored = Cells.from_store(ps.stores.build(tmp_path / "in.h5ad", tmp_path / "store", progress=False))
    assert (send(stored) if send is copy.deepcopy else pickle.loads(send(stored))).n_cells == N
