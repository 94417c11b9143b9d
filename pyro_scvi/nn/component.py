"""Component: base class of models, priors, likelihoods and guides; it remembers its constructor's arguments."""

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from torch import nn

from pyro_scvi.utils.html_repr import table

_serial = count()


@contextmanager
def evaluation_mode(*parts: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode for the block; afterwards each returns to the mode that it had."""
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Component(nn.Module):
    """Base class of everything that can be exchanged: priors, likelihoods, dispersions, libraries, networks, guides.

    ``arguments`` holds the arguments of the constructor. ``pyro_name`` is unique in the session, also for copies:
    Pyro's parameter store is global, and two models of one name would silently share parameters. ``expected_genes`` is
    the number of genes that a component was made for, None if it takes any.
    """

    arguments: dict[str, Any]
    pyro_name: str
    expected_genes: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Component":
        """Remember the arguments before the constructor runs."""
        self = super().__new__(cls)
        # By object.__setattr__, because that of nn.Module works only after its __init__.
        signature = inspect.signature(cls.__init__)
        try:
            bound = signature.bind_partial(self, *args, **kwargs)
        except TypeError as error:
            known = ", ".join(list(signature.parameters)[1:]) or "none"
            raise TypeError(f"{cls.__name__}() {error}; its arguments: {known}") from None
        object.__setattr__(self, "arguments", dict(list(bound.arguments.items())[1:]))  # without self
        named_anew(self)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # of a copy, which must not share the original's parameters in Pyro's store
        named_anew(self)

    def config(self) -> dict[str, Any]:
        """The constructor's arguments; components that were left out or exchanged are shown as they are now."""
        made = {}
        for key, parameter in constructor_parameters(type(self)).items():
            given, held = self.arguments.get(key, parameter.default), self._modules.get(key)
            if isinstance(held, Component if given is None else nn.Module) and isinstance(given, nn.Module | None):
                made[key] = held
            elif key in self.arguments:
                made[key] = given
        return made

    def shown(self) -> dict[str, Any]:
        """The arguments shown in the repr."""
        return self.config()

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={_brief(value)}" for key, value in self.shown().items() if value is not None)
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        facts = {key: _brief(value) for key, value in self.shown().items() if value is not None}
        learned = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return table(type(self).__name__, facts | {"parameters to learn": f"{learned:,}"})


def named_anew(component: Component) -> None:
    """Give a component a ``pyro_name`` that no other has."""
    object.__setattr__(component, "pyro_name", f"{type(component).__name__}_{next(_serial)}")


def constructor_parameters(cls: type[Any]) -> dict[str, inspect.Parameter]:
    """Parameters of the constructor by name, without self.

    From ``__init__``, because of a class the first releases of Python 3.11 give the signature of ``__new__``.
    """
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])


def lasting_repr(value: Any) -> str:
    """The repr without memory addresses, which differ between processes."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"<{'x'.join(map(str, shape))}>" if shape is not None and len(shape) else repr(value)
