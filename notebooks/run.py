"""Execute the notebooks: ``python -m notebooks.run`` writes every .ipynb from its .py, with the outputs of a full run.

``python -m notebooks.run 02 05`` does so for those two. The scripts are the source: do not edit an .ipynb.
"""

import argparse
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
MODE = "PYRO_SCVI_NOTEBOOKS"
"""Environment variable: "short" makes a notebook run all of its cells on less work, with the same headline."""

FULL, SHORT = "full", "short"

# Numba needs its own: what scanpy runs with it also sets the threads of torch, to as many as there are cores.
ONE_THREAD = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
NO_BARS = {"TQDM_DISABLE": "1"}  # how far a call has come is no output

_log = logging.getLogger("notebooks")


def scripts() -> list[Path]:
    """The notebooks' percent scripts, in order."""
    return sorted(FOLDER.glob("[0-9][0-9]_*.py"))


def read(script: Path) -> NotebookNode:
    """The notebook of a script, without outputs; the same script gives the same notebook, identifiers included."""
    notebook = jupytext.read(script)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info={"name": "python"})
    return notebook


def execute(notebook: NotebookNode, mode: str = FULL, *, timeout: int = 1200) -> NotebookNode:
    """Run every cell in a new kernel, on one thread and in an empty folder; ``mode`` goes into the metadata.

    Raises
    ------
    CellExecutionError
        Of nbclient, at the first cell that raises.
    """
    environment = {**os.environ, MODE: mode, **ONE_THREAD, **NO_BARS}
    environment.pop("MPLBACKEND", None)  # the kernel's own shows figures in the notebook
    metadata = notebook.metadata
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=timeout,
            startup_timeout=600,  # a busy machine takes longer than the minute that is its default
            record_timing=False,
            resources={"metadata": {"path": folder}},
        )
        client.execute(env=environment)
    notebook.metadata = NotebookNode({**metadata, "language_info": {"name": "python"}, "pyro_scvi": {"mode": mode}})
    return notebook


def headline(notebook: NotebookNode) -> dict[str, Any]:
    """Output of the cell tagged "headline".

    ``quantity``, ``value`` and ``unit``; ``error``, by which the same run may differ on another machine; ``refit_sd``,
    the spread over refits with other seeds, None in short mode.
    """
    (cell,) = [cell for cell in notebook.cells if "headline" in cell.metadata.get("tags", ())]
    return json.loads("".join(output.text for output in cell.outputs))  # the kernel may send a line in parts


def main() -> None:
    """Execute the notebooks named on the command line, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="beginnings of their names, as 02; none: all")
    chosen = tuple(parser.parse_args().names)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for script in scripts():
        if script.name.startswith(chosen or ("",)):
            notebook = execute(read(script))
            nbformat.write(notebook, script.with_suffix(".ipynb"))
            _log.info("%s: %s", script.stem, headline(notebook))


if __name__ == "__main__":
    main()
