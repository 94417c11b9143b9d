"""The notebooks as the site shows them: without what only their tests need.

Tests run every notebook on less work (``SHORT``), and compare the number that its cell "headline" prints as JSON. A
reader gets the code of the full run, and the number as a sentence.
"""

import ast
import copy
import json
import re
from collections.abc import Iterator
from typing import Any

MODE = "SHORT"
ASIDES = re.compile(r"[;,] the others than [^.]*? where SHORT|\s\(`error`,\s+here and[^)]*\)|, epochs=None")
UNITS = ("nats per cell", "posterior standard deviations")  # the others repeat the quantity
LEFT_OVER = ("json", "os")  # imported for the headline and for SHORT

Edit = tuple[int, int, str]


def for_readers(notebook: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a notebook (nbformat 4, as JSON) without its scaffolding."""
    notebook = copy.deepcopy(notebook)
    for cell in notebook["cells"]:
        if "headline" in cell["metadata"].get("tags", ()):
            cell["outputs"] = [_sentence(cell["outputs"])]
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            text = _edited(text, _scaffolding)
        cell["source"] = ASIDES.sub("", text)
    code = "\n".join(cell["source"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    unused = {name for name in LEFT_OVER if not re.search(rf"\b{name}\.", code)}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["source"] = re.sub(rf"^import ({'|'.join(unused)})\n", "", cell["source"], flags=re.MULTILINE)
            cell["source"] = cell["source"].strip("\n")
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["source"].strip()]
    return notebook


def _sentence(outputs: list[dict[str, Any]]) -> dict[str, Any]:
    found = json.loads("".join("".join(output["text"]) for output in outputs))
    unit = f" {found['unit']}" if found["unit"] in UNITS else ""
    text = f"{found['quantity'][0].upper()}{found['quantity'][1:]}: **{found['value']}**{unit}"
    if found["refit_sd"] is not None:
        text += f". Standard deviation over other seeds: {found['refit_sd']}"
    return {"output_type": "display_data", "metadata": {}, "data": {"text/markdown": f"{text}."}}


def _edited(source: str, edits: Any) -> str:
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line.encode()))
    raw = source.encode()  # the columns of a syntax tree count bytes

    def place(line: int, column: int) -> int:
        return starts[line - 1] + column

    found: list[Edit] = list(edits(ast.parse(source), raw, place))
    for start, end, text in sorted(found, reverse=True):
        raw = raw[:start] + text.encode() + raw[end:]
    return re.sub(r"\n{4,}", "\n\n\n", raw.decode()).strip("\n")


def _scaffolding(node: ast.AST, raw: bytes, place: Any) -> Iterator[Edit]:
    """Edits of the outermost nodes that are scaffolding: they take the full run's side."""
    for child in ast.iter_child_nodes(node):
        if _only_for_tests(child):
            end = raw.find(b"\n", place(child.end_lineno, child.end_col_offset))  # with the comment after it
            yield place(child.lineno, 0), len(raw) if end < 0 else end + 1, ""
        elif isinstance(child, ast.IfExp) and _names(child.test, MODE):
            yield _taken(child, child.orelse, raw, place)
        elif isinstance(child, ast.BoolOp) and any(_names(value, MODE) for value in child.values):
            (kept,) = [value for value in child.values if not _names(value, MODE)]
            yield _taken(child, kept, raw, place)
        else:
            yield from _scaffolding(child, raw, place)


def _taken(whole: ast.expr, part: ast.expr, raw: bytes, place: Any) -> Edit:
    start, end = place(whole.lineno, whole.col_offset), place(whole.end_lineno, whole.end_col_offset)
    text = raw[place(part.lineno, part.col_offset) : place(part.end_lineno, part.end_col_offset)].decode()
    if raw[start - 2 : start] == b" (" and raw[end : end + 1] == b")":  # brackets around it, not those of a call
        start, end = start - 1, end + 1
    return start, end, text


def _only_for_tests(node: ast.AST) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id in (MODE, "headline") for target in node.targets)
    if isinstance(node, ast.If):
        return _names(node.test, MODE) and isinstance(node.test, ast.Name)
    return isinstance(node, ast.Expr) and _names(node, "headline")


def _names(node: ast.AST, name: str) -> bool:
    return any(isinstance(each, ast.Name) and each.id == name for each in ast.walk(node))
