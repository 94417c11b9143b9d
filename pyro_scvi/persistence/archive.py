"""A directory of one JSON file and the tensors it names: written whole or not at all, read only if not a byte changed.

``config.json`` ends with the SHA-256 of all that precedes it, and holds that of the tensors' file, whose name is taken
from its content. So the one rename of ``config.json`` replaces both at once, whenever a process or machine stops.
"""

import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyro
import safetensors
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pyro_scvi.errors import CheckpointError
from pyro_scvi.utils.checks import warn
from pyro_scvi.version import __version__

FORMAT = 2
CONFIG, PREVIOUS = "config.json", "previous.json"
_HEAD = {"format", "kind", "versions", "weights", "sha256"}  # keys beside those of the content
_UNSIGNED = 1  # the format before digests, and its one name for weights
_UNSIGNED_WEIGHTS = "weights.safetensors"
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_PARTIAL = re.compile(r"\.(config|previous|weights-[0-9a-f]{16})-[0-9a-f]{16}\.part")
_SIGNATURE = ',\n "sha256": "{}"\n}}\n'
_SIGNED = len(_SIGNATURE.format("0" * 64))


class Content(NamedTuple):
    """What a directory holds: of which kind, values as JSON takes them, and tensors by name."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def folder(path: Any) -> Path:
    """The directory that a path names, home directories resolved.

    Raises
    ------
    CheckpointError
        If it names none.
    """
    try:
        found = Path(path).expanduser()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"expected the path of a directory, got {path!r}: {error}") from error
    if "\0" in str(found):
        raise CheckpointError(f"expected the path of a directory, got {path!r}, which no file can be called")
    return found


def write(target: Path, content: Content, *, keep_previous: bool = False) -> None:
    """Write into the directory ``target``; what is there already stays readable until the new content is complete.

    With ``keep_previous`` it stays afterwards, too, as ``previous.json`` and the tensors that this names.

    Raises
    ------
    CheckpointError
        If the directory holds something else, or cannot be written; what was there is intact then.
    """
    check_replaceable(target, content.kind)
    try:
        _write(target, content, keep_previous)
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"could not write {target}: {error}; what was there before is intact") from error


def read(source: Path, keys: Mapping[str, set[str]], *, config: str = CONFIG) -> Content:
    """Read and verify what :func:`write` wrote; ``config`` is the file to start from.

    Parameters
    ----------
    source
        The directory.
    keys
        Kinds that may be there, each with the names that its facts must have, and none beside them.
    config
        ``config.json``, or ``previous.json`` for what it replaced.

    Raises
    ------
    CheckpointError
        If a file is missing, corrupt or of another format or kind, or facts have other names.
    """
    path = source / config
    facts = _verified(path, _bytes(path), keys)
    weights = source / str(_weights_named(facts))
    content = _bytes(weights)
    if facts["sha256"] is None:
        text = f"{source} is of format 1, which cannot tell whether it was damaged; load it and save it again"
        warn(text)
    elif hashlib.sha256(content).hexdigest() != facts["weights"].get("sha256"):
        raise CheckpointError(f"{weights} is corrupt: its SHA-256 is not the one that {path} holds")
    try:
        tensors = load_tensors(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{weights} is corrupt: {error}") from error
    return Content(facts["kind"], {key: facts[key] for key in keys[facts["kind"]]}, tensors)


def check_replaceable(target: Path, kind: str) -> None:
    """Refuse a path where something else lies than nothing or earlier content of this kind.

    Raises
    ------
    CheckpointError
        Naming it.
    """
    if not os.path.lexists(target):
        return
    try:
        names = {item.name: item.is_file() for item in target.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{target} is no directory that can be written: {error}") from error
    found = sorted(name for name, is_file in names.items() if not (is_file and _may_be_ours(name, _weights_of(target))))
    kinds = {config: _kind(target / config) for config in (CONFIG, PREVIOUS) if config in names}
    if kinds.get(CONFIG) is None and kinds.get(PREVIOUS) == kind:  # a corrupt one beside the one before
        kinds.pop(CONFIG, None)
    found += [
        f"a {held}" if held else f"a broken or strange {config}" for config, held in kinds.items() if held != kind
    ]
    if found:
        raise CheckpointError(
            f"{target} holds something else than a saved {kind}: {', '.join(found[:3])}; "
            "nothing was overwritten, choose another path"
        )


def remove_orphans(target: Path) -> None:
    """Delete what was left by a process that failed or was killed while it wrote. Only where nobody else is writing."""
    named = _weights_of(target)
    for item in target.iterdir():
        if _is_partial(item.name) or (_WEIGHTS.fullmatch(item.name) and item.name not in named):
            item.unlink(missing_ok=True)


def _write(target: Path, content: Content, keep_previous: bool) -> None:
    target.mkdir(parents=True, exist_ok=True)
    before = _weights_of(target)
    blob = save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in content.tensors.items()})
    digest = hashlib.sha256(blob).hexdigest()
    weights = {"file": f"weights-{digest[:16]}.safetensors", "sha256": digest}
    head = {"format": FORMAT, "kind": content.kind, "versions": _versions()}
    config = signed({**head, **content.facts, "weights": weights})
    is_new = not (target / weights["file"]).exists()
    try:
        _replace(target / weights["file"], blob)
        if keep_previous and (target / CONFIG).exists():
            _replace(target / PREVIOUS, (target / CONFIG).read_bytes())
        _replace(target / CONFIG, config)
    except OSError:
        if is_new:
            (target / weights["file"]).unlink(missing_ok=True)
        raise
    _sync(target.parent)
    for name in before - _weights_of(target) - {None}:
        (target / str(name)).unlink(missing_ok=True)
    if not keep_previous:  # a checkpoint looks after its own when it begins
        remove_orphans(target)


def _replace(path: Path, content: bytes) -> None:
    """Put a file into its place in one step, once it is on the disk."""
    partial = path.with_name(f".{path.stem}-{secrets.token_hex(8)}.part")
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Have the names in a directory on the disk, where a system can say so."""
    if os.name == "posix":
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def signed(facts: dict[str, Any]) -> bytes:
    """What ``config.json`` holds for these facts: JSON that ends with the digest of all that precedes it."""
    body = json.dumps(facts, indent=1).removesuffix("\n}").encode()
    return body + _SIGNATURE.format(hashlib.sha256(body).hexdigest()).encode()


def _verified(path: Path, raw: bytes, keys: Mapping[str, set[str]]) -> dict[str, Any]:
    """The facts, if every byte is as written, and format, kind and names are those expected."""
    facts = _parsed(raw)
    if _is_unsigned(facts) and "sha256" not in facts:
        facts |= {"format": FORMAT, "kind": "fit", "versions": {}}
        facts |= {"weights": {"file": _UNSIGNED_WEIGHTS}, "sha256": None}
    elif raw[-_SIGNED:] != _SIGNATURE.format(hashlib.sha256(raw[:-_SIGNED]).hexdigest()).encode():
        why = "".join(f"; it has {wrong}" for wrong in _strange(facts, keys)) if facts else ""
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one written with it{why}")
    if wrong := _strange(facts, keys):
        raise CheckpointError(f"{path} has {' and '.join(wrong)}")
    if _weights_named(facts) is None:
        raise CheckpointError(f"{path} names {facts['weights']!r}, which is no file of weights")
    return facts


def _strange(facts: dict[str, Any], keys: Mapping[str, set[str]]) -> list[str]:
    """What is not as this version writes it, in words."""
    found = facts.get("format"), facts.get("kind")
    if found[0] != FORMAT:
        return [f"format {found[0]!r}, where this version reads {FORMAT}"]
    if str(found[1]) not in keys:
        return [f"a saved {found[1]}, not a {' or '.join(keys)}"]
    expected = keys[str(found[1])] | _HEAD
    unknown, missing = sorted(facts.keys() - expected), sorted(expected - facts.keys())
    return [f"{what} keys {names}" for what, names in (("unknown", unknown), ("no", missing)) if names]


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"there is no saved fit or checkpoint, or a part of it is missing: {error}") from error


def _parsed(raw: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _peek(path: Path) -> dict[str, Any]:
    try:
        return _parsed(path.read_bytes())
    except OSError:
        return {}


def _kind(path: Path) -> str | None:
    facts = _peek(path)
    return str(facts["kind"]) if "kind" in facts else "fit" if _is_unsigned(facts) else None


def _weights_named(facts: dict[str, Any]) -> str | None:
    """The file of weights that a config names, if that is a name which this module gives or gave."""
    held = facts.get("weights")
    name = _UNSIGNED_WEIGHTS if _is_unsigned(facts) else held.get("file") if isinstance(held, dict) else None
    return name if isinstance(name, str) and (name == _UNSIGNED_WEIGHTS or _WEIGHTS.fullmatch(name)) else None


def _weights_of(target: Path) -> set[str | None]:
    return {_weights_named(_peek(target / config)) for config in (CONFIG, PREVIOUS)}


def _is_unsigned(facts: dict[str, Any]) -> bool:
    return type(facts.get("format")) is int and facts["format"] == _UNSIGNED  # true is 1, too


def _may_be_ours(name: str, weights: set[str | None]) -> bool:
    """Whether a name is one that only this module gives, or that of the weights which a config here names."""
    return name in {CONFIG, PREVIOUS} | weights or _is_partial(name) or _WEIGHTS.fullmatch(name) is not None


def _is_partial(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None


def _versions() -> dict[str, str]:
    packages = {"torch": torch, "pyro-ppl": pyro, "numpy": np, "safetensors": safetensors}
    ours = {"python": platform.python_version(), "pyro-scvi": __version__}
    return ours | {name: str(package.__version__) for name, package in packages.items()}
