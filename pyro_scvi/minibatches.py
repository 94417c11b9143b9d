"""Cells on a device: resident where they fit, otherwise row by row from where they lie."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from pyro_scvi.cells import CellIndex, Cells
from pyro_scvi.errors import FitError

RESIDENT_BYTES = 2**30  # densely resident up to here: a copy of the counts on the device


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


class Minibatches:
    """Counts and covariates of ``cells`` as tensors on ``device``, by rows."""

    def __init__(self, cells: Cells, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.cells, self.device, self.dtype = cells, device, dtype
        size = cells.n_cells * cells.n_genes * torch.empty((), dtype=dtype).element_size()
        self.resident = self._moved(slice(None)) if size <= RESIDENT_BYTES else None

    def rows(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Counts (rows, genes) and covariates (rows, covariates) of the given rows."""
        if self.resident is None:
            return self._moved(index.cpu().numpy())
        return self.resident[0][index], self.resident[1][index]

    def shuffled(self, batch_size: int) -> Iterator[Tensor]:
        """Row indices of one epoch: every cell once, in batches of as equal size as possible."""
        order = torch.randperm(self.cells.n_cells).to(self.device)
        yield from order.tensor_split(math.ceil(len(order) / batch_size))

    def in_order(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Counts and covariates of all cells, in the order of the file."""
        for rows in torch.arange(self.cells.n_cells, device=self.device).split(batch_size):
            yield self.rows(rows)

    def _moved(self, index: CellIndex) -> tuple[Tensor, Tensor]:
        x, gamma = self.cells[index]
        return x.to(self.device, self.dtype), gamma.to(self.device, self.dtype)
