"""Archives: a directory with a JSON file and the tensors it names, written whole or not at all, verified when read.

``config.json`` ends with the SHA-256 of everything before it, and holds that of the tensors' file, which is named after
its content. Renaming ``config.json`` therefore replaces both at once, whenever a process or machine stops.
"""

import hashlib
import json
import os
import platform
import re
import secrets
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
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
from pyro_scvi.utils.disk.files import regular_bytes, sync_folder
from pyro_scvi.utils.disk.locks import only_writer
from pyro_scvi.version import __version__

FORMAT = 2
CONFIG, PREVIOUS = "config.json", "previous.json"
_HEAD = {"format", "kind", "versions", "weights", "sha256"}  # keys that every config has, beside those of its content
_FORMAT_WITHOUT_DIGEST = 1  # the first format, which had no digests and one name for weights
_WEIGHTS_WITHOUT_DIGEST = "weights.safetensors"
_WEIGHTS = re.compile(r"weights-[0-9a-f]{16}\.safetensors")
_LOCK = re.compile(r"\..+\.lock")  # inside a folder whose parent cannot be written
_PARTIAL = re.compile(r"\.(config|previous|weights-[0-9a-f]{16})-[0-9a-f]{16}\.part")
_SIGNATURE = ',\n "sha256": "{}"\n}}\n'
_SIGNED = len(_SIGNATURE.format("0" * 64))


class Content(NamedTuple):
    """Content of a directory: its kind, values as JSON takes them, and tensors by name."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]


def folder(path: Any) -> Path:
    """The directory at a path, with ~ resolved; the same one if the process changes its working directory.

    Raises
    ------
    CheckpointError
        If no directory can have that name.
    """
    try:
        directory = Path(path).expanduser().absolute()
    except (TypeError, RuntimeError) as error:
        raise CheckpointError(f"expected the path of a directory, got {path!r}: {error}") from error
    if "\0" in str(directory):
        raise CheckpointError(f"expected the path of a directory, got {path!r}, which is not a valid file name")
    return directory


@contextmanager
def alone(target: Path) -> Iterator[None]:
    """Let no other run and no other process write into a directory while the block runs.

    Raises
    ------
    CheckpointError
        If another one does, or nothing can be written there.
    """
    with ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(only_writer(target))
        except BlockingIOError as error:
            raise CheckpointError(str(error)) from error
        except OSError as error:
            raise CheckpointError(f"could not write {target}: {error}; what was there before is intact") from error
        yield


def write(target: Path, content: Content, *, keep_previous: bool = False) -> None:
    """Write into the directory ``target``; earlier content stays readable until the new content is complete.

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
        Kinds that may be there, each with the exact set of names of its facts.
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
    """Refuse a path that holds anything but earlier content of this kind.

    Raises
    ------
    CheckpointError
        If it does; names what is there.
    """
    if not os.path.lexists(target):
        return
    try:
        names = {item.name: item.is_file() for item in target.iterdir()}
    except OSError as error:
        raise CheckpointError(f"{target} is not a directory that can be written: {error}") from error
    ours = {name for name, is_file in names.items() if is_file and _may_be_ours(name, _weights_of(target))}
    unexpected = sorted(names.keys() - ours)
    kinds = {config: _kind(target / config) for config in (CONFIG, PREVIOUS) if config in names}
    if kinds.get(CONFIG) is None and kinds.get(PREVIOUS) == kind:  # the newest is corrupt, the one before it is not
        kinds.pop(CONFIG, None)
    unexpected += [
        f"a {held}" if held else f"a broken or strange {config}" for config, held in kinds.items() if held != kind
    ]
    if unexpected:
        raise CheckpointError(
            f"{target} holds files that are not of a saved {kind}: {', '.join(unexpected[:3])}; nothing was "
            "overwritten, choose another path"
        )


def remove_orphans(target: Path) -> None:
    """Delete files left by a process that was stopped while it wrote. Safe only if no other process is writing."""
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
    # The config is written last: until then readers see the earlier content.
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
    sync_folder(target.parent)
    for name in before - _weights_of(target) - {None}:
        (target / str(name)).unlink(missing_ok=True)
    if not keep_previous:  # of checkpoints they are removed when a run begins
        remove_orphans(target)


def _replace(path: Path, content: bytes) -> None:
    """Write a file under another name, and rename it once it is on the disk."""
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
    sync_folder(path.parent)


def signed(facts: dict[str, Any]) -> bytes:
    """Content of ``config.json`` for these facts: JSON that ends with the digest of everything before it."""
    body = json.dumps(facts, indent=1).removesuffix("\n}").encode()
    return body + _SIGNATURE.format(hashlib.sha256(body).hexdigest()).encode()


def _verified(path: Path, raw: bytes, keys: Mapping[str, set[str]]) -> dict[str, Any]:
    """The facts, after checks of the digest, the format, the kind and the names."""
    facts = _parsed(raw)
    if _lacks_digest(facts) and "sha256" not in facts:
        facts |= {"format": FORMAT, "kind": "fit", "versions": {}}
        facts |= {"weights": {"file": _WEIGHTS_WITHOUT_DIGEST}, "sha256": None}
    elif raw[-_SIGNED:] != _SIGNATURE.format(hashlib.sha256(raw[:-_SIGNED]).hexdigest()).encode():
        why = "".join(f"; it has {wrong}" for wrong in _mismatches(facts, keys)) if facts else ""
        raise CheckpointError(f"{path} is corrupt: its SHA-256 is not the one written with it{why}")
    if wrong := _mismatches(facts, keys):
        raise CheckpointError(f"{path} has {' and '.join(wrong)}")
    if _weights_named(facts) is None:
        raise CheckpointError(f"{path} names {facts['weights']!r}, which is not a file of weights")
    return facts


def _mismatches(facts: dict[str, Any], keys: Mapping[str, set[str]]) -> list[str]:
    """In words, how the facts differ from what this version writes."""
    version, kind = facts.get("format"), facts.get("kind")
    if version != FORMAT:
        return [f"format {version!r}, where this version reads {FORMAT}"]
    if str(kind) not in keys:
        return [f"a saved {kind}, not a {' or '.join(keys)}"]
    expected = keys[str(kind)] | _HEAD
    unknown, missing = sorted(facts.keys() - expected), sorted(expected - facts.keys())
    return [f"{what} keys {names}" for what, names in (("unknown", unknown), ("no", missing)) if names]


def _bytes(path: Path) -> bytes:
    try:
        return regular_bytes(path)
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
        return _parsed(regular_bytes(path))
    except OSError:
        return {}


def _kind(path: Path) -> str | None:
    facts = _peek(path)
    return str(facts["kind"]) if "kind" in facts else "fit" if _lacks_digest(facts) else None


def _weights_named(facts: dict[str, Any]) -> str | None:
    """The file of weights that a config names, None if this module gives no such name."""
    held = facts.get("weights")
    name = _WEIGHTS_WITHOUT_DIGEST if _lacks_digest(facts) else held.get("file") if isinstance(held, dict) else None
    return name if isinstance(name, str) and (name == _WEIGHTS_WITHOUT_DIGEST or _WEIGHTS.fullmatch(name)) else None


def _weights_of(target: Path) -> set[str | None]:
    return {_weights_named(_peek(target / config)) for config in (CONFIG, PREVIOUS)}


def _lacks_digest(facts: dict[str, Any]) -> bool:
    return type(facts.get("format")) is int and facts["format"] == _FORMAT_WITHOUT_DIGEST  # by type, because true == 1


def _may_be_ours(name: str, weights: set[str | None]) -> bool:
    """Whether only this module gives such a name, or a config in the directory names it."""
    known = name in {CONFIG, PREVIOUS} | weights or _is_partial(name)
    return known or any(pattern.fullmatch(name) for pattern in (_WEIGHTS, _LOCK))


def _is_partial(name: str) -> bool:
    return _PARTIAL.fullmatch(name) is not None


def _versions() -> dict[str, str]:
    packages = {"torch": torch, "pyro-ppl": pyro, "numpy": np, "safetensors": safetensors}
    ours = {"python": platform.python_version(), "pyro-scvi": __version__}
    return ours | {name: str(package.__version__) for name, package in packages.items()}
