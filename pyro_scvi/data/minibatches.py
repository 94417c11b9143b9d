"""Minibatches of cells on a device; all counts are kept there if they fit, else copied for each minibatch."""

import math
from collections.abc import Iterator
from textwrap import shorten

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import Matrix, dense, smallest_type
from pyro_scvi.data.covariates import Covariates
from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import brief

RESIDENT_BYTES = 2**28  # largest dense copy of counts or covariates in main memory, beside those of the cells
LONGEST_REASON = 120  # characters of torch's own words
_BLOCK = 2**22  # entries moved at a time


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of this name; "auto" is CUDA, else MPS, else the CPU."""
    if not isinstance(device, str | int | torch.device):
        raise ModelError(f"device must be a name, such as 'cpu' or 'auto', or a torch.device; got {brief(device)}")
    accelerator = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=accelerator if device == "auto" else device).device
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA raises an AssertionError
        reason = shorten(str(error), LONGEST_REASON, placeholder=" ...")  # without MPS, torch lists its back ends
        other = "device='cpu' can" if device == "auto" else "'auto' takes one that can"
        raise ModelError(f"the device {device!r} cannot be used: {reason}; {other}") from error


def require_precision(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse float64 on MPS, which has none.

    Raises
    ------
    ModelError
        If it is asked for; says what to do.
    """
    if device.type == "mps" and dtype == torch.float64:
        raise ModelError("MPS has no float64: take device='cpu', or fit with dtype=torch.float32")


def resident_bytes(device: torch.device) -> int:
    """Largest dense copy of the counts, in bytes; on a GPU half of the free memory."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else RESIDENT_BYTES


def even_sizes(n_cells: int, n_batches: int) -> list[int]:
    """Sizes of ``n_batches`` batches, as equal as possible: the first may have one cell more."""
    return [n_cells // n_batches + (batch < n_cells % n_batches) for batch in range(n_batches)]


class Minibatches:
    """Counts and covariates of ``cells``, or of the rows ``selected`` among them, as tensors on ``device``.

    The counts lie on the device in the smallest type that holds them. If they are too many, minibatches are copied from
    the matrix of the cells instead; likewise the covariates. ``new_batches``: whether cells may be of batches that the
    schema does not know.

    Raises
    ------
    SchemaError
        If there are such cells and ``new_batches`` is False.
    """

    def __init__(
        self,
        cells: Cells,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        selected: np.ndarray | None = None,
        *,
        new_batches: bool = False,
    ) -> None:
        if not new_batches:
            cells.require_known_batches()
        self.cells, self.device, self.dtype = cells, device, dtype
        self.selected = np.arange(cells.n_cells) if selected is None else selected
        self.n_cells = len(self.selected)
        most, stored = resident_bytes(device), smallest_type(cells.counts)
        few = self.n_cells * cells.n_covariates * dtype.itemsize <= most
        self.gamma = self._on_device(cells.gamma[self.selected]) if few else None
        few = self.n_cells * cells.n_genes * stored.itemsize <= most
        self.resident = self._moved(stored) if few else None

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (rows, genes) and covariates (rows, covariates) of the given rows."""
        if self.resident is not None and self.gamma is not None:
            return self.resident.index_select(0, index).to(self.dtype), self.gamma.index_select(0, index)
        rows = self.selected[index.cpu().numpy()]
        x, gamma = self.resident, self.gamma
        return (
            self._on_device(dense(self.cells.counts[rows])) if x is None else x.index_select(0, index).to(self.dtype),
            self._on_device(self.cells.gamma[rows]) if gamma is None else gamma.index_select(0, index),
        )

    def shuffled(self, batch_size: int) -> Iterator[Tensor]:
        """Row indices of one epoch: every cell once, in batches of as equal size as possible."""
        yield from self.shuffled_into(even_sizes(self.n_cells, math.ceil(self.n_cells / batch_size)))

    def shuffled_into(self, sizes: list[int]) -> Iterator[Tensor]:
        """Row indices of one epoch: every cell once, in batches of these sizes."""
        yield from torch.randperm(self.n_cells).to(self.device).split(sizes)

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Counts and covariates of all cells, in the order of the file."""
        for rows in torch.arange(self.n_cells, device=self.device).split(batch_size):
            yield self.rows(rows)

    def totals(self) -> np.ndarray:
        """Total count of each cell, (cells,)."""
        return self.cells.totals[self.selected]

    def covariates(self) -> Covariates:
        """Covariates of all cells, (cells, covariates)."""
        return self.cells.gamma.take(self.selected)

    def gene_totals(self) -> np.ndarray:
        """Total count of each gene, (genes,)."""
        return sum((np.asarray(block.sum(0)).reshape(-1) for _, block in self._blocks()), np.zeros(self.cells.n_genes))

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device, self.dtype)

    def _moved(self, stored: np.dtype) -> Tensor:
        """All counts on the device; moved in blocks, so that no dense copy of a wider type is held."""
        shape = self.n_cells, self.cells.n_genes
        moved = torch.empty(shape, dtype=getattr(torch, stored.name), device=self.device)
        for rows, block in self._blocks():
            moved[rows] = torch.from_numpy(dense(block, stored)).to(self.device)
        return moved

    def _blocks(self) -> Iterator[tuple[slice, Matrix]]:
        size = max(1, _BLOCK // self.cells.n_genes)
        for start in range(0, self.n_cells, size):
            rows = slice(start, start + size)
            yield rows, self.cells.counts[self.selected[rows]]
