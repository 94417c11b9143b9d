"""Sphinx: the site is built from these pages, the notebooks and the docstrings."""

import inspect
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.ext import autosummary
from sphinx.util.inspect import stringify_signature

import pyro_scvi as ps
from pyro_scvi.nn.component import Component

# The reference names modules as users do, `ps.libraries`; Sphinx has to be able to import them by these names.
sys.modules.update(
    {f"pyro_scvi.{name}": getattr(ps, name) for name in ps.__all__ if inspect.ismodule(getattr(ps, name))}
)

_HERE = Path(__file__).parent
sys.path.insert(0, str(_HERE.parent))
from notebooks.for_readers import for_readers  # noqa: E402, the folder has to be found first

(_HERE / "notebooks").mkdir(exist_ok=True)
for _notebook in (_HERE.parent / "notebooks").glob("*.ipynb"):  # Sphinx reads pages below its own folder only
    _text = json.dumps(for_readers(json.loads(_notebook.read_text(encoding="utf-8"))))
    _copy = _HERE / "notebooks" / _notebook.name
    if not _copy.exists() or _copy.read_text(encoding="utf-8") != _text:  # or every build would read it anew
        _copy.write_text(_text, encoding="utf-8")

project = "pyro-scvi"
author = copyright = "The pyro-scvi developers"
release = metadata.version("pyro-scvi")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

myst_enable_extensions = ["amsmath", "dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # the notebooks are shipped with the outputs of a full run
suppress_warnings = ["myst.header"]  # the changelog's first heading is its own title

autosummary_generate = True
autosummary.WELL_KNOWN_ABBREVIATIONS += ("Sec.", "Secs.", "Fig.", "Eq.", "Alg.")  # or summaries would end there
autodoc_member_order = "bysource"
autodoc_default_options = {  # scikit-learn puts them into every estimator
    "exclude-members": "set_fit_request, set_transform_request, set_score_request, set_partial_fit_request",
}
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring = False
napoleon_use_param = False  # or what is said of two parameters together would be said of each

html_math_renderer = "mathml"

html_theme = "sphinx_book_theme"
html_title = "pyro-scvi"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}


def _links_from_here(_app: object, page: str, source: list[str]) -> None:
    """Fix links from the notebooks to these pages, which are one folder closer on the site than in the repository."""
    if page.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../")


def _formula(writer: Any, node: nodes.math) -> None:
    """A formula as MathML, which browsers draw themselves, so the site loads no script from another server."""
    writer.body.append(_mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def _displayed_formula(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{_mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def _mathml(formula: str, display: str) -> str:
    """Convert by latex2mathml, which names aligned rows differently and does not treat ~ as a relation."""
    markup = convert(formula.replace("{aligned}", "{align*}"), display=display)
    return markup.replace("<mi>&#x0007E;</mi>", "<mo>&#x0223C;</mo>")


def _signature(_app: object, _what: str, _name: str, thing: Any, *_: object) -> tuple[str, str] | None:
    """Signature of a component's constructor; Sphinx would show that of __new__, which takes any arguments."""
    if inspect.isclass(thing) and issubclass(thing, Component):
        return stringify_signature(inspect.signature(thing), show_annotation=False), ""
    return None


def setup(app: Sphinx) -> None:
    """Register what changes the sources, signatures, and how formulas are written."""
    app.connect("autodoc-process-signature", _signature)
    app.connect("source-read", _links_from_here)
    app.add_html_math_renderer("mathml", (_formula, None), (_displayed_formula, None))
