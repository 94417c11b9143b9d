"""Saving and loading a Fit: weights as safetensors, everything else as JSON, nothing ever unpickled."""

import dataclasses
import inspect
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pyro_scvi import guides, libraries, likelihoods, networks, priors, weights
from pyro_scvi.errors import StoreError
from pyro_scvi.fit import Fit
from pyro_scvi.guides import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.parts import Part
from pyro_scvi.schema import Schema

FORMAT = 1
CONFIG, WEIGHTS = "config.json", "weights.safetensors"


def save(fit: Fit, path: str | Path) -> None:
    """Write a fit into the directory ``path``; an existing save there is replaced once the new one is complete.

    Raises
    ------
    StoreError
        If the directory holds something else than a save, or cannot be written.
    """
    target = Path(path).expanduser()
    if target.exists() and not _replaceable(target):
        raise StoreError(
            f"{target} holds something else than a saved fit; nothing was overwritten, choose another path"
        )
    config = {
        "format": FORMAT,
        "model": describe(fit.model, fit.model),
        "guide": describe(fit.guide, fit.model),
        "schema": fit.schema.to_dict(),
        "settings": fit.settings,
        "dtype": str(fit.dtype).removeprefix("torch."),
        "history": _columns(fit.history.reset_index()),
    }
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=target.name + ".") as folder:
            new = Path(folder) / "new"
            new.mkdir()
            _write(new / WEIGHTS, save_tensors({k: v.detach().cpu().contiguous() for k, v in _state(fit).items()}))
            _write(new / CONFIG, json.dumps(config, indent=1).encode())
            if target.exists():
                target.rename(Path(folder) / "old")
            new.rename(target)
    except OSError as error:
        raise StoreError(f"could not save to {target}: {error}") from error


def load(path: str | Path, *, model: SCVI | None = None, guide: Guide | None = None) -> Fit:
    """Read a fit that :meth:`Fit.save` wrote.

    Parameters
    ----------
    path
        The directory.
    model, guide
        Needed where the fit holds parts that are not this package's own (a user's prior or likelihood): the same
        objects, built again; their weights are then read.

    Raises
    ------
    StoreError
        If the save is missing, broken or of another format, or holds a part that must be passed.
    """
    source = Path(path).expanduser()
    try:
        config = json.loads((source / CONFIG).read_bytes())
        tensors = load_tensors((source / WEIGHTS).read_bytes())
    except OSError as error:
        raise StoreError(f"{source} is no saved fit: {error}") from error
    except (ValueError, SafetensorError) as error:
        raise StoreError(f"the save {source} is corrupt: {error}") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise StoreError(f"{source / CONFIG} is not of format {FORMAT}, the one that this version reads")
    try:
        return _rebuilt(config, tensors, model, guide)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise StoreError(f"the save {source} does not fit together: {error}") from error


def describe(value: Any, model: SCVI) -> Any:
    """JSON for a part: its class's name and its constructor's arguments; the model itself where a guide names it."""
    if isinstance(value, Part):
        arguments = {k: {"the": "model"} if v is model else describe(v, model) for k, v in value.makeup().items()}
        return (
            {"part": type(value).__name__, "arguments": arguments}
            if type(value) in _own()
            else {"foreign": repr(value)}
        )
    if dataclasses.is_dataclass(value) and type(value) in _own():
        arguments = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        return {"part": type(value).__name__, "arguments": arguments}
    if isinstance(value, Tensor | np.ndarray):
        return {"tensor": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {"mapping": {k: describe(v, model) for k, v in value.items()}}
    if isinstance(value, list | tuple):
        return [describe(v, model) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return {"foreign": repr(value)}


def build(description: Any, model: SCVI | None) -> Any:
    """The value that :func:`describe` wrote down. Only classes of this package are ever called."""
    if isinstance(description, list):
        return [build(item, model) for item in description]
    if not isinstance(description, dict):
        return description
    match description:
        case {"the": "model"}:
            return model
        case {"tensor": values}:
            return torch.tensor(values)
        case {"mapping": items}:
            return {key: build(item, model) for key, item in items.items()}
        case {"part": name, "arguments": arguments}:
            return _class_called(name)(**{key: build(item, model) for key, item in arguments.items()})
        case {"foreign": text}:
            raise StoreError(f"the fit was made with {text}, which is not this package's: pass model= (and guide=)")
    raise StoreError(f"unknown description {description!r}")


def _rebuilt(config: dict[str, Any], tensors: dict[str, Tensor], model: SCVI | None, guide: Guide | None) -> Fit:
    dtype = getattr(torch, config["dtype"])
    model = build(config["model"], None) if model is None else model
    guide = build(config["guide"], model) if guide is None else guide
    history = pd.DataFrame(config["history"]).set_index("epoch").astype(float)
    made = Fit(model.to(dtype).eval(), guide.to(dtype).eval(), history, Schema.from_dict(config["schema"]))
    made.settings, model.trained = config["settings"], True
    expected = _state(made)
    if expected.keys() != tensors.keys():
        raise StoreError(f"its weights differ from the model's: {sorted(expected.keys() ^ tensors.keys())}")
    for name, tensor in expected.items():
        if tensor.shape != tensors[name].shape:
            raise StoreError(f"{name} has shape {tuple(tensors[name].shape)}, the model {tuple(tensor.shape)}")
        with torch.no_grad():
            tensor.copy_(tensors[name])
    return made


def _state(fit: Fit) -> dict[str, Tensor]:
    pair = {"model": fit.model, "guide": fit.guide}
    return {f"{side}.{name}": value for side, part in pair.items() for name, value in part.state_dict().items()}


def _replaceable(target: Path) -> bool:
    """Whether a path is an empty directory or holds a save and nothing else."""
    if not target.is_dir():
        return False
    names = {item.name for item in target.iterdir()}
    if not names:
        return True
    try:
        return names == {CONFIG, WEIGHTS} and "format" in json.loads((target / CONFIG).read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def _columns(table: pd.DataFrame) -> dict[str, list[float | None]]:
    """Columns as JSON numbers, NaN as null."""
    return {name: [None if pd.isna(v) else v for v in table[name].tolist()] for name in map(str, table)}


def _own() -> dict[type, str]:
    rooms = (guides, libraries, likelihoods, networks, priors, weights)
    classes = [c for room in rooms for _, c in inspect.getmembers(room, inspect.isclass) if _is_part(c)]
    return {c: c.__name__ for c in (*classes, SCVI)}


def _is_part(candidate: type) -> bool:
    packaged = candidate.__module__.startswith("pyro_scvi.")
    return packaged and (issubclass(candidate, nn.Module) or dataclasses.is_dataclass(candidate))


def _class_called(name: str) -> Callable[..., Any]:
    for known, label in _own().items():
        if label == name:
            return known
    raise StoreError(f"unknown part {name!r}")


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
