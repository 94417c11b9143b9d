"""Checkpoints with right checksums whose progress is not that of their history are refused by name."""

import json

import pytest

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError
from pyro_scvi.persistence import archive
from pyro_scvi.persistence.archive import Content
from pyro_scvi.training.checkpoint import CHECKPOINT_FACTS
from tests.training.test_checkpoint import run, stopped

pytestmark = [pytest.mark.integration, pytest.mark.faults]

EPOCHS = 3


@pytest.fixture
def folder(cells, tmp_path, monkeypatch):
    stopped(cells, tmp_path / "run", monkeypatch, EPOCHS)
    return tmp_path / "run"


def rewritten(folder, change):
    """The checkpoint with other facts and tensors, and right checksums."""
    content = archive.read(folder, {"checkpoint": CHECKPOINT_FACTS})
    change(content.facts, content.tensors)
    archive.write(folder, Content("checkpoint", content.facts, content.tensors))


def put(**values):
    return lambda facts, tensors: facts["progress"].update(values)


def scheduled(step):
    return lambda facts, tensors: facts["progress"]["schedule"].update(last_epoch=step)


def stepped(step, *, with_schedule):
    def change(facts, tensors):
        for name, tensor in tensors.items():
            if name.endswith(".step"):
                tensor.fill_(step)
        if with_schedule:
            facts["progress"]["schedule"].update(last_epoch=step)

    return change


def cut(n):
    """Leave so many epochs in the history."""
    return lambda facts, tensors: facts["history"].update({k: v[:n] for k, v in facts["history"].items()})


def longer(n):
    def change(facts, tensors):
        history = facts["history"]
        history.update({k: (v * n)[:n] for k, v in history.items()} | {"epoch": list(range(1, n + 1))})

    return change


def numbered(*epochs):
    return lambda facts, tensors: facts["history"].update(epoch=list(epochs))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (scheduled(0), "schedule is after step 0, and 3 epochs have 12 steps"),
        (scheduled(13), "schedule is after step 13"),
        (scheduled(10**9), "schedule is after step 1000000000"),
        (scheduled(-1), "schedule is after step -1"),
        (stepped(0, with_schedule=True), "optimiser is after step 0"),
        (stepped(10**6, with_schedule=True), "optimiser is after step 1000000"),
        (stepped(11, with_schedule=False), "schedule is after step 12"),
        (put(waited=40), "has waited 40 epochs, and by its history"),
        (put(waited=-1), "has waited -1 epochs"),
        (put(waited=0.5), "has waited 0.5 epochs"),
        (put(best_loss=-1e9), "best_loss is -1e.09, and the best of its history is"),
        (put(best_loss=1e9), "best_loss is 1e.09"),
        (put(best_loss=None), "best_loss is inf"),
        (put(halvings=-1), "halved -1 times"),
        (put(halvings=2.5), "halved 2.5 times"),
        (put(rate_scale=1e6), "multiplied by 1000000.0"),
        (put(rate_scale=0.25), "halved 0 times, and multiplied by 0.25"),
        (cut(0), "inconsistent"),
        (cut(1), "is after step 12, and 1 epochs have 4 steps"),
        (longer(6), "is after step 12, and 6 epochs have 24 steps"),
        (longer(7), "history has 7 epochs of 6"),
        (numbered(1, 2, 4), "history has the epochs"),
        (numbered(2, 3, 4), "history has the epochs"),
        (numbered(1, 1, 1), "history has the epochs"),
    ],
)
def test_progress_beside_the_history_is_refused(cells, folder, change, named):
    rewritten(folder, change)
    with pytest.raises(CheckpointError, match=named):
        run(cells, checkpoint=folder, resume=True)


def test_a_best_epoch_that_is_not_the_best_is_refused(cells, folder):
    is_now = json.loads((folder / "config.json").read_text())["progress"]["best_is_now"]
    rewritten(folder, put(best_is_now=not is_now))
    with pytest.raises(CheckpointError, match=f"best_is_now is {not is_now}"):
        run(cells, checkpoint=folder, resume=True)


def test_what_was_rewritten_without_a_change_goes_on(cells, folder):
    rewritten(folder, lambda facts, tensors: None)
    assert len(run(cells, checkpoint=folder, resume=True).history) == 6


@pytest.mark.parametrize(
    "kl_weight", [ps.schedules.ConstantKL(0.5), ps.schedules.ConstantKL(0.0), ps.schedules.WarmUp(4)]
)
def test_epochs_are_compared_under_the_last_weight(cells, tmp_path, monkeypatch, kl_weight):
    stopped(cells, tmp_path / "run", monkeypatch, 5, kl_weight=kl_weight)
    assert len(run(cells, checkpoint=tmp_path / "run", resume=True, kl_weight=kl_weight).history) == 6
