"""Serialization of models: components as JSON and back, by the names of this package's classes only."""

import dataclasses
import inspect
import math
import re
from collections.abc import Iterator
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyro_scvi import guides, likelihoods, priors, schedules
from pyro_scvi import nn as networks
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import CheckpointError
from pyro_scvi.guides.base import Guide
from pyro_scvi.likelihoods import library_size
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import Component, constructor_parameters, lasting_repr
from pyro_scvi.priors import weights
from pyro_scvi.utils.allocation_limit import AllocationLimit

FIT_FACTS = {"model", "guide", "schema", "settings", "dtype", "history"}

RENAMED = {"Weight": "ConstantKL"}
"""Old name -> new name of classes that saves or checkpoints hold by name: written as the old one, read as the new."""

_MOST_PARTS = 500  # of a model or a guide; ours have less than 20
_MOST_CALLS = 100_000  # two seconds of torch: as much as 2,500 tensors of ours need, which no model of ours has


def describe(value: Any, model: SCVI) -> Any:
    """JSON for a component: the name of its class and its constructor's arguments; a guide refers to its model."""
    if isinstance(value, Component):
        arguments = {k: {"the": "model"} if v is model else describe(v, model) for k, v in value.config().items()}
        return (
            {"part": type(value).__name__, "arguments": arguments} if type(value) in _own_classes() else _foreign(value)
        )
    if dataclasses.is_dataclass(value) and type(value) in _own_classes():
        arguments = {f.name: describe(getattr(value, f.name), model) for f in dataclasses.fields(value)}
        return {"part": type(value).__name__, "arguments": arguments}
    if isinstance(value, Tensor | np.ndarray):
        return {"tensor": value.tolist()}
    if isinstance(value, slice):  # columns of gamma
        return {"slice": [value.start, value.stop]}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"mapping": {k: describe(v, model) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [describe(v, model) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return _foreign(value)


def build(description: Any, model: SCVI | None) -> Any:
    """The value that :func:`describe` described. Only classes of this package are ever called."""
    if isinstance(description, list):
        return [build(item, model) for item in description]
    if not isinstance(description, dict):
        return description
    match description:
        case {"the": "model"}:
            return model
        case {"tensor": values}:
            return torch.tensor(values)
        case {"slice": [start, stop]}:
            return slice(start, stop)
        case {"mapping": items}:
            return {key: build(item, model) for key, item in items.items()}
        case {"part": name, "arguments": arguments}:
            return _class_called(name)(**{key: build(item, model) for key, item in arguments.items()})
        case {"foreign": text}:
            raise CheckpointError(
                f"it was made with {text}, which is not part of this package: pass model= (and guide=)"
            )
    raise CheckpointError(f"unknown description {repr(description)[:100]}")


def build_sized(description: Any, model: SCVI | None, tensors: dict[str, Tensor]) -> Any:
    """As :func:`build`, for a description whose sizes are among those of ``tensors``.

    Raises
    ------
    CheckpointError
        If one is larger, or there are very many parts: they would take memory and time that the tensors do not account
        for.
    """
    if sum(1 for _ in _parts(description)) > _MOST_PARTS:
        raise CheckpointError(f"it is made of more than {_MOST_PARTS} parts")
    stored = [tensor for tensor in tensors.values() if tensor.numel()]  # others have sizes that cost a file nothing
    largest = max([len(tensors), *(size for tensor in stored for size in tensor.shape)])
    for name, size in _sizes(description):
        if size > largest:
            raise CheckpointError(f"{name} is {size}, more than any size of its weights")
    return build(description, model)


def limited_by(tensors: dict[str, Tensor]) -> AllocationLimit:
    """A limit that models with these tensors stay far below while they are made.

    Priors of weights cost most. They need up to 35 elements for each element of the tensors, all together, and 40 calls
    for each tensor. Tensors without elements cost a file nothing, so there is a limit to calls whatever their number.
    """
    n_elements = sum(tensor.numel() for tensor in tensors.values())
    calls = min(300 * len(tensors) + 3_000, _MOST_CALLS)
    return AllocationLimit(8 * n_elements + 1_000_000, 200 * n_elements + 4_000_000, calls)


def _parts(description: Any) -> Iterator[Any]:
    """All parts of a description."""
    if isinstance(description, dict):
        if "part" in description:
            yield description
        description = list(description.values())
    if isinstance(description, list):
        for item in description:
            yield from _parts(item)


def _sizes(description: Any) -> Iterator[tuple[str, int]]:
    """Integers among the arguments, by name. A seed is no size, nor is a whole number that may have been a fraction."""
    if isinstance(description, list):
        for item in description:
            yield from _sizes(item)
    elif isinstance(description, dict):
        others = _no_sizes(description["part"]) if "part" in description else set()
        items = description.get("arguments", description)
        for name, value in items.items() if isinstance(items, dict) else ():
            if type(value) is int and name not in others:
                yield name, value
            elif name != "tensor":
                yield from _sizes(value)


def _no_sizes(part: str) -> set[str]:
    """Arguments of a part that take fractions, such as a scale."""
    parameters = constructor_parameters(_class_called(part))
    return {"seed"} | {
        name for name, of in parameters.items() if not re.search(r"\bint\b|empty|Any", str(of.annotation))
    }


def with_new_names(description: Any) -> Any:
    """A description with the present names of classes, whichever version wrote it."""
    if isinstance(description, list):
        return [with_new_names(item) for item in description]
    if not isinstance(description, dict):
        return description
    renewed = {key: with_new_names(item) for key, item in description.items()}
    part = renewed.get("part")
    return renewed | {"part": RENAMED[part]} if isinstance(part, str) and part in RENAMED else renewed


def facts_of(
    model: SCVI, guide: Guide, history: pd.DataFrame, schema: Schema, settings: dict[str, Any]
) -> dict[str, Any]:
    """Everything about a fit except its weights, as JSON takes it."""
    return {
        "model": describe(model, model),
        "guide": describe(guide, model),
        "schema": schema.to_dict(),
        "settings": settings,
        "dtype": str(next(guide.parameters()).dtype).removeprefix("torch."),
        "history": columns_of(history),
    }


def columns_of(history: pd.DataFrame) -> dict[str, list[float | None]]:
    """Columns as JSON numbers, NaN as null."""
    table = history if "epoch" in history else history.rename_axis("epoch").reset_index()
    return {name: [None if pd.isna(v) else v for v in table[name].tolist()] for name in map(str, table)}


def history_of(columns: dict[str, list[float | None]]) -> pd.DataFrame:
    """The table from which :func:`columns_of` took the columns."""
    return pd.DataFrame(columns).set_index("epoch").astype(float)


def states_of(model: SCVI, guide: Guide) -> dict[str, Tensor]:
    """Parameters and buffers of model and guide by name, not copied."""
    pair = {"model": model, "guide": guide}
    return {f"{side}.{name}": value for side, part in pair.items() for name, value in part.state_dict().items()}


def with_landmarks(guide: Guide, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a save, with none of the landmarks known if an earlier version wrote it."""
    return {"guide.landmarks": torch.zeros_like(guide.landmarks)} | tensors


def check_shapes(model: SCVI, guide: Guide, tensors: dict[str, Tensor]) -> None:
    """Refuse tensors that do not fit model and guide.

    Raises
    ------
    CheckpointError
        If names or shapes differ.
    """
    held = states_of(model, guide)
    if other := sorted(held.keys() ^ tensors.keys()):
        more = f" and {len(other) - 5} more" if len(other) > 5 else ""
        names = ", ".join(repr(name)[1:-1][:100] for name in other[:5])  # a file may hold any name
        raise CheckpointError(f"its weights differ from the model's: {names}{more}")
    for name, tensor in held.items():
        if tensors[name].shape != tensor.shape:
            shapes = f"{tuple(tensors[name].shape)}, in the model {tuple(tensor.shape)}"
            raise CheckpointError(f"{name} has shape {shapes}")


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse tensors with which results would be NaN: of NaN or infinity, and variances below 0.

    Raises
    ------
    CheckpointError
        If there is one; names some.
    """
    lost = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
    if lost:
        raise CheckpointError(f"{len(lost)} of its weights hold NaN or infinity: {', '.join(sorted(lost)[:3])}")
    below = [name for name, tensor in tensors.items() if name.endswith("running_var") and bool((tensor < 0).any())]
    if below:
        raise CheckpointError(f"{len(below)} of its variances are below 0: {', '.join(sorted(below)[:3])}")


def check_schema(schema: Schema, model: SCVI) -> None:
    """Refuse a schema that is not that of a model, or whose names and scales are none.

    Raises
    ------
    CheckpointError
        If it is refused; says why.
    """
    words = [schema.batches, *schema.levels, schema.label_names]
    names = (*schema.gene_names, *schema.covariates, *schema.categories, *chain.from_iterable(words))
    columns = (schema.batch, schema.layer, schema.labels)
    if not all(isinstance(name, str) for name in (*names, *(column or "" for column in columns))):
        raise CheckpointError("its schema has names that are not strings")
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in (*schema.means, *schema.sds)):
        raise CheckpointError("its schema has means or standard deviations that are not numbers")
    if not all(sd > 0 for sd in schema.sds):
        raise CheckpointError("its schema has standard deviations that are not above 0")
    if any(len(set(of)) < len(of) for of in (schema.gene_names, *words)):
        raise CheckpointError("its schema has genes or batches that occur twice")
    if (schema.n_genes, schema.n_covariates) != (model.n_genes, model.n_covariates):
        found = f"{schema.n_genes} genes and {schema.n_covariates} covariates"
        raise CheckpointError(f"its schema has {found}, the model {model.n_genes} and {model.n_covariates}")


def put_states(model: SCVI, guide: Guide, tensors: dict[str, Tensor]) -> None:
    """Copy tensors into model and guide, all of them or none.

    Raises
    ------
    CheckpointError
        If names, shapes or types are not the model's and the guide's.
    """
    check_shapes(model, guide, tensors)
    held = states_of(model, guide)
    for name, tensor in held.items():
        if tensors[name].dtype != tensor.dtype:
            raise CheckpointError(f"{name} is of type {tensors[name].dtype}, the model has {tensor.dtype}")
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(tensors[name])


def _foreign(value: Any) -> dict[str, str]:
    return {"foreign": lasting_repr(value)}


@cache
def _own_classes() -> dict[type, str]:
    packages = (guides, library_size, likelihoods, networks, priors, schedules, weights)
    classes = [c for package in packages for _, c in inspect.getmembers(package, inspect.isclass) if _is_part(c)]
    return {c: c.__name__ for c in (*classes, SCVI)}


def _is_part(candidate: type) -> bool:
    packaged = candidate.__module__.startswith("pyro_scvi.")
    return packaged and (issubclass(candidate, nn.Module) or dataclasses.is_dataclass(candidate))


def _class_called(name: str) -> type[Any]:
    for known, label in _own_classes().items():
        if label == RENAMED.get(name, name):
            return known
    raise CheckpointError(f"unknown part {repr(name)[:100]}")
