"""What a fitted model says of cells: embeddings, and the evaluation mode that every verb shares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.cells import Cells
from pyro_scvi.coordinates import Joint, cell_terms, log_joint, prior_sites, scored
from pyro_scvi.errors import ModelError, SchemaError, require_at_least
from pyro_scvi.guides import Guide
from pyro_scvi.importance import Effort, Importance, LogJoint, Question, persistent_importance, refine
from pyro_scvi.memory import keep_freed_memory
from pyro_scvi.minibatches import Minibatches
from pyro_scvi.model import SCVI
from pyro_scvi.parts import evaluation_mode
from pyro_scvi.seeding import seeded

if TYPE_CHECKING:
    from pyro_scvi.fitted import Fit

CANDIDATES = 64  # prior draws that compete with the guide as a start
MARGIN = 10.0  # nats by which they must win: within one posterior, density says little of where the mass is


@contextmanager
def evaluating(model: SCVI, guide: Guide, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, an own seed and an own parameter store; everything is put back afterwards."""
    keep_freed_memory()
    with evaluation_mode(model, guide), seeded(seed), pyro.get_param_store().scope(), pyro.validation_enabled(False):
        with torch.no_grad():
            yield


def require_fit(fit: Any) -> None:
    """Refuse what is no Fit, before anything is asked of it.

    Raises
    ------
    ModelError
        Naming what came.
    """
    if not (isinstance(getattr(fit, "model", None), SCVI) and isinstance(getattr(fit, "guide", None), Guide)):
        raise ModelError(f"expected the Fit that ps.fit or ps.load returns, got {type(fit).__name__}")


def require_question(fit: Any, cells: Any) -> None:
    """Refuse what is no Fit and what are no Cells, an AnnData above all.

    Raises
    ------
    ModelError
        Naming what came.
    """
    require_fit(fit)
    if not isinstance(cells, Cells):
        raise ModelError(
            f"expected Cells, got {type(cells).__name__}; make them with Cells.from_anndata(adata, schema=fit.schema)"
        )


def minibatches(fit: Fit, cells: Cells) -> Minibatches:
    """The cells on the fit's device, after a check that their genes and covariates are the model's."""
    fitted, given = fit.schema, cells.schema
    if fitted.gene_names != given.gene_names:
        same = len(set(fitted.gene_names) & set(given.gene_names))
        raise SchemaError(
            f"the cells have {len(given.gene_names)} genes, {same} of them among the {len(fitted.gene_names)} of the "
            "fit, or in another order; make them with Cells.from_anndata(adata, schema=fit.schema)"
        )
    if (fitted.batches, fitted.covariates, fitted.means, fitted.sds) != (
        given.batches,
        given.covariates,
        given.means,
        given.sds,
    ):
        raise SchemaError(
            f"the fit has batches {fitted.batches} and covariates {fitted.covariates}, the cells have {given.batches} "
            f"and {given.covariates}, or other scales; make them with Cells.from_anndata(adata, schema=fit.schema)"
        )
    return Minibatches(cells, fit.device, fit.dtype)


def embed(fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
    r"""Posterior mean of z under the guide, E_q[z | x].

    .. math:: \hat z_n = \int z\, q(z | x_n)\, dz

    Exact where q is normal; by 200 draws under ``seed`` where q is a flow or lives on the simplex; by refinement from
    the nearest fitted cell where the guide is not amortized.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema, which need not be those it was fitted on.
    batch_size
        Cells at a time.
    seed
        Of the draws, where there are any.

    Returns
    -------
    ndarray (cells, latents)

    Raises
    ------
    SchemaError
        If the cells' genes or covariates are not those of the fit.
    ModelError
        If ``fit`` or ``cells`` is of the wrong kind, ``batch_size`` below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> ps.embed(fit, test).shape
    (12, 2)
    """
    require_question(fit, cells)
    require_at_least(1, batch_size=batch_size)
    with evaluating(fit.model, fit.guide, seed):
        means = [_mean(fit.guide, x, gamma) for x, gamma in minibatches(fit, cells).in_order(batch_size)]
        return torch.cat(means).cpu().numpy()


def _mean(guide: Guide, x: Tensor, gamma: Tensor) -> Tensor:
    if not guide.amortized:
        loc, _ = refined(guide, x, gamma)
        return guide.coordinates.sites(loc)["z"].squeeze(-2)
    law = guide.z_law(guide.encode(x, gamma, None))
    mean = law.sample((200,)).mean(0) if isinstance(law, dist.TransformedDistribution) else law.mean
    return mean.squeeze(-2)


def start(guide: Guide, x: Tensor, gamma: Tensor, joint: Joint = log_joint) -> tuple[LogJoint, Tensor, Tensor]:
    """The log joint density of cells, by ``joint``, and location and scale (cells, size) from where to look for them.

    The guide's, but for cells to which a draw from the prior gives a much higher density: those lie so far from what
    the guide was trained on that gradient steps from there may end in a mode that holds no mass, unseen by any k-hat.
    """
    fixed = guide.weights.medians()
    density = joint(guide.model, x, gamma, fixed)
    loc, scale = guide.start(x, gamma)
    with torch.no_grad():
        candidates = torch.cat([loc[None], *_drawn_from_prior(guide, gamma)])
        values = torch.cat([density(part) for part in candidates.split(draws_at_once(x))])
        values[0] += MARGIN
        best = values.nan_to_num(-torch.inf).argmax(0)
    return density, candidates[best, torch.arange(len(x), device=x.device)], scale.detach()


def _drawn_from_prior(guide: Guide, gamma: Tensor) -> list[Tensor]:
    try:
        sites = prior_sites(guide.model, gamma, guide.weights.medians(), CANDIDATES)
    except NotImplementedError:  # an improper prior has no draws
        return []
    return [guide.coordinates.of(sites)]


@torch.enable_grad()
def refined(guide: Guide, x: Tensor, gamma: Tensor, *, steps: int = 100) -> tuple[Tensor, Tensor]:
    """Location and scale (cells, size) of a diagonal normal, raised from the start by gradient steps."""
    return refine(*start(guide, x, gamma), steps=steps)


def weighted(
    guide: Guide, x: Tensor, gamma: Tensor, effort: Effort, *, joint: Joint = log_joint, attempts: int = 3
) -> Importance:
    """Weighted draws of every cell's latents, from a proposal corrected for that cell.

    Cells whose k-hat is above 0.7 are tried again with twice the effort, then four times; the best attempt counts.
    """

    def question(rows: Tensor) -> Question:
        return Question(*start(guide, x[rows], gamma[rows], joint), draws_at_once(x[rows]))

    return persistent_importance(question, torch.arange(len(x), device=x.device), effort, attempts=attempts)


def bound_terms(guide: Guide, x: Tensor, gamma: Tensor, samples: int = 1) -> tuple[Tensor, Tensor]:
    """Log weight log p(x, z, l) - log q(z, l | x) of draws from the guide, and its part log q - log p of the latents.

    Each (samples, cells), nats; the mean of the first is the ELBO, of the second the KL divergence.
    """
    sites, log_q = guide.draw(x, gamma, samples)
    return weigh(guide, x, gamma, sites, log_q)


def weigh(guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], log_q: Tensor) -> tuple[Tensor, Tensor]:
    """Log p(x, z, l) - log q of given draws (samples, cells, ...), and its part log q - log p of the latents."""
    fixed, size, terms = guide.weights.medians(), draws_at_once(x), []
    for start in range(0, len(log_q), size):
        part = {name: value[start : start + size] for name, value in sites.items()}
        trace = scored(guide.model, x, gamma, {**fixed, **part})
        terms.append(torch.stack([cell_terms(trace, "x"), cell_terms(trace, *sites)]))
    of_x, of_latents = torch.cat(terms, 1)
    return of_x + of_latents - log_q, log_q - of_latents


def draws_at_once(x: Tensor, megabytes: int = 5) -> int:
    """How many draws of (cells, genes) at once keep one tensor within a few megabytes, what caches hold."""
    return max(1, megabytes * 2**20 // (x.numel() * x.element_size()))
