"""Selected entries of a tensor: gathered on a CPU, masked on a GPU."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.utils.execution import tracing


class Gathered(NamedTuple):
    """Some entries of the counts, gathered: their values and their positions ``at`` in the flattened counts.

    Parameters may have leading dimensions that the counts lack; their entries are (leading, entries).
    """

    x: Tensor
    at: Tensor
    shape: torch.Size

    def split(self, chosen: Tensor) -> tuple["Gathered", "Gathered"]:
        """The chosen entries, and the others."""
        return self._take(true_places(chosen)), self._take(true_places(~chosen))

    def _take(self, some: Tensor) -> "Gathered":
        return Gathered(self.x.index_select(0, some), self.at.index_select(0, some), self.shape)

    def of(self, dense: Tensor) -> Tensor:
        """These entries of a tensor; one with a single row of genes is not expanded to the size of the counts."""
        if dense.dim() and dense.numel() == dense.shape[-1] == self.shape[-1]:
            at, n = self.at.cpu().numpy(), self.shape[-1]
            at = at.astype(np.int32) if self.shape.numel() < 2**31 else at
            gene = torch.from_numpy(at - at // n * n)  # at % n, several times faster
            return dense.reshape(1, -1).index_select(1, gene.to(dense.device))
        return _flat(dense, self.shape).index_select(1, self.at)

    def write(self, values: Tensor, dense: Tensor) -> None:
        """Set these entries of a contiguous tensor."""
        _flat(dense, self.shape).scatter_(1, self.at.expand(values.shape), values)

    def replaced(self, values: Tensor, dense: Tensor) -> Tensor:
        """A tensor with these entries set, differentiable by both."""
        return _flat(dense, self.shape).index_copy(1, self.at, values).reshape(dense.shape)


class Masked(NamedTuple):
    """Some entries of the counts, left in place: all entries are computed, with x = 1 outside the mask.

    For devices on which counting the entries, which the host must wait for, takes longer than computing all of them.
    """

    x: Tensor
    mask: Tensor
    shape: torch.Size

    def of(self, dense: Tensor) -> Tensor:
        """All entries of a tensor."""
        return _flat(dense, self.shape)

    def write(self, values: Tensor, dense: Tensor) -> None:
        """Set the entries of the mask in a contiguous tensor."""
        flat = _flat(dense, self.shape)
        torch.where(self.mask, values, flat, out=flat)

    def replaced(self, values: Tensor, dense: Tensor) -> Tensor:
        """A tensor with the entries of the mask set, differentiable by both."""
        return torch.where(self.mask, values, _flat(dense, self.shape)).reshape(dense.shape)


Entries = Gathered | Masked


def neither_zero_nor_one(x: Tensor) -> Entries:
    """The entries above 1, and those that are no counts: fractions, negative numbers, NaN."""
    if not gathers(x.device):
        return _masked(x, (x != 0) & (x != 1))
    counts = x.numpy()
    mask, zero, one = counts > 1, counts == 0, counts == 1
    if sum(map(np.count_nonzero, (mask, zero, one))) < counts.size:  # rare: some entries are no counts
        mask = ~(zero | one)
    return _gathered(x, mask)


def above_zero(x: Tensor) -> Entries:
    """The entries of the counts that are not 0."""
    return _gathered(x, x.numpy() != 0) if gathers(x.device) else _masked(x, x != 0)


def _masked(x: Tensor, mask: Tensor) -> Masked:
    mask = mask.reshape(-1)
    return Masked(torch.where(mask, x.reshape(-1), 1.0), mask, torch.Size(x.shape))


def _gathered(x: Tensor, mask: np.ndarray) -> Gathered:
    at = torch.from_numpy(np.flatnonzero(mask))
    shape = torch.Size(x.shape)  # a plain tuple where Pyro tracks the provenance of values
    return Gathered(x.reshape(-1).index_select(0, at), at, shape)


def distinct(parameter: Tensor) -> Tensor:
    """Undo an expansion: keep one entry along every dimension that only repeats it."""
    for dim, stride in enumerate(parameter.stride()):
        if stride == 0 and parameter.shape[dim] > 1:
            parameter = parameter.narrow(dim, 0, 1)
    return parameter


def gathers(device: torch.device) -> bool:
    """Whether entries are gathered: on a CPU, unless torch is tracing and tensors have no values."""
    return device.type == "cpu" and not tracing()


def true_places(mask: Tensor) -> Tensor:
    """Positions of True in the flattened mask; NumPy finds them several times faster than torch."""
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return mask.reshape(-1).nonzero().squeeze(-1)


def _flat(dense: Tensor, shape: torch.Size) -> Tensor:
    """A tensor as (leading, entries); a view if it is contiguous and as large as the counts."""
    if dense.shape[-len(shape) :] != shape:
        dense = dense.expand(torch.broadcast_shapes(dense.shape, shape))
    size = shape.numel()
    return dense.reshape(dense.numel() // size if size else 1, size)
