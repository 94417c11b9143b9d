"""The command ``infer``: apply a saved fit to many cells, block by block, in one process or several."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from pyro_scvi.analysis.evidence.evidence import evidence as log_evidence
from pyro_scvi.analysis.integration.embedding import embed
from pyro_scvi.analysis.predictive.imputation import impute, technical_zero_probability
from pyro_scvi.cli.files import QueryOptions, load_fit, read_h5ad
from pyro_scvi.cli.messages import say, told_of
from pyro_scvi.cli.options import AllowNonInteger, Device, Fill, FitFolder, Progress, QueryLayer, Raw, Sampling, Seed
from pyro_scvi.cli.workspace import require_apart
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError
from pyro_scvi.export import blocks
from pyro_scvi.export.block_columns import Verb
from pyro_scvi.inference.samplers import Amortized
from pyro_scvi.training.distributed import joined
from pyro_scvi.training.fitted import Fit


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise typer.BadParameter(f"{text!r} is not I/N with I from 1 to N.")
    return int(number) - 1, int(of)


def infer(
    fit_folder: FitFolder,
    source: Annotated[
        Path, typer.Argument(metavar="COUNTS", help="A store that `store` wrote, or an .h5ad file; only read.")
    ],
    out: Annotated[Path, typer.Option(metavar="OUT", help="What to write: OUT.zarr, or OUT.h5ad by one process.")],
    expression: Annotated[bool, typer.Option("--expression", help="E[w | x] as a layer.")] = False,
    technical_zeros: Annotated[bool, typer.Option("--technical-zeros", help="P(h = 1 | x) as a layer.")] = False,
    evidence: Annotated[bool, typer.Option("--evidence", help="log p(x) with its diagnostics in obs.")] = False,
    shard: Annotated[
        Any, typer.Option(parser=_shard, metavar="I/N", help="Job I of N: every N-th block.", show_default="1/1")
    ] = None,
    block: Annotated[int, typer.Option(min=1, help="Cells at a time.")] = 4096,
    layer: QueryLayer = None,
    raw: Raw = False,
    fill_missing_genes: Fill = False,
    allow_non_integer: AllowNonInteger = False,
    samples: Annotated[int, typer.Option(min=1, help="Draws of the latents of each cell, for layers.")] = 25,
    sampler: Sampling = None,
    seed: Seed = 0,
    device: Device = "auto",
    progress: Progress = True,
) -> None:
    """Write E[z | x] of all cells, and on request more, into an AnnData on disk; counts are not copied.

    Components of expression, for neighbours, are written by ps.shards.write in Python.

    Cells are read block by block, so that memory does not grow with them. Several jobs, or the ranks of torchrun, may
    write into one OUT.zarr. The same command goes on with the blocks that are missing.
    """
    with told_of(out), joined() as ranks:
        require_apart(out, source, fit=fit_folder)
        fit = load_fit(fit_folder, device)
        cells = _opened(fit, source, QueryOptions(layer, raw, fill_missing_genes, allow_non_integer))
        drawing: dict[str, Any] = {"samples": samples, "sampler": (sampler or Amortized)()}
        verbs: dict[str, Verb] = {"X_pyro_scvi": embed}
        verbs |= {"pyro_scvi_expression": partial(impute, **drawing)} if expression else {}
        verbs |= {"pyro_scvi_technical_zero": partial(technical_zero_probability, **drawing)} if technical_zeros else {}
        verbs |= {"pyro_scvi": log_evidence} if evidence else {}
        index, of = shard or (0, 1)
        shares = index * ranks.size + ranks.rank, of * ranks.size
        left = blocks.write(
            fit, cells, out, verbs, shard=shares, block=block, seed=seed, progress=progress and ranks.first
        )
        say(f"wrote {out}" if left == 0 else f"{left:,} blocks of {out} are still missing")


def _opened(fit: Fit, source: Path, reading: QueryOptions) -> Cells:
    """Cells of a store or a file, left on disk."""
    if source.is_dir():
        if reading.layer is not None or reading.raw:
            raise DataError(
                f"the store {source} has the counts of one place, chosen when it was built; leave out --layer and --raw"
            )
        return Cells.from_store(source, schema=fit.schema, fill_missing_genes=reading.fill_missing_genes)
    return reading.cells_of(fit, read_h5ad(source, in_place=True), in_place=True)
