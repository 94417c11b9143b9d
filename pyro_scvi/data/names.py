"""Names of rows and columns: what is a name, the rows of a table in the order of its names, and names like a slip."""

import re
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

_NUMBERED_CELL = re.compile(r"(cell_)?\d+")  # as pandas, anndata and from_counts call rows without a name
_BARCODE = re.compile(r"[ACGTN]{12,}([-_.].*)?")  # of a cell, such as AAACCTGAGAAACCAT-1
_GENE_ID = re.compile(r"(ENS[A-Z]*G\d{11})(\.\d+)?")  # of Ensembl; without its version it is the same gene
_LOOKED_AT = 100


class Labelled(NamedTuple):
    """Values with the index of their rows and columns, names or numbers; None where there are none."""

    values: Any
    rows: pd.Index | None
    columns: pd.Index | None


def is_numbering(names: Sequence[Hashable] | pd.Index) -> bool:
    """Whether these are no names but the numbers 0, 1, 2, ..., which pandas and anndata give where there are none."""
    return all(str(name) == str(i) for i, name in enumerate(names))


def is_shuffled_numbering(names: pd.Index) -> bool:
    """Whether these are the numbers 0, 1, 2, ... in another order, as of a table without names that was sorted."""
    return (
        len(names) > 0 and not is_numbering(names) and {str(name) for name in names} == set(map(str, range(len(names))))
    )


def warn_of_numbered_genes(*genes: pd.Index) -> None:
    """Warn where genes of several data sets match because their names were lost, and each data set numbers them.

    Warns
    -----
    UserWarning
        If the genes of one of them are numbered.
    """
    if any(map(is_numbering, genes)):
        warn(
            "genes are named by numbers (0, 1, 2, ...), which happens where their names were lost on reading. "
            "They are matched by these numbers, which is right only if all data sets number the genes in the "
            "same way. Set adata.var_names to the names of genes."
        )


def names_in(index: pd.Index | None) -> pd.Index | None:
    """An index as strings; None if there is none, or it only numbers the rows."""
    return None if index is None or is_numbering(index) else pd.Index([str(name) for name in index])


def as_series(values: Any) -> Any:
    """A Series of one value per row, of what has names of rows; everything else as it is."""
    if isinstance(values, xr.DataArray) and values.ndim == 1:
        values = values.to_series()
    if isinstance(values, pd.DataFrame) and values.shape[1] == 1:
        values = values.iloc[:, 0]
    return values


def rows_by_name(cells: pd.Index) -> np.ndarray:
    """Rows in the order of the cells' names, (cells,): the same cells in whatever order they came."""
    return np.argsort(cells.to_numpy(dtype=str), kind="stable")


def positions_of(cells: pd.Index, index: pd.Index, what: str) -> np.ndarray:
    """Rows of a table, one for each cell, matched by name; by position if one of both sides has no names.

    Parameters
    ----------
    cells
        (cells,): names of the cells.
    index
        (rows,): names of the rows of the table; there may be further ones.
    what
        Name of the table in errors.

    Returns
    -------
    ndarray
        (cells,): row of each cell.

    Raises
    ------
    DataError
        If cells have no row or several, or a table without names has another length.
    """
    wanted, names = (pd.Index([str(name) for name in each]) for each in (cells, index))
    if wanted.equals(names):
        return np.arange(len(wanted))
    if names.is_unique and (found := names.get_indexer(wanted)).min(initial=0) >= 0:
        return found
    if is_numbering(names) or (_are_numbers_in_order(wanted) and not _are_numbers(names)):
        if len(names) != len(wanted):
            raise DataError(f"{what} must have one row for each of the {len(wanted)} cells, got {len(names)}.")
        return np.arange(len(wanted))
    if not names.is_unique and wanted.isin(names).all():
        doubled = quoted(names[names.duplicated()].unique(), 3)
        raise DataError(f"{what} names rows more than once, such as {doubled}: cells cannot be matched by name.")
    missing = wanted[~wanted.isin(names)]
    raise DataError(
        f"{what} has no row for {len(missing)} of the {len(wanted)} cells, such as {quoted(missing, 3)}; its rows "
        f"are named {quoted(names, 3)}. Rows are matched by name. If they are already in the order of the cells, "
        "pass them without names: .to_numpy() or .reset_index(drop=True)."
    )


def labelled(matrix: Any) -> Labelled:
    """A matrix with the names that it has: a DataFrame, or a DataArray with dimensions cell and gene.

    Raises
    ------
    DataError
        If columns of a DataFrame hold no numbers.
    """
    if isinstance(matrix, xr.DataArray) and matrix.ndim == 2:
        matrix = (matrix.transpose("cell", "gene") if set(matrix.dims) == {"cell", "gene"} else matrix).to_pandas()
    if not isinstance(matrix, pd.DataFrame):
        return Labelled(matrix, None, None)
    words = [(name, kind) for name, kind in matrix.dtypes.items() if not pd.api.types.is_numeric_dtype(kind)]
    if words:
        raise DataError(
            f"counts must hold numbers; {len(words)} columns, such as {str(words[0][0])!r}, hold {words[0][1]}. "
            "Leave out columns that are not genes, and pass annotations as obs=."
        )
    return Labelled(_values(matrix), matrix.index, matrix.columns)


def _values(frame: pd.DataFrame) -> Any:
    if len(frame.columns) and all(isinstance(kind, pd.SparseDtype) for kind in frame.dtypes):
        accessor: Any = frame.sparse
        return accessor.to_coo()
    if any(isinstance(kind, pd.api.extensions.ExtensionDtype) for kind in frame.dtypes):
        return frame.to_numpy(dtype=np.float64, na_value=np.nan)
    return frame.to_numpy()


def _are_numbers_in_order(names: pd.Index) -> bool:
    """Whether rows have no names but are numbered, all or some of them, and were not sorted in another way since."""
    return _are_numbers(names) and bool((np.diff([int(name.removeprefix("cell_")) for name in names]) > 0).all())


def _are_numbers(names: pd.Index) -> bool:
    return all(_NUMBERED_CELL.fullmatch(name) for name in names)


def warn_of_swapped_names(genes: pd.Index, cells: pd.Index) -> None:
    """Warn where columns are named like cells, or rows like genes: most probably they were swapped on reading.

    Warns
    -----
    UserWarning
        If they are; names some.
    """
    for what, other, names, form in (("genes", "cells", genes, _BARCODE), ("cells", "genes", cells, _GENE_ID)):
        few = [str(name) for name in names[:_LOOKED_AT]]
        if few and sum(form.fullmatch(name) is not None for name in few) > len(few) / 2:
            warn(
                f"{what} are named like {other}: {quoted(few, 3)}. Cells are rows and genes are columns. If they "
                "are swapped, pass adata.T, or the transposed matrix."
            )
            return


def other_forms(missing: pd.Index, unmatched: pd.Index) -> str:
    """A sentence on missing genes that are there in another form: case, spaces or a version number; "" if none is."""
    there = {_plain(name): name for name in unmatched}
    pairs = [(name, there[_plain(name)]) for name in missing if _plain(name) in there]
    if not pairs:
        return ""
    wanted, found = pairs[0]
    return (
        f" {len(pairs)} of them are probably there under names that differ only by case, spaces or a version number, "
        f"such as {found!r} for {wanted!r}: give them the same names first, by adata.var_names = [...]."
    )


def _plain(name: str) -> str:
    bare = str(name).strip().upper()
    gene = _GENE_ID.fullmatch(bare)
    return gene[1] if gene else bare
