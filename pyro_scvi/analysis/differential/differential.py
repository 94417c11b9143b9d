"""Differential expression (Section 4): P(w_a < w_b), Bayes factors, fold changes and FDR."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor

from pyro_scvi.analysis.differential.all_pairs import AllPairs
from pyro_scvi.analysis.differential.matched_pairs import Estimate, Groups, MatchedPairs
from pyro_scvi.analysis.inputs import minibatches, require_question
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import cells_by_gene, row_blocks
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.samplers import Amortized, Sampler, require_sampler
from pyro_scvi.types import Theta
from pyro_scvi.utils.checks import require_number

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["AllPairs", "DepthCorrected", "Uncorrected", "differential_expression"]


def __dir__():
    return __all__


_RESOLUTION = 0.001  # of p_lfc at the least, which is a share of a thousand pairs or more


@dataclass(frozen=True)
class DepthCorrected:
    r"""Compare w / depth, depth the sum of the cell's means: groups of unequal depth are on one scale.

    .. math:: w_{ng} / \textstyle\sum_{g'} \mu_{ng'}

    Examples
    --------
    >>> options = {"groupby": "kind", "group_a": "a", "group_b": "b", "largest_se": 0.05}
    >>> corrected = ps.differential_expression(fit, cells, contrast=ps.differential.DepthCorrected(), **options)
    >>> bool(corrected.p_a_lt_b.between(0, 1).all())
    True
    """

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu minus the log of its sum over the genes."""
        return theta["log_mean"] - theta["log_mean"].logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Uncorrected:
    r"""Compare w itself, in counts, as Lopez et al. (2017, Sec. 4) do: a deeper cell then has more of every gene.

    .. math:: w_{ng} \sim Gamma(r_{ng}, r_{ng} / \mu_{ng})

    Examples
    --------
    >>> options = {"groupby": "kind", "group_a": "a", "group_b": "b", "largest_se": 0.05}
    >>> laden = ps.differential_expression(fit, cells, contrast=ps.differential.Uncorrected(), **options)
    >>> bool(laden.p_a_lt_b.between(0, 1).all())
    True
    """

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu."""
        return theta["log_mean"]


@dataclass(frozen=True)
class _Comparison:
    fit: Fit
    cells: Cells
    batches: Minibatches
    contrast: DepthCorrected | Uncorrected
    delta: float
    pairing: AllPairs | MatchedPairs
    sampler: Sampler
    seed: int


def differential_expression(
    fit: Fit,
    cells: Cells,
    *,
    groupby: str | Sequence[Hashable],
    group_a: Hashable | None = None,
    group_b: Hashable | None = None,
    contrast: DepthCorrected | Uncorrected = DepthCorrected(),
    delta: float = 0.5,
    within_batch: bool = False,
    largest_se: float = 0.005,
    most_pairs: int = 20_000,
    pairing: AllPairs | None = None,
    sampler: Sampler = Amortized(),
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compare the expression of two groups of cells gene by gene, by pairs of cells and draws of their latents.

    .. math:: P(w_a < w_b | z_a, z_b) = I_{b_a / (b_a + b_b)}(r_a, r_b), \qquad b = r / \mu

    (regularised incomplete beta function), averaged over pairs, so that only z and l are sampled (Lopez et al. 2017,
    Sec. 4, with the integral over w done exactly). By default w is divided by the cell's depth: where one group has
    several times more molecules per cell, as dendritic cells have, nearly every gene is higher in it otherwise.

    Of the same pairs, lfc is the log2 fold change of the mean of w, and a gene is called where that is beyond delta in
    one direction for nearly all of them:

    .. math:: p_{lfc} = \max(P(lfc > \delta), P(lfc < -\delta))

    ``fdr`` is the running mean of 1 - p_lfc from the largest p_lfc down: of the genes called up to it, so large a share
    is expected for which it is false that, *of two random cells, one from each group, that of the group called has more
    than 2^delta times the mean of the other*. Between equal groups p_lfc is at most 1/2, up to Monte Carlo error,
    however much their cells vary. A gene that differs on average, but by less than it varies within a group, is not
    called; where a group is a mixture, as "the rest" is, few genes are. For those look at ``p_a_lt_b`` or
    ``log_bayes_factor``, and at the interval of lfc.

    Parameters
    ----------
    fit
        The fit.
    cells
        Any cells of its schema.
    groupby
        A column of ``cells.obs``, or one value per cell.
    group_a
        A value of it; None, with ``group_b`` None: each value in turn.
    group_b
        Another value of it; None: all other cells.
    contrast
        :class:`DepthCorrected` or :class:`Uncorrected`.
    delta
        Fold changes beyond this, in log2 units, count as changes for ``p_lfc`` and ``fdr``; 0: any.
    within_batch
        Pair cells of the same batch only.
    largest_se
        Pairs are added until the standard error of every gene's ``p_a_lt_b`` is as small as this; 0: until
        ``most_pairs``.
    most_pairs
        The most pairs, whatever the standard errors.
    pairing
        ``AllPairs(samples=...)`` takes so many draws of each group and all their pairs, in place of the three arguments
        above; it needs one dispersion per gene.
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
        For a contrast, pairing or number that cannot be, a likelihood without w, or AllPairs where cells differ in
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
    require_question(fit, cells)
    require_sampler(sampler)
    _check_options(contrast, delta)
    fit.model.likelihood.require_explicit()  # w is a site of such laws only
    labels = _labels(cells, groupby)
    plan = _pairing(pairing, within_batch, largest_se, most_pairs)
    comparison = _Comparison(fit, cells, minibatches(fit, cells), contrast, delta, plan, sampler, seed)
    if group_a is None:
        if group_b is not None:
            raise DataError("group_b without group_a: name group_a, or leave both out to compare each with the rest")
        groups = pd.unique(labels[~pd.isna(labels)])  # cells without a label are part of every rest
        if not len(groups):
            raise DataError("no cell has a label: there is nothing to compare")
        tables = {group: _compared(comparison, *_members(labels, group, None)) for group in groups}
        return pd.concat(tables, names=["group"])
    return _compared(comparison, *_members(labels, group_a, group_b))


def _compared(comparison: _Comparison, rows_a: np.ndarray, rows_b: np.ndarray) -> pd.DataFrame:
    fit, cells = comparison.fit, comparison.cells
    groups = Groups(fit, cells, comparison.batches, rows_a, rows_b, comparison.contrast, comparison.sampler)
    with evaluating(fit.model, fit.guide, comparison.seed, theta=True):
        found = comparison.pairing.estimate(groups, np.random.default_rng(comparison.seed), comparison.delta)
    table = _summary(found) | _raw(cells, rows_a, "a") | _raw(cells, rows_b, "b")
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


def _summary(found: Estimate) -> dict[str, np.ndarray]:
    clipped = np.clip(found.p, 0.5 / found.n, 1 - 0.5 / found.n)
    return {
        "p_a_lt_b": found.p,
        "se": found.se,
        "log_bayes_factor": np.log(clipped) - np.log1p(-clipped),
        "lfc_mean": found.lfc_mean,
        "lfc_sd": found.lfc_sd,
        "lfc_low": found.lfc_low,
        "lfc_high": found.lfc_high,
        "p_lfc": found.p_lfc,
        "fdr": expected_fdr(found.p_lfc),
    }


def expected_fdr(probability: np.ndarray) -> np.ndarray:
    """Expected share of false calls among each gene and all genes with a larger probability of what is called."""
    order = np.argsort(-probability, kind="stable")
    rates = np.empty_like(probability)
    rates[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return rates


def half_step(p: np.ndarray) -> float:
    """Half of the least distance from 0 or 1 that a share of pairs has, at most 0.0005; 0 and 1 themselves aside."""
    inner = p[(p > 0) & (p < 1)]
    return 0.5 * min([_RESOLUTION, *inner, *(1 - inner)])


def _raw(cells: Cells, rows: np.ndarray, side: str) -> dict[str, np.ndarray]:
    sums, detected = np.zeros(cells.n_genes), np.zeros(cells.n_genes)
    for _, block in row_blocks(cells.counts, rows):
        sums += np.asarray(block.sum(0, dtype=np.float64))
        detected += cells_by_gene(block)
    return {f"mean_{side}": sums / len(rows), f"detected_{side}": detected / len(rows)}


def _labels(cells: Cells, groupby: str | Sequence[Hashable]) -> np.ndarray:
    if isinstance(groupby, str):
        if groupby not in cells.obs:
            raise DataError(
                f"cells.obs has no column {groupby!r}; its columns are {list(cells.obs.columns)}; name one of them, or "
                "pass one value per cell"
            )
        labels = cells.obs[groupby].to_numpy(dtype=object)
    else:
        labels = _as_objects(groupby)
    if labels.shape != (cells.n_cells,):
        raise DataError(f"groupby must hold one value for each of the {cells.n_cells} cells, got {labels.shape}")
    if not all(isinstance(label, Hashable) for label in labels):
        raise DataError("groupby must hold words, numbers or other labels that can be compared; some are lists")
    return np.where(pd.isna(labels), np.nan, labels)  # pandas' own NA has no truth value


def _as_objects(groupby: Sequence[Hashable]) -> np.ndarray:
    if not isinstance(groupby, list | tuple):
        return np.asarray(groupby, dtype=object)
    return pd.Series(list(groupby), dtype=object).to_numpy()  # NumPy would take tuples for the rows of a matrix


def _members(labels: np.ndarray, group_a: Hashable, group_b: Hashable | None) -> tuple[np.ndarray, np.ndarray]:
    known = sorted(map(repr, pd.unique(labels)))
    for group in (group_a, group_b):
        if group is not None and not (isinstance(group, Hashable) and _in(labels, group).any()):
            raise DataError(f"no cell is in group {group!r}; the groups are [{', '.join(known)}]")
    if group_a == group_b:
        raise DataError(f"both groups are {group_a!r}; name two of [{', '.join(known)}]")
    in_a = _in(labels, group_a)
    in_b = ~in_a if group_b is None else _in(labels, group_b)
    if not in_b.any():
        raise DataError(f"every cell is in group {group_a!r}: there is no rest to compare it with")
    return np.flatnonzero(in_a), np.flatnonzero(in_b)


def _in(labels: np.ndarray, group: Hashable) -> np.ndarray:
    """Which labels are the group, (cells,); a group may be a tuple, which NumPy would take for several."""
    one = np.empty((), dtype=object)
    one[()] = group
    return np.asarray(labels == one, dtype=bool)
