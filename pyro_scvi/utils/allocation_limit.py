"""A limit on the tensors that a block of code makes: numbers in a file must not decide how much memory that costs."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from pyro_scvi.errors import CheckpointError

_VIEWS = {"expand", "expand_as", "broadcast_to", "view", "view_as", "__get__", "__set__", "size", "dim", "stride"}
_RESTORING = {"_set_grad_enabled", "set_rng_state", "set_state"}  # by which contexts end, also after the limit was met
_PRODUCTS = {"linear", "matmul", "mm", "__matmul__"}
_KEEPING = {"to", "reshape", "flatten", "contiguous", "clone", "detach", "float", "double", "zeros_like", "ones_like"}
_SQUARES = {"eye", "diag", "diag_embed", "diagflat", "outer", "tril_indices", "triu_indices"}

_ROUGH = 0.001  # of the limit: results that may be larger are not estimated, because estimates add up

_TOO_MUCH = "it asks for far more memory or time than its weights need"


class AllocationLimit(TorchFunctionMode):
    """A context in which results of torch have at most ``largest`` elements each, and ``elements`` together.

    The size of a result is known before a function is called: roughly from the shapes it is given, and from torch's
    meta device, where tensors have no memory but which takes seconds to start, if that is too much.

    Raises
    ------
    CheckpointError
        By the function that goes beyond the limit.
    """

    def __init__(self, largest: int, elements: int, calls: int) -> None:
        super().__init__()
        self.largest, self.elements, self.calls, self.rough = largest, elements, calls, _ROUGH * elements

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, if its result is within the limit."""
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in _RESTORING:
            return func(*args, **kwargs)
        self.calls -= 1
        if name not in _VIEWS:
            self._require(func, name, args, kwargs)
        if self.elements < 0 or self.calls < 0:
            raise CheckpointError(_TOO_MUCH)
        return func(*args, **kwargs)

    def _require(self, func: Any, name: str, args: Any, kwargs: Any) -> None:
        made = _at_most(name, args, kwargs)
        if made > self.rough:
            made = _exactly(func, args, kwargs)
        if made > self.largest:
            raise CheckpointError(_TOO_MUCH)
        self.elements -= made


def _at_most(name: str, args: Any, kwargs: Any) -> int:
    """Elements that a function's result has at most, by the sizes and the shapes among its arguments."""
    if name in _KEEPING and args and isinstance(args[0], Tensor):
        return args[0].numel()
    # "new_full" and its kin take no more than type and device from their tensor.
    leaves = tree_leaves((args[name.startswith("new_") :], kwargs))
    sizes = math.prod(leaf for leaf in leaves if type(leaf) is int and leaf > 1)
    shapes = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
    if name in _PRODUCTS and len(shapes) > 1 and shapes[0]:
        return math.prod(map(math.prod, shapes[:2])) // shapes[0][-1] ** 2
    try:
        made = sizes * math.prod(np.broadcast_shapes(*shapes))
    except ValueError:
        made = sizes * math.prod(map(math.prod, shapes))
    return made**2 if name in _SQUARES else made


def _exactly(func: Any, args: Any, kwargs: Any) -> int:
    """Elements of a function's result; as many as can be where they depend on values."""
    device = {"device": torch.device("meta")} if not any(isinstance(a, Tensor) for a in tree_leaves(args)) else {}
    try:
        result = func(*tree_map(_without_memory, args), **{**tree_map(_without_memory, kwargs), **device})
    except (NotImplementedError, RuntimeError, TypeError):
        return _at_most("", args, kwargs)
    return sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


def _without_memory(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value
