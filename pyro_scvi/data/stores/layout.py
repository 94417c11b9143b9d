"""Layout of a store on disk: its files, and the JSON that describes them."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from anndata import AnnData

from pyro_scvi.errors import StoreError
from pyro_scvi.utils.disk.files import regular_bytes, short_name

FORMAT = 1
SCHEMA, ANNOTATIONS = "schema.json", "annotations.h5ad"
INDPTR, INDICES, DATA, TOTALS, DETECTED = "indptr.npy", "indices.npy", "data.npy", "totals.npy", "detected.npy"
ARRAYS = (INDPTR, INDICES, DATA, TOTALS, DETECTED)


FILES = "files"
"""In ``uns`` of the annotations: names of the files, and number of cells of each; stores of one file have none."""


@dataclass(frozen=True)
class StoreSchema:
    """Contents of a store: sizes, origin and checksums.

    Parameters
    ----------
    format
        Version of the layout.
    n_cells, n_genes, n_nonzero
        Sizes of the counts.
    plan
        The files, genes and options that the store was built from.
    files
        Size in bytes and SHA-256 of each file, by name.
    """

    format: int
    n_cells: int
    n_genes: int
    n_nonzero: int
    plan: dict[str, Any]
    files: dict[str, dict[str, Any]]

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        durably(folder / SCHEMA, lambda file: file.write(json.dumps(asdict(self), indent=1).encode()))

    @classmethod
    def read(cls, folder: Path) -> "StoreSchema":
        """Read it from a folder.

        Raises
        ------
        StoreError
            If it is missing, broken or of another format.
        """
        try:
            content = json.loads(regular_bytes(folder / SCHEMA))
        except OSError as error:
            hint = f"its build was interrupted, call build again: {work_of(folder)}"
            reason = hint if work_of(folder).is_dir() else str(error)
            raise StoreError(f"{folder} is not a store of counts: {reason}") from error
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{folder / SCHEMA} is corrupt: {error}") from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise StoreError(f"{folder / SCHEMA} is not of format {FORMAT}, the one that this version reads")
        try:
            schema = cls(**content)
            described = {name: sorted(facts) for name, facts in schema.files.items()}
        except (AttributeError, TypeError) as error:
            raise StoreError(f"{folder / SCHEMA} is corrupt: {error}") from error
        if described != {name: ["bytes", "sha256"] for name in (*ARRAYS, ANNOTATIONS)}:
            raise StoreError(f"{folder / SCHEMA} is corrupt: it lacks files of a store; {rebuild(folder)}")
        return schema

    def check(self, folder: Path, verify: bool) -> None:
        """Refuse files whose sizes, and with ``verify`` checksums, differ from those noted here.

        Raises
        ------
        StoreError
            If one differs; names the file.
        """
        for name, expected in self.files.items():
            file = folder / name
            if not file.is_file():
                raise StoreError(f"{file} is missing; {rebuild(folder)}")
            actual, size = file.stat().st_size, expected["bytes"]
            if actual != size:
                what = "truncated" if actual < size else "altered"
                raise StoreError(f"{file} was {what}: it has {actual} bytes, not {size}; {rebuild(folder)}")
            if verify and fingerprint(file) != expected:
                raise StoreError(f"{file} was altered: its checksum is not the one in the schema; {rebuild(folder)}")


def rebuild(folder: Path) -> str:
    """Advice for a broken store."""
    return f"delete {folder} and build it again"


def files_of(annotations: AnnData) -> np.ndarray | None:
    """Name of the file that each cell is of, (cells,); None if the store does not say, or not for all of its cells."""
    told = annotations.uns.get(FILES)
    if not isinstance(told, Mapping) or set(told) != {"names", "cells"}:
        return None
    names, cells = np.asarray(told["names"]), np.asarray(told["cells"])
    listed = names.ndim == cells.ndim == 1 and len(names) == len(cells) and cells.dtype.kind in "iu"
    within = listed and bool(((cells >= 0) & (cells <= annotations.n_obs)).all())
    # Of Python's integers, whose sum does not wrap round: NumPy would write past the end of an array.
    return np.repeat(names, cells) if within and sum(cells.tolist()) == annotations.n_obs else None


def work_of(target: Path) -> Path:
    """Folder of a store's parts until the store is complete."""
    return target.with_name(short_name(target) + ".partial")


def durably(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name, and rename it once all of it is on the disk."""
    new = path.with_name(path.name + ".new")
    with new.open("w+b") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


@contextmanager
def doubled_names_allowed() -> Iterator[None]:
    """Silence anndata about cell names that occur twice; ``Cells`` warns about them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Observation names are not unique", UserWarning)
        yield


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
