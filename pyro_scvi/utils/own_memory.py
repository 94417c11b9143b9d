"""Whose memory counts are in: a copy where the caller could change them later."""

from typing import Any

import numpy as np
import torch
from scipy import sparse

_PARTS = ("data", "indices", "indptr")


def owned(counts: Any, given: Any) -> Any:
    """Counts (cells, genes) that nobody changes: what shares memory with the ``given`` matrix is copied.

    Sources, and arrays that are mapped from a file for reading only, stay where they are.
    """
    lent = [part for part in _parts(given) if not _is_read_only_file(part)]

    def own(array: np.ndarray) -> np.ndarray:
        return array.copy() if any(np.may_share_memory(array, part) for part in lent) else array

    if isinstance(counts, np.ndarray):
        return own(counts)
    if sparse.issparse(counts):
        for name in _PARTS:
            setattr(counts, name, own(getattr(counts, name)))
    return counts


def _parts(given: Any) -> list[np.ndarray]:
    """The arrays of a matrix that counts may be in; what is read or computed into new memory has none."""
    if isinstance(given, torch.Tensor):
        return _parts_of_tensor(given)
    if sparse.issparse(given):
        held = [getattr(given, name, None) for name in _PARTS]
        return [part for part in held if isinstance(part, np.ndarray)]
    # What has chunks, as arrays of dask and zarr have, is computed or read anew.
    in_memory = hasattr(given, "__array__") and getattr(given, "chunks", None) is None
    in_memory = in_memory or isinstance(given, memoryview)
    return [np.asarray(given)] if in_memory else []


def _parts_of_tensor(tensor: torch.Tensor) -> list[np.ndarray]:
    if tensor.device.type != "cpu" or tensor.dtype == torch.bfloat16:  # these are converted
        return []
    pieces = [tensor] if tensor.layout == torch.strided else []
    if tensor.layout == torch.sparse_csr:
        pieces = [tensor.values(), tensor.col_indices(), tensor.crow_indices()]
    return [piece.detach().numpy() for piece in pieces]


def _is_read_only_file(array: Any) -> bool:
    while array is not None:
        if isinstance(array, np.memmap) and array.mode == "r":
            return True
        array = getattr(array, "base", None)
    return False
