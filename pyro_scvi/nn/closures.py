"""What a callable reaches beside its arguments, and the refusal of trainable things that no module owns.

A module registers the parameters that are its attributes. What its code reaches otherwise (through a closure, a
default, a partial, a list or a global name) would be neither trained nor moved nor saved, nor copied.
"""

import dis
import functools
import types
import weakref
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor, nn

from pyro_scvi.errors import ModelError

DEEPEST = 8  # steps from the part to what it reaches
MOST = 1000  # items of a container that are looked at
GLOBAL, ATTRIBUTE = ("LOAD_GLOBAL", "LOAD_NAME"), ("LOAD_ATTR", "LOAD_METHOD")
LIBRARIES = ("pyro_scvi", "torch", "pyro", "numpy", "builtins", "functools")
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of a module

Names = frozenset[str]
NONE: Names = frozenset()


class _Step(NamedTuple):
    """What lies one step further: how it is written, the thing itself, and which attributes of it the code names."""

    written: str
    value: Any
    names: Names = NONE


def require_owned(part: Any, what: str, *owners: nn.Module) -> None:
    """Refuse a part whose code reaches trainable tensors that are no parameters of the ``owners``.

    Raises
    ------
    ModelError
        Naming the part and how it reaches them.
    """
    own = {id(parameter) for owner in owners for parameter in owner.parameters()}

    def is_lost(value: Any) -> bool:
        return isinstance(value, Tensor) and value.requires_grad and value.is_leaf and id(value) not in own

    lost = sorted(set(reached(part, what, is_lost)))
    if lost:
        raise ModelError(
            f"{', '.join(lost[:3])}: trainable, but it is reached only through the code of the {what}, so it "
            f"would not be trained, moved or saved. Make the {what} a torch.nn.Module that has it as an "
            "attribute, or freeze it by requires_grad_(False)"
        )


def reached(part: Any, what: str, wanted: Callable[[Any], bool]) -> Iterator[str]:
    """How ``part``, called ``what``, reaches what is wanted: as a part of it, or by its code."""
    return _reached(_Step(what, part), 0, {}, wanted)


def _reached(
    step: _Step, depth: int, seen: dict[tuple[int, Names], Any], wanted: Callable[[Any], bool]
) -> Iterator[str]:
    """The paths; ``seen`` keeps the objects, lest another take the place of one."""
    value = step.value
    if wanted(value):
        yield step.written
        return
    if isinstance(value, Tensor):
        return
    key = (id(value), step.names)
    if depth > DEEPEST or key in seen or isinstance(value, str | bytes | int | float | None):
        return
    seen[key] = value
    for further in _further(value, step.names):
        yield from _reached(further._replace(written=step.written + further.written), depth + 1, seen, wanted)


def _further(value: Any, names: Names) -> Iterator[_Step]:
    if isinstance(value, types.FunctionType):
        return _of_function(value)
    if isinstance(value, types.MethodType):
        return iter([_Step("", value.__func__), _Step("", value.__self__, _named_in(value.__func__))])
    if isinstance(value, functools.partial):
        return iter([_Step(".func", value.func), _Step(".args", value.args), _Step("", value.keywords)])
    if isinstance(value, weakref.ref):
        return iter([_Step("()", value(), names)])
    if isinstance(value, dict):
        return (_Step(f"[{key!r}]", inner, names) for key, inner in islice(value.items(), MOST))
    if isinstance(value, list | tuple | set | frozenset):
        return (_Step(f"[{place}]", inner, names) for place, inner in enumerate(islice(value, MOST)))
    if isinstance(value, types.ModuleType | type):  # of these only what the code takes out and what is itself trainable
        return (step for step in _attributes(value, names) if isinstance(step.value, nn.Module | Tensor))
    return _of_object(value, names)


def _of_function(function: types.FunctionType) -> Iterator[_Step]:
    code, names = function.__code__, _named_in(function)
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if cell != types.CellType():  # not yet filled
            yield _Step(f" -> {name}", cell.cell_contents, names)
    for default in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
        yield _Step(" -> a default", default, names)
    for name in sorted(_loaded(code, GLOBAL) & function.__globals__.keys()):
        found = function.__globals__[name]
        if not isinstance(found, types.FunctionType) or found.__globals__ is function.__globals__:
            yield _Step(f" -> {name}", found, names)


def _of_object(value: Any, names: Names) -> Iterator[_Step]:
    """Parameters and children of a module; the methods of a user's own class that run when it is called; attributes."""
    if isinstance(value, nn.Module):
        yield from (_Step(f".{name}", found) for name, found in value.named_parameters(recurse=False))
        yield from (_Step(f".{name}", found) for name, found in value.named_children())
        yield from (_Step(" -> a hook", hook) for kind in HOOKS for hook in getattr(value, kind).values())
    own = [kind for kind in type(value).__mro__ if kind.__module__.partition(".")[0] not in LIBRARIES]
    methods = {name: found for kind in reversed(own) for name, found in vars(kind).items()}
    for name, found in methods.items():
        function = found.fget if isinstance(found, property) else found
        if isinstance(function, types.FunctionType) and name != "__init__" and (callable(value) or name in names):
            yield _Step("", function)
            yield from _attributes(value, _named_in(function))
    yield from _attributes(value, names)


def _attributes(value: Any, names: Names) -> Iterator[_Step]:
    held = getattr(value, "__dict__", {})
    slotted = {name for name in names & _slots(value) if hasattr(value, name)}
    return (_Step(f".{name}", getattr(value, name), names) for name in sorted(names & held.keys() | slotted))


def _slots(value: Any) -> set[str]:
    """The attributes that an object has by the ``__slots__`` of its classes, and so not in its ``__dict__``."""
    kinds = type(value).__mro__
    return {
        name for kind in kinds for name, found in vars(kind).items() if isinstance(found, types.MemberDescriptorType)
    }


def _named_in(function: Any) -> Names:
    """The attributes that a function's code takes of whatever it has."""
    return _loaded(function.__code__, ATTRIBUTE) if isinstance(function, types.FunctionType) else NONE


def _loaded(code: types.CodeType, operations: tuple[str, ...]) -> Names:
    """The names that code, and the code inside it, loads by these operations."""
    own = {step.argval for step in dis.get_instructions(code) if step.opname in operations}
    return frozenset(own).union(
        *(_loaded(part, operations) for part in code.co_consts if isinstance(part, types.CodeType))
    )
