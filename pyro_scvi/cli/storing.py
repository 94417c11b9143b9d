"""The command ``store``: build a store of counts that do not fit into memory."""

from pathlib import Path
from typing import Annotated

import typer

from pyro_scvi.cli.messages import reporting, say
from pyro_scvi.cli.options import AllowNonInteger, Layer, Progress, Raw
from pyro_scvi.cli.workspace import require_apart
from pyro_scvi.data import stores
from pyro_scvi.data.stores import CountStore


def store(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help=".h5ad files or zarr folders; only read.")],
    out: Annotated[Path, typer.Option(metavar="STORE", help="The folder to write.")],
    layer: Layer = None,
    raw: Raw = False,
    allow_non_integer: AllowNonInteger = False,
    label: Annotated[str | None, typer.Option(help="Column of obs to hold the name of each cell's file.")] = None,
    index_unique: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Appended to names of cells, with the name of their file.")
    ] = None,
    progress: Progress = True,
) -> None:
    """Write the counts of one file, or of several as one, into a store for `Cells.from_store`.

    Genes are matched by name: those that all files have are kept. After an interruption the same command goes on.
    """
    with reporting(out):
        require_apart(out, *files)
        path = stores.build(
            files,
            out,
            layer=layer,
            raw=raw,
            label=label,
            index_unique=index_unique,
            allow_non_integer=allow_non_integer,
            progress=progress,
        )
        n_cells, n_genes = CountStore(path, verify=False).shape
        say(f"{n_cells:,} cells x {n_genes:,} genes")
