"""Inputs of a store: counts, genes and annotations of one or several files."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import anndata
import h5py
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset

from pyro_scvi.data.lazy_counts import Backed
from pyro_scvi.data.links import check_links, require_regular_file
from pyro_scvi.data.names import other_forms
from pyro_scvi.data.obs_columns import inferred, object_columns, of_one_kind, quoted
from pyro_scvi.data.places import Place, hint_of, require_no_mudata
from pyro_scvi.data.stores.layout import doubled_names_allowed
from pyro_scvi.data.stores.zarr_folders import check_zarr_folder
from pyro_scvi.errors import DataError, ModelError, SchemaError
from pyro_scvi.utils.checks import brief, warn
from pyro_scvi.utils.disk.unreadable import errors_named
from pyro_scvi.utils.disk.zarr_groups import zarr_group

_log = logging.getLogger(__name__)


class Input(NamedTuple):
    """One file: its counts, which stay there, and the names of its genes and cells."""

    name: str
    path: Path
    counts: Backed
    var: pd.DataFrame
    obs: pd.DataFrame
    hint: str  # where raw counts may be instead

    @property
    def genes(self) -> pd.Index:
        """Names of the genes."""
        return self.var.index


def named_files(files: str | Path | Sequence[str | Path] | Mapping[str, str | Path]) -> dict[str, Path]:
    """Absolute paths by name; files without a name are named by their stem.

    Raises
    ------
    ModelError
        If there is no file, or two have the same name.
    """
    if isinstance(files, Mapping) and files:
        return {str(name): Path(file).expanduser().absolute() for name, file in files.items()}
    listed = [Path(file).expanduser().absolute() for file in ([files] if isinstance(files, str | Path) else files)]
    named = {file.stem: file for file in listed}
    if not listed or len(named) < len(listed):
        raise ModelError("pass one file or several of different names, or a dict that names them: {name: file}.")
    return named


def check_names(genes: Any, label: Any, index_unique: Any) -> None:
    """Refuse arguments that cannot name genes, a column or a separator.

    Raises
    ------
    ModelError
        If there is one; names the argument.
    """
    if isinstance(genes, str) or (genes is not None and not isinstance(genes, Iterable)):
        raise ModelError(f"genes must be a list of names, such as [{genes!r}]; got {brief(genes)}.")
    for name, word in {"label": label, "index_unique": index_unique}.items():
        if word is not None and not isinstance(word, str):
            raise ModelError(f"{name} must be a string, got {brief(word)}.")


@contextmanager
def opened(name: str, path: Path, place: Place) -> Iterator[Input]:
    """Open a .h5ad file or a zarr folder as anndata wrote it.

    Raises
    ------
    DataError
        If it cannot be read, its counts are stored by genes or are a broken matrix, or a gene name occurs twice.
    SchemaError
        If the layer or ``raw`` does not exist.
    """
    with _group(path) as group:
        with errors_named(str(path)):
            read = _read(group, name, path, place)
        yield read


def _read(group: Any, name: str, path: Path, place: Place) -> Input:
    _require_anndata(group, path)
    layers = (quoted(list(group["layers"])) if "layers" in group else "") or "none"
    has_raw = "raw" in group and "X" in group["raw"]
    if place.path not in group:
        raise SchemaError(f"{path} has no {place.name}; its layers are: {layers}.")
    counts = _counts(group, place, path)
    var, obs = _table(group, "raw/var" if place.raw else "var", path), _table(group, "obs", path)
    doubled = var.index[var.index.duplicated()].unique()
    if len(doubled):
        raise DataError(f"gene names must be unique; in {path}, {quoted(doubled)} occur more than once.")
    if len(var) != counts.shape[1]:
        raise DataError(f"{path} has counts of {counts.shape[1]} genes and {len(var)} names of genes.")
    return Input(name, path, counts, var, obs, hint_of(layers, has_raw and not place.raw))


def _counts(group: Any, place: Place, path: Path) -> Backed:
    source = f"{place.name} of {path}"
    with errors_named(source):
        matrix = group[place.path]
        matrix = sparse_dataset(matrix) if "encoding-type" in matrix.attrs and hasattr(matrix, "keys") else matrix
        return Backed(matrix, source)


def _table(group: Any, name: str, path: Path) -> pd.DataFrame:
    with errors_named(f"{name} of {path}"):
        table = read_elem(group[name])
        if not isinstance(table, pd.DataFrame):
            raise DataError(f"{name} of {path} is not a table, but {brief(table)}.")
        return table


def _require_anndata(group: Any, path: Path) -> None:
    require_no_mudata(group, path)
    if missing := [name for name in ("obs", "var") if name not in group]:
        raise DataError(f"{path} was not written by anndata: it has no {' and no '.join(missing)}.")


@contextmanager
def _group(path: Path) -> Iterator[Any]:
    if path.is_dir():
        check_zarr_folder(path)
        try:
            group = zarr_group(path, "r")
        except MemoryError:
            raise
        except Exception as error:  # what zarr raises for a folder that it did not write
            raise DataError(f"{path}: cannot read it as zarr: {error}") from error
        yield group
        return
    require_regular_file(path)
    check_links(path)
    try:
        file = h5py.File(path, "r")
    except OSError as error:
        raise DataError(f"{path}: cannot read it as h5ad: {error}") from error
    with file:
        yield file


def common_genes(inputs: Sequence[Input], genes: Sequence[str] | None) -> pd.Index:
    """The given genes, or the genes of all files in the order of the first.

    Raises
    ------
    DataError
        If no gene is common to all files, or a given one is listed twice.
    SchemaError
        If a file lacks a gene that was given.
    """
    if genes is None:
        return _shared_genes(inputs)
    wanted = pd.Index([str(gene) for gene in genes])
    if not len(wanted) or wanted.has_duplicates:
        raise DataError(f"genes must be listed once each; twice: {quoted(wanted[wanted.duplicated()].unique())}.")
    for each in inputs:
        missing = wanted.difference(each.genes, sort=False)
        if len(missing):
            raise SchemaError(f"{each.path} lacks {len(missing)} of the {len(wanted)} genes: {quoted(missing)}.")
    return wanted


def _shared_genes(inputs: Sequence[Input]) -> pd.Index:
    """The genes of all files in the order of the first; warns of names that differ in form only."""
    shared = inputs[0].genes
    for each in inputs[1:]:
        shared = shared[shared.isin(each.genes)]
    for each in inputs[1:]:
        first, other = (of.genes[~of.genes.isin(shared)] for of in (inputs[0], each))
        if forms := other_forms(first, other):
            warn(f"genes of {inputs[0].path} are not in {each.path}, and are left out.{forms}")
    if not len(shared):
        raise DataError(f"no gene is in all of the {len(inputs)} files. Do all files use the same kind of gene names?")
    for each in inputs:
        if len(shared) < len(each.genes):
            _log.info("%d genes of %s are not in all files: left out", len(each.genes) - len(shared), each.path)
    return shared


def joined_obs(inputs: Sequence[Input], label: str | None, index_unique: str | None) -> pd.DataFrame:
    """Annotations of all cells, (cells, columns), with every column of any file.

    Raises
    ------
    DataError
        If a file has a column ``label`` already, or files share names of cells and ``index_unique`` is None.
    """
    for each in inputs:
        if label in each.obs:
            raise DataError(f"obs of {each.path} has a column {label!r} already; choose another label.")
        if len(each.obs) != each.counts.shape[0]:
            raise DataError(f"{each.path} has {each.counts.shape[0]} cells and {len(each.obs)} rows of obs.")
    if len(inputs) == 1 and label is None and index_unique is None:
        return inputs[0].obs
    with doubled_names_allowed(), errors_named("obs of these files", "cannot be joined"):
        annotations = {each.name: AnnData(obs=each.obs) for each in inputs}
        joined = anndata.concat(annotations, label=label, index_unique=index_unique, join="outer").obs
    for name in joined.columns:
        joined[name] = of_one_kind(joined[name])
    for name in object_columns(joined):
        if joined[name].isna().any():  # strings or booleans: as plain objects they cannot be written to a file
            joined[name] = inferred(joined[name])
    doubled = joined.index[joined.index.duplicated()].unique()
    if len(inputs) > 1 and index_unique is None and len(doubled):
        raise DataError(
            f"{len(doubled)} cell names occur more than once in these files: {quoted(doubled)}; pass "
            "index_unique='-' to append the name of the file to them."
        )
    return joined
