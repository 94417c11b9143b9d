"""Stores: counts on disk, larger than memory, built once from .h5ad or zarr files and read by random rows."""

from pyro_scvi.data.stores.building import build
from pyro_scvi.data.stores.count_store import CountStore

__all__ = ["CountStore", "build"]


def __dir__() -> list[str]:
    return __all__
