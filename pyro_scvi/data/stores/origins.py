"""By what a file is known again as the one that a store was built from: its content."""

import hashlib
from pathlib import Path
from typing import Any

CHUNK = 2**24
"""Bytes that are read at a time."""


def origin(path: Path) -> dict[str, Any]:
    """Path, size and times of a file; of a folder those of all its files.

    ``states`` takes in the time that only the system sets. It changes, too, where no byte does: by a link or by rights.
    """
    files = _files(path)
    states = [file.stat() for file in files]
    told = zip(files, states, strict=True)
    known = [f"{file}\0{state.st_size} {state.st_mtime_ns} {state.st_ctime_ns}\0" for file, state in told]
    return {
        "path": str(path),
        "bytes": sum(state.st_size for state in states),
        "modified": max((state.st_mtime_ns for state in states), default=0),
        "states": hashlib.sha256("".join(known).encode("utf-8", "surrogateescape")).hexdigest()[:16],
    }


def with_contents(plan: dict[str, Any]) -> dict[str, Any]:
    """A plan whose files are noted with a digest of their bytes, which are read once for it."""
    files = {name: file | {"content": _content(Path(file["path"]))} for name, file in plan["files"].items()}
    return plan | {"files": files}


def same_plan(earlier: Any, plan: dict[str, Any]) -> bool:
    """Whether a store was begun with this plan, from files of this content."""
    if not isinstance(earlier, dict) or not isinstance(files := earlier.get("files"), dict):
        return False
    if {**earlier, "files": None} != {**plan, "files": None} or list(files) != list(plan["files"]):
        return False
    return all(same_file(then, plan["files"][name]) for name, then in files.items())


def same_file(then: Any, now: dict[str, Any]) -> bool:
    """Whether a file is the one that was noted; its bytes are read only where its times are others.

    Earlier versions noted no content: there path, size and time of the last change have to be the same.
    """
    if not isinstance(then, dict):
        return False
    if "content" not in then:
        return all(then.get(name) == now[name] for name in ("path", "bytes", "modified"))
    if all(then.get(name) == now[name] for name in ("path", "states")):
        return True
    return bool(then.get("bytes") == now["bytes"] and then["content"] == _content(Path(now["path"])))


def _files(path: Path) -> list[Path]:
    return sorted(path.rglob("*")) if path.is_dir() else [path]


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the names and bytes of all files of a folder."""
    digest = hashlib.sha256()
    for file in _files(path):
        if not file.is_file():
            continue
        digest.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
        with file.open("rb") as content:
            while chunk := content.read(CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
