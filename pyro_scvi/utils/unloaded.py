"""What a module holds, read from its source and not imported: torch alone takes seconds to import."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

from pyro_scvi.utils.disk.publishing import signals_deferred


def names_to_check(file: str) -> dict[str, tuple[str, str]]:
    """Module and name of all that a file imports under ``if TYPE_CHECKING``, by the name that it gets there."""
    blocks = (node for node in _tree(file).body if isinstance(node, ast.If) and _is_type_checking(node.test))
    imports = (node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom))
    return {alias.asname or alias.name: (str(node.module), alias.name) for node in imports for alias in node.names}


def imported(module: str, name: str) -> Any:
    """What ``from module import name`` gives."""
    home = import_module(module)
    return vars(home)[name] if name in vars(home) else import_module(f"{module}.{name}")


def docstring(module: str, function: str) -> str:
    """Documentation of a function of a module that stays unloaded."""
    package, _, last = module.rpartition(".")
    file = Path(str(import_module(package).__file__)).parent / f"{last}.py"
    found = [node for node in _tree(str(file)).body if isinstance(node, ast.FunctionDef) and node.name == function]
    return ast.get_docstring(found[0]) or ""


def _tree(file: str) -> ast.Module:
    text = Path(file).read_text(encoding="utf-8")
    with signals_deferred():  # in Python 3.11 Ctrl-C in the midst of this is a SystemError
        return ast.parse(text)


def _is_type_checking(test: ast.expr) -> bool:
    return isinstance(test, ast.Name) and test.id == "TYPE_CHECKING"
