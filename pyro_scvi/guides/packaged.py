"""Whether all that a program runs is this package's, so that what holds for that need not be looked for."""

from typing import Any

from torch import nn

from pyro_scvi.model import SCVI

KNOWN = ("pyro_scvi.", "torch.nn.", "pyro.distributions.", "pyro.nn.")
"""Packages whose code does what this one relies on."""

PROGRAM = ("__call__", "forward", "prior_of", "decode", "observe")
"""What a model runs; a class that overrides none of it has the program of this package."""


def is_packaged(model: SCVI, *, decoding: bool = False) -> bool:
    """Whether all that the program runs is this package's; with ``decoding``, all that leads from z to theta."""
    if any(getattr(type(model), name) is not getattr(SCVI, name) for name in PROGRAM) or _is_patched(model):
        return False
    parts: tuple[Any, ...] = (model.likelihood, model.library, model.decoder)
    if not decoding:
        parts += (model.prior, *model.weights.makers)
    return all(map(_is_known, parts))


def _is_known(part: Any) -> bool:
    """Whether a part and the modules that it is made of are of known classes, and have no method of their own."""
    inner = part.modules() if isinstance(part, nn.Module) else [part]
    return all(type(one).__module__.startswith(KNOWN) and not _is_patched(one) for one in inner)


def _is_patched(part: Any) -> bool:
    """Whether a method of its class has another in its place."""
    own = [name for name in getattr(part, "__dict__", ()) if not name.startswith("_")]  # torch's transforms have others
    return any(callable(getattr(type(part), name, None)) for name in own)
