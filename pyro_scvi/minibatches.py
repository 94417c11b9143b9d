"""Cells on a device: resident where they fit, otherwise row by row from where they lie."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.cells import Cells
from pyro_scvi.counts import smallest_type
from pyro_scvi.errors import FitError

RESIDENT_BYTES = 2**28  # up to here a dense copy of the counts is held in main memory, beside the matrix of the cells
_BLOCK = 2**22  # entries moved at a time


def resolve_device(device: str | torch.device) -> torch.device:
    """The device meant by its name; "auto" is CUDA, else MPS, else the CPU."""
    if device != "auto":
        try:
            return torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
            reason = str(error).splitlines()[0]
            raise FitError(f"the device {device!r} cannot be used: {reason}; 'auto' takes one that can") from error
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def resident_bytes(device: torch.device) -> int:
    """How large a dense copy of the counts may be: on a GPU half of the memory that is free."""
    return torch.cuda.mem_get_info(device)[0] // 2 if device.type == "cuda" else RESIDENT_BYTES


class Minibatches:
    """Counts and covariates of ``cells`` as tensors on ``device``, by rows.

    The counts lie on the device in the smallest type that holds them, unless they are too many: then rows come from
    the matrix of the cells.
    """

    def __init__(self, cells: Cells, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.cells, self.device, self.dtype = cells, device, dtype
        self.gamma = torch.from_numpy(cells.covariates).to(device, dtype)
        stored = smallest_type(cells.counts)
        fits = cells.n_cells * cells.n_genes * stored.itemsize <= resident_bytes(device)
        self.resident = self._moved(stored) if fits else None

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (rows, genes) and covariates (rows, covariates) of the given rows."""
        gamma = self.gamma.index_select(0, index)
        if self.resident is None:
            return self.cells[index.cpu().numpy()][0].to(self.device, self.dtype), gamma
        return self.resident.index_select(0, index).to(self.dtype), gamma

    def shuffled(self, batch_size: int) -> Iterator[Tensor]:
        """Row indices of one epoch: every cell once, in batches of as equal size as possible."""
        order = torch.randperm(self.cells.n_cells).to(self.device)
        yield from order.tensor_split(math.ceil(len(order) / batch_size))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Counts and covariates of all cells, in the order of the file."""
        for rows in torch.arange(self.cells.n_cells, device=self.device).split(batch_size):
            yield self.rows(rows)

    def _moved(self, stored: np.dtype) -> Tensor:
        """All counts on the device, brought there in blocks: no dense copy of a wider type is ever held."""
        counts = self.cells.counts
        rows = torch.empty(counts.shape, dtype=getattr(torch, stored.name), device=self.device)
        size = max(1, _BLOCK // counts.shape[1])
        for start in range(0, len(rows), size):
            block = counts[start : start + size]
            block = block if isinstance(block, np.ndarray) else block.toarray()
            rows[start : start + size] = torch.from_numpy(block.astype(stored, copy=False))
        return rows
