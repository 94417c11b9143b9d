"""How the commands read counts: raw, corrected counts, and messages that name options."""

import re

import anndata
import h5py
import numpy as np
import pytest

import pyro_scvi as ps
from pyro_scvi.cli.files import read_h5ad
from pyro_scvi.cli.fit_options import CountOptions
from pyro_scvi.cli.wording import on_the_command_line
from tests.support.cli_runs import make_adata, one_line, run, succeed

QUICK = ("--epochs", 1, "--n-latent", 2, "--no-progress")
COMMANDS = ("fit", "embed", "impute", "de", "infer", "store")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Counts in raw, logarithms in X, corrected counts in a layer; and a fit of raw."""
    folder = tmp_path_factory.mktemp("reading")
    adata = make_adata()
    adata.layers["soupx"] = adata.X * 0.93
    del adata.layers["raw"]
    adata.raw = adata.copy()
    adata.X = np.log1p(adata.X.toarray())
    adata.write_h5ad(folder / "cells.h5ad")
    cells = ps.Cells.from_anndata(adata, raw=True)
    ps.fit(ps.SCVI(20, 2), cells, epochs=1, progress=False).save(folder / "fit")
    return folder


def test_every_command_that_reads_counts_has_the_options():
    for command in COMMANDS:
        text = succeed(command, "--help").output
        for option in ("--layer", "--raw", "--allow-non-integer"):
            assert option in text, (command, option)


def test_help_keeps_what_stands_in_brackets():
    assert "E[w | x]" in succeed("impute", "--help").output
    assert 'obsm["X_pyro_scvi"], or' not in succeed("embed", "--help").output


def test_fit_reads_raw_where_it_is_asked_to(folder, tmp_path):
    refused = one_line(run("fit", folder / "cells.h5ad", "--out", tmp_path / "out", *QUICK))
    assert "There is adata.raw, too: if it holds the raw counts, add --raw." in refused
    assert "To go on with these values, add --allow-non-integer." in refused
    assert not re.search(r"raw=True|to_adata|allow_non_integer|layer=", refused)
    adata = read_h5ad(folder / "cells.h5ad")
    assert CountOptions(None, True, None, (), False).cells_of(adata).schema.raw
    assert CountOptions("soupx", False, "donor", (), True).cells_of(adata).n_batches == 2


def test_queries_of_raw(folder, tmp_path):
    fit, cells = folder / "fit", folder / "cells.h5ad"
    succeed("embed", fit, cells, "--out", tmp_path / "a.h5ad")
    succeed("infer", fit, cells, "--raw", "--out", tmp_path / "b.zarr", "--no-progress")
    succeed("store", cells, "--raw", "--out", tmp_path / "store", "--no-progress")
    succeed("infer", fit, tmp_path / "store", "--out", tmp_path / "c.zarr", "--no-progress")
    expected = anndata.read_h5ad(tmp_path / "a.h5ad").obsm["X_pyro_scvi"]
    for name in ("b", "c"):
        found = anndata.read_zarr(tmp_path / f"{name}.zarr").obsm["X_pyro_scvi"]
        np.testing.assert_allclose(found, expected, atol=1e-5)
    refused = one_line(run("infer", fit, tmp_path / "store", "--raw", "--out", tmp_path / "d.zarr"))
    assert "leave out --layer and --raw" in refused


@pytest.mark.parametrize("command", ["embed", "store"])
def test_corrected_counts_are_accepted_where_they_are_asked_for(folder, tmp_path, command):
    start = (command, *([folder / "fit"] if command == "embed" else []), folder / "cells.h5ad", "--layer", "soupx")
    out = ("--out", tmp_path / "out.h5ad", *(["--no-progress"] if command == "store" else []))
    assert "add --allow-non-integer" in one_line(run(*start, *out))
    succeed(*start, "--allow-non-integer", *out)


def test_mudata_is_named(folder, tmp_path):
    with h5py.File(tmp_path / "cells.h5mu", "w") as file:
        file.create_group("mod/rna")
    for arguments in (("embed", folder / "fit", tmp_path / "cells.h5mu", "--out", tmp_path / "x.h5ad"),
                      ("store", tmp_path / "cells.h5mu", "--out", tmp_path / "store")):  # fmt: skip
        assert "holds MuData (rna)" in one_line(run(*arguments))


def messages():
    """What reading says where an argument of Python has an option, by the option."""
    adata = make_adata()
    adata.obs["depth"] = np.linspace(0.1, 1, 60)
    schema = ps.Cells.from_anndata(adata, batch="donor").schema
    some, log = adata[:, :5].copy(), adata.copy()
    log.X = np.log1p(log.X.toarray())
    return {
        "--layer": lambda: ps.Cells.from_anndata(log),
        "--allow-non-integer": lambda: ps.Cells.from_anndata(log),
        "--fill-missing-genes": lambda: ps.Cells.from_anndata(some, schema=schema),
        "--covariates": lambda: ps.Cells.from_anndata(adata, batch="depth"),
        "--batch": lambda: ps.Cells.from_anndata(adata, covariates=["donor"]),
        "--raw": lambda: ps.Cells.from_anndata(adata, layer="raw", raw=True),
        "store FILE --layer LAYER": lambda: ps.Cells.from_anndata(adata, layer="raw", backed=True),
    }


@pytest.mark.parametrize("option", list(messages()))
def test_messages_name_options(option):
    with pytest.raises(ps.errors.PyroScviError) as caught:
        messages()[option]()
    assert option not in str(caught.value)
    text = on_the_command_line(str(caught.value))
    assert option in text
    assert not re.search(r"\b(layer|raw|batch|covariates|allow_non_integer|fill_missing_genes|backed)=", text)
