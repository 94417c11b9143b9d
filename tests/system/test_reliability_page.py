"""The page of reliability says how many tests each of its commands runs, and each runs some."""

import json
import subprocess
import sys

import pytest

from tests.support.paths import ROOT
from tests.support.reliability_rows import rows

COUNT = "import json; from tests.support import reliability_rows as r; print(json.dumps(r.counted(r.rows())))"


@pytest.mark.slow
def test_every_row_says_how_many_tests_its_command_runs():
    ended = subprocess.run([sys.executable, "-c", COUNT], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(ended.stdout.splitlines()[-1])
    listed = rows()
    assert len(found) == len(listed) > 70
    assert {row.cells[0]: int(row.cells[2]) for row in listed} == {
        row.cells[0]: number for row, number in zip(listed, found, strict=True)
    }
    assert min(found) > 0
