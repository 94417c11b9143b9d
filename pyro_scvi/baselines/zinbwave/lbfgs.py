"""L-BFGS for a sum over cells plus a penalty, computed a chunk of cells at a time."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...]

WINDOW = 10  # iterations between looks at the gain
HISTORY = 20  # pairs of steps and gradients that make up the curvature


@dataclass(frozen=True)
class Separable:
    """A function of parameters per cell (``rows``, first axis: cells) and of parameters shared by all cells.

    ``loss`` gives the sum over one slice of cells from their rows and the shared parameters; ``penalty`` is added once,
    from all of them. Memory holds the graph of one slice, however many cells there are.
    """

    loss: Callable[[slice, Tensors, Tensors], Tensor]
    penalty: Callable[[Tensors, Tensors], Tensor]
    cells: Sequence[slice]

    def value(self, rows: Tensors, shared: Tensors) -> tuple[float, list[Tensor]]:
        """The function and its gradients by ``rows`` and by ``shared``."""
        gradients = [torch.zeros_like(t) for t in (*rows, *shared)]
        value = _accumulate(self.penalty, rows, shared, gradients)
        for cells in self.cells:
            of_cells = [g[cells] for g in gradients[: len(rows)]]  # views: what is added to them reaches the whole
            chunk = tuple(t[cells] for t in rows)
            value += _accumulate(partial(self.loss, cells), chunk, shared, of_cells + gradients[len(rows) :])
        return value, gradients


class Minimum(NamedTuple):
    """Result of L-BFGS: ``rows``, ``shared``, the ``value`` there, and whether the stopping rule was met."""

    rows: Tensors
    shared: Tensors
    value: float
    iterations: int
    converged: bool


def minimise(function: Separable, rows: Tensors, shared: Tensors, *, tol: float, max_iter: int) -> Minimum:
    """L-BFGS with strong Wolfe line search, until 10 iterations gain less than ``tol`` times the absolute value.

    Parameters
    ----------
    function, rows, shared
        Function to minimise, and the start.
    tol
        Relative gain over 10 iterations that ends the search.
    max_iter
        Most iterations; reaching them means not converged.
    """
    leaves = [t.detach().clone(memory_format=torch.contiguous_format) for t in (*rows, *shared)]
    optimiser = torch.optim.LBFGS(
        leaves,
        max_iter=WINDOW,
        history_size=HISTORY,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def split() -> tuple[Tensors, Tensors]:
        return tuple(leaves[: len(rows)]), tuple(leaves[len(rows) :])

    def closure() -> float:
        value, gradients = function.value(*split())
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        return value

    before, iterations, converged = float("inf"), 0, False
    while iterations < max_iter and not converged:
        now = float(optimiser.step(closure))  # the value where these iterations begin
        converged = before - now <= tol * abs(now)
        before, iterations = now, iterations + WINDOW
    value, _ = function.value(*split())
    return Minimum(*split(), value, iterations, converged)


def _accumulate(
    term: Callable[[Tensors, Tensors], Tensor], rows: Tensors, shared: Tensors, gradients: Sequence[Tensor]
) -> float:
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (*rows, *shared)]
        value = term(tuple(leaves[: len(rows)]), tuple(leaves[len(rows) :]))
        parts = torch.autograd.grad(value, leaves, materialize_grads=True)
    for gradient, part in zip(gradients, parts, strict=True):
        gradient += part
    return float(value.detach())
