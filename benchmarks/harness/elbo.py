"""Held-out evidence bound (ELBO), estimated for every system by the same few lines in float64."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.baselines.scvi_tools import log_zinb

AT_ONCE = 256  # cells


class Outputs(NamedTuple):
    """Outputs of a fitted system for cells x (cells, genes), in evaluation mode and in float64.

    ``encode`` maps x to location and scale of q(z | x), (cells, latents) each; ``decode`` maps z (samples, cells,
    latents) and x to log mean, log inverse dispersion and dropout logits, each broadcastable to (samples, cells,
    genes). The library size is the cell's observed total.
    """

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    decode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class Estimate(NamedTuple):
    """Mean over cells in nats per cell, and its Monte Carlo standard error (over draws of z, not over cells)."""

    value: float
    se: float


@torch.no_grad()
def held_out_elbo(outputs: Outputs, x: Tensor, *, samples: int = 25, seed: int = 0) -> Estimate:
    r"""Evidence bound of cells that were not trained on, the KL divergence in closed form.

    .. math:: \frac1N \sum_n \Big[ \frac1S \sum_s \log ZINB(x_n \mid z_{ns}) - KL(q(z | x_n) \| N(0, I)) \Big]

    Parameters
    ----------
    outputs
        The system.
    x
        Counts (cells, genes), float64.
    samples, seed
        Draws of z per cell, and their seed: systems get the same noise.
    """
    generator = torch.Generator().manual_seed(seed)
    parts = [_terms(outputs, rows, samples, generator) for rows in x.split(AT_ONCE)]
    values = torch.cat(parts, 1)  # (samples, cells)
    variance = values.var(0).mean() / values.numel()
    return Estimate(float(values.mean()), float(variance.sqrt()))


def _terms(outputs: Outputs, x: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    loc, scale = outputs.encode(x)
    noise = torch.randn(samples, *loc.shape, generator=generator, dtype=x.dtype)
    log_factorial = torch.lgamma(x + 1)
    log_likelihood = []
    for z in (loc + scale * noise)[:, None]:
        log_mean, log_r, gate = outputs.decode(z, x)
        r = log_r.exp()
        constant = torch.lgamma(x + r) - torch.lgamma(r) - log_factorial
        log_likelihood.append(log_zinb(x, log_mean - log_r, r, gate, constant).sum(-1))
    kl = 0.5 * (loc.square() + scale.square() - 1 - 2 * scale.log()).sum(-1)
    return torch.cat(log_likelihood) - kl
