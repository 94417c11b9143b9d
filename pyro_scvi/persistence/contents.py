"""Contents of values by which two calls are compared: the same in every process, and another for any other content."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scipy import sparse
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component, lasting_repr
from pyro_scvi.persistence.digests import digest_of, digests_of_columns, has_padding
from pyro_scvi.utils.checks import brief
from pyro_scvi.utils.out_of_memory import is_out_of_memory

PLAIN = (type(None), bool, int, float, complex, str, bytes, slice, range, Enum, torch.dtype, torch.device, torch.Size)
OF_ANNDATA = ("X", "layers", "obs", "var", "obsm", "varm", "uns")

_BIND = "Bind numbers, words, arrays, tables or objects with attributes"

Known = Callable[[Any], str | None]


def content_of(value: Any, known: Known = lambda value: None) -> str:
    """A value in words; arrays and tables enter by a digest of their content.

    ``known`` gives the words for values of other kinds, or None. Functions are told by module and name.

    Raises
    ------
    ModelError
        For an object that has no content that could be compared.
    """
    try:
        return _Contents(known).of(value)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        what = f"{type(value).__module__}.{type(value).__qualname__}"
        reason = brief(str(error))
        raise ModelError(f"a value inside of {what} cannot be recognised by a later call: {reason}. {_BIND}") from error


def content_of_parts(*wholes: nn.Module) -> str:
    """Constructor's arguments of all components inside modules that are none of this package, in words.

    Their repr shows arrays by their shape alone.
    """
    parts = [
        (name, part.arguments)
        for whole in wholes
        for name, part in whole.named_modules()
        if isinstance(part, Component) and not type(part).__module__.startswith("pyro_scvi.")
    ]
    return content_of(parts) if parts else ""


@dataclasses.dataclass
class _Contents:
    """Goes through values; ``inside`` are the objects that lead to the one at hand, some of which hold themselves."""

    known: Known
    inside: list[int] = dataclasses.field(default_factory=list)

    def of(self, value: Any) -> str:
        if (words := self.known(value)) is not None:
            return words
        if id(value) in self.inside:
            return f"the {type(value).__qualname__} itself"
        self.inside.append(id(value))
        try:
            return self._plain(value) or self._of_data(value) or self._of_container(value) or self._of_object(value)
        finally:
            self.inside.pop()

    def _plain(self, value: Any) -> str:
        if isinstance(value, np.generic):
            item = value.item()  # a number of 80 bits is its own item
            return repr(value) if isinstance(item, np.generic) else self.of(item)
        if isinstance(value, PurePath):
            return repr(str(value))
        if isinstance(value, PLAIN):
            return repr(value)
        if isinstance(value, ModuleType):
            return value.__name__
        if isinstance(value, partial):
            return self._of_partial(value)
        if isinstance(value, MethodType):
            return f"{value.__func__.__module__}.{value.__func__.__qualname__} of {self.of(value.__self__)}"
        if isinstance(value, FunctionType | BuiltinFunctionType | type):
            return f"{value.__module__}.{value.__qualname__}"
        return ""

    def _of_partial(self, value: partial[Any]) -> str:
        named = [f"{name}={self.of(bound)}" for name, bound in sorted(value.keywords.items())]
        bound = ", ".join([*map(self.of, value.args), *named])
        return f"{self.of(value.func)}({bound})" if bound else self.of(value.func)

    def _of_data(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return self._of_tensor(value)
        if sparse.issparse(value):
            rows: Any = sparse.csr_array(value, copy=True)  # type: ignore[call-overload]
            rows.sum_duplicates()
            return f"sparse {rows.shape} {self._all(rows.data, rows.indices, rows.indptr)}"
        if isinstance(value, pd.DataFrame):
            columns = [self._of_column(value.columns[i], value.iloc[:, i]) for i in range(value.shape[1])]
            return f"table {self.of(value.index)} {columns}"
        if isinstance(value, pd.Series | pd.Index | pd.Categorical):
            index = self.of(value.index) if isinstance(value, pd.Series) else ""
            return f"column {getattr(value, 'name', None)!r} {self._of_column('values', pd.Series(value))} {index}"
        if isinstance(value, np.ma.MaskedArray):
            return f"masked {self._all(np.asarray(value.data), np.ma.getmaskarray(value))}"
        if isinstance(value, np.ndarray):
            words = value.dtype.hasobject or has_padding(value.dtype)
            content = self._all(*value.ravel().tolist()).encode() if words else value.tobytes()
            return f"array {value.dtype} {value.shape} {digest_of([content])}"
        if isinstance(value, AnnData):
            return f"AnnData {self._all(*(getattr(value, name) for name in OF_ANNDATA))}"
        return ""

    def _of_column(self, name: Any, column: pd.Series) -> str:
        """Objects of any kind one by one, among them lists; all else by its digest."""
        if pd.api.types.is_object_dtype(column) and pd.api.types.infer_dtype(column) not in ("string", "boolean"):
            return f"{name!r} {self._all(*column.tolist())}"
        return str(digests_of_columns(column.reset_index(drop=True).to_frame(name)))

    def _of_tensor(self, value: Tensor) -> str:
        dense = value.detach().cpu()
        dense = dense.to_dense() if dense.layout is not torch.strided else dense
        numbers = dense.float() if dense.dtype is torch.bfloat16 else dense
        return f"{value.dtype} {self.of(np.asarray(numbers))}"

    def _of_container(self, value: Any) -> str:
        if isinstance(value, Mapping):
            items = sorted(f"{self.of(key)}: {self.of(item)}" for key, item in value.items())
            return f"{{{', '.join(items)}}}"
        if isinstance(value, Set):
            return f"{{{', '.join(sorted(map(self.of, value)))}}}"
        if isinstance(value, Sequence) or type(value).__name__ == "deque":
            return f"({self._all(*value)})"
        return ""

    def _of_object(self, value: Any) -> str:
        kind = f"{type(value).__module__}.{type(value).__qualname__}"
        if isinstance(value, torch.Generator):
            return f"{kind} {self.of(value.get_state())}"
        if isinstance(value, np.random.Generator):
            return f"{kind} {self.of(value.bit_generator.state)}"
        if isinstance(value, Component):
            return f"{lasting_repr(value)} {self.of(value.state_dict())} {content_of_parts(value)}"
        if isinstance(value, nn.Module):
            return f"{lasting_repr(value)} {self.of(value.state_dict())}"
        fields = [*getattr(value, "__dict__", ()), *_slots(type(value))]
        if fields or hasattr(value, "__dict__") or type(value) is object:
            return f"{kind} {self.of({name: getattr(value, name) for name in fields if hasattr(value, name)})}"
        raise ModelError(f"a value of type {kind} has no content that a later call could be compared by. {_BIND}")

    def _all(self, *values: Any) -> str:
        return ", ".join(map(self.of, values))


def _slots(kind: type) -> Iterable[str]:
    for base in kind.__mro__:
        slots = base.__dict__.get("__slots__", ())
        yield from [slots] if isinstance(slots, str) else slots
