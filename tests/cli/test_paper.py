"""The command paper: names, errors in one line, a run that continues, and everything once in a quick run."""

import json
from dataclasses import replace
from functools import partial

import pytest

import pyro_scvi as ps
from pyro_scvi.cli import paper as paper_command
from pyro_scvi.paper import report
from pyro_scvi.paper.budget import QUICK
from pyro_scvi.paper.experiment import Experiment
from pyro_scvi.paper.experiments import EXPERIMENTS
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Step
from pyro_scvi.paper.tables import held_out, table1
from tests.support.cli_runs import Page, one_line, run, succeed

CALLS = []


def square(number):
    CALLS.append(number)
    if number == 13:
        raise KeyboardInterrupt
    return number**2


def experiment(name, *numbers, needs=()):
    steps = [Step(square, {"number": number}, needs) for number in numbers]

    def rows(results, budget):
        return [Row("set", "ours", "square", results.of(step).result) for step in steps]

    return Experiment(name, f"Table of {name}", ("Squares.",), lambda budget: steps, rows)


@pytest.fixture
def known(monkeypatch):
    """Two experiments in place of the paper's."""
    CALLS.clear()

    def put(*experiments):
        monkeypatch.setattr(paper_command, "EXPERIMENTS", {one.name: one for one in experiments})

    put(experiment("first", 2), experiment("second", 3))
    return put


def quick(name, out):
    return run("paper", name, "--quick", "--no-progress", "--out", out)


def test_every_table_and_figure_has_its_name():
    assert list(EXPERIMENTS) == [one.name for one in EXPERIMENTS.values()]
    assert list(EXPERIMENTS) == ["table1", "table2", "table3", "table4", "figure1", "figure2", "timing"]
    for one in EXPERIMENTS.values():
        assert all(json.loads(json.dumps(step.settings)) == step.settings for step in one.steps(QUICK))


def test_a_name_that_is_not_known_lists_those_that_are(known, tmp_path):
    result = quick("third", tmp_path / "out")
    assert result.exit_code == 2
    assert "'third' is not one of first, second, all." in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_all_are_in_one_page_and_the_next_run_computes_nothing(known, tmp_path):
    out = tmp_path / "out"
    said = succeed("paper", "all", "--quick", "--no-progress", "--out", out).output
    assert f"wrote {out / 'index.html'}" in said
    assert sorted(path.name for path in out.iterdir()) == [*sorted([*report.FILES, "steps"])]
    assert [row.value for row in report.read_rows(out / report.CSV)] == [4, 9]
    succeed("paper", "second", "--quick", "--no-progress", "--out", out)
    assert CALLS == [2, 3]
    assert [row.value for row in report.read_rows(out / report.CSV)] == [9]
    assert "Table of first" not in Page.read(out / report.PAGE).text
    assert list(tmp_path.iterdir()) == [out]


def test_an_interrupted_run_continues(known, tmp_path):
    out = tmp_path / "out"
    known(experiment("first", 2, 13))
    assert quick("first", out).exit_code != 0
    assert [path.name for path in out.iterdir()] == ["steps"]
    known(experiment("first", 2, 4))
    assert quick("first", out).exit_code == 0
    assert CALLS == [2, 13, 4]


def test_nothing_of_somebody_else_is_touched(known, tmp_path):
    foreign, file = tmp_path / "foreign", tmp_path / "file"
    foreign.mkdir()
    (foreign / "report.md").write_text("mine")
    file.write_text("mine")
    assert one_line(quick("all", foreign)) == f"{foreign} is not empty and holds no earlier run; pass another --out"
    assert one_line(quick("all", file)) == f"{file} is a file; pass a folder as --out"
    assert [(foreign / "report.md").read_text(), file.read_text()] == ["mine", "mine"]
    assert CALLS == []


def test_a_result_that_was_changed_is_not_replaced(known, tmp_path):
    out = tmp_path / "out"
    assert quick("all", out).exit_code == 0
    (out / report.MARKDOWN).write_text("my remarks")
    changed = out / report.MARKDOWN
    said = one_line(quick("all", out))
    assert said == f"{changed} is not as an earlier run wrote it; move it away or pass another --out"
    assert changed.read_text() == "my remarks"
    changed.rename(out / "remarks.md")
    assert quick("all", out).exit_code == 0
    assert (out / "remarks.md").read_text() == "my remarks"


def test_missing_data_are_one_line(known, tmp_path, monkeypatch):
    monkeypatch.setenv("PYRO_SCVI_DATA", str(tmp_path / "nowhere"))
    known(experiment("first", 2, needs=("brain10k.h5ad",)))
    said = one_line(quick("first", tmp_path / "out"))
    expected = f"brain10k.h5ad is not in {tmp_path / 'nowhere'}; set PYRO_SCVI_DATA to the folder that holds it"
    assert said == expected
    assert CALLS == []


def test_a_failing_step_is_one_line_that_names_it(known, tmp_path):
    known(experiment("first", "two"))
    assert one_line(quick("first", tmp_path / "out")).startswith(
        "tests.cli.test_paper:square {'number': 'two'} failed: TypeError"
    )


def test_everything_once_in_a_quick_run(data_path, tmp_path, monkeypatch):
    """With an evidence of fewer steps yet: in a quick run its numbers mean nothing, either."""
    monkeypatch.setattr(paper_command, "QUICK", replace(QUICK, sizes=(150, 200)))
    for tables in (table1, held_out):
        monkeypatch.setattr(tables, "evidence", partial(ps.evidence, steps=3, rounds=1))
    for name in {file for one in EXPERIMENTS.values() for step in one.steps(QUICK) for file in step.needs}:
        data_path(name)
    out = tmp_path / "out"
    succeed("paper", "all", "--quick", "--no-progress", "--out", out)
    page, rows = Page.read(out / report.PAGE), report.read_rows(out / report.CSV)
    assert all(link.startswith("data:") for link in page.links)
    assert all(one.title in page.text for one in EXPERIMENTS.values())
    assert all(row.note for row in rows if row.value != row.value)
    assert len([row for row in rows if row.value == row.value]) > len(rows) / 2
    kept = {path: path.stat().st_mtime_ns for path in (out / "steps").glob("*.json") if path.name != "written.json"}
    succeed("paper", "all", "--quick", "--no-progress", "--out", out)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
