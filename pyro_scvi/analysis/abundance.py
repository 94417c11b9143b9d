"""differential_abundance: where in the latents one group of samples has more cells than another."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import combinations
from math import comb
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.stats import false_discovery_control
from torch import Tensor

from pyro_scvi.analysis.differential.labels import groups_of
from pyro_scvi.analysis.inputs import batches_in_streams, minibatches, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import as_written
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.precision import in_float64

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

LEAST_SAMPLES = 2
"""Samples in each group, and cells in each sample: one alone has no error."""

AT_ONCE = 500_000
"""Numbers held at a time: pairs of cells x latents, or cells x exchanges."""

FARTHEST = 600.0
"""Nats below the densest sample at which a density counts as this: smaller ones are zero in float64."""


def differential_abundance(
    fit: Fit,
    cells: Cells,
    groupby: str | Sequence[Hashable] | np.ndarray | pd.Series,
    sample: str | Sequence[Hashable] | np.ndarray | pd.Series,
    *,
    group_a: Hashable | None = None,
    group_b: Hashable | None = None,
    permutations: int = 1000,
    seed: int = 0,
    batch_size: int = 256,
) -> pd.DataFrame:
    r"""Compare how densely cells of two groups lie around every cell, with errors over samples.

    .. math:: d_n = \log \frac{1}{|b|} \sum_{s \in b} q_s(\hat z_n) - \log \frac{1}{|a|} \sum_{s \in a} q_s(\hat z_n),
        \qquad q_s(z) = \frac{1}{|s|} \sum_{m \in s} q(z | x_m)

    q_s is the aggregated posterior of a sample, such as a donor; every sample counts alike, however many cells it has.
    The cell n itself is left out of its own sample: it lies at the peak of its own posterior, whose density would
    say that each cell is typical of its own group.

    Samples are what was drawn at random, so errors are over samples, not over cells. ``se`` is the jackknife's: each
    sample is left out in turn (Efron and Stein 1981); of few samples that differ much it is a little too large.
    ``p_value`` exchanges the groups of whole samples. With 3 samples against 3 it cannot be below 0.1, and with 4
    against 4 not below 0.03.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema.
    groupby, sample
        Group and sample of each cell: columns of ``cells.obs``, or one value per cell. A sample belongs to one group.
        Cells of other groups, or without a sample, have a row, but are in no q_s.
    group_a, group_b
        The groups that are compared. May be left out if there are two: a is then the first by name.
    permutations
        Number of exchanges. If there are no more than that, all are made.
    seed
        Of the exchanges, and of draws for guides whose mean of z has no closed form.
    batch_size
        Cells at a time.

    Returns
    -------
    DataFrame
        By cell: ``log_ratio``, d in nats, log 2 = 0.69 for twice as many; ``se``; ``p_value``, two-sided; and
        ``q_value``, p-values adjusted over cells (Benjamini and Hochberg 1995).

    Raises
    ------
    DataError
        If a group has fewer than 2 samples, a sample has fewer than 2 cells or is in both groups, or groups are unknown
        or not named.
    ModelError
        If the guide has no density of z, or an argument has the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> donors = np.repeat(["p", "q", "r", "s"], 15)
    >>> condition = np.repeat(["control", "treated"], 30)
    >>> table = ps.differential_abundance(fit, cells, condition, donors)
    >>> table.columns.tolist(), table.attrs["group_b"]
    (['log_ratio', 'se', 'p_value', 'q_value'], 'treated')
    """
    require_inputs(fit, cells)
    require_at_least(1, permutations=permutations, batch_size=batch_size)
    _require_density(fit)
    design = _design(groups_of(cells, groupby), groups_of(cells, sample, "sample"), group_a, group_b)
    log_q = _aggregated(fit, cells, design, batch_size, seed)
    exchanged = _exchanges(design, permutations, np.random.default_rng(seed))
    table = pd.DataFrame({"log_ratio": _log_ratio(log_q, *design.weights)}, pd.Index(cells.cell_names, name="cell"))
    table["se"] = _errors(log_q, design)
    table["p_value"] = _p_values(log_q, design.weights, exchanged)
    table["q_value"] = false_discovery_control(table["p_value"])
    # As text: a Parquet file keeps attributes only if JSON can.
    table.attrs = dict(zip(("group_a", "group_b"), map(str, design.groups), strict=True))
    table.attrs["samples"] = [str(name) for name in design.samples]
    return table


class Weights(NamedTuple):
    """How much each sample counts in group a and in group b, (samples,) or (samples, exchanges)."""

    a: np.ndarray
    b: np.ndarray


class Design(NamedTuple):
    """The groups, the samples, which of these are in group b, and the position of each cell's sample, or -1."""

    groups: tuple[Hashable, Hashable]
    samples: list[Hashable]
    in_b: np.ndarray
    codes: np.ndarray

    @property
    def weights(self) -> Weights:
        """Every sample of a group counts alike."""
        return Weights(_equal(~self.in_b), _equal(self.in_b))


def _design(labels: np.ndarray, samples: np.ndarray, group_a: Hashable | None, group_b: Hashable | None) -> Design:
    groups = _groups(labels, group_a, group_b)
    of_groups = pd.Series(samples).where(pd.Series(labels).isin(groups))
    names = _by_name(of_groups.dropna())  # exchanges are drawn in this order, whatever that of the cells is
    places = {name: place for place, name in enumerate(names)}
    codes = np.array([places.get(name, -1) for name in of_groups])
    if not len(names):
        raise DataError(f"no cell of the groups {groups[0]!r} and {groups[1]!r} has a sample")
    of_b = labels == groups[1]
    shares = np.array([of_b[codes == place].mean() for place in range(len(names))])
    if both := [name for name, share in zip(names, shares, strict=True) if 0 < share < 1]:
        raise DataError(
            f"the samples {both[:5]} have cells of both groups: the test exchanges whole samples. If the two "
            "parts of a sample count as independent, name samples by both columns: obs['donor'] + '_' + "
            "obs['condition']"
        )
    design = Design(groups, names, shares == 1, codes)
    _require_enough(design)
    return design


def _groups(labels: np.ndarray, group_a: Hashable | None, group_b: Hashable | None) -> tuple[Hashable, Hashable]:
    known = _by_name(pd.Series(labels).dropna())
    group_a, group_b = (as_written(labels, group) for group in (group_a, group_b))
    if group_a is None and group_b is None and len(known) == LEAST_SAMPLES:
        return known[0], known[1]
    named = all(isinstance(group, Hashable) and group in known for group in (group_a, group_b))
    if not named or group_a is None or group_b is None or group_a == group_b:
        raise DataError(f"name two groups as group_a= and group_b=, got {group_a!r} and {group_b!r}; they are {known}")
    return group_a, group_b


def _by_name(labels: pd.Series) -> list[Hashable]:
    """Every label once, in the order of their names."""
    return sorted(pd.unique(labels), key=lambda label: (str(label), repr(label)))


def _require_enough(design: Design) -> None:
    sizes = np.bincount(design.codes[design.codes >= 0], minlength=len(design.samples))
    if small := [name for name, size in zip(design.samples, sizes, strict=True) if size < LEAST_SAMPLES]:
        raise DataError(f"the samples {small[:5]} have one cell each, too few for a density: leave them out")
    for group, taken in zip(design.groups, (~design.in_b, design.in_b), strict=True):
        if taken.sum() < LEAST_SAMPLES:
            raise DataError(
                f"group {group!r} has {taken.sum()} sample: the spread between samples is unknown, because "
                "cells of one sample are not replicates. Each group needs two samples"
            )


def _require_density(fit: Fit) -> None:
    site = fit.guide.coordinates.of_z()
    if not (fit.guide.amortized and fit.guide.stochastic):
        raise ModelError(
            f"{type(fit.guide).__name__} has no density q(z | x) of new cells: fit with ps.guides.DiagonalNormal"
        )
    if site.place.start:
        raise ModelError(
            "this guide gives q(z | x) only together with other latents: fit with ps.guides.DiagonalNormal"
        )


def _aggregated(fit: Fit, cells: Cells, design: Design, batch_size: int, seed: int) -> np.ndarray:
    """Log q_s at the mean of every cell (cells, samples), the cell itself left out of its sample."""
    site, log_q = fit.guide.coordinates.of_z(), np.empty((cells.n_cells, len(design.samples)))
    with evaluating(fit.model, fit.guide, seed):
        data = minibatches(fit, cells)
        z = torch.cat([fit.guide.mean(site, *some) for some in batches_in_streams(fit, cells, batch_size, seed)])
        for place in range(len(design.samples)):
            members = torch.from_numpy(np.flatnonzero(design.codes == place)).to(fit.device)
            total = in_float64(z.new_full((len(z),), -torch.inf))
            for rows in members.split(batch_size):
                law = fit.guide.law(site, fit.guide.encode(*data.rows(rows), None), {})
                total = torch.logaddexp(total, _summed(law, z, rows))
            others = len(members) - torch.zeros_like(total).index_fill(0, members.to(total.device), 1.0)
            log_q[:, place] = (total - others.log()).cpu().numpy()
    return np.maximum(log_q, log_q.max(1, keepdims=True) - FARTHEST)


def _summed(law: Any, z: Tensor, rows: Tensor) -> Tensor:
    """Log of the summed densities (cells,) at all z (cells, 1, latents) of the cells ``rows``, without a cell's own."""
    step, found = max(1, AT_ONCE // (len(rows) * z.shape[-1])), []
    for start in range(0, len(z), step):
        log_p = law.log_prob(z[start : start + step, None]).squeeze(-1)  # (cells, rows)
        own = torch.nonzero((rows >= start) & (rows < start + len(log_p))).squeeze(-1)
        log_p[rows[own] - start, own] = -torch.inf
        found.append(log_p.logsumexp(1))
    return in_float64(torch.cat(found))


def _log_ratio(log_q: np.ndarray, of_a: np.ndarray, of_b: np.ndarray) -> np.ndarray:
    """Log of the weighted means of q_s (cells, samples) in b over that in a: (cells,) or (cells, exchanges)."""
    q = np.exp(log_q - log_q.max(1, keepdims=True))
    of_group_a, of_group_b = np.log(q @ of_a), np.log(q @ of_b)
    ratio: np.ndarray = (of_group_b.T - of_group_a.T).T  # by cell, or by cell and choice of samples
    return ratio


def _equal(taken: np.ndarray) -> np.ndarray:
    weights: np.ndarray = taken / taken.sum(0)
    return weights


def _exchanges(design: Design, n: int, random: np.random.Generator) -> Weights:
    """Weights (samples, exchanges) of all ways to call as many samples b, or of ``n`` at random and that observed."""
    n_samples, n_b = len(design.in_b), int(design.in_b.sum())
    if comb(n_samples, n_b) <= n:
        chosen = np.array(list(combinations(range(n_samples), n_b)))
        in_b = np.zeros((n_samples, len(chosen)), dtype=bool)
        in_b[chosen.T, np.arange(len(chosen))] = True
    else:
        shuffled = [random.permutation(design.in_b) for _ in range(n)]
        in_b = np.stack([design.in_b, *shuffled], 1)
    return Weights(_equal(~in_b), _equal(in_b))


def _errors(log_q: np.ndarray, design: Design) -> np.ndarray:
    """Jackknife error of the log ratio over samples, (cells,): of each group's log mean with one sample left out."""
    variance = np.zeros(len(log_q))
    for taken in (~design.in_b, design.in_b):
        places = np.flatnonzero(taken)
        rest = np.stack([taken & (np.arange(len(taken)) != place) for place in places], 1)
        logs = _log_ratio(log_q, _equal(taken), _equal(rest))
        variance += (len(places) - 1) * logs.var(1)
    return np.sqrt(variance)


def _p_values(log_q: np.ndarray, observed: Weights, exchanged: Weights) -> np.ndarray:
    """Share of the exchanges whose log ratio is as far from zero as the one observed, (cells,)."""
    parts = []
    for part in _blocks(log_q, exchanged):
        least = np.abs(_log_ratio(part, *observed)) - 1e-9  # the same sum in another order is the same ratio
        parts.append((np.abs(_log_ratio(part, *exchanged)) >= least[:, None]).mean(1))
    return np.concatenate(parts)


def _blocks(log_q: np.ndarray, weights: Weights) -> list[np.ndarray]:
    return np.array_split(log_q, np.ceil(log_q.shape[0] * weights.a.shape[1] / AT_ONCE).astype(int))
