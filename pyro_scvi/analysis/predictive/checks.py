"""Prior and posterior predictive draws, and predictive checks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyro
import torch
import xarray as xr
from numpy.typing import ArrayLike
from torch import Tensor

from pyro_scvi.analysis.global_averages import at_draws, shares
from pyro_scvi.analysis.inputs import batches_in_streams, require_inputs
from pyro_scvi.analysis.predictive.check_statistics import Statistics, banded, moments
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.program_runs import drawn_counts, needs_counts
from pyro_scvi.guides.supported import require_drawable
from pyro_scvi.inference.evaluation import drawn_from_prior, evaluating, law_given, sampled_counts, with_enumerated
from pyro_scvi.inference.given import Given, sampler_for
from pyro_scvi.inference.samplers import Amortized, Draws, Refined, Sampler
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.priors.base import require_proper
from pyro_scvi.training.same_columns import in_order_of_columns
from pyro_scvi.utils.cell_streams import alone, per_cell
from pyro_scvi.utils.checks import brief, require_at_least, require_kind
from pyro_scvi.utils.html_repr import table
from pyro_scvi.utils.random_state import seeded

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["Checks", "NewLatents", "check_predictions", "posterior_predictive", "prior_predictive"]


def __dir__() -> list[str]:
    return __all__


REPLICAS = 5
"""Of each data set in check_predictions; the variance of their mean is a fifth of that of the data's statistic."""


def prior_predictive(
    model: SCVI, n_cells: int, *, gamma: ArrayLike | Tensor | None = None, seed: int = 0
) -> np.ndarray:
    r"""Draw counts (cells, genes) of ``n_cells`` new cells from the model as it is.

    .. math:: z_n \sim p(z), \quad l_n \sim p(l), \quad x_n \sim p(x | z_n, l_n)

    Parameters
    ----------
    model
        Fitted or not.
    n_cells
        Number of cells.
    gamma
        (cells, covariates), needed where the model has covariates: in the order of ``cells.covariates``, or a DataFrame
        with columns named as ``cells.schema.column_names``, in any order, if the model is of a fit.
    seed
        Of the draws.

    Returns
    -------
    ndarray
        (cells, genes), counts.

    Raises
    ------
    SchemaError
        If ``gamma`` names other columns than the fit has, or the model is of no fit, which would know their names.
    ModelError
        If covariates are missing or of another shape, ``model`` is no SCVI, ``n_cells`` is below 1, or the prior (Flat)
        cannot be drawn from.

    Examples
    --------
    >>> x = ps.prior_predictive(model, 5)
    >>> x.shape, bool((x >= 0).all())
    ((5, 20), True)
    """
    require_kind(model, SCVI, "model", "fit.model")
    require_at_least(1, n_cells=n_cells)
    constants = _gamma(model, n_cells, gamma)
    require_drawable(model)
    try:
        with evaluation_mode(model), seeded(seed), pyro.get_param_store().scope(), torch.no_grad():
            return drawn_counts(model, constants)[0].cpu().numpy()
    except NotImplementedError as error:
        raise ModelError(f"the prior {model.prior!r} cannot be drawn from: {error}") from error
    except (AttributeError, TypeError) as error:
        raise needs_counts(model, error) from error


def _gamma(model: SCVI, n_cells: int, given: ArrayLike | Tensor | None) -> Tensor:
    """Covariates (cells, covariates) where the model is, in its precision."""
    if given is None and model.n_covariates:
        raise ModelError(f"the model has {model.n_covariates} covariates: pass gamma of shape (cells, covariates)")
    like = next(chain(model.decoder.parameters(), model.buffers()))  # all weights may be latent
    try:
        gamma = torch.zeros(n_cells, 0) if given is None else _tensor(in_order_of_columns(model.trained_on, given))
    except (TypeError, ValueError) as error:
        raise ModelError(f"gamma must be numbers of shape (cells, covariates), got {brief(given)}") from error
    if tuple(gamma.shape) != (n_cells, model.n_covariates):
        raise ModelError(f"gamma must have shape ({n_cells}, {model.n_covariates}), got {tuple(gamma.shape)}")
    return gamma.to(like)


def _tensor(values: Any) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values, dtype=np.float64))


def posterior_predictive(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 5,
    global_draws: int | None = None,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 64,
) -> xr.DataArray:
    r"""Replicated counts x ~ p(x | z, l) with z and l from the cells' posterior.

    Dimensions are (sample, cell, gene).

    .. math:: z^s, l^s \sim p(z, l | x_n), \qquad \tilde x^s_n \sim p(x | z^s, l^s)

    Global latents, such as weights with a prior, are at the guide's medians: their uncertainty is in the replicas only
    where ``global_draws=`` asks for it.

    The array has that size in int32, or in float32 if the draws are not whole numbers. So take few samples of many
    cells, or part of the cells at a time.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema.
    samples
        Replicas of every cell.
    global_draws
        None: global latents are at the guide's medians. A number: the replicas are shared among so many of their draws.
    sampler, seed, batch_size
        As in ``sample_posterior``.

    Returns
    -------
    DataArray
        (sample, cell, gene), counts.

    Raises
    ------
    ModelError
        If a number is below 1 or an argument has the wrong type. For a prior without a density, except with Amortized.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> replicas = ps.posterior_predictive(fit, test, samples=3)
    >>> replicas.dims, replicas.shape
    (('sample', 'cell', 'gene'), (3, 12, 20))
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide if global_draws is None else None)
    require_at_least(1, samples=samples, batch_size=batch_size)
    fits = at_draws(fit, global_draws, seed)
    parts = list(zip(fits, shares(samples, len(fits)), strict=True))
    counts, done = np.empty((samples, cells.n_cells, cells.n_genes), dtype=np.int32), 0
    with evaluating(fit.model, fit.guide, seed):
        for x, replicas in _replicated(parts, cells, sampler, batch_size, seed):
            if not torch.equal(replicas.int().to(replicas), replicas):
                counts = counts.astype(np.float32, copy=False)
            counts[:, done : done + len(x)] = replicas.cpu().numpy()
            done += len(x)
    coordinates = {"cell": list(cells.cell_names), "gene": list(cells.gene_names)}
    return xr.DataArray(counts, coords=coordinates, dims=("sample", "cell", "gene"), name="x")


class NewLatents:
    r"""Latents from their prior, whatever the counts: a sampler for :func:`check_predictions`.

    .. math:: z^s \sim p(z), \quad l^s \sim p(l)

    Replicas are then of other cells of the same population (Marshall and Spiegelhalter 2003). The check tests the prior
    as well as p(x | z), and no draw of it has seen the counts.

    Raises
    ------
    ModelError
        When it draws, for a prior without draws (Flat).

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=19, sampler=ps.criticism.NewLatents())
    >>> checks.genes.shape
    (20, 30)
    """

    def draw(self, guide: Guide, x: Tensor, gamma: Tensor, samples: int) -> Draws:
        """Draw every latent of the cells, discrete ones among them, from its prior."""
        require_proper(guide.model, "no latents can be drawn from it")
        require_drawable(guide.model)
        with per_cell():
            return Draws(drawn_from_prior(guide, gamma, samples, enumerated=True), dict)


class Checks(NamedTuple):
    """Posterior predictive checks of every gene and every cell, see :func:`check_predictions`.

    Attributes
    ----------
    genes, cells
        Tables with a row per gene, and per cell; columns are (statistic, part). ``attrs["outside"]`` of each says by
        statistic which share of rows lies outside its band, and which shares do in simulated data sets.

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=19)
    >>> checks.genes.columns.levels[0].tolist()
    ['dispersion', 'mean', 'pit', 'variance', 'variance_given_mean', 'zero_fraction']
    >>> checks.cells.columns.levels[0].tolist(), sorted(checks.genes.attrs["outside"]["mean"])
    (['total'], ['high', 'low', 'p', 'share'])
    """

    genes: pd.DataFrame
    cells: pd.DataFrame

    def __repr__(self) -> str:
        return "Checks\n" + "\n".join(f"  {name}: {fact}" for name, fact in self._facts().items())

    def _repr_html_(self) -> str:
        return table("Checks", self._facts())

    def _facts(self) -> dict[str, str]:
        facts = {}
        for what, of in {"genes": self.genes, "cells": self.cells}.items():
            for name in of.columns.unique(0):
                rows = of[name].dropna()
                outside = ((rows.observed < rows.low) | (rows.observed > rows.high)).mean()
                facts[name] = f"{outside:.0%} of {len(rows):,} {what} outside the band of simulated cells"
                if known := of.attrs.get("outside", {}).get(name):
                    facts[name] += f", where it is {known['low']:.0%} to {known['high']:.0%} (p = {known['p']:.2g})"
        return facts


def check_predictions(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 39,
    interval: float = 0.9,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 64,
) -> Checks:
    r"""Compare statistics of the data with those of data sets that the fit simulates: p-values.

    .. math:: D(x) = T(x) - \tfrac15 \sum_{k=1}^5 T(\tilde x^k), \qquad
        p = P(D(x^s) > D(x)) + \tfrac12 P(D(x^s) = D(x))

    x^s are data sets with the latents of replicas of x, and the replicas of each data set have latents of its own,
    inferred from its counts by ``sampler``. So the data, which its own replicas have seen, is compared with data sets
    for which this holds as well, and p is near uniform if the model is right (Hjort, Dahl and Steinbakk 2006), except
    where an inexact sampler places latents of cells from the prior elsewhere than those of replicas. A share of
    replicas alone is not: it is pulled towards 1/2 where latents are fitted to the same counts, and away from it where
    the sampler is inexact.

    Statistics T of genes: the fraction of zeros, mean, variance and dispersion (variance by mean, NaN for a gene
    without counts), each less that of replicas. ``variance_given_mean`` is the mean of (x - mu)^2 / v with mean and
    variance of x at the latents (left out if the likelihood has none); ``pit`` is 12 times the mean squared distance
    from 1/2 of the place of x among its replicas (the probability integral transform): both are large if counts vary
    more about their means than the model says. Of cells: the total.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema.
    samples
        Simulated data sets, each of which costs the inference of its latents and 5 replicas.
    interval
        Probability inside the band of simulated data sets, between 0 and 1; by order statistics, which 39 data sets, or
        19, have exactly for 0.9.
    sampler
        As in ``sample_posterior``. ``criticism.NewLatents()`` draws latents from the prior. For ``ps.Given``,
        ``ps.Refined()`` draws those of simulated cells.
    seed, batch_size
        As in ``sample_posterior``.

    Returns
    -------
    Checks
        ``genes`` and ``cells``, tables with a row for each; means in counts, variances in counts^2. Columns are
        (statistic, part) with parts ``observed``, ``low``, ``median``, ``high`` (equal-tailed band) and ``p``, the
        share of simulated data sets above the observed one, with ties counted as half.

    Raises
    ------
    ModelError
        If ``interval`` is not between 0 and 1, a number is below 1, or an argument has the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=19)
    >>> checks.genes["zero_fraction"].columns.tolist()
    ['observed', 'low', 'median', 'high', 'p']
    >>> checks.genes.shape, checks.cells.shape
    ((20, 30), (12, 5))
    """
    require_inputs(fit, cells)
    simulated = Refined() if isinstance(sampler, Given) else sampler
    sampler = sampler_for(sampler, cells, fit.guide)
    require_at_least(1, samples=samples, batch_size=batch_size)
    if not isinstance(interval, Real) or not 0 < interval < 1:
        raise ModelError(f"interval must be between 0 and 1, got {interval!r}")
    statistics = Statistics()
    with evaluating(fit.model, fit.guide, seed):
        for x, gamma in batches_in_streams(fit, cells, batch_size, seed):
            for one in range(len(x)):
                rows = slice(one, one + 1)
                with alone(one):
                    statistics.add(*_with_simulated(fit, x[rows], gamma[rows], samples, sampler, simulated))
    genes, by_cell = statistics.of_genes(), statistics.of_cells()
    return Checks(
        banded(genes, interval, cells.gene_names, "gene"), banded(by_cell, interval, cells.cell_names, "cell")
    )


def _with_simulated(
    fit: Fit, x: Tensor, gamma: Tensor, samples: int, sampler: Sampler, simulated: Sampler
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """One cell and ``samples`` simulations of it (1 + samples, genes), replicas of each, and mean and variance of x."""
    own = sampler.draw(fit.guide, x, gamma, samples + REPLICAS).sites
    constants = gamma.expand(samples, -1)
    counts = _law(fit, x, gamma, {name: value[:samples] for name, value in own.items()}, samples).sample()[:, 0].to(x)
    again = simulated.draw(fit.guide, counts, constants, REPLICAS).sites
    sets = torch.cat([x, counts])
    sites = {name: torch.cat([value[samples:], again[name]], 1) for name, value in own.items()}
    law = _law(fit, sets, gamma.expand(len(sets), -1), sites, REPLICAS)
    return sets, law.sample(), moments(law)


def _law(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], n: int) -> Any:
    """The distribution of counts (n, cells, genes) at draws of the latents; missing discrete ones are drawn."""
    law: Any = law_given(fit.guide, x, gamma, with_enumerated(fit.guide, x, gamma, sites))
    return law.expand((n, *x.shape))


def _replicated(
    fits: Sequence[tuple[Fit, int]], cells: Cells, sampler: Sampler, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts of some cells, and their replicas: so many of each fit."""
    for x, gamma in batches_in_streams(fits[0][0], cells, batch_size, seed):
        drawn = []
        for fit, samples in fits:
            sites = with_enumerated(fit.guide, x, gamma, sampler.draw(fit.guide, x, gamma, samples).sites)
            drawn.append(sampled_counts(fit.guide, x, gamma, sites))
        yield x, torch.cat(drawn)
