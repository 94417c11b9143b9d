"""Indexing of cells: the rows that an index selects, and the number of cells to hold out."""

from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch

from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import brief, require_seed

CellIndex = int | slice | Sequence[int] | np.ndarray | torch.Tensor


def positions(index: CellIndex, n_cells: int) -> np.ndarray:
    """Turn an index into integer positions; indexing by these copies, so a minibatch never aliases the counts.

    Raises
    ------
    DataError
        If the index is neither integers nor a slice nor a mask over all cells.
    IndexError
        If a position is out of range.
    """
    if isinstance(index, slice):
        return np.arange(*_bounds(index, n_cells))
    try:
        rows = np.atleast_1d(index.cpu().numpy() if isinstance(index, torch.Tensor) else np.asarray(index))
    except (TypeError, ValueError) as error:
        raise DataError(f"index cells by integers or by a mask; got {brief(index)}.") from error
    if rows.dtype == bool and rows.shape == (n_cells,):
        return np.flatnonzero(rows)
    if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
        raise DataError(
            f"index cells by integers, (cells,), or by a mask, ({n_cells},); got {rows.dtype} of shape {rows.shape}."
        )
    within(rows, n_cells)
    return rows.astype(np.int64, copy=False)


def _bounds(index: slice, n_cells: int) -> tuple[int, int, int]:
    try:
        return index.indices(n_cells)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"a slice of cells takes integers, as in cells.take(slice(0, 10)); got {index}. For names, pass "
            "cells.cell_names.get_indexer(names)."
        ) from error


def split_at_random(n_cells: int, held_out: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of two parts of the cells, in the order of the cells: those kept and those held out.

    Raises
    ------
    ModelError
        If either part would be empty, or the seed is no integer of 0 or more.
    """
    require_seed(seed)
    n_test = number_held_out(held_out, n_cells)
    is_test = np.zeros(n_cells, dtype=bool)
    is_test[np.random.default_rng(seed).permutation(n_cells)[:n_test]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def number_held_out(held_out: float, n_cells: int) -> int:
    """Number of cells to hold out, from a fraction or a number; at least one is held out and one is left.

    Raises
    ------
    ModelError
        If it is no fraction between 0 and 1 and no number between 0 and ``n_cells``.
    """
    if isinstance(held_out, Integral) and not isinstance(held_out, bool):
        number = int(held_out)
    elif isinstance(held_out, Real) and not isinstance(held_out, bool) and 0 < held_out < 1:
        number = max(1, min(round(held_out * n_cells), n_cells - 1))
    else:
        raise ModelError(f"held_out is a share between 0 and 1 or an int number of cells; got {held_out!r}.")
    if not 0 < number < n_cells:
        raise ModelError(
            f"cannot hold out {number} of {n_cells} cells: both parts need at least one "
            "(in fit, validation=0 holds out none)."
        )
    return number


def within(rows: np.ndarray, n: int) -> np.ndarray:
    """Positions from 0 to n - 1, from positions that may be negative and then count from the end.

    Raises
    ------
    IndexError
        If a position is out of range.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if rows.size and not (-n <= rows.min() and rows.max() < n):
        outside = rows[(rows < -n) | (rows >= n)]
        raise IndexError(f"cells are numbered from 0 to {n - 1}; there is no cell {outside[0]}.")
    return np.where(rows < 0, rows + n, rows)


def consecutive(rows: np.ndarray) -> bool:
    """Whether each position is one more than the previous."""
    return bool((np.diff(rows) == 1).all())
