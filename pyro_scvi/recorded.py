"""Steps of training recorded once as tensor operations and compiled: later ones run nothing of the programs' Python."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_scvi.elbo import Bound
from pyro_scvi.errors import FitError

Step = Callable[..., tuple[Tensor, list[Tensor | None]]]  # parameters, buffers, x, gamma, index -> loss, gradients


class NotCompiled(FitError):
    """A step that torch could not record or compile."""


class Recorded:
    """The bound of a minibatch and its gradients, by one compiled recording for every size of a minibatch.

    What is recorded is the run of model and guide under Pyro with a size's first minibatch: what depends on Python (a
    counter, a tensor that is neither parameter nor buffer) stays as it was then. Parameters and buffers are arguments,
    which the caller may change between steps; random numbers are drawn anew, as without a recording.

    Parameters
    ----------
    bound
        The evidence bound of a model and a guide.
    """

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.parameters = dict(bound.named_parameters())
        self.buffers = dict(bound.named_buffers())
        self.trained = [name for name, parameter in self.parameters.items() if parameter.requires_grad]
        self.steps: dict[int, Step] = {}

    def __call__(self, x: Tensor, gamma: Tensor, *, index: Tensor, n_cells: int, len_all: int) -> float:
        """Negative bound, nats; its gradients are added to those of the parameters.

        Raises
        ------
        FitError
            If the programs cannot be recorded, or the recording not compiled; if a parameter has a hook, or a step
            puts a new tensor in the place of a buffer.
        """
        given = (
            [parameter.detach() for parameter in self.parameters.values()],
            list(self.buffers.values()),
            *(x, gamma, index),
        )
        new = len(x) not in self.steps
        with _explained() if new else nullcontext():
            if new:
                self._require_recordable()
                self.steps[len(x)] = self._compiled(n_cells, given)
            with torch.no_grad():
                loss, gradients = self.steps[len(x)](*given)
        for name, gradient in zip(self.trained, gradients, strict=True):
            parameter = self.parameters[name]
            parameter.grad = gradient if parameter.grad is None or gradient is None else parameter.grad + gradient
        return loss.item()

    def _require_recordable(self) -> None:
        """Refuse what a recording would leave out in silence."""
        hooked = [name for name, parameter in self.parameters.items() if _hooks(parameter)]
        if hooked:
            raise FitError(f"{hooked} have hooks, which a compiled step does not call: remove them")
        replaced = [name for name, buffer in self.bound.named_buffers() if buffer is not self.buffers.get(name)]
        if replaced:
            raise FitError(f"a step puts new tensors in the place of {replaced}: change buffers in place, as by copy_")

    def _compiled(self, n_cells: int, example: Any) -> Step:
        """Compiled by its first call."""
        recording = make_fx(self._step(n_cells), tracing_mode="fake", _allow_non_fake_inputs=True)(*example)
        return torch.compile(recording, options={"fallback_random": True})

    def _step(self, n_cells: int) -> Step:
        def step(
            parameters: list[Tensor], buffers: list[Tensor], x: Tensor, gamma: Tensor, index: Tensor
        ) -> tuple[Tensor, list[Tensor | None]]:
            state = dict(zip((*self.parameters, *self.buffers), (*parameters, *buffers), strict=True))
            state |= {name: state[name].detach().requires_grad_() for name in self.trained}
            leaves = [state[name] for name in self.trained]
            loss = torch.func.functional_call(self.bound, state, (x, gamma), {"index": index, "n_cells": n_cells})
            gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            # The fused optimiser reads memory, in the order of the parameters' strides.
            return loss.detach(), [None if g is None else g.contiguous() for g in gradients]

        return step


def _hooks(parameter: Tensor) -> bool:
    return bool(parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None))


@contextmanager
def _explained() -> Iterator[None]:
    """Say what it means that torch cannot record or compile a step."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of torch's compiler about other parts of torch
            yield
    except FitError:
        raise
    except Exception as error:
        text = str(error).rpartition("Output:")[2].partition("Set TORCHDYNAMO_VERBOSE")[0]
        reason = " ".join(text.split())[:300]
        raise NotCompiled(
            f"a training step cannot be compiled ({type(error).__name__}: {reason}); leave compiled=True out. It needs "
            "a C++ compiler, and programs whose Python does not depend on values of tensors"
        ) from error
