"""The notebooks run in short mode, are what their scripts say, and print the headlines that are committed.

A headline has two spreads. ``refit_sd`` is the reader's: what fits with other seeds differ by. ``error`` is the test's:
what the same run, with the same seeds, may differ by on another machine; on one machine, and one thread as here, a run
repeats itself to the last digit. It is a literal in each script, about four times the largest difference seen in short
mode between instruction sets (``ATEN_CPU_CAPABILITY=default``, the same with ``MKL_CBWR=COMPATIBILITY``), and no less
than the rounding of the value. What changes the model, its training or the question should move a headline by more.
"""

import ast
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from notebooks import run
from notebooks.for_readers import for_readers

SCRIPTS = run.scripts()
LARGEST = 2_000_000  # bytes of all notebooks together
QUIET = """\
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
"""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:zmq", "ignore::DeprecationWarning:jupyter_client")
of_every = pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)


def committed(script):
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def streams(notebook):
    return [out for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs if "text" in out]


def fresh(script, mode):
    """The notebook executed now, with warnings as errors."""
    notebook = run.read(script)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(QUIET))
    return run.execute(notebook, mode)


def check(script, mode):
    notebook = fresh(script, mode)
    assert [out.text for out in streams(notebook) if out.name == "stderr"] == []
    before, now = run.headline(committed(script)), run.headline(notebook)
    same = ("quantity", "unit", "error")
    assert [before[key] for key in same] == [now[key] for key in same]
    assert abs(before["value"] - now["value"]) <= before["error"], (before, now)


@of_every
def test_runs_in_short_mode_with_the_committed_headline(script):
    check(script, run.SHORT)


@pytest.mark.slow
@of_every
def test_runs_in_full_with_the_committed_headline(script):
    check(script, run.FULL)


@of_every
def test_committed_notebook_is_its_script(script):
    assert [(cell.cell_type, cell.source) for cell in committed(script).cells] == [
        (cell.cell_type, cell.source) for cell in run.read(script).cells
    ]


@of_every
def test_the_site_shows_the_code_of_the_full_run_without_scaffolding(script):
    shown = for_readers(json.loads(script.with_suffix(".ipynb").read_text()))
    text = "\n\n".join(cell["source"] for cell in shown["cells"])
    assert not re.search(r"SHORT|headline|json|`error`", text)
    for cell in shown["cells"]:
        if cell["cell_type"] == "code":
            ast.parse(cell["source"])
    (cell,) = [cell for cell in shown["cells"] if "headline" in cell["metadata"].get("tags", ())]
    assert f"**{run.headline(committed(script))['value']}**" in cell["outputs"][0]["data"]["text/markdown"]


def test_scaffolding_takes_the_side_of_the_full_run():
    source = """\
import json
import os

SHORT = os.environ.get("MODE") == "short"
µ = [draw(seed) for seed in ([] if SHORT else [1, 2])]
few = test.take(range(2 if SHORT else 15))[:: 1 if SHORT else 6]
if SHORT:
    few = few[:1]
if few and not SHORT:
    µ.append(few)
"""
    cells = [
        {"cell_type": "code", "metadata": {}, "source": source.splitlines(keepends=True)},
        {"cell_type": "code", "metadata": {}, "source": "if SHORT:\n    pass"},
    ]
    (cell,) = for_readers({"cells": cells})["cells"]
    assert cell["source"].split("\n") == [
        "µ = [draw(seed) for seed in [1, 2]]",
        "few = test.take(range(15))[:: 6]",
        "if few:",
        "    µ.append(few)",
    ]


@of_every
def test_committed_outputs_are_of_one_full_run(script):
    notebook = committed(script)
    assert notebook.metadata.pyro_scvi.mode == run.FULL
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert [out.text for out in streams(notebook) if out.name == "stderr"] == []
    assert not [out for cell in code for out in cell.outputs if out.output_type == "error"]
    text = json.dumps(notebook)
    assert not [folder for folder in ("/home/", "/tmp/", "/root/", "/work/", "site-packages") if folder in text]
    line = run.headline(notebook)
    assert set(line) == {"quantity", "value", "error", "unit", "refit_sd"}
    assert line["error"] > 0
    assert line["refit_sd"] > 0


def test_notebooks_are_small_and_all_there():
    assert {path.stem for path in run.FOLDER.glob("*.ipynb")} == {script.stem for script in SCRIPTS}
    assert SCRIPTS
    assert sum(path.stat().st_size for path in run.FOLDER.glob("*.ipynb")) < LARGEST


def test_a_script_runs_without_a_notebook(tmp_path):
    environment = {**os.environ, run.MODE: run.SHORT, "MPLBACKEND": "Agg"}
    done = subprocess.run(
        [sys.executable, str(SCRIPTS[0])], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert '"quantity"' in done.stdout
