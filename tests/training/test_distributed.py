"""Training by two ranks under torchrun, on one machine through gloo."""

import json
import os
import re
import shutil
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.training.distributed import ProcessGroup, SingleProcess
from pyro_scvi.utils.random_state import seed_of
from tests.support.paths import ROOT, TESTS
from tests.support.simulate import simulated_counts

pytestmark = pytest.mark.integration

RANKS = TESTS / "support" / "ranks.py"
COMPILER = shutil.which("g++")
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")


def python(*arguments, check=True, **environment):
    """Run a program with this interpreter; its output."""
    known = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    ran = subprocess.run(command, env=os.environ | known | environment, capture_output=True, text=True, timeout=500)
    if check and ran.returncode:
        raise AssertionError(f"{ran.stdout}\n{ran.stderr}")
    return ran


@pytest.fixture(scope="module")
def lost(tmp_path_factory):
    """A folder with the checkpoint of two ranks of which the second was killed, and what torchrun said of it."""
    path = tmp_path_factory.mktemp("lost")
    return path, python(*TORCHRUN, RANKS, path, "checkpointed", check=False, FATAL="1")


@pytest.fixture(scope="module")
def folder(lost, tmp_path_factory):
    """What the tasks of ranks.py wrote, by two ranks and by one process: each start imports torch, so there are two."""
    path = tmp_path_factory.mktemp("ranks")
    (path / "whole").mkdir()
    for name in ("resumed", "resumed-alone"):
        shutil.copytree(lost[0], path / name)
    tasks = ("gradient", "compiled", "trained", "whole", "resumed", "signalled", "late")
    refusals = ("refused", "unlike", "few", "broken")
    python(*TORCHRUN, RANKS, path, *(task for task in tasks if task != "compiled" or COMPILER), *refusals)
    python(RANKS, path, "gradient", "trained", "resumed-alone")
    return path


def test_the_gradient_of_two_ranks_is_that_of_their_cells_together(folder):
    alone = torch.load(folder / "gradient-1-0.pt")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(folder / f"gradient-2-{rank}.pt"), alone, rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not COMPILER, reason="there is no C++ compiler, g++")
def test_a_compiled_gradient_of_two_ranks_is_the_same(folder):
    alone = torch.load(folder / "gradient-1-0.pt")
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(folder / f"compiled-2-{rank}.pt"), alone, rtol=1e-10, atol=1e-10)


def test_ranks_hold_the_same_parameters_statistics_and_history(folder):
    first, second = (torch.load(folder / f"state-2-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    histories = [(folder / f"history-2-{rank}.csv").read_text() for rank in (0, 1)]
    assert histories[0] == histories[1]


def test_two_ranks_reach_what_one_process_reaches(folder):
    """Smoothed over the last ten epochs, on five held-out cells of this toy; real cells are in docs/howto."""
    together, alone = (pd.read_csv(folder / f"history-{size}-0.csv") for size in (2, 1))
    assert len(together) == len(alone) == 25
    np.testing.assert_allclose(together.learning_rate, alone.learning_rate)
    assert together.train_loss.iloc[0] > alone.train_loss.iloc[-1] + 3
    assert abs(together.train_loss.iloc[-10:].mean() - alone.train_loss.iloc[-10:].mean()) < 1


def test_a_signal_to_one_rank_ends_all_after_the_same_step(folder):
    first, second = (json.loads((folder / f"signalled-{rank}.json").read_text()) for rank in (0, 1))
    assert first["epochs"] == second["epochs"] == 3
    assert "SIGTERM after epoch 3" in second["warned"][0]
    assert "another rank" in first["warned"][0]


def both(folder, task):
    return [json.loads((folder / f"{task}-{rank}.json").read_text()) for rank in (0, 1)]


def test_a_signal_after_the_ranks_told_each_other_ends_all_after_the_next_step(folder):
    first, second = both(folder, "late")
    assert first["steps"] == second["steps"] == 13
    assert first["epochs"] == second["epochs"] == 12 // 4
    assert "SIGTERM after epoch" in second["warned"][0]
    assert "another rank" in first["warned"][0]


DIFFERENT = [
    "batch_size is 24 on rank 0 and 12 on rank 1",
    "epochs is 2 on rank 0 and 3 on rank 1",
    "seed is 0 on rank 0 and 1 on rank 1",
    "validation is 0.1 on rank 0 and 7 on rank 1",
    "validation is 0.1 on rank 0 and 20 x 20 with digest",
    "learning_rate is OneCycle",
    "kl_weight is ConstantKL",
    "patience is None on rank 0 and 1 on rank 1",
    "eps is 1e-08 on rank 0 and 0.0001 on rank 1",
    "elbo is NoneType on rank 0 and Trace_ELBO on rank 1",
    "cells is 101 x 20 with digest .* on rank 0 and 90 x 20",
    "cells is 101 x 20 with digest .* on rank 0 and 101 x 20",
    "guide is .*n_layers=1.* on rank 0 and .*n_layers=2.* on rank 1",
    "model is .*n_latent=3.* on rank 0 and .*n_latent=4.* on rank 1",
    "model is .* on rank 0 and .*StudentT.* on rank 1",
]


def test_ranks_with_different_arguments_are_told_which(folder):
    first, second = both(folder, "unlike")
    assert first == second
    assert len(first) == len(DIFFERENT) + 1
    for text, expected in zip(first, DIFFERENT, strict=False):
        assert re.search(rf"same model, cells and options: {expected}", text), text
    assert first[-1] == 2  # with the same arguments they train


def test_fewer_cells_than_ranks_are_said(folder):
    first, second = both(folder, "few")
    assert first == second
    assert len(first) == 2
    assert all("each needs one: got 128 of 1 cells" in text for text in first)


def test_an_error_of_ones_own_is_not_a_lost_rank(folder):
    assert both(folder, "broken") == [["RuntimeError", "my backward pass has a fault"]] * 2


def test_genes_of_an_empty_share_have_no_counts():
    cells = ps.Cells.from_counts(simulated_counts(5))
    empty = Minibatches(cells, torch.device("cpu"), torch.float32, np.arange(0))
    assert empty.gene_totals().tolist() == [0] * cells.n_genes


def test_several_processes_that_nothing_joined_are_warned_of(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    says = "WORLD_SIZE is 2, but .*each process trains alone"
    with pytest.warns(UserWarning, match=says), ps.distributed.joined() as ranks:
        assert type(ranks) is SingleProcess
    monkeypatch.setenv("WORLD_SIZE", "1")
    with ps.distributed.joined() as ranks:
        assert type(ranks) is SingleProcess


def test_errors_of_the_first_rank_are_those_of_all(folder):
    first, second = (json.loads((folder / f"refused-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    few, occupied, elbo, ranks = first
    assert "each needs one: got 1 of 91" in few
    assert occupied.startswith("CheckpointError")
    assert "mine.txt" in occupied
    assert "RenyiELBO has no differentiable_loss" in elbo
    assert "joined() yields, got 2" in ranks


def test_a_lost_rank_is_said(lost):
    path, ran = lost
    assert ran.returncode
    if "exitcode  : -15" not in ran.stderr:  # torchrun, which names the lost rank too, may end the other one first
        assert "FitError: rank 0 of 2 lost contact with the others" in ran.stderr
        assert "start again with resume=True and any number of ranks" in ran.stderr
    assert "Signal 9 (SIGKILL)" in ran.stderr
    assert not (path / "final.pt").exists()


def test_one_process_goes_on_where_two_ranks_were_lost(lost, folder):
    reached = ps.load(lost[0] / "checkpoint").history
    assert len(reached) == 3
    history = pd.read_csv(folder / "resumed-alone" / "history.csv", index_col="epoch")
    assert len(history) == 8
    pd.testing.assert_frame_equal(history[:3], reached, check_dtype=False)


def test_two_ranks_resume_to_what_they_would_have_reached(folder):
    assert torch.equal(torch.load(folder / "whole" / "final.pt"), torch.load(folder / "resumed" / "final.pt"))


def test_fit_from_the_command_line(tmp_path):
    (tmp_path / "umap.py").write_text("raise ImportError")  # its import takes longer than all of the rest
    path = {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    adata = ad.AnnData(simulated_counts(120).astype(np.float32))
    adata.write_h5ad(tmp_path / "in.h5ad")
    options = ["--out", tmp_path / "out", "--epochs", 2, "--no-progress"]
    command = ["-m", "pyro_scvi", "fit", tmp_path / "in.h5ad", *options]
    ran = python(*TORCHRUN, *command, **path)
    assert ran.stdout.count("fitting 108 cells") == ran.stdout.count(f"wrote {tmp_path / 'out'}") == 1
    assert ps.load(tmp_path / "out" / "fit").settings["n_cells"] == 97
    again = python(*TORCHRUN, *command, check=False, **path)
    assert again.returncode
    assert "is not empty" in again.stderr
    assert again.stderr.count("Traceback (most recent") == 1


SHARES = [(101, 24, 2), (101, 24, 3), (5, 2, 2), (7, 3, 3), (64, 128, 4)]


@pytest.mark.parametrize(("n_cells", "batch_size", "size"), SHARES)
def test_steps_share_out_all_cells(n_cells, batch_size, size):
    sizes, held, seen = rank_of(0, size).batch_sizes(n_cells, batch_size), [], []
    for ranks in (rank_of(i, size) for i in range(size)):
        shard = torch.from_numpy(ranks.shard(np.arange(n_cells)))
        parts = torch.arange(len(shard)).tensor_split(len(sizes))
        assert min(map(len, parts)) >= 1
        assert torch.equal(torch.cat([ranks.among_all(part) for part in parts]), shard)
        held.append([len(part) for part in parts])
        seen.extend(shard.tolist())
    assert np.sum(held, 0).tolist() == sizes
    assert sorted(seen) == list(range(n_cells))
    assert max(sizes) < batch_size + size


def rank_of(rank, size):
    """A rank without a process group."""
    ranks = ProcessGroup.__new__(ProcessGroup)
    ranks.rank, ranks.size = rank, size
    return ranks


def test_one_process_is_what_joined_yields_without_torchrun():
    with ps.distributed.joined() as ranks:
        assert type(ranks) is SingleProcess
        assert (ranks.rank, ranks.size, ranks.first) == (0, 1, True)


def test_seeds_of_ranks_and_epochs_differ():
    assert len({seed_of(seed, epoch, rank) for seed in range(5) for epoch in range(5) for rank in range(5)}) == 125


def test_ranks_draw_noise_of_their_own(folder):
    first, second = (set(json.loads((folder / f"seeds-2-{rank}.json").read_text())) for rank in (0, 1))
    second -= {0, 1, 2}  # of looks at the program's sites, which are the same on all ranks
    assert not first & second
    assert len(second) == 2 * 25  # training and a look at held-out cells, by epoch
