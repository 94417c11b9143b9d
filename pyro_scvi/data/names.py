"""Names of rows and columns: what is a name, the rows of a table in the order of its names, and names like a slip."""

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd
import xarray as xr

from pyro_scvi.data.obs_columns import quoted, text_of
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import warn

_NUMBERED_CELL = re.compile(r"(cell_)?\d+")  # as pandas, anndata and from_counts call rows without a name
_OWN = "gene_"
_NUMBERED_GENE = re.compile(rf"(V|X|{_OWN})?(\d+)")  # as pandas, R's tables without header and from_counts call columns
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


def warn_of_numbered_genes(*genes: pd.Index) -> None:
    """Warn where genes of several data sets match because their names were lost, and each data set numbers them.

    Warns
    -----
    UserWarning
        If the genes of one of them are numbered, also as tools do it: V1, X1. Names such as gene_0 are often meant,
        and are told unless all data sets have the same in the same order.
    """
    own = (
        all(str(name).startswith(_OWN) for each in genes for name in each) and len({tuple(each) for each in genes}) < 2
    )
    if not own and (numbered := [each for each in genes if _are_all_numbers(each)]):
        warn(
            f"genes are named by numbers ({quoted(numbered[0], 3)}), as where their names were lost on reading. "
            "They are matched by these numbers, which is right only if all data sets number the genes in the same "
            "way. Set adata.var_names to the names of genes."
        )


def _are_all_numbers(genes: pd.Index) -> bool:
    """Whether genes are numbered 0, 1, 2, ... or 1, 2, 3, ..., in any order, all in one form that tools make of it."""
    parts = [_NUMBERED_GENE.fullmatch(str(name)) for name in genes]
    matches = [part for part in parts if part is not None]
    one_form = len({part[1] for part in matches}) == 1
    return len(matches) == len(parts) and one_form and _count_up([int(part[2]) for part in matches])


def _count_up(numbers: Sequence[int]) -> bool:
    """Whether these are 0, 1, 2, ... or 1, 2, 3, ..., in any order."""
    first = min(numbers, default=0)
    return first in (0, 1) and sorted(numbers) == list(range(first, first + len(numbers)))


def names_in(index: pd.Index | None) -> pd.Index | None:
    """An index as strings; None if there is none, or it only numbers the rows."""
    return None if index is None or is_numbering(index) else texts(index)


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


def in_order_of(names: Any, values: Any, what: str) -> Any:
    """Values in the order of ``names``, one row for each; matched by name where both sides have names.

    Parameters
    ----------
    names
        Index of cells or genes, as of a DataFrame of counts; anything else has none.
    values
        A Series or DataFrame, or a dict by name; anything else is in the right order.
    what
        Name of the values in errors.

    Raises
    ------
    DataError
        As :func:`positions_of`; for a dict also where there are no names, because its order means nothing.
    """
    if isinstance(values, Mapping):
        return _looked_up(names, values, what)
    if not isinstance(names, pd.Index) or not isinstance(values, pd.Series | pd.DataFrame):
        return values
    return values.iloc[positions_of(names, values.index, what)]


def _looked_up(names: Any, values: Mapping[Any, Any], what: str) -> pd.Series:
    """The value of each name in a dict."""
    if not isinstance(names, pd.Index):
        raise DataError(
            f"{what} is a dict by name, and there are no names to match it with. Pass an embedding or counts with "
            "names, as a DataFrame has them, or the values in the order of the rows."
        )
    wanted, found = texts(names), texts(values)
    rows = _only_rows(wanted, found)
    if not wanted.is_unique or rows.min(initial=0) < 0:
        _refuse_rows(wanted, found, what)
    series = pd.Series(list(values.values()), dtype=None if values else object)
    return series.iloc[rows].set_axis(names)


def positions_of(names: pd.Index, index: pd.Index, what: str) -> np.ndarray:
    """Rows of a table, one for each cell or gene, matched by name; by position if one of both sides has no names.

    Parameters
    ----------
    names
        (cells,): names of the cells, or of genes.
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
        If names have no row or several, a table without names has another length, or both sides have numbers instead
        of names, in two orders.
    """
    wanted, found = texts(names), texts(index)
    if wanted.equals(found):
        return np.arange(len(wanted))
    require_one_order(wanted, found, what)
    if wanted.is_unique and (rows := _only_rows(wanted, found)).min(initial=0) >= 0:
        return rows
    if is_numbering(found) or (_are_numbers_in_order(wanted) and not _are_numbers(found)):
        if len(found) != len(wanted):
            raise DataError(f"{what} must have one row for each of the {len(wanted)} cells, got {len(found)}.")
        return np.arange(len(wanted))
    _refuse_rows(wanted, found, what)


def _only_rows(wanted: pd.Index, found: pd.Index) -> np.ndarray:
    """The row of each name, (names,); -1 where there is none or several."""
    single = ~found.duplicated(keep=False)
    rows = np.flatnonzero(single)
    places: np.ndarray = found[single].get_indexer(wanted)
    return np.where(places < 0, -1, rows[places] if len(rows) else -1)


def require_one_order(names: pd.Index, index: pd.Index, what: str) -> None:
    """Refuse numbers 0, 1, 2, ... in two orders: they may be those of cells, or those of rows that were sorted.

    Raises
    ------
    DataError
        If cells and rows have them; ``what`` names the table.
    """
    wanted, found = texts(names), texts(index)
    if not (_are_numbers(wanted) and _are_numbers(found)) or len(wanted) != len(found):
        return
    bare = all(map(str.isdecimal, wanted)) or all(map(str.isdecimal, found))
    numbers, others = (_numbers(each) for each in (wanted, found))
    if bare and numbers != others and _count_up(numbers) and sorted(numbers) == sorted(others):
        raise DataError(
            f"{what} and the cells have numbers instead of names, in two orders: {quoted(found, 3)} and "
            f"{quoted(wanted, 3)}. Each row may be of the cell of its number, or of the cell in its place. If rows are "
            "in the order of the cells, pass them without names, as .to_numpy() gives them. Otherwise give cells and "
            "rows names, as in adata.obs_names = [...]."
        )


def _refuse_rows(wanted: pd.Index, found: pd.Index, what: str) -> NoReturn:
    """Refuse names that are there, but twice on one of both sides, or that are not there."""
    if wanted.isin(found).all():
        side, twice = (what, found) if found[found.isin(wanted)].has_duplicates else ("the list of cells", wanted)
        doubled = quoted(twice[twice.duplicated()].unique(), 3)
        raise DataError(f"{side} names rows more than once, such as {doubled}: cells cannot be matched by name.")
    missing = wanted[~wanted.isin(found)]
    raise DataError(
        f"{what} has no row for {len(missing)} of the {len(wanted)} cells, such as {quoted(missing, 3)}; its rows are "
        f"named {quoted(found, 3)}. Rows are matched by name. If they are already in the order of the cells, pass them "
        "without names: .to_numpy() or .reset_index(drop=True)."
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
    return _are_numbers(names) and bool((np.diff(_numbers(names)) > 0).all())


def _are_numbers(names: pd.Index) -> bool:
    return all(_NUMBERED_CELL.fullmatch(name) for name in names)


def _numbers(names: pd.Index) -> list[int]:
    return [int(name.removeprefix("cell_")) for name in names]


def texts(names: Iterable[Any]) -> pd.Index:
    """Names as text."""
    return pd.Index([text_of(name) for name in names])


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
