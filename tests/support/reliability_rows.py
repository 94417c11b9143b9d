"""The rows of docs/reliability.md: each command, how many tests it should run, and how many it collects."""

import contextlib
import io
import re
import shlex
from typing import NamedTuple

import pytest
from _pytest.mark import KeywordMatcher, MarkMatcher
from _pytest.mark.expression import Expression

from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "reliability.md"


class Row(NamedTuple):
    """A row: its cells, and the files and expressions of its command."""

    cells: list[str]
    files: list[str]
    words: str | None
    marks: str

    def runs(self, item):
        """Whether the command runs a test that was collected."""
        file = item.nodeid.split("::")[0]
        here = any(file == given or file.startswith(f"{given}/") for given in self.files)
        named = self.words is None or Expression.compile(self.words).evaluate(KeywordMatcher.from_item(item))
        return here and named and Expression.compile(self.marks).evaluate(MarkMatcher.from_markers(item.iter_markers()))


def rows():
    """Every row with a command."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        if line.startswith("|") and (command := re.search(r"`pytest ([^`]*)` \|$", line)):
            words = shlex.split(command[1])
            given = {flag: words[words.index(flag) + 1] for flag in ("-k", "-m") if flag in words}
            marks = given.get("-m", "not slow")  # one that is given takes the place of the default
            files = [word for word in words if word.startswith("tests/")]
            found.append(Row([cell.strip() for cell in line.strip("| ").split("|")], files, given.get("-k"), marks))
    return found


def counted(listed):
    """How many tests the command of each row runs, from one collection of all their files."""
    kept = {}

    class Keeping:
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(self, items):
            kept.update({item.nodeid: item for item in items})

    files = sorted({file for row in listed for file in row.files})
    with contextlib.redirect_stdout(io.StringIO()):
        pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[Keeping()])
    return [sum(row.runs(item) for item in kept.values()) for row in listed]
