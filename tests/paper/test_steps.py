"""Steps: computed once, found again after a break, told apart by all that they depend on, and named where they fail."""

import json
import os
import signal
import statistics
import threading
import time
import timeit

import pytest

import pyro_scvi.paper.steps as steps_module
from pyro_scvi.errors import FitError
from pyro_scvi.paper.data import files
from pyro_scvi.paper.steps import Results, Step
from tests.support.faults import file_size_limit

CALLS = []


def double(number):
    CALLS.append(number)
    if number == 13:
        raise FitError("unlucky")
    return {"doubled": 2 * number}


def halve(number):
    return {"doubled": number / 2}


def needs_a_package():
    raise ImportError("No module named 'absent'")


@pytest.fixture(autouse=True)
def _no_calls():
    CALLS.clear()


def results(folder=None, **options):
    return Results(folder, **({"isolated": False, "limit": 60, "progress": False} | options))


def test_an_interrupted_run_continues(tmp_path):
    steps = [Step(double, {"number": number}) for number in (1, 2, 13, 3)]
    with pytest.raises(FitError):
        results(tmp_path).compute(steps)
    assert CALLS == [1, 2, 13]
    again = results(tmp_path)
    again.compute([*steps[:2], steps[3]])
    assert CALLS == [1, 2, 13, 3]
    assert [again.of(step).result["doubled"] for step in (*steps[:2], steps[3])] == [2, 4, 6]
    assert CALLS == [1, 2, 13, 3]


def test_a_half_written_file_is_not_a_result(tmp_path):
    step = Step(double, {"number": 1})
    (tmp_path / f"{step.key}.123.unfinished").write_text('{"resu')
    results(tmp_path).compute([step])
    assert CALLS == [1]
    kept = json.loads((tmp_path / f"{step.key}.json").read_text())
    assert (kept["step"], kept["settings"], kept["result"]) == (
        "tests.paper.test_steps:double",
        {"number": 1},
        {"doubled": 2},
    )


def test_equal_steps_are_computed_once():
    results().compute([Step(double, {"number": 1}), Step(double, {"number": 1})])
    assert CALLS == [1]


def test_the_key_knows_function_source_settings_and_data(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SCVI_DATA", str(tmp_path))
    (tmp_path / "a.csv").write_text("1")
    step = Step(double, {"number": 1}, ("a.csv",))
    keys = {step.key, Step(halve, {"number": 1}, ("a.csv",)).key, Step(double, {"number": 2}, ("a.csv",)).key}
    keys.add(Step(double, {"number": 1}).key)
    (tmp_path / "a.csv").write_text("2")
    keys.add(step.key)
    monkeypatch.setattr("inspect.getsource", lambda function: "changed")
    keys.add(step.key)
    assert len(keys) == 6


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SCVI_DATA", str(tmp_path))
    with pytest.raises(files.DataError, match="absent.h5ad is not in"):
        results().compute([Step(double, {"number": 1}, ("absent.h5ad",))])
    assert CALLS == []


def test_a_missing_package_is_a_reason_that_is_not_kept(tmp_path, caplog):
    outcome = results(tmp_path).of(Step(needs_a_package))
    assert outcome.result is None
    assert outcome.reason == "not installed: No module named 'absent'"
    assert list(tmp_path.iterdir()) == []
    assert "needs_a_package" in caplog.text


@pytest.mark.parametrize(("number", "said"), [(13, "FitError: unlucky"), (None, "TypeError: unsupported operand")])
def test_a_failing_step_names_itself(number, said):
    with pytest.raises(FitError) as caught:
        results().of(Step(double, {"number": number}))
    assert str(caught.value).startswith(f"tests.paper.test_steps:double {{'number': {number}}} failed: {said}")


def test_steps_in_processes_of_their_own_give_results_times_and_names(tmp_path):
    kept = results(tmp_path, isolated=True)
    outcome = kept.of(Step(statistics.mean, {"data": [1, 2, 6]}))
    assert (outcome.result, outcome.reason) == (3, "")
    assert outcome.peak_mb > 50
    with pytest.raises(FitError, match=r"^statistics:mean \{'data': \[\]\} failed: StatisticsError: .*requires"):
        kept.of(Step(statistics.mean, {"data": []}))


def test_a_step_that_takes_too_long_is_not_available(tmp_path, caplog):
    step = Step(timeit.timeit, {"stmt": "while True: pass"})
    outcome = results(tmp_path, isolated=True, limit=8).of(step)
    assert (outcome.result, outcome.reason) == (None, "not finished in 8 CPU seconds")
    assert results(tmp_path).of(step).reason == outcome.reason  # kept


DAMAGED = {
    "half": '{"step": "x", "resu',
    "empty": "",
    "of another kind": "[1, 2]",
    "a number": "3",
    "without a field": '{"result": 1}',
    "deep": "[" * 100_000,
    "no text": "\udcff",
}


@pytest.mark.faults
@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_computed_again(tmp_path, caplog, text):
    step = Step(double, {"number": 1})
    (tmp_path / f"{step.key}.json").write_text(text, errors="surrogateescape")
    assert results(tmp_path).of(step).result == {"doubled": 2}
    assert "is damaged; the step is computed again" in caplog.text
    assert results(tmp_path).of(step).result == {"doubled": 2}
    assert CALLS == [1]


@pytest.mark.faults
@pytest.mark.parametrize("limit", [0, 10, 60])
def test_a_full_disk_leaves_no_half_file(tmp_path, limit):
    with file_size_limit(limit), pytest.raises(OSError, match="File too large"):
        results(tmp_path).of(Step(double, {"number": 1}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.faults
def test_what_a_killed_run_left_is_deleted(tmp_path):
    (tmp_path / "abc.123.unfinished").write_text('{"resu')
    results(tmp_path).compute([])
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def processes(monkeypatch):
    """The processes that are started."""
    started, original = [], steps_module.subprocess.Popen

    def start(*arguments, **options):
        started.append(original(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(steps_module.subprocess, "Popen", start)
    return started


@pytest.mark.faults
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_processes_of_steps(tmp_path, processes, caplog, number):
    """At once, and those that wait do not begin."""
    kept = results(tmp_path, isolated=True, jobs=2)
    began, before = time.monotonic(), signal.signal(signal.SIGTERM, signal.default_int_handler)

    def interrupt():
        while len(processes) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            kept.compute(Step(timeit.timeit, {"stmt": "while True: pass", "number": n}) for n in range(1, 7))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert time.monotonic() - began < 60
    assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
    assert (caplog.text, list(tmp_path.iterdir())) == ("", [])


@pytest.mark.faults
def test_a_process_whose_parent_is_gone_ends(monkeypatch):
    monkeypatch.setattr(steps_module, "_LOOK_EVERY", 0.01)
    child = os.fork()
    if not child:
        threading.Thread(target=steps_module._end_with, args=(1,), daemon=True).start()
        time.sleep(20)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1
