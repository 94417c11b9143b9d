"""Arrays that take the results of verbs: new ones, or those that the caller passes as ``out``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pandas as pd
import torch
import xarray as xr

from pyro_scvi.errors import ModelError

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

LEAST_BITS = 32
"""Floats of fewer bits keep two or three digits, and some are infinite above 65,504."""


def result_array(fit: Fit, shape: tuple[int, ...], out: Any) -> Any:
    """Array that takes the results by ``array[rows] = ndarray``: one that writes into ``out``, or a new one.

    Raises
    ------
    ModelError
        If ``out`` has another shape, cannot be written to, holds something else than floats of 32 bits or more, or has
        names of rows and columns.
    """
    if out is None:  # by torch: thousands of small ones among large temporaries would fragment memory
        return torch.empty(shape, dtype=fit.dtype).numpy()
    if isinstance(out, pd.DataFrame | pd.Series | xr.DataArray):
        raise ModelError(
            f"out is filled by position, and a {type(out).__name__} has names: pass an array as out, as in np.empty("
            f"{shape}, np.float32), and name its rows cells.cell_names and its columns fit.schema.gene_names afterwards"
        )
    if isinstance(out, h5py.Dataset) and not out:
        raise ModelError("out is a dataset of a file that is closed: open it for as long as the call takes")
    if not _is_array(out) or tuple(out.shape) != shape:
        given = f"one of shape {tuple(out.shape)}" if _is_array(out) else type(out).__name__
        raise ModelError(f"out must be an array of shape {shape}, got {given}")
    if not _holds_floats(out.dtype):
        raise ModelError(
            f"out must hold float32 or float64, got {out.dtype}, which would cut or round the results: as in np.empty("
            f"{shape}, np.float32)"
        )
    return _of_tensor(out) if isinstance(out, torch.Tensor) else _writable(out)


def _is_array(out: Any) -> bool:
    return all(hasattr(out, name) for name in ("shape", "dtype", "__setitem__")) and not hasattr(out, "nnz")


def _holds_floats(dtype: Any) -> bool:
    if isinstance(dtype, torch.dtype):
        return dtype in (torch.float32, torch.float64)
    try:
        kind = np.dtype(dtype)
    except TypeError:  # a type of pandas or another package
        return False
    return kind.kind == "f" and 8 * kind.itemsize >= LEAST_BITS


def _of_tensor(out: torch.Tensor) -> np.ndarray:
    if out.device.type != "cpu" or out.layout != torch.strided or out.requires_grad:
        what = "with gradients" if out.requires_grad else f"on {out.device}"
        what = what if out.layout == torch.strided else "that is sparse"
        raise ModelError(f"out must be a dense tensor on the CPU without gradients, got one {what}")
    return out.numpy()


def _writable(out: Any) -> Any:
    if isinstance(out, np.ma.MaskedArray):
        raise ModelError("out must be an array without a mask, which would hide results: pass out.data")
    if _is_read_only(out):
        raise ModelError('out cannot be written to: open its file with mode="r+", or pass a copy')
    return out


def _is_read_only(out: Any) -> bool:
    if isinstance(out, np.ndarray):
        return not out.flags.writeable
    if isinstance(out, h5py.Dataset):
        return out.file.mode == "r"
    return bool(getattr(out, "read_only", False))  # of zarr
