"""predict_labels: P(label | x) of every cell under a prior with a component for each label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyro
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import batches_in_streams, minibatches, require_inputs
from pyro_scvi.analysis.label_effects import LOOKED_AT, dependence
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.log_joint import scored
from pyro_scvi.inference.evaluation import evaluating, watched
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Sampler
from pyro_scvi.utils.checks import require_at_least, switches_checked, warn
from pyro_scvi.utils.progress_bars import over_cells

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

LEAST_KNOWN = 20  # labels, from which their predictions are judged
LEAST_RIGHT = 0.75  # of them, below which components are not those of their labels


@switches_checked
def predict_labels(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 100,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 512,
    progress: bool = True,
) -> pd.DataFrame:
    r"""Probability of each label for every cell, under the prior ``ps.priors.ByLabel``.

    .. math:: P(c | x_n) = E_{q(z | x_n)} \left[\frac{\pi_c\, Normal(z; m_c, s_c^2)}
        {\sum_k \pi_k\, Normal(z; m_k, s_k^2)}\right]

    Labels that the cells have are not looked at, except for a warning.

    Parameters
    ----------
    fit, cells
        A fit whose model has this prior, and cells of its schema.
    samples
        Draws of z for each cell.
    sampler
        What draws z, as in ``sample_posterior``. ``ps.Importance()`` corrects the guide, at a much higher cost.
    seed, batch_size, progress
        As in ``sample_posterior``.

    Returns
    -------
    DataFrame
        Cells x labels; rows sum to 1.

    Raises
    ------
    ModelError
        If the prior has no labels, its columns are not those of one column of ``obs``, labels act on anything else than
        z, or the program does not sample z from the prior: the formula would be wrong.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Warns
    -----
    UserWarning
        If, of 20 or more labels that the cells have, a quarter or more is not what is predicted: the components are
        then not those of their labels. Fit more epochs, or with a larger ``label_weight``, see
        :class:`pyro_scvi.priors.ByLabel`.

    Examples
    --------
    >>> kinds = ps.Cells.from_anndata(adata, labels="kind")
    >>> prior = ps.priors.ByLabel(2, columns=kinds.columns["kind"])
    >>> labelled = ps.fit(ps.SCVI(20, 2, kinds.n_covariates, prior=prior), kinds, epochs=1, progress=False)
    >>> ps.predict_labels(labelled, kinds.take(range(3))).columns.tolist()
    ['a', 'b']
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide)
    require_at_least(1, samples=samples, batch_size=batch_size)
    prior: Any = fit.model.prior
    words = _labels(fit, prior)
    if beside := [site for site in dependence(fit, cells, prior.columns).sites if site != "z"]:
        raise ModelError(
            f"P(label | x) is computed from z alone, but {beside} of this model depend on the labels too. Leave "
            "decoder_columns= out, or leave the columns of labels out of it"
        )
    _require_z_of_prior(fit, cells)
    parts = []
    with evaluating(fit.model, fit.guide, seed):
        for x, gamma in over_cells(batches_in_streams(fit, cells, batch_size, seed), cells.n_cells, progress):
            unlabelled = gamma.clone()
            unlabelled[:, prior.columns] = 0.0
            z = sampler.draw(fit.guide, x, unlabelled, samples).sites["z"]
            parts.append(watched(_probabilities(fit, prior, z)).cpu().numpy())
    found = np.concatenate(parts)
    _warn_of_strangers(found, cells.gamma[:, prior.columns])
    return pd.DataFrame(found, columns=pd.Index(words), index=pd.Index(cells.cell_names, name="cell"))


def _warn_of_strangers(found: np.ndarray, given: np.ndarray) -> None:
    """Warn where labels that the cells have are not those predicted, (cells, labels) each."""
    known = given.sum(1) > 0
    if known.sum() < LEAST_KNOWN:
        return
    right = float((found[known].argmax(1) == given[known].argmax(1)).mean())
    if right <= LEAST_RIGHT:
        warn(
            f"of {known.sum()} labels that these cells have, {right:.0%} are predicted: the components of the "
            "prior do not match the labels. Fit more epochs, or with a larger label_weight of ps.priors.ByLabel"
        )


def _labels(fit: Fit, prior: Any) -> list[str]:
    if not hasattr(prior, "log_prob_of_labels"):
        raise ModelError(
            f"the prior {type(prior).__name__} has no labels: fit with prior=ps.priors.ByLabel(n_latent, "
            'columns=cells.columns["cell_type"]), from cells that were read with labels="cell_type"'
        )
    places = [name for name, place in fit.schema.columns.items() if place == prior.columns]
    if not places:
        raise ModelError(
            f"the prior's columns {prior.columns.start} to {prior.columns.stop - 1} of gamma are not those of one "
            f"column of obs; these are {fit.schema.columns}"
        )
    return [name.removeprefix(f"{places[0]}=") for name in fit.schema.column_names[prior.columns]]


def _require_z_of_prior(fit: Fit, cells: Cells) -> None:
    """Refuse a program of one's own that has a prior with labels, and samples z from something else."""
    model, known, medians = fit.model, fit.guide.coordinates, fit.guide.weights.medians()
    prior: Any = model.prior
    few = cells.take(range(min(LOOKED_AT, cells.n_cells)))
    with evaluating(model, fit.guide, 0):
        x, gamma = next(iter(minibatches(fit, few).in_order(LOOKED_AT)))
        gamma, n_labels = gamma.clone(), prior.columns.stop - prior.columns.start
        gamma[:, prior.columns] = torch.eye(n_labels).to(gamma)[torch.arange(len(gamma)) % n_labels]
        sites = known.sites(fit.guide.start(x, gamma)[0][None])
        nodes: Any = scored(model, x, gamma, medians | sites, known).nodes
        found = nodes["z"]["log_prob"]
        with pyro.poutine.block(), pyro.poutine.condition(data=medians), model.weights.drawn_into(model):
            law: Any = model.prior_of(gamma)
            of_prior = law.log_prob(sites["z"])
    if not torch.allclose(found, of_prior.expand_as(found), rtol=1e-4, atol=1e-4):
        raise ModelError(
            f"{type(model).__name__} does not sample z from its prior {type(prior).__name__}, of which P(label | "
            "x) is computed: let it be z = pyro.sample('z', self.prior_of(gamma))"
        )


def _probabilities(fit: Fit, prior: Any, z: Tensor) -> Tensor:
    """P(label | x) (cells, labels) from draws z (samples, cells, 1, latents), global latents at their medians."""
    medians, model = fit.guide.weights.medians(), fit.model
    with torch.no_grad(), pyro.poutine.block(), pyro.poutine.condition(data=medians), model.weights.drawn_into(model):
        log_p: Tensor = prior.log_prob_of_labels(z.squeeze(-2))
    return log_p.exp().mean(0)
