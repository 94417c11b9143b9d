"""Prior and posterior predictive draws, and predictive checks."""

from __future__ import annotations

import warnings
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
from pyro_scvi.analysis.posterior_samples import predicted
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.program_runs import needs_counts
from pyro_scvi.guides.supported import require_drawable
from pyro_scvi.inference.evaluation import draws_at_once, evaluating
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Sampler
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.utils.checks import require_at_least, require_kind
from pyro_scvi.utils.html_repr import table
from pyro_scvi.utils.random_state import seeded

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["Checks", "check_predictions", "posterior_predictive", "prior_predictive"]


def __dir__() -> list[str]:
    return __all__


def prior_predictive(
    model: SCVI, n_cells: int, *, gamma: ArrayLike | Tensor | None = None, seed: int = 0
) -> np.ndarray:
    r"""Draw counts (cells, genes) of ``n_cells`` new cells from the model with its current weights.

    .. math:: z_n \sim p(z), \quad l_n \sim p(l), \quad x_n \sim p(x | z_n, l_n)

    Parameters
    ----------
    model
        Fitted or not.
    n_cells
        Number of cells.
    gamma
        (cells, covariates), needed where the model has covariates.
    seed
        Of the draws.

    Returns
    -------
    ndarray
        (cells, genes), counts.

    Raises
    ------
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
            return model(None, constants).cpu().numpy()
    except NotImplementedError as error:
        raise ModelError(f"the prior {model.prior!r} cannot be drawn from: {error}") from error
    except (AttributeError, TypeError) as error:
        raise needs_counts(model, error) from error


def _gamma(model: SCVI, n_cells: int, given: ArrayLike | Tensor | None) -> Tensor:
    """Covariates (cells, covariates) where the model is, in its precision."""
    if given is None and model.n_covariates:
        raise ModelError(f"the model has {model.n_covariates} covariates: pass gamma of shape (cells, covariates)")
    like = next(chain(model.decoder.parameters(), model.buffers()))  # all weights may be latent
    gamma = torch.zeros(n_cells, 0) if given is None else torch.as_tensor(given)
    if tuple(gamma.shape) != (n_cells, model.n_covariates):
        raise ModelError(f"gamma must have shape ({n_cells}, {model.n_covariates}), got {tuple(gamma.shape)}")
    return gamma.to(like)


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
    r"""Replicated counts x ~ p(x | z, l) with z and l from the cells' posterior, dimensions (sample, cell, gene).

    .. math:: z^s, l^s \sim p(z, l | x_n), \qquad \tilde x^s_n \sim p(x | z^s, l^s)

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


class Checks(NamedTuple):
    """Posterior predictive checks of every gene and every cell, see :func:`check_predictions`.

    Attributes
    ----------
    genes, cells
        Tables with a row per gene, and per cell; columns are (statistic, part).

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=20)
    >>> checks.genes.columns.levels[0].tolist(), checks.cells.columns.levels[0].tolist()
    (['dispersion', 'mean', 'variance', 'zero_fraction'], ['total'])
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
                facts[name] = f"{outside:.0%} of {len(rows):,} {what} outside the band of replicas"
        return facts


def check_predictions(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 50,
    interval: float = 0.9,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 64,
) -> Checks:
    r"""Compare data with replicas: zero fraction, mean, variance and dispersion of each gene, total of each cell.

    .. math:: D_g = var_n(x_{ng}) / mean_n(x_{ng}), \qquad p = P(T(\tilde x) > T(x)) + \tfrac12 P(T(\tilde x) = T(x))

    over replicas of the data, for each statistic T (Gelman, Meng and Stern 1996).

    D is the dispersion: 1 for Poisson counts with one rate, NaN for a gene without counts. Columns are (statistic,
    part) with the parts ``observed``, ``low``, ``median``, ``high`` (equal-tailed band of ``interval`` over replicas)
    and ``p``, the share of replicas above the observed value, with ties counted as half.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema.
    samples
        Replicas of the data.
    interval
        Probability inside the band of replicas, between 0 and 1.
    sampler, seed, batch_size
        As in ``sample_posterior``.

    Returns
    -------
    Checks
        ``genes`` and ``cells``, tables with a row for each; means in counts, variances in counts^2.

    Raises
    ------
    ModelError
        If ``interval`` is not between 0 and 1, a number is below 1, or an argument has the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> checks = ps.check_predictions(fit, test, samples=20)
    >>> checks.genes["zero_fraction"].columns.tolist()
    ['observed', 'low', 'median', 'high', 'p']
    >>> checks.genes.shape, checks.cells.shape
    ((20, 20), (12, 5))
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide)
    require_at_least(1, samples=samples, batch_size=batch_size)
    if not isinstance(interval, Real) or not 0 < interval < 1:
        raise ModelError(f"interval must be between 0 and 1, got {interval!r}")
    sums, totals = torch.zeros(()), list[Tensor]()
    with evaluating(fit.model, fit.guide, seed):
        for x, replicas in _replicated([(fit, samples)], cells, sampler, batch_size, seed):
            both = torch.cat([x[None], replicas]).double()  # the data is the first of 1 + samples
            sums = sums + torch.stack([(both == 0).sum(1), both.sum(1), both.square().sum(1)]).cpu()
            totals.append(both.sum(-1).cpu())
    zeros, mean, square = sums / cells.n_cells
    variance = square - mean.square()
    of_genes = {"zero_fraction": zeros, "mean": mean, "variance": variance, "dispersion": variance / mean}
    genes = {name: _banded(value.numpy(), interval) for name, value in of_genes.items()}
    of_cells = {"total": _banded(torch.cat(totals, 1).numpy(), interval)}
    return Checks(_framed(genes, cells.gene_names, "gene"), _framed(of_cells, cells.cell_names, "cell"))


def _replicated(
    fits: Sequence[tuple[Fit, int]], cells: Cells, sampler: Sampler, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts of some cells, and their replicas: so many of each fit."""
    for x, gamma in batches_in_streams(fits[0][0], cells, batch_size, seed):
        drawn = []
        for fit, samples in fits:
            draws, size = sampler.draw(fit.guide, x, gamma, samples), draws_at_once(x)
            # Counts are drawn for some draws of the latents at a time: samples x cells x genes would not fit the cache.
            parts = zip(*(site.split(size) for site in draws.sites.values()), strict=True)
            drawn += [_counts(fit, x, gamma, dict(zip(draws.sites, part, strict=True))) for part in parts]
        yield x, torch.cat(drawn)


def _counts(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
    """One draw of counts (samples, cells, genes) at every draw of the latents."""
    law: Any = predicted(fit, x, gamma, sites)
    counts: Tensor = law.expand((len(next(iter(sites.values()))), *x.shape)).sample()
    return counts


def _banded(values: np.ndarray, interval: float) -> dict[str, np.ndarray]:
    observed, replicas = values[0], values[1:]
    # Ties count half, so that discrete statistics have a mean p of 1/2 under the model.
    above = np.where(np.isnan(replicas - observed), np.nan, (replicas > observed) + 0.5 * (replicas == observed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a statistic that no replica has: NaN says so
        low, median, high = np.nanquantile(replicas, [(1 - interval) / 2, 0.5, (1 + interval) / 2], axis=0)
        p = np.nanmean(above, 0)
    return {"observed": observed, "low": low, "median": median, "high": high, "p": p}


def _framed(statistics: dict[str, dict[str, np.ndarray]], names: pd.Index, axis: str) -> pd.DataFrame:
    columns = {(name, part): value for name, parts in statistics.items() for part, value in parts.items()}
    return pd.DataFrame(columns, index=pd.Index(names, name=axis))
