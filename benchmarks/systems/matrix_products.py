"""Matrix products of a training step alone: the float32 limit of any implementation."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness.stopwatch import Sample, Stopwatch

HIDDEN, LATENTS, N_COVARIATES, HEADS = 128, 10, 2, 2


def gemms(n_genes: int, batch_size: int, n_cells: int, epochs: int) -> Callable[[], Sample]:
    """Multiply the matrices of every forward and backward pass over the cells, operands warm in the cache.

    The layers are those of the matched model: genes to 128, 128 to twice 10, 12 to 128, 128 to two heads of genes. The
    gradient of the first layer's input is not among them: nothing needs it.
    """
    products = _of_step(batch_size, n_genes)
    steps = epochs * -(-n_cells // batch_size)

    def measure() -> Sample:
        with Stopwatch() as watch:
            for _ in range(steps):
                for a, b, out in products:
                    torch.mm(a, b, out=out)
        return watch.sample(work=steps * batch_size)

    measure()
    return measure


def flops_per_cell(n_genes: int) -> float:
    """Multiplications and additions of all products, per cell."""
    return sum(2 * out.numel() * a.shape[1] for a, _, out in _of_step(1, n_genes))


def _of_step(rows: int, n_genes: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    shapes = [(n_genes, HIDDEN), (HIDDEN, LATENTS), (HIDDEN, LATENTS), (LATENTS + N_COVARIATES, HIDDEN)]
    shapes += [(HIDDEN, n_genes)] * HEADS
    return [product for i, shape in enumerate(shapes) for product in _products(rows, *shape, of_input=i > 0)]


def _products(rows: int, n_in: int, n_out: int, *, of_input: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    x, weight, y = (torch.randn(shape, generator=generator) for shape in ((rows, n_in), (n_out, n_in), (rows, n_out)))
    forward = x, weight.T, torch.empty(rows, n_out)
    of_weight = y.T, x, torch.empty(n_out, n_in)
    return [forward, of_weight] + ([(y, weight, torch.empty(rows, n_in))] if of_input else [])
