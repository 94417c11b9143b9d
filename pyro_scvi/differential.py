"""Differential expression (Section 4): P(w_a < w_b), Bayes factors, fold changes and false discovery rates."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.special import betainc, expit
from torch import Tensor

from pyro_scvi.cells import Cells
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.likelihoods import Theta
from pyro_scvi.minibatches import Minibatches
from pyro_scvi.posterior import evaluating, minibatches, require_at_least
from pyro_scvi.samplers import Amortized, Sampler
from pyro_scvi.sampling import decoded

if TYPE_CHECKING:
    from pyro_scvi.fit import Fit

Pairing = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class DepthCorrected:
    """Compare w / depth, depth the sum of the cell's means: groups of unequal depth are on one scale."""

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu minus the log of its sum over the genes."""
        return theta["log_mean"] - theta["log_mean"].logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class DepthLaden:
    """Compare w itself, as the paper does: a deeper cell then has more of every gene."""

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu."""
        return theta["log_mean"]


def differential_expression(
    fit: Fit,
    cells: Cells,
    *,
    groupby: str | Sequence[Hashable],
    group_a: Hashable | None = None,
    group_b: Hashable | None = None,
    contrast: DepthCorrected | DepthLaden = DepthCorrected(),
    delta: float = 0.5,
    within_batch: bool = False,
    largest_se: float = 0.005,
    most_pairs: int = 20_000,
    sampler: Sampler = Amortized(),
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compare the expression of two groups of cells gene by gene, by pairs of cells and draws of their latents.

    .. math:: P(w_a < w_b | z_a, z_b) = I_{b_a / (b_a + b_b)}(r_a, r_b), \qquad b = r / \mu

    (regularised incomplete beta function), averaged over pairs, so that only z and l are sampled (Lopez et al. 2017,
    Sec. 4, with the integral over w done exactly). By default w is divided by the cell's depth: where one group has
    several times more molecules per cell, as dendritic cells have, nearly every gene is higher in it otherwise.

    Parameters
    ----------
    fit, cells
        The fit and any cells of its schema.
    groupby
        A column of ``cells.obs``, or one value per cell.
    group_a, group_b
        Values of it. Without ``group_b``: all other cells; without both: each group against the rest, in turn.
    contrast
        :class:`DepthCorrected` or :class:`DepthLaden`.
    delta
        Fold changes beyond this, in log2 units, count as changes for ``p_lfc`` and ``fdr``.
    within_batch
        Pair cells of the same batch only.
    largest_se, most_pairs
        Pairs are added until the standard error of every gene's ``p_a_lt_b`` is below ``largest_se``.
    sampler, seed
        As in ``sample_posterior``.

    Returns
    -------
    DataFrame by gene (and group, when each is compared with the rest)
        ``p_a_lt_b``, its Monte Carlo standard error ``se``, ``log_bayes_factor`` (natural log odds of w_a < w_b, p
        clipped to [1 / 2M, 1 - 1 / 2M] for M pairs, so that it is finite), ``lfc_mean``, ``lfc_sd``, ``lfc_low``,
        ``lfc_high`` (log2 of mean b over mean a: mean, sd and 95 % interval), ``p_lfc`` = P(\|lfc\| > delta), ``fdr``
        (expected false discoveries among this gene and all with larger p_lfc), ``mean_a``, ``mean_b`` (raw counts),
        ``detected_a``, ``detected_b`` (share of cells above zero).

    Raises
    ------
    DataError
        For an unknown, empty or doubly named group, or no batch in common.
    ModelError
        For a contrast, ``delta``, ``largest_se`` or ``most_pairs`` that cannot be, or a likelihood without w.
    """
    _check_options(contrast, delta, largest_se, most_pairs)
    fit.model.likelihood.require_explicit()  # w is a site of such laws only
    labels = _labels(cells, groupby)
    plan = _Plan(contrast, delta, within_batch, largest_se, most_pairs, sampler, seed)
    if group_a is None:
        if group_b is not None:
            raise DataError("group_b without group_a: name group_a, or leave both out to compare each with the rest")
        groups = pd.unique(labels[~pd.isna(labels)])  # cells without a label are part of every rest
        if not len(groups):
            raise DataError("no cell has a label: there is nothing to compare")
        tables = {group: _compared(fit, cells, plan, *_members(labels, group, None)) for group in groups}
        return pd.concat(tables, names=["group"])
    return _compared(fit, cells, plan, *_members(labels, group_a, group_b))


@dataclass(frozen=True)
class _Plan:
    contrast: DepthCorrected | DepthLaden
    delta: float
    within_batch: bool
    largest_se: float
    most_pairs: int
    sampler: Sampler
    seed: int


class _Side(NamedTuple):
    """One cell per pair: log mean on the contrast's scale and log r, float64 arrays (pairs, genes)."""

    log_mean: np.ndarray
    log_r: np.ndarray | None


PAIRS, AT_ONCE = 1000, 128  # pairs between looks at the standard errors, cells drawn at a time


def _compared(fit: Fit, cells: Cells, plan: _Plan, rows_a: np.ndarray, rows_b: np.ndarray) -> pd.DataFrame:
    generator, batches = np.random.default_rng(plan.seed), minibatches(fit, cells)
    draw_pairs = _same_batch_pairs(cells, rows_a, rows_b) if plan.within_batch else _any_pairs(rows_a, rows_b)
    total, squares, changes, n = 0.0, 0.0, list[np.ndarray](), 0
    with evaluating(fit.model, fit.guide, plan.seed):
        while n < plan.most_pairs:
            pairs = draw_pairs(generator, min(PAIRS, plan.most_pairs - n))
            a, b = (_side(fit, batches, rows, plan) for rows in pairs)
            p = probability_less(a, b)
            total, squares, n = total + p.sum(0), squares + np.square(p).sum(0), n + len(p)
            changes.append(((b.log_mean - a.log_mean) / np.log(2)).astype(np.float32))
            mean = total / n
            se = np.sqrt(np.maximum(squares / n - np.square(mean), 0) / n)
            if se.max() <= plan.largest_se:
                break
    table = _summary(mean, se, n, np.concatenate(changes), plan.delta)
    raw = _raw(cells, rows_a, "a") | _raw(cells, rows_b, "b")
    return pd.DataFrame(table | raw, index=pd.Index(cells.gene_names, name="gene"))


def probability_less(a: _Side, b: _Side) -> np.ndarray:
    """P(w_a < w_b | z_a, z_b), (pairs, genes); where w is its mean exactly, 1, 0, or 1/2 for equals."""
    gap = b.log_mean - a.log_mean
    if a.log_r is None or b.log_r is None:
        return 0.5 * (1 + np.sign(gap))
    # b_a / (b_a + b_b) with log b = log r - log mu
    return betainc(np.exp(a.log_r), np.exp(b.log_r), expit(a.log_r - b.log_r + gap))


def _side(fit: Fit, batches: Minibatches, rows: np.ndarray, plan: _Plan) -> _Side:
    means, dispersions = list[np.ndarray](), list[np.ndarray]()
    for part in torch.as_tensor(rows, device=fit.device).split(AT_ONCE):
        x, gamma = batches.rows(part)
        theta = decoded(fit, x, gamma, plan.sampler.draw(fit.guide, x, gamma, 1))
        log_mean, log_r = plan.contrast.log_mean(theta), theta.get("log_inverse_dispersion")
        means.append(_double(log_mean[0]))
        if log_r is not None:
            dispersions.append(_double(log_r.expand(log_mean.shape)[0]))
    return _Side(np.concatenate(means), np.concatenate(dispersions) if dispersions else None)


def _check_options(contrast: Any, delta: float, largest_se: float, most_pairs: int) -> None:
    if not isinstance(contrast, DepthCorrected | DepthLaden):
        raise ModelError(f"contrast must be DepthCorrected() or DepthLaden(), got {contrast!r}")
    if not (delta >= 0 and largest_se >= 0):
        raise ModelError(f"delta and largest_se must be 0 or more, got {delta} and {largest_se}")
    require_at_least(2, most_pairs=most_pairs)


def _summary(p: np.ndarray, se: np.ndarray, n: int, changes: np.ndarray, delta: float) -> dict[str, np.ndarray]:
    clipped = np.clip(p, 0.5 / n, 1 - 0.5 / n)
    low, high = np.quantile(changes, [0.025, 0.975], axis=0)
    p_lfc = (np.abs(changes) > delta).mean(0)
    return {
        "p_a_lt_b": p,
        "se": se,
        "log_bayes_factor": np.log(clipped) - np.log1p(-clipped),
        "lfc_mean": changes.mean(0),
        "lfc_sd": changes.std(0),
        "lfc_low": low,
        "lfc_high": high,
        "p_lfc": p_lfc,
        "fdr": expected_fdr(p_lfc),
    }


def expected_fdr(probability: np.ndarray) -> np.ndarray:
    """Bayesian false discovery rate of calling each gene and all genes with a larger probability of change."""
    order = np.argsort(-probability, kind="stable")
    rates = np.empty_like(probability)
    rates[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return rates


def _raw(cells: Cells, rows: np.ndarray, side: str) -> dict[str, np.ndarray]:
    counts = cells.counts[rows]
    return {f"mean_{side}": _flat(counts.mean(0)), f"detected_{side}": _flat((counts > 0).mean(0))}


def _labels(cells: Cells, groupby: str | Sequence[Hashable]) -> np.ndarray:
    if isinstance(groupby, str):
        if groupby not in cells.obs:
            raise DataError(f"cells.obs has no column {groupby!r}; its columns are {list(cells.obs.columns)}")
        labels = cells.obs[groupby].to_numpy(dtype=object)
    else:
        labels = np.asarray(groupby, dtype=object)
    if labels.shape != (cells.n_cells,):
        raise DataError(f"groupby must hold one value for each of the {cells.n_cells} cells, got {labels.shape}")
    return np.where(pd.isna(labels), np.nan, labels)  # pandas' own NA has no truth value


def _members(labels: np.ndarray, group_a: Hashable, group_b: Hashable | None) -> tuple[np.ndarray, np.ndarray]:
    known = sorted(map(repr, pd.unique(labels)))
    for group in (group_a, group_b):
        if group is not None and not (labels == group).any():
            raise DataError(f"no cell is in group {group!r}; the groups are [{', '.join(known)}]")
    if group_a == group_b:
        raise DataError(f"both groups are {group_a!r}; name two of [{', '.join(known)}]")
    in_b = labels != group_a if group_b is None else labels == group_b
    if not in_b.any():
        raise DataError(f"every cell is in group {group_a!r}: there is no rest to compare it with")
    return np.flatnonzero(labels == group_a), np.flatnonzero(in_b)


def _any_pairs(rows_a: np.ndarray, rows_b: np.ndarray) -> Pairing:
    return lambda generator, n: (generator.choice(rows_a, n), generator.choice(rows_b, n))


def _same_batch_pairs(cells: Cells, rows_a: np.ndarray, rows_b: np.ndarray) -> Pairing:
    """Pairs within a batch, batches in proportion to how many cells of both groups they hold."""
    if not cells.n_batches:
        raise DataError("within_batch needs cells with batches; make the Cells with batch=")
    batch = cells.covariates[:, : cells.n_batches].argmax(1)
    both = [(rows_a[batch[rows_a] == k], rows_b[batch[rows_b] == k]) for k in range(cells.n_batches)]
    both = [(a, b) for a, b in both if len(a) and len(b)]
    if not both:
        raise DataError("no batch holds cells of both groups; compare without within_batch")
    weights = np.array([min(len(a), len(b)) for a, b in both], dtype=float)

    def draw(generator: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = generator.multinomial(n, weights / weights.sum())
        chosen = [(generator.choice(a, k), generator.choice(b, k)) for (a, b), k in zip(both, sizes, strict=True)]
        return np.concatenate([a for a, _ in chosen]), np.concatenate([b for _, b in chosen])

    return draw


def _double(tensor: Tensor) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _flat(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, dtype=float).reshape(-1)
