"""Sphinx: the site is built from these pages, the notebooks and the docstrings."""

import shutil
from importlib import metadata
from pathlib import Path

from sphinx.application import Sphinx

_HERE = Path(__file__).parent
(_HERE / "notebooks").mkdir(exist_ok=True)
for _notebook in (_HERE.parent / "notebooks").glob("*.ipynb"):  # Sphinx reads pages below its own folder only
    shutil.copy2(_notebook, _HERE / "notebooks")

project = "pyro-scvi"
author = copyright = "The pyro-scvi developers"
release = metadata.version("pyro-scvi")

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
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
autodoc_member_order = "bysource"
autodoc_default_options = {  # scikit-learn puts them into every estimator
    "exclude-members": "set_fit_request, set_transform_request, set_score_request, set_partial_fit_request",
}
autodoc_typehints = "none"  # the signatures have them
napoleon_google_docstring = False

html_theme = "sphinx_book_theme"
html_title = "pyro-scvi"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {"show_toc_level": 2, "home_page_in_toc": True, "navbar_persistent": []}


def _links_from_here(_app: object, page: str, source: list[str]) -> None:
    """Links of the notebooks to these pages, which are a folder nearer on the site than in the repository."""
    if page.startswith("notebooks/"):
        source[0] = source[0].replace("](../docs/", "](../")


def setup(app: Sphinx) -> None:
    """Register what changes the sources."""
    app.connect("source-read", _links_from_here)
