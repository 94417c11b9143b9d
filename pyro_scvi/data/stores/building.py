"""Building a store: files are read once, in blocks; an interrupted build can be continued."""

import json
import logging
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import anndata
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, write_elem
from scipy import sparse

from pyro_scvi.data.count_checks import Check, warn_of_features
from pyro_scvi.data.counts import (
    Matrix,
    block_slices,
    cell_totals,
    cells_by_gene,
    limit_of,
    select_genes,
    smallest_type,
)
from pyro_scvi.data.names import warn_of_numbered_genes
from pyro_scvi.data.places import Place, chosen
from pyro_scvi.data.stores.inputs import (
    Input,
    check_names,
    common_genes,
    joined_obs,
    named_files,
    opened,
)
from pyro_scvi.data.stores.layout import (
    ANNOTATIONS,
    ARRAYS,
    DATA,
    DETECTED,
    FILES,
    FORMAT,
    INDICES,
    INDPTR,
    SCHEMA,
    TOTALS,
    StoreSchema,
    doubled_names_allowed,
    durably,
    fingerprint,
    work_of,
)
from pyro_scvi.data.stores.origins import origin, same_file, same_plan, with_contents
from pyro_scvi.errors import StoreError
from pyro_scvi.utils.checks import switches_checked
from pyro_scvi.utils.disk import hdf5
from pyro_scvi.utils.disk.files import lies_in, sync_folder
from pyro_scvi.utils.disk.locks import only_writer
from pyro_scvi.utils.disk.temporary import remove
from pyro_scvi.utils.disk.unreadable import errors_named
from pyro_scvi.utils.progress_bars import progress_bar

PLAN, COMPLETE = "plan.json", "store"

_log = logging.getLogger(__name__)


@switches_checked
def build(
    files: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    path: str | Path,
    *,
    layer: str | None = None,
    raw: bool = False,
    genes: Sequence[str] | None = None,
    label: str | None = None,
    index_unique: str | None = None,
    allow_non_integer: bool = False,
    progress: bool = True,
) -> Path:
    """Write the counts of one or several files into one store, for ``Cells.from_store``.

    Every file is read once from beginning to end, and its counts are validated as in ``Cells.from_anndata``. Until the
    store is complete, its parts lie beside it in ``PATH.partial`` and need the same space again. After an interruption
    the same call continues with the parts that are complete. If the store exists already, the call does nothing. A file
    whose bytes are others since then, even with the same size and time, is refused.

    Parameters
    ----------
    files
        .h5ad files or zarr folders as anndata writes them, dense or CSR; a dict gives them names.
    path
        The folder to write.
    layer
        Layer with the raw counts; None for ``X``.
    raw
        Read the counts and genes of ``raw``.
    genes
        The genes to keep, which every file must have; None for the genes of all files, in the order of the first.
    label
        New column of ``obs`` with the name of each cell's file, for use as ``batch``.
    index_unique
        Separator with which the name of the file is appended to cell names, as by ``anndata.concat``.
    allow_non_integer
        Accept values that are not integers.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Path
        The store.

    Raises
    ------
    DataError
        If a file cannot be read, is stored by genes (CSC), holds values that are no counts (cell and gene are named),
        has no gene in common with the others, or shares cell names with another; or if ``genes``, ``label`` or
        ``index_unique`` are no names.
    SchemaError
        If a layer, ``raw`` or a gene does not exist.
    StoreError
        If ``path`` is in one of the files, or holds something else or a broken store, parts of another build lie beside
        it, or another process is building it. If a file is written while it is read.

    Warns
    -----
    UserWarning
        For counts that are implausibly large or were rounded by a type of 16 bits, features that are no genes, and
        genes of several files that match by numbers only.

    Examples
    --------
    >>> adata.write_h5ad(folder / "cells.h5ad")
    >>> path = ps.stores.build(folder / "cells.h5ad", folder / "cells.store", progress=False)
    >>> ps.Cells.from_store(path, batch="donor").n_covariates
    2
    """
    target = Path(path).expanduser().absolute()
    named = named_files(files)
    for file in named.values():
        if lies_in(target, file):
            raise StoreError(f"{target} is in {file}, which is only read; choose another path")
    check_names(genes=genes, label=label, index_unique=index_unique)
    place = chosen(layer, raw, Place())
    with ExitStack() as stack:
        inputs = [stack.enter_context(opened(name, file, place)) for name, file in named.items()]
        shared = common_genes(inputs, genes)
        if len(inputs) > 1:
            warn_of_numbered_genes(*(each.genes for each in inputs))
        obs = joined_obs(inputs, label, index_unique)
        plan = {
            "format": FORMAT,
            "files": {each.name: origin(each.path) for each in inputs},
            "layer": layer,
            "genes": shared.tolist(),
            "label": label,
            "index_unique": index_unique,
            "allow_non_integer": allow_non_integer,
        }
        plan |= {"raw": True} if raw else {}  # plans of earlier versions know no other place than X and layers
        if target.exists():
            _require_built_by(plan, target)
        else:
            with _alone(target):
                if target.exists():  # another process has built it just now
                    _require_built_by(plan, target)
                else:
                    _build(inputs, obs, shared, plan, target, progress)
    remove(work_of(target))
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Let no other process write parts of this store, nor delete ours, while the block runs."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(only_writer(target))
        except BlockingIOError as error:
            raise StoreError(f"{target} is being built: {error}") from error
        yield


def _build(
    inputs: Sequence[Input], obs: pd.DataFrame, genes: pd.Index, plan: dict[str, Any], target: Path, progress: bool
) -> None:
    """Write the parts that are missing, and make the store of them."""
    work = work_of(target)
    plan = _begin(work, plan)
    with _removed_if_empty(work):
        _write_annotations(work / ANNOTATIONS, obs, genes, inputs)  # before hours of reading: it may be refused
        parts = _parts(inputs, obs.index, genes, plan["allow_non_integer"], work, progress)
    _require_unchanged(inputs, plan, work)
    _assemble(parts, len(obs), genes, plan, work / COMPLETE)
    (work / COMPLETE).rename(target)
    sync_folder(target.parent)


def _require_unchanged(inputs: Sequence[Input], plan: dict[str, Any], work: Path) -> None:
    for each in inputs:
        if not same_file(plan["files"][each.name], origin(each.path)):
            raise StoreError(
                f"{each.path} was written while it was read: its parts may be of two states; delete {work} to build "
                "from the start"
            )


def _require_built_by(plan: dict[str, Any], target: Path) -> None:
    if not (target / SCHEMA).is_file():
        raise StoreError(f"{target} is there already and is not a store; choose another path")
    schema = StoreSchema.read(target)
    if not same_plan(schema.plan, plan):
        raise StoreError(
            f"{target} is there already and was not built from these files with these options, or the files' "
            "content is another now; choose another path"
        )
    schema.check(target, verify=False)
    _log.info("%s was built already", target)


def _begin(work: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """Make the folder of the parts, or check that those in it are of the same build; the plan as it is noted there."""
    try:
        earlier = json.loads((work / PLAN).read_bytes())
    except FileNotFoundError:
        if work.is_dir() and any(item.name != f"{PLAN}.new" for item in work.iterdir()):
            raise StoreError(f"{work} holds files that are not parts of a store; move it away") from None
        work.mkdir(parents=True, exist_ok=True)
        noted = with_contents(plan)
        durably(work / PLAN, lambda file: file.write(json.dumps(noted).encode()))
        return noted
    except (OSError, ValueError) as error:
        raise StoreError(f"{work / PLAN} cannot be read ({error}); delete {work} to build from the start") from error
    if not same_plan(earlier, plan):
        raise StoreError(
            f"{work} holds parts of a build from other files or with other options; repeat that call, or delete the "
            "folder to build from the start"
        )
    return dict(earlier)


@contextmanager
def _removed_if_empty(work: Path) -> Iterator[None]:
    """Remove the folder of a build that failed before its first part: the next call may have other options."""
    try:
        yield
    except BaseException:
        if not any(work.glob("part-*.npz")):
            remove(work)
        raise


class _Part(NamedTuple):
    """One block of cells on disk, with its sums."""

    path: Path
    lengths: np.ndarray  # (cells,): number of non-zeros of each cell
    totals: np.ndarray  # (cells,)
    detected: np.ndarray  # (genes,)
    dtype: np.dtype


def _parts(
    inputs: Sequence[Input], cells: pd.Index, genes: pd.Index, allow_non_integer: bool, work: Path, progress: bool
) -> list[_Part]:
    """All blocks of all files, in order; blocks of an earlier call are verified, the others are written."""
    parts: list[_Part] = []
    with progress_bar(len(cells), "cell", progress) as bar:
        first = 0
        for each in inputs:
            check = Check(genes, each.counts.name, each.hint, allow_non_integer, limit_of(each.counts.dtype))
            warn_of_features(each.var.loc[genes])
            for rows in block_slices(*each.counts.shape):
                path = work / f"part-{len(parts):06d}.npz"
                block = _reread(path, rows.stop - rows.start, len(genes))
                if block is None:
                    read = select_genes(each.counts[np.arange(rows.start, rows.stop)], each.genes.get_indexer(genes))
                    check(read, cells[first + rows.start : first + rows.stop])
                    block = _written(read, path)
                parts.append(_Part(path, np.diff(block.indptr), cell_totals(block), cells_by_gene(block), block.dtype))
                bar.update(block.shape[0])
            check.warn()
            first += each.counts.shape[0]
    return parts


def _written(block: Matrix, path: Path) -> sparse.csr_array:
    """Write a block of validated counts in the smallest types, without zeros."""
    if isinstance(block, np.ndarray):  # SciPy takes no other byte order, and no float16
        block = block.astype(np.float32 if block.dtype == np.float16 else block.dtype.newbyteorder("="), copy=False)
    rows = sparse.csr_array(block)
    rows.eliminate_zeros()
    rows.sort_indices()
    rows = sparse.csr_array((rows.data.astype(smallest_type(rows)), rows.indices, rows.indptr), shape=rows.shape)
    narrow = rows.indices.astype(_index_type(rows.shape[1]))
    arrays = {"indptr": rows.indptr, "indices": narrow, "data": rows.data}
    durably(path, lambda file: _save_arrays(file, arrays))
    return rows


def _save_arrays(file: BinaryIO, arrays: Mapping[str, np.ndarray]) -> None:
    """Write an .npz file and close it also after an error; ``np.savez`` of NumPy 2.0 leaves that to the destructor."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, values in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, values, allow_pickle=False)


def _reread(path: Path, n_cells: int, n_genes: int) -> sparse.csr_array | None:
    """The block that an earlier call wrote, None if it is missing or damaged; npz files hold checksums."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as part:
            indices = part["indices"].astype(part["indptr"].dtype)
            block = sparse.csr_array((part["data"], indices, part["indptr"]), shape=(n_cells, n_genes))
            block.check_format(full_check=True)
            return block
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        _log.warning("%s is damaged (%s): its cells are read again", path, error)
        return None


def _assemble(parts: Sequence[_Part], n_cells: int, genes: pd.Index, plan: dict[str, Any], folder: Path) -> None:
    """Concatenate the parts into the arrays of a store, and write its schema."""
    remove(folder)
    folder.mkdir()
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]), dtype=np.int64)])
    n_nonzero, dtype = int(indptr[-1]), np.result_type(*(part.dtype for part in parts))
    durably(folder / INDPTR, lambda file: np.save(file, indptr))
    durably(folder / TOTALS, lambda file: np.save(file, np.concatenate([part.totals for part in parts])))
    durably(folder / DETECTED, lambda file: np.save(file, np.sum([part.detected for part in parts], 0, dtype=np.int64)))
    durably(folder / INDICES, lambda file: _stack(file, parts, "indices", n_nonzero, _index_type(len(genes))))
    durably(folder / DATA, lambda file: _stack(file, parts, "data", n_nonzero, dtype))
    os.replace(folder.parent / ANNOTATIONS, folder / ANNOTATIONS)
    files = {name: fingerprint(folder / name) for name in (*ARRAYS, ANNOTATIONS)}
    StoreSchema(FORMAT, n_cells, len(genes), n_nonzero, plan, files).write(folder)
    sync_folder(folder)


def _stack(file: BinaryIO, parts: Sequence[_Part], name: str, n: int, dtype: np.dtype) -> None:
    """Write one array of all parts as a .npy file, with one part in memory at a time."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (n,)}
    np.lib.format.write_array_header_2_0(file, header)
    for part in parts:
        try:
            with np.load(part.path, allow_pickle=False) as arrays:
                values = arrays[name]
        except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise StoreError(f"{part.path} was damaged during the build ({error}); call build again") from error
        file.write(values.astype(dtype, copy=False).data)


def _write_annotations(path: Path, obs: pd.DataFrame, genes: pd.Index, inputs: Sequence[Input]) -> None:
    """Write obs, the names of the genes and which cells are of which file; strings stay strings."""
    names, cells = np.array([each.name for each in inputs], dtype=object), [len(each.obs) for each in inputs]
    files = {FILES: {"names": names, "cells": np.array(cells)}} if len(inputs) > 1 else {}
    with doubled_names_allowed():
        annotations = AnnData(obs=obs, var=pd.DataFrame(index=genes), uns=files)
    with (
        anndata.settings.override(allow_write_nullable_strings=True),
        hdf5.written(path, "w") as group,
        errors_named("obs", "cannot be kept in a store; leave that column out, or make it text or numbers"),
    ):
        write_elem(group, "/", annotations)
        read_elem(group["obs"])  # not all that can be written can be read


def _index_type(n_genes: int) -> np.dtype:
    return np.dtype(np.uint16 if n_genes <= np.iinfo(np.uint16).max + 1 else np.int32)
