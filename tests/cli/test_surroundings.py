"""What surrounds a command: its working directory, the permissions of new files, and names with line ends."""

import os
import stat
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi import cli
from pyro_scvi.cli import messages
from tests.support.cli_runs import make_adata, run, succeed

pytestmark = pytest.mark.faults


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("source")
    adata = make_adata()
    adata.var_names = [f"gene\n{number}" for number in range(adata.n_vars)]
    adata.obs_names = [f"cell\r\n{number}" for number in range(adata.n_obs)]
    adata.obs["kind\nof"] = np.where(np.arange(adata.n_obs) % 2, "first\nline", "second\nline")
    adata.write_h5ad(folder / "in.h5ad")
    cells = ps.Cells.from_anndata(adata, batch="kind\nof")
    ps.fit(ps.SCVI(cells.n_genes, 2, 2, n_hidden=8), cells, epochs=1, progress=False, device="cpu").save(folder / "fit")
    return folder


def test_names_with_line_ends_come_back_as_they_were(source, tmp_path):
    out = tmp_path / "a\nfolder"
    out.mkdir()
    fit, file = source / "fit", source / "in.h5ad"
    succeed("embed", fit, file, "--out", out / "o\n.h5ad")
    made, given = anndata.read_h5ad(out / "o\n.h5ad"), anndata.read_h5ad(file)
    assert list(made.var_names) == list(given.var_names)
    assert list(made.obs_names) == list(given.obs_names)
    assert np.isfinite(made.obsm["X_pyro_scvi"]).all()
    result = succeed("de", fit, file, "--groupby", "kind\nof", "--out", out / "t\n.csv")
    assert set(pd.read_csv(out / "t\n.csv")["gene"]) == set(given.var_names)
    assert "wrote" in result.stdout.splitlines()[-1]  # the name of the file does not break the line
    succeed("store", file, "--out", out / "s\n", "--no-progress")
    stored = ps.Cells.from_store(out / "s\n", batch="kind\nof")
    assert list(stored.cell_names) == list(given.obs_names)
    wrong = run("de", fit, file, "--groupby", "no\ncolumn", "--out", out / "u")
    assert wrong.exit_code == 1
    assert len(wrong.stderr.splitlines()) == 1
    assert sorted(os.listdir(out)) == ["o\n.h5ad", "s\n", "t\n.csv"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_permissions_are_those_that_the_user_asked_for(source, tmp_path, mask):
    """Temporary folders are private; what is moved out of them is not, unless the user wants it."""
    before = os.umask(mask)
    try:
        fit, file = source / "fit", source / "in.h5ad"
        succeed("embed", fit, file, "--out", tmp_path / "o.h5ad")
        succeed("de", fit, file, "--groupby", "donor", "--group-a", "a", "--out", tmp_path / "de")
        succeed("infer", fit, file, "--out", tmp_path / "i.h5ad", "--no-progress")
        succeed("infer", fit, file, "--out", tmp_path / "i.zarr", "--no-progress")
        succeed("store", file, "--out", tmp_path / "s", "--no-progress")
        ps.load(fit).save(tmp_path / "saved")
    finally:
        os.umask(before)
    for path in tmp_path.rglob("*"):
        expected = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_relative_paths_and_another_working_directory(source, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(source)
    succeed("embed", f"{relative}/fit", f"{relative}/in.h5ad", "--out", "o.h5ad")
    succeed("store", f"{relative}/in.h5ad", "--out", "s", "--no-progress")
    cells, fit = ps.Cells.from_store("s", batch="kind\nof"), ps.load(f"{relative}/fit")
    monkeypatch.chdir(tmp_path / "there")
    assert ps.embed(fit, cells).shape == (60, 2)
    assert sorted(os.listdir(tmp_path)) == ["o.h5ad", "s", "there"]


def in_child(act):
    """The exit code of a command in a forked child."""
    child = os.fork()
    if not child:
        code = 70
        try:
            code = int(act() or 0)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 71
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("closed", [(0, 1, 2), (1,), (2,), (0,)])
def test_closed_streams_cost_no_result(tmp_path, closed):
    make_adata().write_h5ad(tmp_path / "in.h5ad")

    def act():
        for number in closed:
            os.close(number)
            setattr(sys, ("stdin", "stdout", "stderr")[number], None)
        cli.app(["store", str(tmp_path / "in.h5ad"), "--out", str(tmp_path / "store"), "--no-progress"])

    assert in_child(act) == 0
    counts, _ = ps.Cells.from_store(tmp_path / "store")[:]
    assert np.array_equal(counts.numpy(), make_adata().X.toarray())


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_a_working_directory_that_is_gone_is_one_line(tmp_path, command):
    (tmp_path / "gone").mkdir()
    with (tmp_path / "said").open("wb") as said:

        def act():
            os.chdir(tmp_path / "gone")
            (tmp_path / "gone").rmdir()
            sys.stderr = open(said.fileno(), "w", closefd=False)  # noqa: SIM115
            cli.app([command, "--help"])

        assert in_child(act) == 1
    assert (tmp_path / "said").read_text() == "error: the working directory is gone; change to one that exists\n"


def test_a_working_directory_that_goes_meanwhile_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(messages.typer.Exit), messages.errors_in_one_line():
        Path("x").absolute()
    assert "the working directory is gone" in capsys.readouterr().err


def test_variables_of_several_processes_without_torchrun_end_as_a_note(source, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = succeed("fit", source / "in.h5ad", "--out", tmp_path / "fit", "--epochs", 1, "--no-progress")
    assert "note: WORLD_SIZE is 2, but neither torchrun" in said.stderr
    assert "UserWarning" not in said.stderr
