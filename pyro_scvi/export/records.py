"""Tables of groups as scanpy keeps them: record arrays, the fields of which are the groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import h5py
import numpy as np
import pandas as pd
import zarr

try:  # anndata has no public place for writers of one's own
    from anndata._io.specs.registry import _REGISTRY as WRITERS
    from anndata._io.specs.registry import IOSpec
except ImportError:
    WRITERS = None

MARK = ":"
"""Python's buffers cannot have it in names of fields, and the compressor of zarr's format 2 reads a buffer."""


class MarkedRecords(np.recarray):
    """Records with ":" in names of fields: to zarr they are written without compression, which needs no buffer.

    anndata reads them as it reads other records.
    """


def records_of(columns: Mapping[str, np.ndarray]) -> np.recarray:
    """A record array of these columns, all of one length."""
    records: np.recarray = pd.DataFrame(columns).to_records(index=False)
    marked = any(MARK in name for name in columns)
    return records.view(MarkedRecords) if marked and WRITERS is not None else records


def unwritable(names: Iterable[str]) -> list[str]:
    """Names of fields with which ``adata.write_zarr`` fails in format 2."""
    return [name for name in names if MARK in name and WRITERS is None]


def _write(group: Any, key: str, records: MarkedRecords, *, _writer: Any, dataset_kwargs: Mapping[str, Any]) -> None:
    options = dict(dataset_kwargs)
    if isinstance(group, zarr.Group):
        options["compressor"] = None
    _writer.write_elem(group, key, records.view(np.recarray), dataset_kwargs=options)


if WRITERS is not None:
    for kind in (h5py.Group, zarr.Group):
        WRITERS.register_write(kind, MarkedRecords, IOSpec("rec-array", "0.2.0"))(_write)
