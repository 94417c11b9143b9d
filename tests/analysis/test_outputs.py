"""``out=`` of verbs: floats that hold the results, and nothing that would cut, round, hide or misplace them."""

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.errors import ModelError
from tests.support.simulate import simulated_counts

SHAPE = (20, 20)
CELLS = ps.Cells.from_counts(
    simulated_counts(20), obs=pd.DataFrame({"batch": [1, 2] * 10, "site": ["a", "b"] * 10}), batch="batch"
)
VERBS = {
    "impute": ps.impute,
    "technical zeros": ps.technical_zero_probability,
    "expression": ps.normalized_expression,
}


@pytest.fixture(scope="module")
def fit():
    model = ps.SCVI(20, 2, CELLS.n_covariates, n_hidden=8, n_layers=1)
    return ps.fit(model, CELLS, epochs=1, progress=False, device="cpu")


def hdf5(folder, mode):
    with h5py.File(folder / "out.h5", "w") as file:
        file.create_dataset("out", SHAPE, np.float32)
    return h5py.File(folder / "out.h5", mode)["out"]


def zarred(folder, mode):
    zarr.create_array(folder / "out.zarr", shape=SHAPE, dtype="f4")
    return zarr.open_array(folder / "out.zarr", mode=mode)


def closed(dataset):
    dataset.file.close()
    return dataset


def mapped(folder, mode="w+"):
    path = folder / "out.npy"
    if mode == "r":
        np.save(path, np.empty(SHAPE, np.float32))
        return np.load(path, mmap_mode="r")
    return np.lib.format.open_memmap(path, mode=mode, dtype=np.float32, shape=SHAPE)


TAKEN = {
    "float32": lambda folder: np.empty(SHAPE, np.float32),
    "float64": lambda folder: np.empty(SHAPE),
    "another byte order": lambda folder: np.empty(SHAPE, ">f4"),
    "columns first": lambda folder: np.empty(SHAPE, np.float32, order="F"),
    "a view": lambda folder: np.empty((40, 20), np.float32)[::2],
    "mapped": mapped,
    "h5py": lambda folder: h5py.File(folder / "out.h5", "w").create_dataset("out", SHAPE, "f4"),
    "torch": lambda folder: torch.empty(SHAPE),
    "torch, float64": lambda folder: torch.empty(SHAPE, dtype=torch.float64),
}
REFUSED = {
    "integers": (lambda folder: np.empty(SHAPE, int), "float32 or float64, got int64, which would cut"),
    "booleans": (lambda folder: np.empty(SHAPE, bool), "got bool"),
    "objects": (lambda folder: np.empty(SHAPE, object), "got object"),
    "complex": (lambda folder: np.empty(SHAPE, complex), "got complex128"),
    "float16": (lambda folder: np.empty(SHAPE, np.float16), "got float16"),
    "words": (lambda folder: np.empty(SHAPE, "U3"), "got <U3"),
    "integers in a file": (
        lambda folder: h5py.File(folder / "out.h5", "w").create_dataset("out", SHAPE, "i4"),
        "got int32",
    ),
    "torch, integers": (lambda folder: torch.empty(SHAPE, dtype=torch.int32), "got torch.int32"),
    "torch, bfloat16": (lambda folder: torch.empty(SHAPE, dtype=torch.bfloat16), "got torch.bfloat16"),
    "torch, with gradients": (lambda folder: torch.empty(SHAPE, requires_grad=True), "without gradients, got one with"),
    "torch, without data": (lambda folder: torch.empty(SHAPE, device="meta"), "on the CPU .* got one on meta"),
    "torch, sparse": (lambda folder: torch.zeros(SHAPE).to_sparse_coo(), "got one that is sparse"),
    "a DataFrame": (lambda folder: pd.DataFrame(np.empty(SHAPE)), r"by position, and a DataFrame has names.*np\.empty"),
    "a DataArray": (lambda folder: xr.DataArray(np.empty(SHAPE)), "by position, and a DataArray has names"),
    "a sparse matrix": (lambda folder: sparse.lil_array(SHAPE), "must be an array of shape .* got lil_array"),
    "a list": (lambda folder: [[0.0] * 20] * 20, "must be an array of shape .* got list"),
    "another shape": (lambda folder: np.empty((20, 19)), r"got one of shape \(20, 19\)"),
    "masked": (lambda folder: np.ma.masked_all(SHAPE, np.float32), "without a mask.*out.data"),
    "mapped for reading": (lambda folder: mapped(folder, "r"), "cannot be written to.*mode"),
    "HDF5 for reading": (lambda folder: hdf5(folder, "r"), "cannot be written to.*mode"),
    "zarr for reading": (lambda folder: zarred(folder, "r"), "cannot be written to.*mode"),
    "a closed file": (lambda folder: closed(hdf5(folder, "r")), "of a file that is closed"),
    "repeated": (lambda folder: np.broadcast_to(np.float32(0), SHAPE), "cannot be written to"),
}


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN.keys())
def test_floats_of_any_kind_take_the_results(make, verb, fit, tmp_path):
    out = make(tmp_path)
    assert verb(fit, CELLS, samples=3, batch_size=7, out=out) is out
    np.testing.assert_allclose(np.asarray(out), verb(fit, CELLS, samples=3, batch_size=7), rtol=1e-6)


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS.keys())
@pytest.mark.parametrize(("make", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_would_cut_round_hide_or_misplace_is_refused(make, said, verb, fit, tmp_path):
    with pytest.raises(ModelError, match=said):
        verb(fit, CELLS, out=make(tmp_path))


@pytest.mark.parametrize("batches", [[1, 1], [1, "1"], ["1", 1.0], np.array([1.0, 2.0, 1.0]), pd.Series([1, "1", 2])])
def test_a_batch_that_is_named_twice_is_refused(batches, fit):
    with pytest.raises(ModelError, match="batches name '1' more than once"):
        ps.normalized_expression(fit, CELLS, batches=batches)
    with pytest.raises(ModelError, match="batches name '1' more than once"):
        ps.impute(fit, CELLS, batches=batches, quantity=ps.imputation.mean_given_no_dropout)


def test_batches_named_by_number_or_word_are_the_same(fit):
    for names in ([1, "2"], ["2", 1.0]):
        found = ps.normalized_expression(fit, CELLS, batches=names, samples=3)
        pd.testing.assert_frame_equal(found, ps.normalized_expression(fit, CELLS, samples=3))
