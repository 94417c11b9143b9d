"""Gamma of other batches than the cells' own, and latents of cells whose batch a fit does not know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_scvi.data.schema import Schema
from pyro_scvi.guides.amortized import AmortizedGuide
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.evaluation import with_enumerated
from pyro_scvi.inference.proposals import refined
from pyro_scvi.inference.samplers import Amortized, Sampler

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def in_known_batches(schema: Schema, gamma: Tensor) -> list[Tensor]:
    """Gamma (cells, covariates) with cells of unknown batches in each known one in turn; as it is if all are known."""
    unknown = torch.as_tensor(schema.of_unknown_batch(gamma.cpu().numpy()), device=gamma.device)
    if not unknown.any():
        return [gamma]
    settings = []
    for place in range(schema.n_batches):
        setting = gamma.clone()
        setting[unknown, : schema.n_batches] = 0.0
        setting[unknown, place] = 1.0
        settings.append(setting)
    return settings


def reads_gamma(guide: Guide) -> bool:
    """Whether q(z | x) may depend on gamma: it does not if an encoder predicts it from the counts alone."""
    return not (isinstance(guide, AmortizedGuide) and guide.encoder.n_covariates == 0)


def z_means(fit: Fit, x: Tensor, gamma: Tensor) -> Tensor:
    """E_q[z | x] (cells, 1, latents), averaged over known batches for cells of others where q reads gamma."""
    settings = in_known_batches(fit.schema, gamma)
    settings = settings if reads_gamma(fit.guide) else settings[:1]
    means = [_mean(fit.guide, x, setting) for setting in settings]
    return means[0] if len(means) == 1 else torch.stack(means).mean(0)


def _mean(guide: Guide, x: Tensor, gamma: Tensor) -> Tensor:
    site = guide.coordinates.of_z()
    if not guide.amortized:
        loc, _ = refined(guide, x, gamma)
        return guide.coordinates.sites(loc)[site.name]
    return guide.mean(site, x, gamma)


def draw_latents(fit: Fit, x: Tensor, gamma: Tensor, sampler: Sampler, samples: int) -> dict[str, Tensor]:
    """Draws of all latents (samples, cells, 1) and their events, discrete ones given the others.

    Cells of unknown batches are taken to be of each known batch for an equal part of the draws, which may then be a few
    more, unless nothing that is drawn depends on it.
    """
    settings = in_known_batches(fit.schema, gamma)
    alike = isinstance(sampler, Amortized) and not (reads_gamma(fit.guide) or fit.guide.coordinates.enumerated)
    settings = settings[:1] if alike else settings
    each = -(-samples // len(settings))
    drawn = [with_enumerated(fit.guide, x, own, sampler.draw(fit.guide, x, own, each).sites) for own in settings]
    return {name: torch.cat([sites[name] for sites in drawn]) for name in drawn[0]}


def in_batches(schema: Schema, gamma: Tensor, batches: Sequence[str] | None) -> list[Tensor]:
    """Gamma (cells, covariates) in each of ``batches`` in turn; None: in each known one; none: in the cells' own."""
    if batches is None and schema.n_batches:
        batches = schema.batches
    if not batches:
        return in_known_batches(schema, gamma)
    settings = []
    for name in batches:
        setting = gamma.clone()
        setting[:, : schema.n_batches] = 0.0
        setting[:, schema.batch_position(name)] = 1.0
        settings.append(setting)
    return settings
