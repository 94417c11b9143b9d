"""The pages of the site: their code runs as it stands, and the reference lists every public name."""

import ast
import inspect
import operator
import re
import shlex
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest

import pyro_scvi as ps
from pyro_scvi.training import options
from tests.support.paths import ROOT

DOCS = ROOT / "docs"
PAGES = [ROOT / "CONTRIBUTING.md"] + sorted(
    page for page in DOCS.rglob("*.md") if "```python" in page.read_text() and "_build" not in page.parts
)


@pytest.mark.filterwarnings(
    "ignore:.*its guide does not start at the data's means:UserWarning"
)  # all weights are drawn
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch):
    """Every block in its order, in one namespace and a folder of its own, warnings being errors.

    Fits are short where a page does not say how long, and pictures do without the compiler of UMAP: the numbers of the
    page are not looked at here.
    """
    mpl.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "default_epochs", lambda n_cells: 5)
    monkeypatch.setitem(sys.modules, "umap", None)
    namespace = {}
    for block in re.finditer(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        exec(compile(block.group(1), f"{page.name}", "exec"), namespace)


@pytest.mark.parametrize("package", ["tensorboard", "mlflow"])
def test_the_loggers_of_a_page_write_every_epoch(package, tmp_path, monkeypatch):
    pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # needs no database
    page = (DOCS / "howto" / "watch_training.md").read_text()
    blocks = re.findall(r"^```(python|py)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(blocks[0][1], namespace)
    exec(next(code for _, code in blocks if f"import {package}" in code or f".{package} import" in code), namespace)
    assert list(tmp_path.iterdir())


def test_the_ten_lines_of_the_readme_give_what_it_says():
    """Evidence and first genes, within what other processors' rounding moves a fit by."""
    text = (DOCS.parent / "README.md").read_text()
    *body, last = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL).group(1).strip().splitlines()
    namespace = {}
    exec(
        compile(
            "\n".join(body).replace("ps.fit(model, train)", "ps.fit(model, train, progress=False)"), "README", "exec"
        ),
        namespace,
    )
    said = [float(number) for number in re.search(r"The last line gives \((\S+), (\S+)\)", text).groups()]
    assert eval(last, namespace) == pytest.approx(said, abs=1.5)
    rows = re.findall(r"^\| (\w+) \| (\d+\.\d+) \| (\d+\.\d+) \|", text, re.MULTILINE)
    first = namespace["genes"].sort_values("z", ascending=False).head(len(rows))
    assert list(first.index) == [gene for gene, *_ in rows] != []
    assert first[["lfc", "lfc_se"]].to_numpy() == pytest.approx(np.array([row[1:] for row in rows], float), abs=0.05)


def test_what_is_said_to_be_as_in_scvi_tools_or_better_has_its_test():
    said = (DOCS / "from_scvi_tools.md").read_text().partition("## Side by side")[0]
    rows = re.findall(r"^\|.*\|$", said, re.MULTILINE)
    claims = [row for row in rows if re.search(r"\| (same|better)\b", row)]
    assert len(claims) > 20
    for row in claims:
        file, _, name = re.search(r"`(tests/\S+\.py)(?:::(\w+))?` \|$", row).group(0).strip("` |").partition("::")
        assert f"def {name}" in (ROOT / file).read_text(), row
    left = [row for row in rows if row not in claims and "| missing" in row]
    assert all(re.search(r"missing: .{10,}", row) for row in left)
    assert len(claims) + len(left) == len([row for row in rows if not re.match(r"\| scvi-tools|\|---", row)])


def test_the_readme_links_to_what_is_there():
    links = re.findall(r"\]\(([^)#:]+)\)", (DOCS.parent / "README.md").read_text())
    assert len(links) > 20
    assert not [link for link in links if not (DOCS.parent / link).exists()]


def readers_pages():
    """All pages without what is generated."""
    pages = [*ROOT.glob("*.md"), *(page for page in DOCS.rglob("*.md") if "_build" not in page.parts)]
    return [page for page in pages if page.name != "CHANGELOG.md"]


@pytest.mark.parametrize("page", readers_pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_tables_and_boxes_of_a_page_end_where_they_should(page):
    """A bar within a cell cuts the row; a box whose end is not a line of its own holds the rest of the page."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    assert len(re.findall(r"^:::", text, re.MULTILINE)) == text.count(":::")
    assert text.count(":::") % 2 == 0
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        cells = {len(re.findall(r"(?<!\\)\|", row)): row for row in table.splitlines()}
        assert len(cells) == 1, cells


def test_the_reference_lists_every_public_name():
    listed = set(re.findall(r"^   (\w\S*)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    rooms = {name.split(".")[0] for name in listed if "." in name}
    assert set(ps.__all__) - rooms == {name for name in listed if "." not in name}
    assert rooms == {name for name in ps.__all__ if type(getattr(ps, name)).__name__ == "module"}


def test_the_reference_lists_every_name_of_a_room():
    """All of them but a value that is no class or function, which the reference cannot show."""
    listed = set(re.findall(r"^   (\w\S*)$", (DOCS / "api.md").read_text(), re.MULTILINE))
    for room in {name.split(".")[0] for name in listed if "." in name}:
        names = {name.partition(".")[2] or name for name in listed if name.startswith(f"{room}.")}
        assert names <= set(getattr(ps, room).__all__), room
        assert names | set(ps.__all__) | {"AUTHORS_START"} >= set(getattr(ps, room).__all__), room


def test_the_reference_lists_nothing_that_is_not_there():
    for name in re.findall(r"^   (\w\S*)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        value = ps
        for part in name.split("."):
            value = getattr(value, part)
        assert value.__doc__, name


def test_summaries_fit_into_the_tables_of_the_reference():
    for name in re.findall(r"^   (\w\S*)$", (DOCS / "api.md").read_text(), re.MULTILINE):
        first, *rest = inspect.getdoc(operator.attrgetter(name)(ps)).splitlines()
        assert len(first) <= 90, name
        assert not rest or not rest[0], name


def messages():
    """The texts in the package, with … for what is filled in."""
    for path in (ROOT / "pyro_scvi").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_that_are_quoted_are_those_of_the_code():
    quotes = re.findall(r'^\| "(.+?)" \|', (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    texts = list(messages())
    assert len(quotes) > 15
    assert [quote for quote in quotes if not any(quote in text for text in texts)] == []


ROWS = re.findall(r"`pytest (.+)` \|$", (DOCS / "reliability.md").read_text(), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", ROWS)
def test_commands_of_the_page_on_reliability_select_tests(command):
    asked = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *shlex.split(command)]
    found = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-500:]
    assert "::" in found.stdout


def test_the_page_on_reliability_has_commands():
    assert len(ROWS) > 60
