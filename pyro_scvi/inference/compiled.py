"""Compiled training steps and densities: recorded once as tensor operations, then run without Python."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from pyro_scvi.errors import FitError
from pyro_scvi.guides.coordinates import Coordinates
from pyro_scvi.guides.log_joint import log_joint, log_terms_at
from pyro_scvi.inference.elbo import Bound
from pyro_scvi.model import SCVI
from pyro_scvi.types import LogJoint
from pyro_scvi.utils.random_state import seeded

Step = Callable[..., tuple[Tensor, list[Tensor | None]]]  # parameters, buffers, x, gamma, index -> loss, gradients


class NotCompiled(FitError):
    """A step or density that torch could not record or compile."""


class Recorded:
    """The bound of a minibatch and its gradients, compiled once for each size of a minibatch.

    Model and guide are recorded while they run under Pyro on the first minibatch of a size. State in Python (a counter,
    a tensor that is neither parameter nor buffer) stays as it was in that run. Parameters and buffers are arguments,
    which the caller may change between steps. Random numbers are drawn anew in every step.

    Parameters
    ----------
    bound
        The evidence bound of a model and a guide.
    prepare
        Turns a step and an example of its arguments into what is called instead; None: what torch makes of it.
    """

    def __init__(self, bound: Bound, prepare: Callable[[Step, tuple[Any, ...]], Step] | None = None) -> None:
        self.bound, self.prepare = bound, prepare or _compiled
        self.parameters = dict(bound.named_parameters())
        self.buffers = dict(bound.named_buffers())
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.steps: dict[int, Step] = {}

    def __call__(self, x: Tensor, gamma: Tensor, *, index: Tensor, n_cells: int, len_all: int) -> float:
        """Negative bound, nats; its gradients are added to those of the parameters.

        Raises
        ------
        FitError
            If the programs cannot be recorded, the recording cannot be compiled, a parameter has a hook, or a step
            replaces a buffer by a new tensor.
        """
        given = (
            [parameter.detach() for parameter in self.parameters.values()],
            list(self.buffers.values()),
            *(x, gamma, index),
        )
        if len(x) not in self.steps:
            with _compile_errors_explained("a training step"):
                self._require_recordable()
                self.steps[len(x)] = self.prepare(self._step(n_cells), given)
        with torch.no_grad():
            loss, gradients = self.steps[len(x)](*given)
        for name, gradient in zip(self.trained, gradients, strict=True):
            parameter = self.parameters[name]
            parameter.grad = gradient if parameter.grad is None or gradient is None else parameter.grad + gradient
        return loss.item()

    def _require_recordable(self) -> None:
        """Refuse hooks and replaced buffers, which a recording would leave out silently."""
        hooked = [name for name, parameter in self.parameters.items() if _hooks(parameter)]
        if hooked:
            raise FitError(f"{hooked} have hooks, which a compiled step does not call: remove them")
        replaced = [name for name, buffer in self.bound.named_buffers() if buffer is not self.buffers.get(name)]
        if replaced:
            raise FitError(f"a step replaces the tensors {replaced}: change buffers in place, as by copy_")

    def _step(self, n_cells: int) -> Step:
        def step(
            parameters: list[Tensor], buffers: list[Tensor], x: Tensor, gamma: Tensor, index: Tensor
        ) -> tuple[Tensor, list[Tensor | None]]:
            state = dict(zip((*self.parameters, *self.buffers), (*parameters, *buffers), strict=True))
            state |= {name: state[name].detach().requires_grad_() for name in self.trained}
            leaves = [state[name] for name in self.trained]
            loss = torch.func.functional_call(self.bound, state, (x, gamma), {"index": index, "n_cells": n_cells})
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            # The fused optimiser assumes that gradients lie in memory as the parameters do.
            return loss.detach(), [None if g is None else g.contiguous() for g in gradients]

        return step


def _hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


class RecordedJoint:
    """The log joint density of one model and batches of ``n_cells`` cells, by compiled recordings.

    A shape of u, with or without its gradient, is compiled when it is evaluated for the tenth time. Rarer shapes, and
    batches of other sizes, are evaluated by the program itself. Only first derivatives by u are available.
    """

    OFTEN = 10

    def __init__(self, n_cells: int) -> None:
        self.n_cells = n_cells
        self.asked: Counter[tuple[torch.Size, bool]] = Counter()
        self.recordings: dict[tuple[torch.Size, bool], Callable[..., Any]] = {}

    def __call__(self, model: SCVI, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]) -> LogJoint:
        """Log p(x, z, l) in coordinates u (samples, cells, size), nats, (samples, cells).

        Raises
        ------
        FitError
            When it is evaluated, if the program cannot be recorded, or the recording cannot be compiled.
        """
        by_program = log_joint(model, x, gamma, global_latents)
        if len(x) != self.n_cells:
            return by_program
        state = {name: t.detach() for name, t in (*model.named_parameters(), *model.named_buffers())}

        def density(u: Tensor) -> Tensor:
            kind = u.shape, torch.is_grad_enabled() and u.requires_grad
            self.asked[kind] += 1
            if self.asked[kind] < self.OFTEN:
                return by_program(u)
            result = self._recorded(kind, model, (u.detach(), x, gamma, global_latents, state))
            value: Tensor = _WithGradient.apply(u, *result) if kind[1] else result
            return value

        return density

    def _recorded(self, kind: tuple[torch.Size, bool], model: SCVI, given: tuple[Any, ...]) -> Any:
        if kind not in self.recordings:
            with _compile_errors_explained("a density"):
                self.recordings[kind] = _compiled(_value_and_gradient(model) if kind[1] else _value(model), given)
        with torch.no_grad():
            return self.recordings[kind](*given)


def _value(model: SCVI) -> Callable[..., Tensor]:
    """Log p(x, z, l) at u as a function of all it depends on."""
    coordinates, density = Coordinates(model), _Density(model)

    def value(
        u: Tensor, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor], state: dict[str, Tensor]
    ) -> Tensor:
        named = {f"model.{name}": t for name, t in state.items()}
        terms: Tensor = torch.func.functional_call(density, named, (u, coordinates, x, gamma, global_latents))
        return terms

    return value


def _value_and_gradient(model: SCVI) -> Callable[..., tuple[Tensor, Tensor]]:
    """The same with its gradient by u."""
    value = _value(model)

    def both(u: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_density = value(u, *others)
            (gradient,) = torch.autograd.grad(log_density.sum(), u)
        return log_density.detach(), gradient

    return both


class _Density(nn.Module):
    """A model's log joint density as a module: torch's functional_call takes nothing else."""

    def __init__(self, model: SCVI) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, u: Tensor, coordinates: Coordinates, x: Tensor, gamma: Tensor, global_latents: dict[str, Tensor]
    ) -> Tensor:
        return torch.stack(log_terms_at(u, coordinates, self.model, x, gamma, global_latents)).sum(0)


class _WithGradient(torch.autograd.Function):
    """Values (samples, cells), each of its own cell and draw, and their gradient by u (samples, cells, size)."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return grad[..., None] * gradient, None, None


def recording_of(function: Callable[..., Any], example: tuple[Any, ...]) -> GraphModule:
    """The tensor operations of the function's run on the example; nothing is drawn or changed."""
    with seeded(0):
        # Not fake: constants of a model that are neither parameters nor buffers.
        return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*example)


def _compiled(function: Callable[..., Any], example: tuple[Any, ...]) -> Callable[..., Any]:
    """Record the function's run on the example, and compile the recording by a call on copies of the example.

    The compilers of some versions of torch draw random numbers themselves; the seed keeps these out of training.
    """
    recording = recording_of(function, example)
    with seeded(0):
        # fallback_random: the same random numbers as without compiling.
        compiled: Callable[..., Any] = torch.compile(recording, options={"fallback_random": True})
        with torch.no_grad():
            compiled(*tree_map_only(Tensor, Tensor.clone, example))
    return compiled


@contextmanager
def _compile_errors_explained(what: str) -> Iterator[None]:
    """Turn an error of torch's compiler into one that says what cannot be compiled and what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the compiler about other parts of torch
            yield
    except FitError:
        raise
    except Exception as error:  # torch raises many kinds, with the compiler's output somewhere in the text
        text = str(error).rpartition("Output:")[2].partition("Set TORCHDYNAMO_VERBOSE")[0]
        reason = " ".join(text.split())[:300]
        raise NotCompiled(
            f"{what} cannot be compiled ({type(error).__name__}: {reason}); leave compiled=True out. It needs "
            "a C++ compiler, and programs whose Python does not depend on values of tensors"
        ) from error
