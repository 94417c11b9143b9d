"""Differential expression (Section 4): P(w_a < w_b), Bayes factors, fold changes and FDR."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_scvi.analysis.differential.all_pairs import AllPairs
from pyro_scvi.analysis.differential.contrasts import DepthCorrected, Uncorrected
from pyro_scvi.analysis.differential.labels import labels_of, members
from pyro_scvi.analysis.differential.matched_pairs import Groups, MatchedPairs
from pyro_scvi.analysis.differential.summary import raw_counts, summary
from pyro_scvi.analysis.global_averages import at_draws
from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Sampler
from pyro_scvi.utils.checks import require_number

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


@dataclass(frozen=True)
class _Comparison:
    """What all groups are compared by: the fit, its cells and the options."""

    fit: Fit
    cells: Cells
    batches: Minibatches
    contrast: DepthCorrected | Uncorrected
    delta: float
    pairing: AllPairs | MatchedPairs
    sampler: Sampler
    seed: int
    turns: tuple[Fit, ...]


def differential_expression(
    fit: Fit,
    cells: Cells,
    *,
    groupby: str | Sequence[Hashable] | np.ndarray,
    group_a: Hashable | None = None,
    group_b: Hashable | None = None,
    contrast: DepthCorrected | Uncorrected = DepthCorrected(),
    delta: float = 0.5,
    within_batch: bool = False,
    largest_se: float = 0.005,
    most_pairs: int = 20_000,
    pairing: AllPairs | None = None,
    global_draws: int | None = None,
    sampler: Sampler = Amortized(),
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compare the expression of two groups of cells, gene by gene, over pairs of cells and draws of their latents.

    .. math:: P(w_a < w_b | z_a, z_b) = I_{b_a / (b_a + b_b)}(r_a, r_b), \qquad b = r / \mu

    This regularised incomplete beta function is averaged over pairs (Lopez et al. 2017, Sec. 4). The integral over w is
    exact, so only z and l are sampled. By default w is divided by the cell's depth. Without that, a group with several
    times more molecules per cell, such as dendritic cells, has nearly every gene higher.

    Over the same pairs, lfc is the log2 fold change of the mean of w. A gene is called where lfc is beyond delta in one
    direction for nearly all pairs:

    .. math:: p_{lfc} = \max(P(lfc > \delta), P(lfc < -\delta))

    ``fdr`` is the running mean of 1 - p_lfc, from the largest p_lfc down: the expected share of false positives among
    genes ranked this high. A gene is a false positive if this statement does not hold: *of two random cells, one from
    each group, that of the group called has more than 2^delta times the mean of the other*. Between equal groups p_lfc
    is at most 1/2, up to Monte Carlo error, however much their cells vary. A gene that differs on average, but by less
    than it varies within a group, is not called. Few genes are called where a group is a mixture, as "the rest" is. For
    those look at ``p_a_lt_b`` or ``log_bayes_factor``, and at the interval of lfc.

    Parameters
    ----------
    fit
        The fit.
    cells
        Any cells with the fit's schema.
    groupby
        A column of ``cells.obs``, or one value per cell.
    group_a
        A value of ``groupby``; None, with ``group_b`` None: each value in turn.
    group_b
        Another value of ``groupby``; None: all other cells.
    contrast
        :class:`DepthCorrected` or :class:`Uncorrected`.
    delta
        Fold changes beyond this, in log2 units, count as changes for ``p_lfc`` and ``fdr``; 0: any.
    within_batch
        Pair cells of the same batch only.
    largest_se
        Pairs are added until the standard error of every gene's ``p_a_lt_b`` is at most this; 0: until ``most_pairs``.
    most_pairs
        The largest number of pairs, whatever the standard errors.
    pairing
        ``AllPairs(samples=...)`` takes this many draws of each group and uses all their pairs. It replaces the three
        arguments above and needs one dispersion per gene.
    global_draws
        None: global latents are at the guide's medians. A number: pairs take turns at so many of their draws, whose
        spread is in ``se``; not with ``AllPairs``. There is then no more certainty to be had from pairs alone.
    sampler
        Draws the latents of every cell, as in ``sample_posterior``.
    seed
        Of the pairs and the draws.

    Returns
    -------
    DataFrame by gene (and group, when each is compared with the rest)
        ``p_a_lt_b``, its Monte Carlo standard error ``se``, ``log_bayes_factor`` (natural log odds of w_a < w_b, p
        clipped to [1 / 2M, 1 - 1 / 2M] for M pairs that share no draw, so that it is finite), ``lfc_mean``,
        ``lfc_sd``, ``lfc_low``, ``lfc_high`` (log2 of mean b over mean a: mean, sd and 95 % interval over pairs),
        ``p_lfc`` (share of pairs with a change beyond delta in the likelier direction), ``fdr`` (expected share of
        false calls among this gene and all with larger p_lfc), ``mean_a``, ``mean_b`` (raw counts), ``detected_a``,
        ``detected_b`` (share of cells above zero).

    Raises
    ------
    DataError
        For an unknown, empty or doubly named group, or no batch in common.
    ModelError
        For an invalid contrast, pairing or number, a likelihood without w, or AllPairs where cells differ in
        dispersion.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b", largest_se=0.05)
    >>> table.columns[:4].tolist(), len(table)
    (['p_a_lt_b', 'se', 'log_bayes_factor', 'lfc_mean'], 20)
    >>> every = ps.differential_expression(fit, cells, groupby="kind", largest_se=0.05)
    >>> every.index.names
    FrozenList(['group', 'gene'])
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide if global_draws is None else None)
    _check_options(contrast, delta)
    fit.model.likelihood.require_explicit()  # w is a site of such laws only
    labels = labels_of(cells, groupby)
    plan = _pairing(pairing, within_batch, largest_se, most_pairs)
    if global_draws is not None and pairing is not None:
        raise ModelError("AllPairs takes one law for all draws; leave pairing out, or global_draws")
    turns = () if global_draws is None else tuple(at_draws(fit, global_draws, seed))
    if len(turns) > most_pairs // 2:
        raise ModelError(f"most_pairs must be at least twice global_draws, got {most_pairs} and {global_draws}")
    comparison = _Comparison(fit, cells, minibatches(fit, cells), contrast, delta, plan, sampler, seed, turns)
    if group_a is None:
        if group_b is not None:
            raise DataError("group_b without group_a: name group_a, or leave both out to compare each with the rest")
        groups = pd.unique(labels[~pd.isna(labels)])  # cells without a label are part of every rest
        if not len(groups):
            raise DataError("no cell has a label: there is nothing to compare")
        tables = {group: _compared(comparison, *members(labels, group, None)) for group in groups}
        return pd.concat(tables, names=["group"])
    return _compared(comparison, *members(labels, group_a, group_b))


def _compared(comparison: _Comparison, rows_a: np.ndarray, rows_b: np.ndarray) -> pd.DataFrame:
    fit, cells = comparison.fit, comparison.cells
    how = (comparison.contrast, comparison.sampler, comparison.turns)
    groups = Groups(fit, cells, comparison.batches, rows_a, rows_b, *how)
    with evaluating(fit.model, fit.guide, comparison.seed, theta=True):
        estimate = comparison.pairing.estimate(groups, np.random.default_rng(comparison.seed), comparison.delta)
    table = summary(estimate) | raw_counts(cells, rows_a, "a") | raw_counts(cells, rows_b, "b")
    return pd.DataFrame(table, index=pd.Index(cells.gene_names, name="gene"))


def _pairing(given: AllPairs | None, within_batch: bool, largest_se: float, most_pairs: int) -> AllPairs | MatchedPairs:
    if given is None:
        return MatchedPairs(largest_se, most_pairs, within_batch)
    if not isinstance(given, AllPairs):
        raise ModelError(f"pairing must be AllPairs(...), or None for matched pairs, got {given!r}")
    if within_batch:
        raise ModelError("AllPairs pairs cells of all batches; leave pairing out, or within_batch")
    return given


def _check_options(contrast: Any, delta: float) -> None:
    if not isinstance(contrast, DepthCorrected | Uncorrected):
        raise ModelError(f"contrast must be DepthCorrected() or Uncorrected(), got {contrast!r}")
    require_number(delta, "delta")
