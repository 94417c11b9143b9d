"""normalized_expression: the share of each gene in a cell, with batches averaged and depth left out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import (
    batches_in_streams,
    listed_batches,
    listed_names,
    listed_quantiles,
    require_inputs,
)
from pyro_scvi.analysis.integration.means import means_alone
from pyro_scvi.analysis.integration.spaces import shares
from pyro_scvi.analysis.new_batches import draw_latents, in_batches
from pyro_scvi.analysis.outputs import result_array
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.errors import SchemaError
from pyro_scvi.inference.evaluation import evaluating, theta_given
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Refined, Sampler
from pyro_scvi.priors.base import has_density
from pyro_scvi.utils.checks import require_at_least, require_positive

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

DRAWS, DRAWS_OF_QUANTILES = 25, 400


def normalized_expression(
    fit: Fit,
    cells: Cells,
    *,
    genes: Sequence[str] | None = None,
    batches: Sequence[str] | None = None,
    per: float = 1e4,
    samples: int | None = None,
    quantiles: Sequence[float] | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: Any = None,
) -> Any:
    r"""Normalised expression: the share of each gene in a cell, averaged over batches.

    .. math:: s_{ng} = E_{z | x_n} \left[\frac{1}{B} \sum_b
        \frac{\mu_{ng}(z, b)}{\sum_k \mu_{nk}(z, b)}\right] \cdot per

    z is inferred in the cell's own batch and decoded in each batch b. The shares of all genes sum to ``per``. Zeros
    that are technical play no part: mu is the mean given no dropout. Further categories and continuous covariates stay
    those of the cell.

    Parameters
    ----------
    fit, cells
        The fit and any cells of its schema, also of batches that it does not know, if they were read with
        ``allow_new_batches=True``.
    genes
        Names of the genes to return; None: all of the fit. Shares are always among all genes of the fit.
    batches
        Batches that are averaged over; None: all that the fit knows. ``()``: each cell's own, uncorrected; of a cell of
        an unknown batch, all that are known.
    per
        What the shares of a cell sum to; 1e4 as in scanpy's ``normalize_total(target_sum=1e4)``.
    samples, sampler
        Draws of z in every cell, and how they are drawn. None: 25 by ``ps.Amortized()`` for means, 400 by
        ``ps.Refined()`` for quantiles, because intervals from the guide itself are too narrow.
    seed, batch_size
        As in ``sample_posterior``.
    quantiles
        Instead of the mean, these quantiles over the draws of z.
    out
        Array to write into, row by row, in place of a table; it is returned. As in ``impute``: of shape (cells, genes),
        or (quantiles, cells, genes).

    Returns
    -------
    DataFrame, or out
        Cells x genes; with quantiles, columns (quantile, gene).

    Raises
    ------
    ModelError
        If the program does not say what its theta is, a number is out of range, an argument has the wrong type, a
        batch is named twice, or ``out`` has another shape or type.
    SchemaError
        If the cells' genes or covariates are not those of the fit, or there is no such gene or batch.

    Examples
    --------
    >>> table = ps.normalized_expression(fit, test, genes=["GENE3", "GENE0"])
    >>> table.shape, table.columns.tolist()
    ((12, 2), ['GENE3', 'GENE0'])
    >>> bool(np.allclose(ps.normalized_expression(fit, test).sum(axis=1), 1e4))
    True
    """
    require_inputs(fit, cells)
    levels = [] if quantiles is None else listed_quantiles(quantiles)
    refines = bool(levels) and has_density(fit.model)  # under Flat there is no posterior to refine towards
    default = Refined() if refines else Amortized()
    sampler = sampler_for(default if sampler is None else sampler, cells, fit.guide)
    samples = (DRAWS_OF_QUANTILES if levels else DRAWS) if samples is None else samples
    require_at_least(1, samples=samples, batch_size=batch_size)
    require_positive(per, "per")
    batches = None if batches is None else listed_batches(batches)
    names, places = _positions(fit, genes)
    lead = (len(levels),) if levels else ()
    found, done = result_array(fit, (*lead, cells.n_cells, len(names)), out), 0
    with evaluating(fit.model, fit.guide, seed, theta=True):
        for x, gamma in batches_in_streams(fit, cells, batch_size, seed, new_batches=True):
            rows = slice(done, done := done + len(x))
            sites = draw_latents(fit, x, gamma, sampler, samples)
            with means_alone(fit.model):  # no sooner: samplers ask for densities
                drawn = per * _shares(fit, x, in_batches(fit.schema, gamma, batches), sites, places)
            found[..., rows, :] = _summary(drawn, levels).cpu().numpy()
    return _table(found, cells, names, levels) if out is None else out


def _positions(fit: Fit, genes: Sequence[str] | None) -> tuple[list[str], Tensor]:
    known = fit.schema.gene_names
    names = list(known) if genes is None else listed_names(genes, "genes")
    places = pd.Index(known).get_indexer(pd.Index(names))
    if (unknown := [name for name, place in zip(names, places, strict=True) if place < 0]) or not names:
        raise SchemaError(f"the fit does not know the genes {quoted(unknown)}; it has {quoted(known, 3)}")
    return names, torch.from_numpy(places).to(fit.device)


def _shares(fit: Fit, x: Tensor, settings: list[Tensor], sites: dict[str, Tensor], places: Tensor) -> Tensor:
    """Shares (draws, cells, genes asked for), the mean over settings of gamma."""

    def decoded(gamma: Tensor) -> Tensor:
        return shares(theta_given(fit.guide, x, gamma, sites, scores_x=False)["log_mean"]).index_select(-1, places)

    return reduce(torch.add, map(decoded, settings)) / len(settings)


def _summary(drawn: Tensor, levels: list[float]) -> Tensor:
    return torch.quantile(drawn, drawn.new_tensor(levels), 0) if levels else drawn.mean(0)


def _table(found: np.ndarray, cells: Cells, names: list[str], levels: list[float]) -> pd.DataFrame:
    index = pd.Index(cells.cell_names, name="cell")
    if not levels:
        return pd.DataFrame(found, index, pd.Index(names, name="gene"))
    columns = pd.MultiIndex.from_product([levels, names], names=["quantile", "gene"])
    return pd.DataFrame(np.concatenate(list(found), -1), index, columns)
