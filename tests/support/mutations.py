"""Mutations of a directory that the archive wrote: of bytes, and of values with the digests that those should have."""

import hashlib
import json

import safetensors.torch
import torch

from pyro_scvi.persistence import archive

VALUES = (None, True, -1, 0, 1, 3, 2.5, 1e308, float("nan"), "", "x", "float64", "SCVI", "../config.json", [], [1], {})
PARTS = (
    {"part": "os.system", "arguments": {"command": "false"}},
    {"part": "SCVI", "arguments": {}},
    {"part": "Point", "arguments": {"model": {"the": "model"}}},
    {"foreign": "lambda: 0"},
    {"tensor": [[1.0], [2.0, 3.0]]},
    {"mapping": {"x": 1}},
    {"the": "model"},
)


def mutate(path, other, rng):
    """Alter one thing; returns "bytes" where no digest was put right, else "signed"."""
    ways = (_flip, _cut, _insert, _remove, _blank, _swap, _delete, _foreign, _edit, _edit, _sign, _sign, _sign_tensors)
    return ways[rng.integers(len(ways))](path, other, rng)


def _files(path):
    return sorted(path.iterdir())


def _some(path, rng):
    files = _files(path)
    file = files[rng.integers(len(files))]
    return file, file.read_bytes()


def _flip(path, other, rng):
    file, content = _some(path, rng)
    altered = bytearray(content)
    for place in rng.integers(len(content), size=rng.integers(1, 5)):
        altered[place] ^= 1 << rng.integers(8)
    if altered == content:  # the same bit twice
        altered[0] ^= 1
    file.write_bytes(altered)
    return "bytes"


def _cut(path, other, rng):
    file, content = _some(path, rng)
    file.write_bytes(content[: rng.integers(len(content))])
    return "bytes"


def _insert(path, other, rng):
    file, content = _some(path, rng)
    place = rng.integers(len(content) + 1)
    file.write_bytes(content[:place] + rng.bytes(rng.integers(1, 9)) + content[place:])
    return "bytes"


def _remove(path, other, rng):
    file, content = _some(path, rng)
    place = rng.integers(len(content))
    file.write_bytes(content[:place] + content[place + rng.integers(1, 9) :])
    return "bytes"


def _blank(path, other, rng):
    """Zeros over a block, as after a power cut; over the first byte at least, which is none before."""
    file, content = _some(path, rng)
    length = rng.integers(1, len(content) + 1)
    file.write_bytes(bytes(length) + content[length:] if content[0] else b"x" + content[1:])
    return "bytes"


def _swap(path, other, rng):
    first, second = (_files(path)[i] for i in rng.choice(len(_files(path)), 2, replace=False))
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    return "bytes"


def _delete(path, other, rng):
    _some(path, rng)[0].unlink()
    return "bytes"


def _foreign(path, other, rng):
    """The file of another save under the name of this one's."""
    theirs = [f for f in _files(other) if f.name not in ("config.json", "previous.json")]
    ours = [f for f in _files(path) if f.name not in ("config.json", "previous.json")]
    ours[rng.integers(len(ours))].write_bytes(theirs[rng.integers(len(theirs))].read_bytes())
    return "bytes"


def _edited(path, rng):
    """The config with one value, key or list entry replaced, added or left out."""
    config = json.loads((path / "config.json").read_text())
    places = list(_places(config))
    holder, key = places[rng.integers(len(places))]
    value = (*VALUES, *PARTS)[rng.integers(len(VALUES) + len(PARTS))]
    match rng.integers(4):
        case 0:
            del holder[key]
        case 1 if isinstance(holder, dict):
            holder["stranger"] = value
        case _:
            holder[key] = value
    return config


def _edit(path, other, rng):
    text = json.dumps(_edited(path, rng), indent=1) + "\n"
    same = text.encode() == (path / "config.json").read_bytes()
    (path / "config.json").write_text(text + " " * same)
    return "bytes"


def _sign(path, other, rng):
    config = _edited(path, rng)
    config.pop("sha256", None)
    (path / "config.json").write_bytes(archive.signed(config))
    return "signed"


def _sign_tensors(path, other, rng):
    config = json.loads((path / "config.json").read_text())
    file = path / config["weights"]["file"]
    tensors = safetensors.torch.load_file(file)
    name = sorted(tensors)[rng.integers(len(tensors))]
    tensor = tensors[name]
    match rng.integers(5):
        case 0:
            del tensors[name]
        case 1:
            tensors["stranger"] = tensor.clone()
        case 2:
            tensors[name] = torch.zeros(3, 2)
        case 3:
            tensors[name] = tensor.double() if tensor.dtype != torch.float64 else tensor.float()
        case 4:
            tensors[name] = torch.ones_like(tensor)
    blob = safetensors.torch.save({key: value.contiguous() for key, value in tensors.items()})
    file.write_bytes(blob)
    config["weights"]["sha256"] = hashlib.sha256(blob).hexdigest()
    config.pop("sha256")
    (path / "config.json").write_bytes(archive.signed(config))
    return "signed"


def _places(value):
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])
