"""What identifies a run that writes block by block: a file of another run is not continued."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor, nn

from pyro_scvi.data.cells import Cells
from pyro_scvi.export.block_columns import Column
from pyro_scvi.nn.component import lasting_repr
from pyro_scvi.persistence.digests import digest_of, digest_of_counts, digest_of_names, digests_of_columns
from pyro_scvi.persistence.serialization import describe, states_of
from pyro_scvi.training.fitted import Fit

if TYPE_CHECKING:
    from pyro_scvi.export.block_columns import Verb


def identity_of(fit: Fit, cells: Cells, verbs: Mapping[str, Verb], columns: dict[str, list[Column]]) -> dict[str, Any]:
    """What results depend on, and what is written beside them, as JSON takes it."""
    return (
        {"fit": _of_fit(fit)}
        | _of_cells(cells)
        | {
            "obs": digests_of_columns(cells.obs),
            "arrays": [column.shape for some in columns.values() for column in some],
            **{f"verb {name!r}": _of_function(verb) for name, verb in verbs.items()},
        }
    )


def differences(recorded: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    """In words, where a run is not the one that was recorded."""
    for name, value in run.items():
        then = recorded.get(name)
        if isinstance(value, dict) and isinstance(then, dict):
            yield from (f"{name} column {key!r}" for key in then | value if then.get(key) != value.get(key))
        elif then != value:
            yield name


def _of_cells(cells: Cells) -> dict[str, Any]:
    return {
        "cell names": digest_of_names(cells.cell_names),
        "gene names": digest_of_names(cells.gene_names),
        "counts": digest_of_counts(cells.counts),
        "covariates": digest_of(cells.gamma.blocks()),
    }


def _of_fit(fit: Fit) -> str:
    parts = [describe(part, fit.model) for part in (fit.model, fit.guide)]
    return digest_of(
        [json.dumps(parts, sort_keys=True).encode(), _of_tensors(states_of(fit.model, fit.guide)).encode()]
    )


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(name.encode() + value.detach().cpu().numpy().tobytes() for name, value in tensors.items())


def _of_function(function: Callable[..., Any]) -> str:
    """Its module and name, the arguments that a partial binds, and the object of a method."""
    if isinstance(function, partial):
        named = [f"{name}={_of_value(value)}" for name, value in sorted(function.keywords.items())]
        return f"{_of_function(function.func)}({', '.join([*map(_of_value, function.args), *named])})"
    known = function if hasattr(function, "__qualname__") else type(function)
    owner = getattr(function, "__self__", None)
    return f"{known.__module__}.{known.__qualname__}" + (f" of {_of_value(owner)}" if owner is not None else "")


def _of_value(value: Any) -> str:
    """A value in words; what its repr would shorten enters by a digest of its content."""
    if isinstance(value, Fit):
        return f"Fit {_of_fit(value)}"
    if isinstance(value, Cells):
        return f"Cells {_of_cells(value)}"
    if isinstance(value, nn.Module):
        return f"{lasting_repr(value)} {_of_tensors(value.state_dict())}"
    if isinstance(value, pd.Series | pd.DataFrame):
        table = value.reset_index()
        return f"{type(value).__name__} {digests_of_columns(table)}"
    if isinstance(value, Tensor | np.ndarray | pd.Index):
        return _of_array(np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value))
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_of_value, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_of_value(item)}' for key, item in value.items())}}}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return f"{type(value).__qualname__} {_of_value(fields)}"
    return lasting_repr(value)


def _of_array(array: np.ndarray) -> str:
    content = array.tobytes() if array.dtype.kind != "O" else "\0".join(map(_of_value, array.ravel())).encode()
    return f"array {array.dtype} {array.shape} {digest_of([content])}"
