"""The report of the paper's tables: layout, footnotes, escaping, and rows that can be read back."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from pyro_scvi.paper import layout, report
from pyro_scvi.paper.budget import FULL, QUICK
from pyro_scvi.paper.experiment import Experiment, Picture
from pyro_scvi.paper.experiments import EXPERIMENTS
from pyro_scvi.paper.rows import Row
from pyro_scvi.paper.steps import Results
from pyro_scvi.paper.summary import Finding, each
from tests.support.cli_runs import Page
from tests.support.paths import ROOT

HOSTILE = "<b>A & B</b> | *x_y* `c` [1] $z$"

ROWS = [
    Row("set one", "ours", "silhouette", 0.28512, 0.0123, "sd over seeds", 5, (0, 1, 2, 3, 4), 12.3, 0.285),
    Row("set one", "ours", "score", -1234.567, 2.34, "se over cells", 80, (0,)),
    Row("set one", HOSTILE, "silhouette", 0.2, 0.03, "se over cells", 80, (0, 2), note="not converged"),
    Row("set one", "theirs", "silhouette", math.nan, seeds=(0,), note="not finished in 1,200 CPU seconds"),
    Row("set one", "theirs", "score", math.nan, note="not finished in 1,200 CPU seconds"),
    Row("set one", "the data", "genes", 263.0),
    Row("set two", "ours", "silhouette", 0.5, paper=0.25),
    Row("set two", "theirs", "silhouette", 0.25, note="NA"),
]


def draw(results, budget, folder):
    figure = Figure(figsize=(1, 1))
    figure.savefig(folder / "a.png", dpi=20)
    return [Picture(folder / "a.png", f"alt {HOSTILE}", f"caption {HOSTILE}")]


TABLE = Experiment("table", f"title {HOSTILE}", (f"text {HOSTILE}",), lambda e: [], lambda r, e: ROWS, draw)


@pytest.fixture
def written(tmp_path):
    report.write([TABLE], Results(None, isolated=False, limit=1), FULL, tmp_path, "versions 1.2")
    return tmp_path


def test_a_matrix_has_systems_by_quantities_and_the_papers_numbers():
    matrix, alone, second = layout.laid_out(ROWS)
    assert matrix.header == [
        "system",
        "silhouette (± sd over seeds, n = 5)",
        "paper",
        "score (± se over cells, n = 80)",
        "CPU s",
        "seeds",
    ]
    assert matrix.rows[0] == ["ours", "0.285 ± 0.012", "0.285", "-1,234.6 ± 2.3", "12", "0–4"]
    assert (alone.heading, alone.rows) == ("", [["the data", "genes", "263"]])
    assert second.heading == "set two"
    assert second.rows == [["ours", "0.5000", "0.25"], ["theirs", "0.2500 [1]", "–"]]


def test_footnotes_say_why_there_is_no_number_and_what_is_unlike_the_column():
    matrix = layout.laid_out(ROWS)[0]
    assert matrix.rows[1] == [HOSTILE, "0.200 ± 0.030 [1] [2]", "–", "–", "–", "0, 2"]
    assert matrix.rows[2] == ["theirs", "NA [3]", "–", "NA [3]", "–", "0"]
    assert matrix.notes == ["not converged", "± se over cells, n = 80", "not finished in 1,200 CPU seconds"]


def test_what_all_columns_share_stands_in_the_heading():
    rows = [Row("set", name, quantity, 1.0, 0.1, "sd over draws", 20) for name in "ab" for quantity in "xy"]
    (found,) = layout.laid_out(rows)
    assert (found.heading, found.header) == ("set (± sd over draws, n = 20)", ["system", "x", "y"])


def test_levels_and_differences_are_tables_of_their_own():
    levels = [Row("set", name, quantity, 1.0) for name in "ab" for quantity in ("level", "bound")]
    leads = [Row("set", f"a minus {name}", quantity, 1.0) for name in "bc" for quantity in ("lead", "median lead")]
    rows = [levels[0], leads[0], *levels[1:], *leads[1:]]
    one, other = layout.laid_out(rows)
    assert (one.heading, one.header) == ("set", ["system", "level", "bound"])
    assert (other.heading, [row[0] for row in other.rows]) == ("", ["a minus b", "a minus c"])
    joined = Row("set", "a", "lead", 1.0)
    assert len(layout.laid_out([*rows, joined])) == 1


def test_long_headers_are_cut_and_stand_in_full_below():
    given = "log p(x given z, l), z refitted to the test cells, nats per cell"
    (found,) = layout.laid_out([Row("set", name, quantity, 1.0) for name in "ab" for quantity in (given, "AUC")])
    assert (found.header, found.columns) == (["system", "log p(x given z, l) (a)", "AUC"], [f"(a) {given}"])


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.28512, 0.0123, "0.285 ± 0.012"),
        (-1234.567, 23.4, "-1,235 ± 23"),
        (1.0, 0.0, "1.000 ± 0"),
        (0.000123456, math.nan, "0.000123"),
        (12345.6, math.nan, "12,346"),
        (3.0, math.nan, "3"),
        (-2e-15, math.nan, "0"),
        (math.inf, math.nan, "inf"),
    ],
)
def test_numbers_have_as_many_digits_as_their_error_allows(value, error, text):
    assert layout.number(value, error) == text


def test_rows_are_read_back_as_they_were(written):
    found = report.read_rows(written / report.CSV)
    assert len(found) == len(ROWS)
    for one, other in zip(found, ROWS, strict=True):
        assert repr(one) == repr(other)  # NaN is NaN


def test_json_holds_every_number_with_its_seeds_and_command(written):
    records = json.loads((written / report.JSON).read_text())
    assert [record["value"] for record in records] == [None if np.isnan(row.value) else row.value for row in ROWS]
    assert records[0]["seeds"] == "0 1 2 3 4"
    assert {record["command"] for record in records} == {"python -m pyro_scvi paper table --out DIR"}


def test_the_page_shows_text_as_text_and_asks_for_nothing(written):
    page = Page.read(written / report.PAGE)
    assert "b" not in page.tags
    assert page.text.count(HOSTILE) == 4  # title, text, system, caption
    assert [link.split(":")[0] for link in page.links] == ["data", "data"]
    assert "python -m pyro_scvi paper table --out DIR" in page.text


def test_markdown_has_no_markup_of_the_data_and_its_pictures_beside_it(written):
    text = (written / report.MARKDOWN).read_text()
    assert r"\<b\>A \& B\</b\> \| \*x\_y\* \`c\` \[1\] \$z\$" in text
    assert "](a.png)" in text
    assert (written / "a.png").is_file()
    header = next(line for line in text.splitlines() if line.startswith("| system"))
    table = [line for line in text.splitlines() if line.startswith("|")][:5]
    assert {len(line.replace(r"\|", "").split("|")) for line in table} == {len(header.split("|"))}


def test_a_quick_run_says_that_its_numbers_mean_nothing(tmp_path):
    report.write([TABLE], Results(None, isolated=False, limit=1), QUICK, tmp_path, "")
    assert "numbers mean nothing" in Path(tmp_path / report.MARKDOWN).read_text()
    assert "are those of a full run" in Path(tmp_path / report.MARKDOWN).read_text()
    assert "--out DIR --quick" in Path(tmp_path / report.PAGE).read_text()


FOUND = Finding("ours has {a}, theirs {b}", each("set two", "silhouette", a="ours", b="theirs"))
MISSING = Finding("not {there}", each("set one", "silhouette", there="theirs"))


def test_a_report_opens_with_claim_findings_and_picture(tmp_path):
    opened = replace(TABLE, claim=f"claim {HOSTILE}", findings=(FOUND, MISSING))
    report.write([TABLE, opened], Results(None, isolated=False, limit=1), FULL, tmp_path, "")
    text = (tmp_path / report.MARKDOWN).read_text()
    opening, details = text.split(f"## {report.HOW_TO_READ}")
    assert f"**{report.CLAIM}** {report.escaped(f'claim {HOSTILE}')}" in opening
    assert f"**{report.FOUND}**\n\n- ours has 0.5000, theirs 0.2500\n\n![" in opening
    assert "not" not in opening.replace("`c`", "").split("- ours")[1].split("![")[0]
    assert details.count("](a.png)") == 1, "of the experiment that is not in the summary"
    page = Page.read(tmp_path / report.PAGE)
    assert f"{report.CLAIM} claim {HOSTILE}" in page.text
    assert "ours has 0.5000, theirs 0.2500" in page.text
    assert page.text.index("ours has") < page.text.index(report.HOW_TO_READ)


def test_a_finding_shows_errors_and_is_left_out_where_a_number_is_missing():
    rows = [Row("d", "s", "q", 1.234, 0.12), Row("d", "t", "q", 2.0, 0.0), Row("d", "u", "q", math.nan)]
    assert Finding("{a} {b}", each("d", "q", a="s", b="t")).sentence(rows) == "1.23 ± 0.12 2"
    assert Finding("{a}", each("d", "q", a="u")).sentence(rows) == ""
    assert Finding("no number").sentence([]) == "no number"


@pytest.mark.parametrize("experiment", EXPERIMENTS.values(), ids=lambda experiment: experiment.name)
def test_the_committed_report_opens_with_what_its_rows_say(experiment):
    folder = ROOT / "docs" / "paper"
    text = (folder / report.MARKDOWN).read_text().split(f"## {report.HOW_TO_READ}")[0]
    rows = report.read_rows(folder / report.CSV)
    sentences = [finding.sentence(rows) for finding in experiment.findings]
    assert all(sentences)
    for sentence in [experiment.claim, *sentences]:
        assert report.escaped(sentence) in text


def test_an_experiment_without_numbers_writes_an_empty_table(tmp_path):
    empty = Experiment("figure", "", (), lambda e: [], lambda r, e: [])
    report.write([empty], Results(None, isolated=False, limit=1), FULL, tmp_path, "")
    assert report.read_rows(tmp_path / report.CSV) == []
