"""Draw the picture of the README and of the front page: ``python docs/front.py``, from a clone, with the extra demo.

It runs the ten lines of the README as they stand, so the picture shows what they give.
"""

import io
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

import pyro_scvi as ps

HERE = Path(__file__).parent
COLOURS = 255  # of the palette: the file stays below 100 kB


def ten_lines() -> dict[str, Any]:
    """The names that the first block of Python in the README defines."""
    text = (HERE.parent / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if block is None:
        raise ValueError("README.md has no block of Python")
    names: dict[str, Any] = {}
    exec(compile(block.group(1), "README.md", "exec"), names)
    return names


def picture(names: dict[str, Any]) -> Figure:
    """Draw the embedding by cell type, and the genes that differ between two of them."""
    figure = Figure(figsize=(11.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1.55, 1))
    adata = names["adata"]
    ps.plots.embedding(ps.plots.project(adata.obsm["X_pyro_scvi_expression_pca"]), adata.obs["bulk_labels"], ax=left)
    left.set_title("700 blood cells", fontsize=11)
    ps.plots.volcano(names["genes"], ax=right, names=10)
    right.set_title("genes: B cells (a) over dendritic cells (b)", fontsize=11)
    return figure


def main() -> None:
    """Write the picture."""
    drawn = io.BytesIO()
    picture(ten_lines()).savefig(drawn, dpi=110)
    small = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(HERE / "_static" / "front.png", optimize=True)


if __name__ == "__main__":
    main()
