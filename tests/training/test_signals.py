"""SIGINT and SIGTERM during training: the step ends, and the fit of the epochs before is kept."""

import os
import signal
import sys
import threading

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import ModelError
from pyro_scvi.training.loop import Trainer
from pyro_scvi.training.signals import noted_interrupts
from tests.support.cli_runs import make_adata, one_line, succeed
from tests.support.cli_runs import run as invoke
from tests.training.test_checkpoint import check_equal, parts, run

pytestmark = pytest.mark.integration

STEPS = 4  # of an epoch: 54 cells in batches of 16


def sent(monkeypatch, *moments):
    """Send signals to this process at steps given by their number: (step, signal), the first step is 1."""
    rows, at, training = Minibatches.rows, dict(moments), [0]

    def counted(self, index):
        if torch.is_grad_enabled():  # not where cells are only looked at
            training[0] += 1
            if training[0] in at:
                os.kill(os.getpid(), at[training[0]])
        return rows(self, index)

    monkeypatch.setattr(Minibatches, "rows", counted)
    return training


@pytest.fixture
def handlers():
    """Handlers of one's own, which must be there afterwards; the one of SIGTERM would not end the tests."""
    seen = []

    def own(number, frame):
        seen.append(number)

    before = {number: signal.signal(number, own) for number in (signal.SIGINT, signal.SIGTERM)}
    yield seen
    for number, handler in before.items():
        assert signal.getsignal(number) is own
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_gives_the_fit_of_the_epochs_before(cells, tmp_path, monkeypatch, handlers, number):
    whole, folder = run(cells), tmp_path / "run"
    with monkeypatch.context() as patch:
        steps = sent(patch, (3 * STEPS + 2, number))
        with pytest.warns(UserWarning, match=f"interrupted by {number.name} after epoch 3 of 6"):
            fit = run(cells, checkpoint=folder, checkpoint_every=ps.schedules.CheckpointInterval(epochs=5))
        assert steps[0] == 3 * STEPS + 2  # no step after the one that ran
    assert handlers == [number]  # a handler of one's own is called, once
    assert fit.settings["interrupted"] == f"{number.name} after epoch 3 of 6"
    assert len(fit.history) == 3
    assert fit.history.drop(columns="seconds").equals(whole.history.drop(columns="seconds").iloc[:3])
    assert np.isfinite(ps.embed(fit, cells)).all()
    check_equal(run(cells, checkpoint=folder, resume=True), whole)
    check_equal(run(cells, fit.model, fit.guide, checkpoint=folder, resume=True), whole)  # also with the models used


def test_a_signal_after_the_last_step_does_not_make_the_run_an_interrupted_one(cells, monkeypatch, handlers):
    evaluate, seen = Trainer.evaluate, []

    def last(self, *args):
        seen.append(args)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return evaluate(self, *args)

    monkeypatch.setattr(Trainer, "evaluate", last)
    fit = run(cells)
    assert len(fit.history) == 6
    assert handlers == [signal.SIGINT]
    assert "interrupted" not in fit.settings


def test_the_fit_of_an_interrupted_run_is_that_of_its_best_epoch(cells, monkeypatch, handlers):
    with monkeypatch.context() as patch:
        sent(patch, (5 * STEPS + 1, signal.SIGINT))
        with pytest.warns(UserWarning, match="after epoch 5 of 30"):
            stopped = run(cells, epochs=30, learning_rate=ps.schedules.Constant(0.05))
    best = int(stopped.history.held_out_loss.idxmin())
    again = run(cells, epochs=best, learning_rate=ps.schedules.Constant(0.05))
    for one, other in ((stopped.model, again.model), (stopped.guide, again.guide)):
        assert all(
            torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True)
        )


def test_before_the_first_epoch_there_is_no_fit(cells, tmp_path, monkeypatch, handlers):
    whole, (model, guide) = run(cells), parts(cells)
    before = [p.clone() for p in guide.parameters()]
    with monkeypatch.context() as patch:
        sent(patch, (2, signal.SIGTERM))
        with pytest.raises(KeyboardInterrupt, match="SIGTERM before the first epoch") as caught:
            run(cells, model, guide, checkpoint=tmp_path / "run")
    assert caught.value.fit is None
    assert all(torch.equal(a, b) for a, b in zip(before, guide.parameters(), strict=True))
    check_equal(run(cells, checkpoint=tmp_path / "run", resume=True), whole)


def test_a_second_signal_stops_at_once(cells, tmp_path, monkeypatch, handlers):
    whole = run(cells)
    with monkeypatch.context() as patch:
        rows, at = Minibatches.rows, [0]

        def twice(self, index):
            at[0] += 1
            if at[0] == 3 * STEPS + 2:  # landmarks are read at the end of each epoch
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                raise AssertionError("the step went on")
            return rows(self, index)

        patch.setattr(Minibatches, "rows", twice)
        with pytest.raises(KeyboardInterrupt, match="SIGINT after SIGINT") as caught:
            run(cells, checkpoint=tmp_path / "run")
    assert len(caught.value.fit.history) == 2
    check_equal(run(cells, checkpoint=tmp_path / "run", resume=True), whole)


def test_handlers_are_put_back_whatever_happens(cells, handlers):
    own = signal.getsignal(signal.SIGINT)

    def fail():
        with noted_interrupts():
            assert signal.getsignal(signal.SIGINT) is not own
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert signal.getsignal(signal.SIGINT) is own
    model, guide = parts(cells)
    model.stray = torch.nn.Parameter(torch.zeros(1))
    with pytest.raises(ModelError):
        run(cells, model, guide)
    assert signal.getsignal(signal.SIGINT) is own


def test_ignored_signals_stay_ignored(cells, monkeypatch):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as nohup and shells in the background have it
    try:
        sent(monkeypatch, (5, signal.SIGINT))
        assert "interrupted" not in run(cells).settings
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_other_threads_leave_handlers_alone(cells):
    before, fits = signal.getsignal(signal.SIGINT), []
    thread = threading.Thread(target=lambda: fits.append(run(cells)))
    thread.start()
    thread.join()
    check_equal(fits[0], run(cells))
    assert signal.getsignal(signal.SIGINT) is before


def test_the_command_line_goes_on_where_it_was_stopped(tmp_path, monkeypatch, handlers):
    monkeypatch.setitem(sys.modules, "umap", None)
    make_adata().write_h5ad(tmp_path / "data.h5ad")
    options = ["--epochs", 3, "--no-progress", "--device", "cpu"]
    whole, other, folder = tmp_path / "whole", tmp_path / "other", tmp_path / "run"
    succeed("fit", tmp_path / "data.h5ad", "--out", whole, *options)
    with monkeypatch.context() as patch:
        sent(patch, (2, signal.SIGTERM))  # of one step an epoch
        result = invoke("fit", tmp_path / "data.h5ad", "--out", other, "--checkpoint", folder, *options)
    assert "interrupted by SIGTERM after epoch 1 of 3" in one_line(result)
    assert "--resume" in one_line(result)
    assert not other.exists()
    succeed("fit", tmp_path / "data.h5ad", "--out", other, "--checkpoint", folder, "--resume", *options)
    check_equal(ps.load(whole / "fit"), ps.load(other / "fit"))
    assert "--checkpoint" in invoke("fit", tmp_path / "data.h5ad", "--out", tmp_path / "no", "--resume").output
