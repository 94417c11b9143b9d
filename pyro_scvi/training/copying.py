"""Copies of model and guide, which are trained or filled in place of those that were given."""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.nn.closures import reached
from pyro_scvi.nn.component import Component, named_anew
from pyro_scvi.utils.out_of_memory import is_out_of_memory

OfGuide = TypeVar("OfGuide", bound=Guide | None)

_OF_MODULES = frozenset(vars(nn.Module()))  # attributes that torch keeps, the parts among them
_DESCRIPTIONS = frozenset({"arguments", "pyro_name"})  # of components: what they were made of, which the parts are, too


class _Span(NamedTuple):
    """Where a tensor lies: its first byte, and its last byte + 1."""

    device: str
    start: int
    end: int


def copied(model: SCVI, guide: OfGuide) -> tuple[SCVI, OfGuide]:
    """Copy model and guide together: the copied guide is of the copied model, and they share what the given ones share.

    Everything has the same values, random states and hooks included. Only functions are not copied, as always in
    Python, so what they reach must not be a part of the given model or guide.

    Raises
    ------
    ModelError
        If something cannot be copied, a part would still be of the given ones, or a parameter shares memory with
        another tensor; names it.
    """
    given: dict[str, Any] = {"model": model} if guide is None else {"model": model, "guide": guide}
    _require_own_memory(given)
    memo = dict[int, Any]()  # Python's: identity of what was given -> its copy
    try:
        with _ResultsDetached():
            made = copy.deepcopy(given, memo)
            _keep_hooks(given, made, memo)
    except Exception as error:  # Python and torch raise many kinds for what has no copy
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"{_uncopied(given)} cannot be copied, and training takes a copy of model and guide "
            f"({type(error).__name__}: {error}): keep it outside of them, or give its class a __deepcopy__"
        ) from error
    for part in made.values():
        for component in part.modules():
            if isinstance(component, Component):
                named_anew(component)
    _require_separate(given, made)
    copies: Any = made["model"], made.get("guide")
    return copies[0], copies[1]


class _ResultsDetached(TorchFunctionMode):
    """Lets deepcopy copy the results of earlier calls, which a part may keep, without their gradients."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.__deepcopy__ or args[0].is_leaf:
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        memo[id(tensor)] = tensor.detach().clone()
        return memo[id(tensor)]


def _uncopied(given: dict[str, Any]) -> str:
    """The first attribute of a module that cannot be copied; the whole if each can."""
    for what, part in given.items():
        for path, module in part.named_modules(prefix=what):
            for name, value in _attributes(module):
                try:
                    with _ResultsDetached():
                        copy.deepcopy(value)
                except Exception:
                    return f"{path}.{name}"
    return "the model" if len(given) == 1 else "the model with its guide"


def _attributes(module: nn.Module) -> list[tuple[str, Any]]:
    """What a module holds beside parameters, buffers, parts and hooks."""
    return [item for item in vars(module).items() if item[0] not in _OF_MODULES | _DESCRIPTIONS]


def _keep_hooks(given: dict[str, Any], made: dict[str, Any], memo: dict[int, Any]) -> None:
    """Register the hooks of parameters with their copies: torch leaves them out."""
    pairs = zip(_parameters(given), _parameters(made), strict=True)
    for ours, theirs in {id(p): (p, q) for (_, p), (_, q) in pairs}.values():  # once, if model and guide share it
        if not (_hooks(ours, "_backward_hooks") or _hooks(ours, "_post_accumulate_grad_hooks")):
            continue  # integers, too, which cannot have a gradient
        theirs.requires_grad_()  # torch registers with no others; it may have been frozen after its hook was made
        for hook in _hooks(ours, "_backward_hooks"):
            theirs.register_hook(copy.deepcopy(hook, memo))
        for hook in _hooks(ours, "_post_accumulate_grad_hooks"):
            theirs.register_post_accumulate_grad_hook(copy.deepcopy(hook, memo))
        theirs.requires_grad_(ours.requires_grad)


def _hooks(parameter: Any, kind: str) -> list[Any]:
    return list((getattr(parameter, kind, None) or {}).values())


def _parameters(parts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for what, part in parts.items():
        yield from part.named_parameters(prefix=what)


def _require_separate(given: dict[str, Any], made: dict[str, Any]) -> None:
    """Refuse copies that reach a part of the given model or guide: training would read or change it there."""
    theirs = {id(thing): thing for part in given.values() for thing in _things(part)}

    def is_theirs(value: Any) -> bool:
        return id(value) in theirs

    found = {path for what, value in _roots(made) for path in reached(value, what, is_theirs)}
    if found:
        shortest = sorted(found, key=lambda path: (len(path), path))
        raise ModelError(
            f"{', '.join(shortest[:3])}: still refers to the model that was given. Training copies model and "
            "guide, but functions are not copied. Let the code reach it as an attribute of its own object "
            "(self.model in a guide), as an argument, or by functools.partial"
        )
    if "guide" in made and made["guide"].model is not made["model"]:
        raise ModelError("the guide's copy is of another model than the model's copy: let Guide.model be as it is")


def _roots(made: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Where code may be: modules, their other attributes, and hooks of parameters."""
    for what, part in made.items():
        for path, module in part.named_modules(prefix=what):
            yield path, module
            yield from ((f"{path}.{name}", value) for name, value in _attributes(module))
    for path, parameter in _parameters(made):
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            yield from ((f"a hook of {path}", hook) for hook in _hooks(parameter, kind))


def _things(part: nn.Module) -> Iterator[Any]:
    yield from part.modules()
    yield from part.parameters()
    yield from part.buffers()


def _require_own_memory(given: dict[str, Any]) -> None:
    """Refuse a parameter whose memory is also another tensor's: the copy of one would no longer follow the other."""
    furthest: tuple[_Span, str, Tensor] | None = None
    for span, name, tensor in sorted((_span(tensor), name, tensor) for name, tensor in _tensors(given)):
        if furthest and span.device == furthest[0].device and span.start < furthest[0].end:
            if any(isinstance(one, nn.Parameter) for one in (tensor, furthest[2])):
                raise ModelError(
                    f"{furthest[1]} and {name} share memory, and the copy that training takes would not. Let both "
                    "be one nn.Parameter, or compute one from the other where it is used"
                )
            if span.end <= furthest[0].end:
                continue
        furthest = span, name, tensor


def _tensors(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that have memory, each once."""
    named = [
        (name, tensor)
        for what, part in given.items()
        for name, tensor in (*part.named_parameters(prefix=what), *part.named_buffers(prefix=what))
    ]
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in reversed(named)}.values():
        if tensor.layout is torch.strided and tensor.device.type != "meta" and tensor.numel():
            yield name, tensor


def _span(tensor: Tensor) -> _Span:
    n = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return _Span(str(tensor.device), start, start + n * tensor.element_size())
