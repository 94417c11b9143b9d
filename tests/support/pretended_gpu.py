"""A pretended GPU: tensors that lie on the CPU, say that they are on a device, and refuse what tensors there refuse.

Values are computed by the CPU's kernels, so programs run to their end. Operations on the device are counted, and so is
what makes the host wait for it. torch must be a build for the CPU, and the guard loaded before torch is imported.
"""

import contextlib
import os
import subprocess
from collections import Counter
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

COPIES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"}
WITHOUT_KERNEL = {
    *("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty"),
    *("aten::_unsafe_view", "aten::detach", "aten::_local_scalar_dense"),
}
WAITS = {
    *("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2"),
    *("aten::unique_dim", "aten::bincount", "aten::repeat_interleave"),
    *("aten::linalg_cholesky_ex", "aten::_linalg_eigh", "aten::_linalg_svd"),
}
# Kernels that take a number from the CPU as an argument; where() copies it to the device first.
TAKE_NUMBERS = {
    *("add", "sub", "mul", "div", "rsub", "pow", "atan2", "remainder", "floor_divide", "maximum", "minimum"),
    *("eq", "ne", "lt", "le", "gt", "ge", "bitwise_and", "logical_and", "where", "fill"),
}


def build_guard(compiler, folder):
    """Compile what torch asks of a device; the path of the library."""
    here, root = os.path.dirname(__file__), os.path.dirname(torch.__file__)
    built, library = os.path.join(folder, "pretended_guard.so"), os.path.join(root, "lib")
    command = [compiler, "-w", "-shared", "-fPIC", "-std=c++17", "-O0", os.path.join(here, "pretended_guard.cpp")]
    command += [f"-I{root}/include", f"-L{library}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{library}", "-o", built]
    subprocess.run(command, check=True, capture_output=True)
    return built


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a device; ``held`` has its values."""

    @staticmethod
    def __new__(cls, held, device):
        if device.type == "mps" and held.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=device,
            requires_grad=False,
        )
        made.held = held
        return made

    def __repr__(self):
        return f"OnDevice({self.held!r}, {self.device})"

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            made = OnDevice(self.held.detach().clone(), self.device)
            is_parameter = isinstance(self, torch.nn.Parameter)
            memo[id(self)] = torch.nn.Parameter(made, self.requires_grad) if is_parameter else made
        return memo[id(self)]

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl


class Everywhere(TorchDispatchMode):
    """Sees operations that make tensors on the device of tensors that are not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatched(func, args, kwargs or {})


class Counts:
    """Operations on the device and waits of the host, while there is something to count in."""

    operations, waits = Counter(), Counter()


def dispatched(func, args, kwargs):
    """Run one operation on the values, and let what it gives be on the device where it would be."""
    flat, spec = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, torch.Tensor)]
    base, place = func._schema.name, place_of(func._schema.name, tensors, kwargs)
    on_device = [t for t in tensors if isinstance(t, OnDevice)]
    if on_device:
        require_one_device(base, args, tensors, on_device)
    if on_device or place is not None:
        count(func, base, args, tensors, place)
    held = [t.held if isinstance(t, OnDevice) else t for t in flat]
    plain_args, plain_kwargs = tree_unflatten(held, spec)
    if plain_kwargs.get("device") is not None:
        plain_kwargs["device"] = torch.device("cpu")
    plain_kwargs.pop("pin_memory", None)
    out = func(*plain_args, **plain_kwargs)
    if place is None:
        return args[0] if base == "aten::copy_" else out
    made = tree_map_only(torch.Tensor, lambda t: OnDevice(t, place), out)
    if not on_device or base == "aten::_to_copy":
        return made
    return return_and_correct_aliasing(func, args, kwargs, made)


def place_of(base, tensors, kwargs):
    """The device of what an operation gives; None for the CPU."""
    asked = kwargs.get("device")
    if asked is not None:
        asked = torch.device(asked)
        return None if asked.type == "cpu" else torch.device(asked.type, asked.index or 0)
    if base == "aten::copy_":
        tensors = tensors[:1]
    return next((t.device for t in tensors if isinstance(t, OnDevice)), None)


def require_one_device(base, args, tensors, on_device):
    """Refuse tensors on several devices, except copies, indices, and numbers for kernels that take them."""
    others = [t for t in tensors if not isinstance(t, OnDevice)]
    if base in COPIES:
        return
    if base in INDEXING:
        others = [t for t in others if t.dim() and not any(t is index for index in args[1] if index is not None)]
        others += [] if isinstance(args[0], OnDevice) else [args[0]]
    elif base.removeprefix("aten::").rstrip("_") in TAKE_NUMBERS:
        others = [t for t in others if t.dim()]
    if others or len({t.device for t in on_device}) > 1:
        raise RuntimeError(f"Expected all tensors to be on the same device, but found several ({base})")


def count(func, base, args, tensors, place):
    """Note the operation, and whether the host waits for it."""
    on_host = [t for t in tensors if not isinstance(t, OnDevice)]
    by_mask = base in INDEXING and any(t is not None and t.dtype == torch.bool for t in args[1])
    moves = base in COPIES and isinstance(tensors[-1], OnDevice) != (place is not None)
    if base in WAITS or by_mask or moves or (base == "aten::where" and on_host):
        Counts.waits[base] += 1
    if base not in WITHOUT_KERNEL and not is_view(func):
        Counts.operations[base] += 1


def is_view(func):
    """Whether an operation gives a view of its input."""
    given = func._schema.returns
    return bool(given) and all(one.alias_info is not None and not one.alias_info.is_write for one in given)


def moving(make):
    """A function that makes tensors of data, for a device: torch asks CUDA itself there."""

    def made(data, *args, device=None, **kwargs):
        if device is None:
            return make(data, *args, **kwargs)
        trained = kwargs.pop("requires_grad", False)
        out = data if isinstance(data, OnDevice) else make(data, *args, **kwargs)
        return out.to(device, **kwargs).requires_grad_(trained)

    return made


@contextlib.contextmanager
def pretended_gpu(kind="cuda"):
    """Inside, the device of this kind is there."""
    of_host = {"get_rng_state": torch.get_rng_state, "set_rng_state": torch.set_rng_state}
    by_module = {
        torch.cuda: {
            "_lazy_init": lambda: None,
            "is_available": lambda: kind == "cuda",
            "is_initialized": lambda: kind == "cuda",
            "current_device": lambda: 0,
            "device_count": lambda: 1,
            "is_bf16_supported": lambda *_, **__: True,
            "mem_get_info": lambda *_: (2**34, 2**34),
            "manual_seed_all": lambda seed: None,  # values are drawn by the generator of the CPU
        },
        torch.mps: {"manual_seed": lambda seed: None},
        torch.backends.mps: {"is_available": lambda: kind == "mps"},
        torch: {name: moving(getattr(torch, name)) for name in ("tensor", "as_tensor", "asarray")},
    }
    for module in (torch.cuda, torch.mps):
        by_module[module]["get_rng_state"] = lambda *_: of_host["get_rng_state"]()
        by_module[module]["set_rng_state"] = lambda state, *_: of_host["set_rng_state"](state)
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with contextlib.ExitStack() as stack:
        for module, replaced in by_module.items():
            stack.enter_context(mock.patch.multiple(module, **replaced))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(Everywhere())
        yield
