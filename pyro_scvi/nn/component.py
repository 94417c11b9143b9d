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
    """Evaluation mode inside; every module's own mode is put back afterwards."""
    modes = [(module, module.training) for part in parts for module in part.modules()]
    for part in parts:
        part.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class Component(nn.Module):
    """Base of every swappable piece: priors, likelihoods, dispersions, libraries, networks, models, guides.

    ``arguments`` holds what the constructor was called with. ``pyro_name`` is unique in the session, also for
    copies: Pyro's parameter store is global, and two models under one name would silently share parameters. A part that
    fits a model of one number of genes only says it in ``expected_genes``.
    """

    arguments: dict[str, Any]
    pyro_name: str
    expected_genes: int | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Component":
        """Remember the arguments before the constructor runs."""
        self = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind_partial(self, *args, **kwargs)
        object.__setattr__(self, "arguments", dict(list(bound.arguments.items())[1:]))  # all but the object itself
        object.__setattr__(self, "pyro_name", f"{cls.__name__}_{next(_serial)}")
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        object.__setattr__(self, "pyro_name", f"{type(self).__name__}_{next(_serial)}")

    def config(self) -> dict[str, Any]:
        """The constructor's arguments, with the parts that are held now where they were exchanged or left out."""
        made = {}
        for key, parameter in constructor_parameters(type(self)).items():
            given, held = self.arguments.get(key, parameter.default), self._modules.get(key)
            if held is not None and (given is None or isinstance(given, nn.Module)):
                made[key] = held
            elif key in self.arguments:
                made[key] = given
        return made

    def shown(self) -> dict[str, Any]:
        """The arguments that the repr gives."""
        return self.config()

    def __repr__(self) -> str:
        shown = ", ".join(f"{key}={_brief(value)}" for key, value in self.shown().items() if value is not None)
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        facts = {key: _brief(value) for key, value in self.shown().items() if value is not None}
        learned = sum(p.numel() for p in self.parameters() if p.requires_grad)
        return table(type(self).__name__, facts | {"parameters to learn": f"{learned:,}"})


def constructor_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """What the constructor takes, by name, without the object itself.

    Asked of the class, the first releases of Python 3.11 give the signature of :meth:`Part.__new__`.
    """
    return dict(list(inspect.signature(cls.__init__).parameters.items())[1:])  # type: ignore[misc]


def lasting_repr(value: Any) -> str:
    """The repr, without addresses, which are others in every process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _brief(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"<{'x'.join(map(str, shape))}>" if shape is not None and len(shape) else repr(value)
