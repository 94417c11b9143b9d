"""Simulation-based calibration of the guide of global latents: by a fit to each simulated data set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.analysis.predictive.calibration import (
    Calibration,
    require_distinct,
    require_ranks,
    summary_of,
)
from pyro_scvi.data.cells import Cells
from pyro_scvi.distributions.supports import varying_entries
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.program_runs import drawn_counts
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.checks import brief, require_at_least, switches_checked
from pyro_scvi.utils.progress_bars import progress_bar
from pyro_scvi.utils.random_state import seeded

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["calibrate_globals"]


@switches_checked
def calibrate_globals(
    fit: Fit,
    cells: Cells,
    refit: Callable[[Cells], Fit],
    n_sets: int = 40,
    *,
    draws: int = 99,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    r"""Simulate data sets, fit each, and test whether the guide recovers the global latents.

    .. math:: \theta^* \sim p(\theta), \quad z^*_n \sim p(z | \theta^*), \quad x_n \sim p(x | z^*_n, \theta^*), \quad
        \theta^1, \ldots, \theta^L \sim q(\theta | x_1, \ldots, x_N), \quad rank = \#\{\theta^s < \theta^*\}

    If q were the posterior, ranks would be uniform on 0 to L (Talts, Betancourt, Simpson, Vehtari and Gelman 2018). An
    approximation by independent normals is too narrow where latents are correlated; the coverage says by how much.

    Parameters
    ----------
    fit
        The fit whose program simulates: with its trained parameters, and global latents from their prior.
    cells
        What every simulated data set takes its size and covariates from. Their counts are not used.
    refit
        What fits simulated cells, such as ``lambda cells: ps.fit(model, cells, epochs=50, progress=False)``. For the
        calibration of q alone, its model's decoder is the one that simulated: ``copy.deepcopy(fit.model)``, with
        ``requires_grad_(False)`` for its decoder. A decoder that is trained anew is a part of what is tested.
    n_sets
        Simulated data sets, each of which costs a fit.
    draws
        L. L + 1 must be a multiple of 20.
    seed
        Of the simulations and the draws. The seeds of the fits are those of ``refit``.
    progress
        Whether to show how many data sets are done.

    Returns
    -------
    Calibration
        ``ranks`` (simulated data sets x quantities), one quantity for each number of each global latent, and
        ``summary`` as :func:`pyro_scvi.calibrate` has it. Numbers of an array that are the same in all its values, as
        the upper triangle of a Cholesky factor, are left out.

    Raises
    ------
    ModelError
        If the fit has no global latents, a prior has no density, L + 1 is no multiple of 20, a number is below 1,
        two quantities would have one name, ``refit`` is no function, or what it returns has other global latents.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(20))
    >>> wide = {"likelihood.dispersion.*": ps.weights.NormalWeights(0.3)}
    >>> random = ps.SCVI(20, 2, likelihood=likelihood, weight_priors=wide)
    >>> quick = {"epochs": 1, "progress": False}
    >>> options = {"draws": 19, "progress": False}
    >>> made = ps.calibrate_globals(
    ...     ps.fit(random, train, **quick), train, lambda cells: ps.fit(random, cells, **quick), 3, **options
    ... )
    >>> made.ranks.shape
    (3, 20)
    """
    require_inputs(fit, cells)
    require_proper(fit.model, "nothing can be drawn from it")
    require_at_least(1, n_sets=n_sets)
    require_ranks(draws)
    names = list(fit.guide.weights.supports)
    if not names:
        raise ModelError("the model has no global latents; calibrate ranks those of the cells")
    if not callable(refit):
        raise ModelError(f"refit must be a function that fits cells, got {brief(refit)}")
    varying = {
        name: varying_entries(fit.guide.weights.supports[name], value.shape)
        for name, value in fit.guide.weights.medians().items()
    }
    columns = require_distinct([label for name in names for label in _labels(name, varying[name])])
    rows = []
    with progress_bar(n_sets, "data set", progress) as bar:
        for of_data, of_draws in _seeds(seed, n_sets):
            truth, simulated = _simulated(fit, cells, of_data)
            posterior = _posterior(refit(simulated), names, draws, of_draws)
            rows.append(np.concatenate([_ranks(posterior[name], truth[name], varying[name]) for name in names]))
            bar.update(1)
    ranks = pd.DataFrame(np.stack(rows), columns=columns)
    ranks.index.name = "simulated data set"
    return Calibration(ranks, summary_of(ranks, draws), draws)


def _seeds(seed: int, n: int) -> Iterator[tuple[int, int]]:
    """Seeds of each data set and of its draws: with one for both, the first draw would have the truth's noise."""
    for one in np.random.SeedSequence(seed).spawn(n):
        of_data, of_draws = map(int, one.generate_state(2))
        yield of_data, of_draws


def _simulated(fit: Fit, cells: Cells, seed: int) -> tuple[dict[str, Tensor], Cells]:
    """Global latents from their prior, and cells that the program draws at them."""
    _, gamma = minibatches(fit, cells).rows(torch.arange(cells.n_cells, device=fit.device))
    with evaluating(fit.model, fit.guide, seed):
        _, trace = drawn_counts(fit.model, gamma)
    nodes: dict[str, Any] = trace.nodes
    truth = {name: nodes[name]["value"] for name in fit.guide.weights.supports}
    return truth, replace(cells, counts=nodes["x"]["value"].cpu().numpy())


def _posterior(fitted: Fit, names: list[str], draws: int, seed: int) -> dict[str, Tensor]:
    """Draws (draws, ...) of the global latents from the guide of a fit to simulated cells."""
    found = getattr(getattr(fitted, "guide", None), "weights", None)
    if found is None or list(found.supports) != names:
        raise ModelError(f"refit must return a fit of a model with the global latents {names}, got {brief(fitted)}")
    with seeded(seed):
        drawn: dict[str, Tensor] = found.draws(draws)
    return drawn


def _ranks(posterior: Tensor, truth: Tensor, varying: Tensor) -> np.ndarray:
    return (posterior < truth).sum(0).cpu()[varying].reshape(-1).numpy()


def _labels(name: str, varying: Tensor) -> list[str]:
    if not varying.dim():
        return [name]
    return [f"{name}_{'_'.join(map(str, place))}" for place in varying.nonzero().tolist()]
