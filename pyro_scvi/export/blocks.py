"""Results of many cells, written block by block into one file by one process, several ranks or many jobs."""

from __future__ import annotations

import os
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pyro_scvi.analysis.inputs import require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import Source
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.export.block_columns import Verb, columns_of, require_alike, require_verbs, split
from pyro_scvi.export.block_files import format_of
from pyro_scvi.export.block_identity import identity_of, in_words
from pyro_scvi.export.block_obs import writable
from pyro_scvi.export.block_results import create, opened
from pyro_scvi.persistence.digests import digest_of_counts
from pyro_scvi.utils.checks import brief, require_at_least, require_seed, switches_checked
from pyro_scvi.utils.progress_bars import each

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["write"]


def __dir__() -> list[str]:
    return __all__


@switches_checked
def write(
    fit: Fit,
    cells: Cells,
    path: str | Path,
    verbs: Mapping[str, Verb],
    *,
    shard: tuple[int, int] = (0, 1),
    block: int = 4096,
    seed: int = 0,
    progress: bool = True,
) -> int:
    """Apply functions to cells block by block and write the results into an AnnData on disk.

    The memory needed does not grow with the number of cells.

    A result of shape (cells, genes) becomes a layer under the verb's name. One of shape (cells,) becomes a column of
    ``obs``, any other (cells, ...) an ``obsm`` entry, and a DataFrame the columns ``name_column``. Every block
    has the same seed. The verbs of this package draw for each cell by the seed and its name, so they give what they
    give for all cells at once, up to rounding, whatever the block and the shards. A function of your own that draws
    otherwise would draw the same in every block.

    Parameters
    ----------
    fit, cells
        The fit and any cells with its schema, in memory or on disk.
    path
        A folder that ends in ``.zarr``: several processes on one file system may write into it at the same time, each
        its own shard. Or a file that ends in ``.h5ad``, for one process. ``anndata.read_zarr`` reads the folder at any
        time; missing values are NaN. If ``path`` exists already, only missing blocks are computed.
    verbs
        By name, functions of (fit, cells, seed=), such as ``{"X_pyro_scvi": ps.embed, "evidence": ps.evidence}``.
    shard
        (i, n): write every n-th block, starting at block i, counted from 0; ``(ranks.rank, ranks.size)`` under
        torchrun.
    block
        Cells at a time.
    seed
        Seed of all random numbers.
    progress
        Whether to show a progress bar.

    Returns
    -------
    int
        Number of blocks still missing, over all shards; 0 when complete.

    Raises
    ------
    DataError
        If ``path`` is locked, has no room for the results or may not be written. If it holds something else, or results
        of another fit, other cells, counts, genes, annotations or covariates (such as those of ``cells.with_batch``),
        verbs, seed or blocks, or of another version of this package; says what differs. If somebody changed names or
        annotations in it. Functions are compared by module and name, and by the arguments that
        ``functools.partial`` binds. If a column of ``obs`` holds what an AnnData on disk cannot, such as
        dates, lists or values of several types.
    ModelError
        If an argument has the wrong type, or one that is bound to a verb cannot be compared with a later call. If a
        verb does not return one row per cell, or returns different columns for different blocks. If names are empty,
        begin with ``.`` or ``__``, contain ``/`` or a backslash, or occur twice.
    SchemaError
        If the cells' genes or covariates are not those of the fit; raised by the verbs of this package.

    Notes
    -----
    A block counts as done once it has been read back from the file, so a process that is killed, or a disk that is
    full, loses only its current block. An .h5ad file gets the space of all results before the first is computed; its
    structure does not change afterwards. Finished blocks are not checked again: a chunk of a .zarr folder that was
    later deleted or truncated is not noticed.

    A file knows its run by digests of all counts, the names of cells and genes, the covariates and each column of
    ``obs``, because results stay the same file's when its counts or names are put right. The digests are of the
    content: a run goes on from a file in memory to one left in place or a store of the same cells. Every call reads
    the counts for this before its first block, and those on disk once more after its last, if it computed any. For
    20,000 cells x 2,000 genes with a tenth filled that is 0.1 s, and 0.5 s if they are dense.

    Examples
    --------
    Job 3 of 16 that share the work::

        ps.shards.write(fit, cells, "atlas.zarr", {"X_pyro_scvi": ps.embed}, shard=(3, 16))

    The second half of the blocks, then the rest:

    >>> verbs = {"X_pyro_scvi": ps.embed}
    >>> ps.shards.write(fit, cells, folder / "half.zarr", verbs, shard=(1, 2), block=30, progress=False)
    1
    >>> ps.shards.write(fit, cells, folder / "half.zarr", verbs, block=30, progress=False)
    0
    """
    require_inputs(fit, cells)
    require_at_least(1, block=block)
    require_seed(seed)
    block, seed = int(block), int(seed)  # NumPy's integers are none to JSON
    index, of = _checked(shard)
    kind, path = format_of(path), Path(path)
    if of > 1 and not kind.shared:
        raise ModelError(f"an .h5ad file has one writer; with {of} shards let path end in .zarr, got {path}")
    require_verbs(verbs)
    obs, told = writable(kind, cells.obs), in_words(verbs)
    columns = columns_of(fit, cells, verbs, seed)
    run: dict[str, Any] = {"n_cells": cells.n_cells, "block": block, "seed": seed, "layout": kind.layout}
    run |= identity_of(fit, cells, obs, told, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with kind.alone(path):
        if not os.path.lexists(path):
            create(kind, path, obs, cells.gene_names, [column for some in columns.values() for column in some], run)
        with opened(kind, path, run) as results:
            mine = [k for k in results.missing() if k % of == index]
            for k in each(mine, "block", progress):
                rows = slice(k * block, min((k + 1) * block, cells.n_cells))
                part = cells.take(np.arange(rows.start, rows.stop))
                for name, verb in verbs.items():
                    of_part = split(name, verb(fit, part, seed=seed), part.n_cells, cells.n_genes)
                    require_alike(name, of_part, columns[name])
                    for column in of_part:
                        results.put(column, rows)
                results.mark(k)
            if mine:
                _require_unchanged(cells, run["counts"], path)
            return len(results.missing())


def _require_unchanged(cells: Cells, digest: str, path: Path) -> None:
    """Refuse counts on disk that were written anew meanwhile; what is in memory is the cells' own."""
    if isinstance(cells.counts, Source) and digest_of_counts(cells.counts) != digest:
        raise DataError(
            f"the counts were changed while results were computed, so {path} may hold results of both: delete it, and "
            "call again"
        )


def _checked(shard: Any) -> tuple[int, int]:
    numbers = shard if isinstance(shard, tuple) else ()
    if len(numbers) != 2 or not all(isinstance(n, Integral) for n in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise ModelError(f"shard must be (i, n) with 0 <= i < n, got {brief(shard)}")
    return int(numbers[0]), int(numbers[1])
