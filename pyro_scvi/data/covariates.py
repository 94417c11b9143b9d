"""gamma, kept small: one integer per cell for each column of categories, one number for each other column."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

NONE, MEAN = -1, -2
"""Codes of cells without a category, which have zeros, and of an unknown one: the mean over those that are known."""

_AT_ONCE = 2**20  # numbers of gamma that are dense at a time


class Part(Protocol):
    """Some columns of gamma that belong together."""

    @property
    def width(self) -> int:
        """How many columns these are."""
        ...

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Part:
        """The same columns of other cells: what they are made of, (cells,), changed."""
        ...

    def dense(self, rows: np.ndarray | slice) -> np.ndarray:
        """The columns (rows, width), float32."""
        ...


@dataclass(frozen=True, eq=False)
class Words:
    """One-hot columns, one for each of ``width`` words, from the position (cells,) of each cell's word."""

    codes: np.ndarray
    width: int

    @classmethod
    def of(cls, codes: np.ndarray, width: int) -> Words:
        """Keep the positions in the smallest type that holds them."""
        return cls(codes.astype(np.result_type(np.min_scalar_type(-max(width, -MEAN)), np.int8), copy=False), width)

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Words:
        """The words of other cells."""
        return Words.of(change(self.codes), self.width)

    def dense(self, rows: np.ndarray | slice) -> np.ndarray:
        """A 1 where the cell's word is, all zeros for NONE, all ``1 / width`` for MEAN."""
        codes = self.codes[rows]
        columns = np.zeros((len(codes), self.width), dtype=np.float32)
        known = np.flatnonzero(codes >= 0)
        columns[known, codes[known]] = 1.0
        columns[codes == MEAN] = 1 / self.width
        return columns


@dataclass(frozen=True, eq=False)
class Numbers:
    """One column of numbers, (cells,), float32."""

    values: np.ndarray
    width = 1

    def mapped(self, change: Callable[[np.ndarray], np.ndarray]) -> Numbers:
        """The numbers of other cells."""
        return Numbers(change(self.values))

    def dense(self, rows: np.ndarray | slice) -> np.ndarray:
        """The numbers."""
        return self.values[rows][:, None]


class Covariates:
    """The covariates gamma (cells, covariates) of all cells; ``gamma[rows]`` and ``gamma[rows, columns]`` are arrays.

    A thousand batches cost as much memory as two: the columns of ones and zeros are made for the rows that are asked
    for, float32. ``rows`` is a slice or an array of positions, ``columns`` a slice
    without steps.

    Parameters
    ----------
    n_cells
        Number of cells.
    parts
        The columns, by name.

    Examples
    --------
    >>> cells = ps.Cells.from_anndata(adata, batch="donor")
    >>> cells.gamma.shape, cells.gamma[:2].tolist()
    ((60, 2), [[1.0, 0.0], [1.0, 0.0]])
    """

    def __init__(self, n_cells: int, parts: dict[str, Part]) -> None:
        self.parts, self.shape = parts, (n_cells, sum(part.width for part in parts.values()))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: np.ndarray | slice | tuple[np.ndarray | slice, slice]) -> np.ndarray:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        start, stop, _ = columns.indices(self.shape[1])
        n_rows = len(range(len(self))[rows]) if isinstance(rows, slice) else len(rows)
        found, place = [np.zeros((n_rows, 0), dtype=np.float32)], 0
        for part in self.parts.values():
            if place < stop and place + part.width > start:
                found.append(part.dense(rows)[:, max(0, start - place) : stop - place])
            place += part.width
        return np.hstack(found)

    def take(self, rows: np.ndarray) -> Covariates:
        """Those of some cells."""
        return self._mapped(len(rows), lambda values: values[rows])

    def gathered(self, gather: Callable[[np.ndarray], np.ndarray]) -> Covariates:
        """Those of the cells of all processes, of which ``gather`` joins what each has."""
        own = np.arange(len(self))
        return self._mapped(len(gather(own)), gather)

    def replaced(self, name: str, part: Part) -> Covariates:
        """The same with other columns of this name."""
        return Covariates(len(self), self.parts | {name: part})

    def codes(self, name: str) -> np.ndarray:
        """Position (cells,) of each cell's word in the columns of this name, NONE, or MEAN."""
        part = self.parts[name]
        if not isinstance(part, Words):
            raise KeyError(name)
        return part.codes

    def blocks(self) -> Iterator[bytes]:
        """The float32 numbers of all rows in their order, some at a time: together those of the whole array."""
        step = max(1, _AT_ONCE // max(1, self.shape[1]))
        for start in range(0, len(self), step):
            yield self[start : start + step].tobytes()

    def _mapped(self, n_cells: int, change: Callable[[np.ndarray], np.ndarray]) -> Covariates:
        return Covariates(n_cells, {name: part.mapped(change) for name, part in self.parts.items()})
