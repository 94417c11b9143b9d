"""The files of real counts behind the tables, in the folder that ``PYRO_SCVI_DATA`` names."""

import hashlib
import os
from functools import cache
from pathlib import Path

import anndata
import numpy as np

from pyro_scvi.errors import DataError

CORTEX, BRAIN, PBMC_8K4K, PBMC_3KA, PBMC_4K, ARRAYS = (
    "cortex_558.h5ad",
    "brain10k.h5ad",
    "pbmc_8k4k_hvg.h5ad",
    "pbmc_3kA.h5ad",
    "pbmc4k_top2000.h5ad",
    "microarray_reference.csv",
)


def folder() -> Path:
    """Folder of the data: ``PYRO_SCVI_DATA``, by default ../shared/data."""
    return Path(os.environ.get("PYRO_SCVI_DATA", "../shared/data"))


def path(name: str) -> Path:
    """A file of the data folder.

    Raises
    ------
    DataError
        If it is missing.
    """
    file = folder() / name
    if not file.is_file():
        raise DataError(f"{name} is not in {folder()}; set PYRO_SCVI_DATA to the folder that holds it")
    return file


def digest(name: str) -> str:
    """SHA-256 of a file of the data folder, as it is now."""
    file = path(name)
    state = file.stat()
    return _digest(file.absolute(), state.st_size, state.st_mtime_ns, state.st_ctime_ns)


@cache
def _digest(file: Path, *_: int) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def read(name: str, at_most: int | None = None) -> anndata.AnnData:
    """Counts and annotations (cells, genes) of at most this many cells, spread evenly over the file."""
    adata = anndata.read_h5ad(path(name))
    if at_most is not None and at_most < adata.n_obs:
        adata = adata[np.arange(at_most) * adata.n_obs // at_most].copy()
    return adata
