"""Quantiles of the rate w given a count, averaged over draws of the latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.distributions.gamma_mixture import gamma_mixture_quantiles
from pyro_scvi.inference.evaluation import theta_given
from pyro_scvi.inference.samplers import Draws
from pyro_scvi.likelihoods.base import updated_rate
from pyro_scvi.model import SCVI
from pyro_scvi.types import Theta

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

AtDraws = Sequence[tuple["Fit", Draws]]  # fits at draws of the global latents, each with draws of all latents of cells
Part = tuple[Tensor, Tensor, Tensor]  # shape, rate and weight (draws, entries) of Gamma distributions


def rate_is_mean(model: SCVI) -> bool:
    """Whether w is the mean mu itself, so that nothing but the latents makes it uncertain."""
    if not model.likelihood.explicit:
        return False
    like = next(model.parameters())
    eta = {head: like.new_zeros(1, 1, model.n_genes) for head in model.likelihood.heads}
    with torch.no_grad():
        theta = model.likelihood.theta(eta, like.new_zeros(1, model.n_covariates))
        return model.likelihood.rate(**theta) is None


def rate_quantiles(drawn: AtDraws, x: Tensor, gamma: Tensor, quantiles: Sequence[float]) -> Tensor:
    """Quantiles (quantiles, cells, genes) of the distribution of w given x, averaged over the draws of the latents."""
    likelihood = drawn[0][0].model.likelihood
    likelihood.require_explicit()
    lead = [next(iter(draws.sites.values())).shape[:1] for _, draws in drawn]
    thetas = [theta_given(fit.guide, x, gamma, draws.sites) for fit, draws in drawn]
    if likelihood.rate(**thetas[0]) is None:  # w = mu, whose distribution the draws are
        means = torch.cat([theta["log_mean"].exp().expand(*n, *x.shape) for n, theta in zip(lead, thetas, strict=True)])
        return torch.quantile(means, torch.as_tensor(quantiles, dtype=means.dtype, device=means.device), 0)
    parts = [_parts(fit, x, n, theta) for (fit, _), n, theta in zip(drawn, lead, thetas, strict=True)]
    # Draws of counts that were seen come first: a positive count has these alone.
    ordered = [part for of_fits in zip(*parts, strict=True) for part in of_fits]
    joined = [torch.cat(of) for of in zip(*ordered, strict=True)]
    return torch.stack([_solved(x, sum(n[0] for n in lead), joined, float(p)) for p in quantiles])


def _parts(fit: Fit, x: Tensor, lead: torch.Size, theta: Theta) -> list[Part]:
    """Distributions of w given x: where the count was seen and, if zeros may be technical, where it was not."""
    likelihood = fit.model.likelihood
    prior, logits = cast("dist.Gamma", likelihood.rate(**theta)), likelihood.technical_zero_logits(**theta)
    rho = torch.zeros_like(x) if logits is None else torch.sigmoid(logits) * (x == 0)
    kinds = [(updated_rate(prior, x, 0.0), 1 - rho)]
    if logits is not None:
        kinds.append((updated_rate(prior, x, 1.0), rho))
    shaped = [[t.expand(*lead, *x.shape).flatten(1) for t in (w.concentration, w.rate, weight)] for w, weight in kinds]
    return [(shape, rate, weight) for shape, rate, weight in shaped]


def _solved(x: Tensor, draws: int, parts: Sequence[Tensor], p: float) -> Tensor:
    """Quantile of every entry (cells, genes)."""
    shape, rate, weight = parts
    found, weight = torch.empty_like(x).flatten(), weight / weight.sum(0)
    positive = (x > 0).flatten()
    for rows, n in ((positive, draws), (~positive, len(shape))):
        found[rows] = gamma_mixture_quantiles(shape[:n, rows], rate[:n, rows], weight[:n, rows], p)
    return found.view_as(x)
