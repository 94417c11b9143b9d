"""Progress: what a log file gets, and when nothing is shown."""

import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import pyro_scvi as ps
from pyro_scvi.utils import progress_bars
from tests.support.short_evidence import compared


@pytest.fixture
def frequent(monkeypatch):
    """A line of a log file for every look, and bars of questions at once."""
    monkeypatch.setattr(progress_bars, "EVERY", 0.0)
    monkeypatch.setattr(progress_bars, "SHORT", 0.0)


def small_fit(**options):
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3, (60, 8)))
    return ps.fit(ps.SCVI(8, 2, n_hidden=8), cells, epochs=3, device="cpu", **options), cells


def test_a_log_file_gets_lines(frequent, capsys):
    small_fit()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [f"epoch {n} of 3" for n in range(4)]
    assert "\r" not in "".join(lines)
    assert "train" in lines[-1]
    assert "held out" in lines[-1]
    assert lines[-1].endswith("nats per cell")
    assert "gone, " in lines[1]
    assert " left" in lines[1]


def test_without_held_out_cells_nothing_is_said_of_them(frequent, capsys):
    small_fit(validation=0)
    said = capsys.readouterr().err
    assert "train" in said
    assert "held out" not in said
    assert "nan" not in said


def test_lines_come_every_so_often_and_at_the_end(capsys, monkeypatch):
    monkeypatch.setattr(progress_bars, "EVERY", 3600.0)
    assert list(progress_bars.each(list(range(50)), "block", True)) == list(range(50))
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == ["block 0 of 50", "block 50 of 50"]


def test_what_breaks_says_how_far_it_came(capsys):
    steps = progress_bars.each([3, 2, 1, 0], "step", True)
    with pytest.raises(ZeroDivisionError):
        [1 / step for step in steps]
    steps.close()
    assert capsys.readouterr().err.splitlines()[-1].startswith("step 3 of 4")


def test_a_terminal_gets_one_line_that_is_drawn_anew(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    list(progress_bars.each([1, 2], "block", True))
    said = capsys.readouterr().err
    assert said.count("\r") >= 1
    assert said.count("\n") == 1


def questions(fit, cells):
    yield lambda **o: ps.calibrate(fit, 5, sampler=ps.Amortized(), draws=19, thin=1, **o)
    yield lambda **o: ps.evidence(fit, cells, samples=50, steps=5, rounds=1, **o)
    yield lambda **o: ps.sample_posterior(fit, cells, samples=5, **o)
    yield lambda **o: ps.leave_one_out(fit, cells.take(range(4)), samples=30, sampler=ps.Importance(5, 1, 50), **o)
    yield lambda **o: ps.annealed_evidence(fit, cells.take(range(4)), chains=4, temperatures=5, **o)
    yield lambda **o: compared({"one": fit}, cells.take(range(4)), samples=50, **o)


@pytest.mark.filterwarnings("ignore:.*is above:UserWarning")
def test_long_questions_show_how_far_they_are_and_short_ones_nothing(frequent, capsys, monkeypatch):
    fit, cells = small_fit(progress=False)
    assert not capsys.readouterr().err
    for ask in questions(fit, cells):
        ask()
        lines = capsys.readouterr().err.splitlines()
        _, done, _, total = lines[-1].split(",")[0].split()  # cell 4 of 4
        assert done == total
        ask(progress=False)
        assert not capsys.readouterr().err
    monkeypatch.setattr(progress_bars, "SHORT", 60.0)
    for ask in list(questions(fit, cells))[1:]:
        ask()
        assert not capsys.readouterr().err


def test_the_environment_hides_bars():
    program = "from pyro_scvi.utils import progress_bars; list(progress_bars.each([1, 2], 'block', True))"
    environment = os.environ | {"TQDM_DISABLE": "1"}  # which tqdm reads when it is imported
    command = [sys.executable, "-c", program]
    assert not subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


@pytest.mark.parametrize(("value", "hidden"), [("1", True), ("true", True), ("0", False), ("", False)])
def test_the_environment_hides_bars_of_notebooks_too(monkeypatch, value, hidden):
    """tqdm's own there take what they are told, and do not ask the environment."""
    told = []
    monkeypatch.setattr(progress_bars, "Redrawn", lambda **options: told.append(options["disable"]))
    monkeypatch.setattr(progress_bars, "_redraws", lambda stream: True)
    monkeypatch.setenv("TQDM_DISABLE", value)
    progress_bars.progress_bar(5, "cell", True)
    assert told == [hidden]


def ends(child):
    """Whether a process ends by itself within some seconds."""
    end = time.monotonic() + 3
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def forked(act):
    child = os.fork()
    if child:
        return child
    try:
        act()
    finally:
        os._exit(0)


def a_bar():
    with progress_bars.progress_bar(3, "step", False) as bar:
        bar.update()


KINDS = {"lines": progress_bars.Lines, "redrawn": progress_bars.Redrawn}


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_killed_process_that_held_the_lock_stops_no_other(kind, monkeypatch):
    monkeypatch.setattr(progress_bars, "_redraws", lambda _: kind is progress_bars.Redrawn)

    def dies():
        lock.acquire()
        os.kill(os.getpid(), signal.SIGKILL)

    lock = kind.get_lock()
    assert ends(forked(dies))
    assert ends(forked(a_bar))


@pytest.mark.faults
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_lock_that_another_thread_holds_stops_no_forked_process(kind, monkeypatch):
    monkeypatch.setattr(progress_bars, "_redraws", lambda _: kind is progress_bars.Redrawn)
    held, over = threading.Event(), threading.Event()

    def hold():
        with kind.get_lock():
            held.set()
            over.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    try:
        assert ends(forked(a_bar))
    finally:
        over.set()
        thread.join()
