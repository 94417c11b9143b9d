"""Names as long as a file system takes, as outputs of every command: the results, and nothing beside them."""

import os

import anndata as ad
import pytest

import pyro_scvi as ps
from tests.support.cli_runs import make_adata, one_line, run, succeed

pytestmark = pytest.mark.faults

LONGEST = os.pathconf("/", "PC_NAME_MAX") if hasattr(os, "pathconf") else 255


def named(n, ending, letter="n"):
    """A name of so many bytes."""
    n -= len(ending.encode())
    return letter * (n // len(letter.encode())) + "n" * (n % len(letter.encode())) + ending


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    adata = make_adata()
    adata.write_h5ad(folder / "in.h5ad")
    cells = ps.Cells.from_anndata(adata)
    made = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=4), cells, epochs=1, progress=False, device="cpu")
    made.save(folder / "fit")
    return folder


def commands(folder):
    fit, file = folder / "fit", folder / "in.h5ad"
    return {
        "embed": (["embed", fit, file], ".h5ad"),
        "impute": (["impute", fit, file, "--samples", 2], ".h5ad"),
        "infer .h5ad": (["infer", fit, file, "--no-progress"], ".h5ad"),
        "infer .zarr": (["infer", fit, file, "--no-progress"], ".zarr"),
        "store": (["store", file, "--no-progress"], ""),
        "fit": (["fit", file, "--epochs", 1, "--no-progress"], ""),
        "de": (["de", fit, file, "--groupby", "bulk_labels", "--group-a", "CD19+ B", "--group-b", "Dendritic"], ".csv"),
    }


@pytest.mark.parametrize("letter", ["n", "é"])
@pytest.mark.parametrize("length", [240, LONGEST])
@pytest.mark.parametrize("name", ["embed", "impute", "infer .h5ad", "infer .zarr", "store", "fit", "de"])
def test_results_have_long_names(inputs, tmp_path, name, length, letter):
    command, ending = commands(inputs)[name]
    out = tmp_path / named(length, ending, letter)
    succeed(*command, "--out", out)
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize("name", ["embed", "impute", "infer .h5ad", "infer .zarr", "store", "fit", "de"])
def test_longer_ones_are_refused_in_a_line(inputs, tmp_path, name):
    command, ending = commands(inputs)[name]
    said = one_line(run(*command, "--out", tmp_path / named(LONGEST + 1, ending)))
    assert "File name too long" in said
    assert os.listdir(tmp_path) == []


def test_long_names_that_begin_alike_are_told_apart(inputs, tmp_path):
    """Each has a lock and a temporary folder of its own."""
    command, _ = commands(inputs)["embed"]
    for end in ("1.h5ad", "2.h5ad"):
        succeed(*command, "--out", tmp_path / named(240, end))
    assert len(os.listdir(tmp_path)) == 2
    assert ad.read_h5ad(tmp_path / named(240, "2.h5ad")).obsm["X_pyro_scvi"].shape == (60, 2)


def test_saves_and_checkpoints_have_long_names(inputs, tmp_path):
    cells, options = ps.Cells.from_anndata(make_adata()), {"epochs": 1, "progress": False, "device": "cpu"}
    run_folder, saved = tmp_path / named(LONGEST, "run"), tmp_path / named(LONGEST, "fit")
    made = ps.fit(ps.SCVI(cells.n_genes, 2, n_hidden=4), cells, checkpoint=run_folder, **options)
    made.save(saved)
    assert sorted(os.listdir(tmp_path)) == sorted([run_folder.name, saved.name])
    assert len(ps.load(saved).history) == len(ps.load(run_folder).history) == 1
