"""Results of many cells, written block by block into one file by one process, several ranks or many jobs."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from anndata import AnnData

from pyro_scvi.analysis.inputs import require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import inferred, object_columns
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.export.block_files import Format, format_of, reached, something_else, temporary_folder
from pyro_scvi.nn.component import lasting_repr
from pyro_scvi.persistence.serialization import states_of
from pyro_scvi.utils.checks import brief, require_at_least, require_seed, switches_checked
from pyro_scvi.utils.disk.publishing import signals_deferred
from pyro_scvi.utils.progress_bars import each

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["write"]


def __dir__() -> list[str]:
    return __all__


Verb = Callable[..., np.ndarray | pd.DataFrame]
"""(fit, cells, seed=) -> a row for each cell, such as ``ps.embed`` or ``functools.partial(ps.impute, samples=10)``."""

DONE, RUN = "pyro_scvi_blocks", "pyro_scvi_run"
_DONE_PLACE = f"uns/{DONE}"

_RESERVED = re.compile(r"\.|__|zarr\.json$")  # zarr keeps its own files under such names, beside the arrays
_SEPARATORS = re.compile(r"[/\\\0]")  # zarr takes a backslash for a slash


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
        Of everything random.
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
        of another fit, other cells or covariates (such as those of ``cells.with_batch``), verbs, seed or blocks.
        Functions are compared by module and name, and by the arguments that ``functools.partial`` binds. If a column of
        ``obs`` holds values of several types.
    ModelError
        If an argument has the wrong type. If a verb does not return one row per cell, or returns different columns for
        different blocks. If names are empty, begin with ``.`` or ``__``, contain ``/`` or a backslash, or occur twice.
    SchemaError
        If the cells' genes or covariates are not those of the fit; raised by the verbs of this package.

    Notes
    -----
    A block counts as done once it has been read back from the file, so a process that is killed, or a disk that is
    full, loses only its current block. An .h5ad file gets the space of all results before the first is computed; its
    structure does not change afterwards. Finished blocks are not checked again: a chunk of a .zarr folder that was
    later deleted or truncated is not noticed.

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
    columns = _columns(fit, cells, verbs, seed)
    run = {"fit": _digest(fit), "n_cells": cells.n_cells, "block": block, "seed": seed, "layout": kind.layout}
    run |= _described(cells, columns) | {f"verb {name!r}": _identity(verb) for name, verb in verbs.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with kind.alone(path):
        if not os.path.lexists(path):
            _create(kind, path, cells, [column for some in columns.values() for column in some], run)
        with _opened(kind, path, run) as results:
            for k in each([k for k in results.missing() if k % of == index], "block", progress):
                rows = slice(k * block, min((k + 1) * block, cells.n_cells))
                part = cells.take(np.arange(rows.start, rows.stop))
                for name, verb in verbs.items():
                    of_part = _split(name, verb(fit, part, seed=seed), part.n_cells, cells.n_genes)
                    _require_alike(name, of_part, columns[name])
                    for column in of_part:
                        results.put(column, rows)
                results.mark(k)
            return len(results.missing())


class _Column(NamedTuple):
    """An array of results: where it belongs in an AnnData, and its values for some cells."""

    place: str
    values: np.ndarray

    @property
    def shape(self) -> list[Any]:
        """What all blocks share: place, type, and the shape without the cells."""
        return [self.place, self.values.dtype.name, *self.values.shape[1:]]


def _split(name: str, result: Any, n_cells: int, n_genes: int) -> list[_Column]:
    if isinstance(result, pd.DataFrame):
        try:
            columns = [_Column(f"obs/{name}_{column}", result[column].to_numpy(float)) for column in result]
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name!r} must give real numbers in every column: {error}") from error
    else:
        values = np.asarray(result)
        own = "layers" if values.shape == (n_cells, n_genes) else "obsm"
        columns = [_Column(f"{'obs' if values.ndim == 1 else own}/{name}", values)]
    for column in columns:
        if column.values.ndim == 0 or len(column.values) != n_cells or column.values.dtype.kind != "f":
            what = f"{column.values.dtype} of shape {column.values.shape}"
            raise ModelError(f"{name!r} must give real numbers, a row for each of {n_cells} cells, got {what}")
    return columns


def _columns(fit: Fit, cells: Cells, verbs: Any, seed: int) -> dict[str, list[_Column]]:
    """The arrays that each verb fills, inferred from its result for the first cell."""
    if not isinstance(verbs, Mapping) or not verbs or not all(callable(verb) for verb in verbs.values()):
        raise ModelError(f"verbs must be functions by name, as in {{'X_pyro_scvi': ps.embed}}, got {brief(verbs)}")
    for name in verbs:
        if not isinstance(name, str) or not name or _RESERVED.match(name):
            raise ModelError(
                f"names of verbs become names of arrays, such as 'X_pyro_scvi', and must not begin with '.' or '__'; "
                f"got {brief(name)}"
            )
    first = cells.take(np.arange(1))
    by_verb = {name: _split(name, verb(fit, first, seed=seed), 1, cells.n_genes) for name, verb in verbs.items()}
    places = [column.place for some in by_verb.values() for column in some]
    names = [place.split("/", 1)[1] for place in places]
    if within := [name for name in names if _SEPARATORS.search(name)]:
        raise ModelError(f"names of verbs and of their columns must be without '/', got {within}")
    if doubled := sorted({place for place in places if places.count(place) > 1}):
        raise ModelError(f"verbs give {doubled} more than once; choose another name")
    held = {*map(str, cells.obs), str(cells.obs.index.name or "_index")}  # an index has an array beside the columns
    if taken := [place for place in places if place.startswith("obs/") and place[4:] in held]:
        raise ModelError(f"the cells have the columns {taken} already; choose another name")
    return by_verb


def _require_alike(name: str, columns: list[_Column], first: list[_Column]) -> None:
    shapes, expected = [column.shape for column in columns], [column.shape for column in first]
    if shapes != expected:
        raise ModelError(f"{name!r} must give the same for every block: of the first cell {expected}, now {shapes}")


def _described(cells: Cells, columns: dict[str, list[_Column]]) -> dict[str, Any]:
    return {
        "cell names": _digest_of_names(cells.cell_names),
        "totals": _digest_of([cells.totals.tobytes()])[:16],
        "covariates": _digest_of(cells.gamma.blocks())[:16],
        "arrays": [column.shape for some in columns.values() for column in some],
    }


def _digest_of_names(names: Iterable[Any]) -> str:
    return _digest_of(["\n".join(map(str, names)).encode()])[:16]


def _digest_of(content: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in content:
        digest.update(part)
    return digest.hexdigest()


def _identity(verb: Verb) -> str:
    """Identity of a verb: the function's module and name, and the arguments that a partial binds."""
    if isinstance(verb, partial):
        named = [f"{name}={lasting_repr(value)}" for name, value in sorted(verb.keywords.items())]
        return f"{_identity(verb.func)}({', '.join([*map(lasting_repr, verb.args), *named])})"
    known = verb if hasattr(verb, "__qualname__") else type(verb)
    return f"{known.__module__}.{known.__qualname__}"


def _digest(fit: Fit) -> str:
    digest = hashlib.sha256()
    for name, tensor in states_of(fit.model, fit.guide).items():
        digest.update(name.encode() + tensor.detach().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked(shard: Any) -> tuple[int, int]:
    numbers = shard if isinstance(shard, tuple) else ()
    if len(numbers) != 2 or not all(isinstance(n, Integral) for n in numbers) or not 0 <= numbers[0] < numbers[1]:
        raise ModelError(f"shard must be (i, n) with 0 <= i < n, got {brief(shard)}")
    return int(numbers[0]), int(numbers[1])


def _create(kind: Format, path: Path, cells: Cells, columns: list[_Column], run: dict[str, Any]) -> None:
    """Make the file with empty arrays under a temporary name; move it into place unless another process was faster."""
    adata = AnnData(obs=_writable(cells.obs), var=pd.DataFrame(index=cells.gene_names), uns={RUN: json.dumps(run)})
    # zarr writes in threads of its own, which would go on after an interrupt, into a folder that is deleted
    with signals_deferred(), temporary_folder(path) as folder:
        new = folder / path.name
        try:
            _fill(kind, new, adata, columns, run["block"])
        except (OSError, RuntimeError, ValueError) as error:  # zarr and HDF5 have no error of their own
            raise DataError(f"{path} cannot be made: {_line(error)}") from error
        try:
            new.rename(path)
        except OSError:  # a folder that is not empty: another process was faster
            if not path.exists():
                raise


def _fill(kind: Format, path: Path, adata: AnnData, columns: list[_Column], block: int) -> None:
    """Write cells and genes, and empty arrays for the results."""
    with kind.opened(path, "w") as group, ad.settings.override(allow_write_nullable_strings=True):
        ad.io.write_elem(group, "/", adata)
        kind.add(group["uns"], DONE, np.dtype(bool), (-(-adata.n_obs // block),), 1)
        for column in columns:
            place, name = column.place.split("/", 1)
            shape = (adata.n_obs, *column.values.shape[1:])
            kind.add(group[place], name, column.values.dtype, shape, min(block, adata.n_obs))
        attributes = group["obs"].attrs
        attributes["column-order"] = [*attributes["column-order"], *_names(columns, "obs")]


def _line(error: Any) -> str:
    """An error as one line of limited length."""
    return " ".join(str(error).split())[:300]


def _writable(obs: pd.DataFrame) -> pd.DataFrame:
    """A copy in which strings with missing values have a type that anndata can write.

    Raises
    ------
    DataError
        If a column holds values of several types.
    """
    obs = obs.copy()
    for name in object_columns(obs):
        if pd.api.types.infer_dtype(obs[name], skipna=True) not in ("string", "boolean", "empty"):
            raise DataError(f"the column {name!r} of obs holds values of several kinds; make them strings, or drop it")
        if obs[name].isna().any():
            obs[name] = inferred(obs[name])
    return obs


def _names(columns: list[_Column], place: str) -> list[str]:
    return [column.place.removeprefix(f"{place}/") for column in columns if column.place.startswith(f"{place}/")]


class _Results:
    """The arrays of an open file, and which blocks of them are done."""

    def __init__(self, kind: Format, path: Path, group: Any, n_blocks: int) -> None:
        self.kind, self.path, self.group, self.n_blocks = kind, path, group, n_blocks

    def missing(self) -> list[int]:
        """Blocks that are not done."""
        done = self.kind.get(self.group, _DONE_PLACE, slice(0, self.n_blocks))
        return [int(k) for k in np.flatnonzero(~done)]

    def put(self, column: _Column, rows: slice) -> None:
        """Write a block of a column, and read it back.

        Raises
        ------
        DataError
            If it is not in the file afterwards.
        """
        try:
            self.kind.put(self.group, column.place, rows, column.values)
            found = self.kind.get(self.group, column.place, rows)
        except (OSError, RuntimeError, ValueError) as error:  # zarr and HDF5 have no error of their own
            raise self._lost(error) from error
        if not np.array_equal(found, column.values, equal_nan=True):
            raise self._lost(f"{column.place} does not read back as it was written")

    def mark(self, k: int) -> None:
        """Mark a block as done, once all of it can be read."""
        self.put(_Column(_DONE_PLACE, np.ones(1, bool)), slice(k, k + 1))

    def _lost(self, reason: Any) -> DataError:
        return DataError(
            f"{self.path}: a block could not be written: {_line(reason)}. The blocks marked as done are "
            "safe; mend that, and the same call continues with the others"
        )


@contextmanager
def _opened(kind: Format, path: Path, run: dict[str, Any]) -> Iterator[_Results]:
    """The file, if it holds results of this run."""
    try:
        with reached(kind, path, "r") as group:
            text = group["uns"][RUN][()]
            recorded = json.loads(text.decode() if isinstance(text, bytes) else str(text))
            differing = [name for name in run if recorded.get(name) != run[name]]
            if not differing:
                _require_as_made(kind, path, group, run)
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(something_else(path, error)) from error
    if differing:
        raise DataError(
            f"{path} holds results of another run: {', '.join(differing)} differ; pass what that run had, or "
            "choose another path"
        )
    _reserve(kind, path)
    with reached(kind, path, "r+") as group:
        yield _Results(kind, path, group, -(-run["n_cells"] // run["block"]))


def _require_as_made(kind: Format, path: Path, group: Any, run: dict[str, Any]) -> None:
    """Refuse a file of this run whose cells or arrays somebody changed: rows would come beside other cells' names."""
    obs, n_cells, block = group["obs"], run["n_cells"], run["block"]
    changed = [] if _digest_of_names(ad.io.read_elem(obs[obs.attrs["_index"]])) == run["cell names"] else ["obs_names"]
    arrays = [(place, (n_cells, *rest), min(block, n_cells)) for place, _, *rest in run["arrays"]]
    for place, shape, rows in [*arrays, (_DONE_PLACE, (-(-n_cells // block),), 1)]:
        if tuple(group[place].shape) != shape or not kind.as_made(group[place], rows):
            changed.append(place)
    if changed:
        raise DataError(
            f"{path} was changed after its run began: {', '.join(changed)} are not as they were, so it cannot be "
            "continued; choose another path"
        )


def _reserve(kind: Format, path: Path) -> None:
    try:
        kind.reserve(path)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(
            f"there is no room for all results in {path}: {_line(error)}. No block was computed. Make room and "
            "repeat the call"
        ) from error
