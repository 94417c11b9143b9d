"""Replayed steps: the tensor operations of a step, run again without Pyro and autograd, to the same bits."""

import logging
from collections import Counter
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn

from pyro_scvi.inference.compiled import Recorded, recording_of
from pyro_scvi.inference.elbo import Bound
from pyro_scvi.nn.closures import HOOKS
from pyro_scvi.training.distributed import LossAndGrads
from pyro_scvi.utils.custom_ops import FUNCTIONS

LEAST_STEPS = 1000  # of one size in a run; a recording takes the time that it saves in some 300
KNOWN = ("pyro_scvi", "torch")  # packages whose parts do the same in every step

_log = logging.getLogger(__name__)


def replayed(bound: Bound, of_programs: LossAndGrads, sizes: Iterable[int]) -> LossAndGrads:
    """The gradients ``of_programs`` for a run of steps of these sizes, replayed where that pays and cannot differ.

    Parts that others wrote may do in Python what a recording does not repeat; with these all steps are the programs'.
    """
    often = {size for size, steps in Counter(sizes).items() if steps >= LEAST_STEPS}
    return Replayed(bound, of_programs, often) if often and is_known(bound) else of_programs


def is_known(bound: Bound) -> bool:
    """Whether a step is made of parts of this package and of torch alone, without hooks or handlers around it."""
    model: Any = bound.model
    parts = [*bound.modules(), model.prior, *model.weights.makers]
    if pyro.poutine.runtime._PYRO_STACK or torch.is_anomaly_enabled():
        return False
    return all(type(part).__module__.partition(".")[0] in KNOWN and not _is_changed(part) for part in parts)


def _is_changed(part: Any) -> bool:
    """Whether a part has hooks, or a function in the place of one of its class."""
    hooked = isinstance(part, nn.Module) and any(getattr(part, kind) for kind in HOOKS)
    return hooked or any(isinstance(value, FunctionType | MethodType) for value in vars(part).values())


class _After(NamedTuple):
    """What a step leaves: its loss, gradients, buffers and the state of torch's generator."""

    loss: float
    gradients: list[Tensor | None]
    buffers: list[Tensor]
    generator: Tensor

    def equals(self, other: "_After") -> bool:
        """Whether all bits and the layout of the gradients are the same."""
        return (
            self.loss == other.loss
            and torch.equal(self.generator, other.generator)
            and all(map(torch.equal, self.buffers, other.buffers))
            and all(map(_same_gradient, self.gradients, other.gradients))
        )


def _same_gradient(ours: Tensor | None, other: Tensor | None) -> bool:
    if ours is None or other is None:
        return ours is other
    return ours.stride() == other.stride() and torch.equal(ours, other)


class Replayed:
    """Gradients of steps by recordings, one for each size of a minibatch, that have given the bits of the programs.

    The first step of a size is made twice, by the programs and by their new recording. If loss, gradients, running
    statistics or random numbers differ in any bit, or there is no recording, all steps of the size are the programs'.
    So a fit is the same with and without recordings.

    Parameters
    ----------
    bound
        The evidence bound of a model and a guide.
    of_programs
        Its gradients by the programs.
    often
        Sizes of minibatches that are worth a recording.
    """

    def __init__(self, bound: Bound, of_programs: LossAndGrads, often: set[int]) -> None:
        self.bound, self.of_programs, self.often = bound, of_programs, often
        self.recorded = Recorded(bound, _without_overhead)
        self.proven: dict[int, bool] = {}

    def __call__(self, x: Tensor, gamma: Tensor, **given: Any) -> float:
        """Negative bound, nats; leaves its gradients in parameters that have none."""
        size = len(x)
        if size not in self.proven and size in self.often:
            return self._compared(x, gamma, given)
        take = self.recorded if self.proven.get(size) else self.of_programs
        return take(x, gamma, **given)

    def _compared(self, x: Tensor, gamma: Tensor, given: dict[str, Any]) -> float:
        """Make a step by the programs; keep what it leaves, whatever its recording does."""
        before = self._left(0.0)
        programs = self._left(self.of_programs(x, gamma, **given))
        self._put(before)
        try:
            self.proven[len(x)] = self._left(self.recorded(x, gamma, **given)).equals(programs)
        except Exception as error:  # torch raises many kinds; the programs can do without a recording
            _log.debug("a step of %d cells is not recorded: %s", len(x), error)
            self.proven[len(x)] = False
        self._put(programs)
        return programs.loss

    def _left(self, loss: float) -> _After:
        gradients = [parameter.grad for parameter in self.bound.parameters()]
        buffers = [buffer.clone() for buffer in self.bound.buffers()]
        return _After(loss, gradients, buffers, torch.get_rng_state())

    def _put(self, state: _After) -> None:
        for parameter, gradient in zip(self.bound.parameters(), state.gradients, strict=True):
            parameter.grad = gradient
        for buffer, value in zip(self.bound.buffers(), state.buffers, strict=True):
            buffer.copy_(value)
        torch.set_rng_state(state.generator)


def _without_overhead(step: Callable[..., Any], example: tuple[Any, ...]) -> Callable[..., Any]:
    """Record a step; custom operations become functions, and what only cuts a tensor off from autograd is left out."""
    recording = recording_of(step, example)
    for node in list(recording.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            node.replace_all_uses_with(node.args[0])
            recording.graph.erase_node(node)
        else:
            node.target = FUNCTIONS.get(node.target, node.target)
    recording.recompile()
    return recording
