"""Steps: computed once, found again after a break, told apart by all that they depend on, and named where they fail."""

import json
import statistics
import timeit

import pytest

from pyro_scvi.errors import FitError
from pyro_scvi.paper.data import files
from pyro_scvi.paper.steps import Results, Step

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
    files.digest.cache_clear()
    (tmp_path / "a.csv").write_text("1")
    step = Step(double, {"number": 1}, ("a.csv",))
    keys = {step.key, Step(halve, {"number": 1}, ("a.csv",)).key, Step(double, {"number": 2}, ("a.csv",)).key}
    keys.add(Step(double, {"number": 1}).key)
    (tmp_path / "a.csv").write_text("2")
    files.digest.cache_clear()
    keys.add(step.key)
    monkeypatch.setattr("inspect.getsource", lambda function: "changed")
    keys.add(step.key)
    files.digest.cache_clear()
    assert len(keys) == 6


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SCVI_DATA", str(tmp_path))
    files.digest.cache_clear()
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
