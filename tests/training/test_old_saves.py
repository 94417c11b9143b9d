"""Saves of earlier versions load, and give the embeddings that they gave then.

``saves/0.1.0-0ec880f`` was written by commit 0ec880f: five fits of 3 epochs, one of them with its checkpoints, their
40 cells, and the posterior means of z that ``ps.embed`` gave for them.
"""

import shutil
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

import pyro_scvi as ps

SAVES = Path(__file__).parent / "saves" / "0.1.0-0ec880f"
FITS = ["default", "heavy_full_rank", "mixture_flow", "per_cell", "weights_simplex"]


@pytest.fixture(scope="module")
def expected():
    with np.load(SAVES / "expected.npz") as file:
        return dict(file)


def cells_of(expected, schema):
    obs = pd.DataFrame({"batch": expected["batch"], "age": expected["age"]}, index=[f"c{i}" for i in range(40)])
    adata = anndata.AnnData(expected["counts"].astype(np.float32), obs=obs)
    adata.var_names = [f"g{i}" for i in range(8)]
    return ps.Cells.from_anndata(adata, schema=schema)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_loads_and_embeds_as_it_did(name, expected):
    fit = ps.load(SAVES / name)
    z, before = ps.embed(fit, cells_of(expected, fit.schema)), expected[f"embedding_{name}"]
    if fit.guide.amortized:
        np.testing.assert_allclose(z, before, rtol=0, atol=1e-6)
    else:  # from draws, which each cell now has from a random stream of its own
        np.testing.assert_allclose(z, before, rtol=0, atol=0.3)


def test_a_fit_that_is_saved_again_is_the_same(expected, tmp_path):
    ps.load(SAVES / "weights_simplex").save(tmp_path / "again")
    again = ps.load(tmp_path / "again")
    z = ps.embed(again, cells_of(expected, again.schema))
    np.testing.assert_allclose(z, expected["embedding_weights_simplex"], rtol=0, atol=1e-6)


def test_a_checkpoint_loads_and_its_run_goes_on(expected, tmp_path):
    shutil.copytree(SAVES / "checkpoint", tmp_path / "run")
    saved = ps.load(tmp_path / "run")
    cells = cells_of(expected, saved.schema)
    np.testing.assert_allclose(ps.embed(saved, cells), expected["embedding_default"], rtol=0, atol=1e-6)
    model = ps.SCVI(8, 2, cells.n_covariates, n_hidden=4, n_layers=1)
    guide = ps.guides.DiagonalNormal(model, n_hidden=4, n_layers=1)
    options = {"epochs": 3, "seed": 0, "kl_weight": ps.schedules.WarmUp(2), "progress": False}
    resumed = ps.fit(model, cells, guide, checkpoint=tmp_path / "run", resume=True, **options)
    pd.testing.assert_frame_equal(resumed.history, saved.history)
