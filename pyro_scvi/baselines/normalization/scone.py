"""A subset of SCONE (Cole et al. 2019): many normalisations of one data set, scored and ranked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
from scipy.special import entr
from sklearn.base import BaseEstimator

from pyro_scvi.baselines.inputs import dense_counts, require_fitted
from pyro_scvi.baselines.normalization.scalings import (
    RLE,
    TMM,
    FullQuantile,
    NoScaling,
    Scaling,
    TotalScaling,
    UpperQuartile,
)
from pyro_scvi.baselines.normalization.scone_scores import PAM_CELLS, Known, components, scores
from pyro_scvi.data.names import in_order_of
from pyro_scvi.errors import DataError, ModelError

SCALINGS: tuple[Scaling, ...] = (NoScaling(), TotalScaling(), TMM(), RLE(), UpperQuartile(), FullQuantile())
MOST_COMPONENTS = 8
DIGITS = 10  # of scores, before they are ranked: what rounding alone tells apart is a tie


@dataclass(frozen=True)
class Normalisation:
    r"""One normalisation: scale to a common depth, then remove what quality and batch explain.

    Per gene, with y = log(1 + scaled counts), Q the first principal components of the cells' quality metrics,

    .. math:: y = b_0 + B \beta + C \delta + Q \eta + e, \qquad adjusted = y - C \delta - Q \eta

    by least squares. B are sum-to-zero contrasts of the biological groups, which are kept; C are those of the batches
    (Cole et al. 2019, Methods).

    Parameters
    ----------
    scaling
        Of :mod:`pyro_scvi.baselines.normalization.scalings`.
    quality
        Number of principal components of the quality metrics to regress out; 0: none, None: all.
    batch, bio
        Whether to remove batches, and whether biological groups are in the regression.

    Examples
    --------
    >>> ps.baselines.Normalisation(ps.baselines.TMM(), quality=3, batch=True).name
    'TMM, 3 QC, batch'
    """

    scaling: Scaling
    quality: int | None = 0
    batch: bool = False
    bio: bool = False

    @property
    def name(self) -> str:
        """Its name in tables, such as "total, 8 QC"."""
        quality = "all" if self.quality is None else self.quality
        return f"{self.scaling.name}, {quality} QC" + ", batch" * self.batch + ", bio" * self.bio


SEED_CHOICE = Normalisation(TotalScaling(), quality=None)
"""Depth scaling and regression on all (up to 8) components of quality, which SCONE chose in Lopez et al. (2017)."""


def grid(n_quality: int, batch: bool, bio: bool) -> tuple[Normalisation, ...]:
    """Every scaling with 0 to 8 components (at most ``n_quality``); with batches, each also with batches removed."""
    plain = [Normalisation(scaling, k) for scaling in SCALINGS for k in range(min(MOST_COMPONENTS, n_quality) + 1)]
    out = [Normalisation(each.scaling, each.quality, True, bio) for each in plain] if batch else []
    return *plain, *out


class _Cells(NamedTuple):
    """Input of a normalisation: counts (cells, genes), components of quality, labels of batches and groups."""

    counts: np.ndarray
    quality: np.ndarray
    batch: np.ndarray | None
    bio: np.ndarray | None

    def normalised(self, chosen: Normalisation) -> np.ndarray:
        """Log(1 + scaled counts) without the unwanted variation, (cells, genes)."""
        y = np.log1p(chosen.scaling(self.counts))
        unwanted = np.column_stack([np.empty((len(y), 0)), *self._unwanted(chosen)])
        if not unwanted.shape[1]:
            return y
        kept = _contrasts(_required(self.bio, "bio")) if chosen.bio else np.empty((len(y), 0))
        design = np.column_stack((unwanted, np.ones(len(y)), kept))
        if (rank := np.linalg.matrix_rank(design)) < design.shape[1]:
            raise ModelError(
                f"{chosen.name} is confounded: its regression has {design.shape[1]} columns of rank {rank}; take fewer "
                "components of quality, or leave batch or bio out"
            )
        coefficients = np.linalg.lstsq(design, y, rcond=None)[0]
        return y - unwanted @ coefficients[: unwanted.shape[1]]

    def _unwanted(self, chosen: Normalisation) -> list[np.ndarray]:
        most = self.quality.shape[1]
        if chosen.quality is not None and not 0 <= chosen.quality <= most:
            raise ModelError(f"{chosen.name} asks for {chosen.quality} components of quality; 0 to {most} are possible")
        quality = self.quality[:, : chosen.quality]
        return [quality, _contrasts(_required(self.batch, "batch"))] if chosen.batch else [quality]


def _required(labels: np.ndarray | None, name: str) -> np.ndarray:
    if labels is None:
        raise ModelError(f"a Normalisation with {name}=True needs fit(counts, {name}=labels)")
    return labels


class SCONE(BaseEstimator):
    r"""Normalise in many ways, score each by eight criteria, and choose the best mean rank.

    .. math:: mean\_rank_m = \frac1S \sum_s rank_s(m)

    over the S criteria that can be computed, rank 1 for the worst candidate m (Cole et al. 2019, Methods).

    Parameters
    ----------
    candidates
        The normalisations to compare; None for :func:`grid`.
    seed
        For drawing the cells that are clustered for PAM_SIL.

    Attributes
    ----------
    table_
        By normalisation, best first: the scores (higher is better, NaN if their input was not given) and ``mean_rank``.
    best_
        The :class:`Normalisation` in its first row.

    Examples
    --------
    >>> system = ps.baselines.SCONE().fit(counts)
    >>> system.best_.name == system.table_.index[0]
    True
    """

    def __init__(self, candidates: Sequence[Normalisation] | None = None, *, seed: int = 0) -> None:
        self.candidates = candidates
        self.seed = seed

    def fit(
        self,
        counts: Any,
        y: None = None,
        *,
        qc: Any = None,
        batch: Any = None,
        bio: Any = None,
        negative_controls: Any = None,
        positive_controls: Any = None,
    ) -> Self:
        """Score all candidates; if this raises, the previous fit stays.

        Parameters
        ----------
        counts
            Raw counts, (cells, genes).
        y
            Ignored.
        qc
            Quality metrics, (cells, metrics); None for :func:`quality_metrics` of the counts. Metrics and labels with
            names of cells are matched by name with a DataFrame of counts.
        batch, bio
            One label per cell.
        negative_controls, positive_controls
            Positions or a mask of genes that should not, and that should, vary with the biology.

        Raises
        ------
        DataError
            For counts that are negative or not finite, cells without counts, genes without any, labels or metrics of
            another length, metrics that are not finite, or labels of one level or as many as cells.
        ModelError
            For a candidate that needs more components, batches or groups than there are, or whose regression is
            confounded. For an empty list, or duplicate names.
        """
        x = dense_counts(counts, unseen_genes=False)
        names = {"qc": qc, "batch": batch, "bio": bio}
        qc, batch, bio = (in_order_of(getattr(counts, "index", None), given, name) for name, given in names.items())
        metrics = quality_metrics(x) if qc is None else np.asarray(qc, dtype=np.float64).reshape(len(qc), -1)
        _check_rows(x, qc=metrics, batch=batch, bio=bio)
        labels = (None if given is None else np.asarray(given) for given in (batch, bio))
        cells = _Cells(x, components(metrics, n=MOST_COMPONENTS), *labels)
        candidates = self._candidates(cells)
        controls, genes = (negative_controls, positive_controls), getattr(counts, "columns", None)
        unwanted, wanted = (_factors(x, in_order_of(genes, given, "controls")) for given in controls)
        rows = np.random.default_rng(self.seed).permutation(len(x))[:PAM_CELLS]
        known = Known(cells.bio, cells.batch, cells.quality, unwanted, wanted, rows)
        by_name = {each.name: scores(cells.normalised(each), known) for each in candidates}
        table = pd.DataFrame.from_dict(by_name, orient="index").rename_axis("normalisation")
        table["mean_rank"] = table.round(DIGITS).rank().mean(axis=1)
        self.counts_, self.quality_, self.batch_, self.bio_ = cells._replace(counts=x.copy())  # x may be the caller's
        self.table_ = table.sort_values("mean_rank", ascending=False, kind="stable")
        self.best_ = next(each for each in candidates if each.name == self.table_.index[0])
        return self

    def normalised(self, normalisation: Normalisation | None = None) -> np.ndarray:
        """The fitted cells by one normalisation, the best by default: log(1 + scaled counts), adjusted (cells, genes).

        Raises
        ------
        ModelError
            Before the fit, or for more components, batches or groups than there are.
        """
        require_fitted(self, "counts_")
        cells = _Cells(self.counts_, self.quality_, self.batch_, self.bio_)
        return cells.normalised(self.best_ if normalisation is None else normalisation)

    def _candidates(self, cells: _Cells) -> Sequence[Normalisation]:
        if self.candidates is None:
            return grid(cells.quality.shape[1], cells.batch is not None, cells.bio is not None)
        names = [each.name for each in self.candidates]
        if not names:
            raise ModelError("candidates must name at least one Normalisation; leave it out for all of them")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ModelError(f"candidates must have different names, but several are {twice}; name the scalings apart")
        return self.candidates


def quality_metrics(x: np.ndarray) -> np.ndarray:
    """Quality metrics (cells, 10) from counts (cells, genes) alone; those of the sequencing itself tell more.

    Log total, log of genes detected, entropy of the genes' shares of the total (nats), share of the highest gene and
    of the highest 5, 10 and 20 % of genes, share of detected genes with one count and with two, log of the variance
    over the mean of counts.
    """
    total, detected = x.sum(1, keepdims=True), (x > 0).sum(1, keepdims=True)
    if (empty := np.flatnonzero(total == 0)).size:
        raise DataError(f"{empty.size} cells have no count, the first of them cell {empty[0]}; drop them")
    shares = -np.sort(-x / total, axis=1)
    tops = [max(0, int(part * x.shape[1]) - 1) for part in (0.0, 0.05, 0.1, 0.2)]
    few = [(x == n).sum(1, keepdims=True) / detected for n in (1, 2)]
    spread = x.var(1, keepdims=True) / x.mean(1, keepdims=True)
    entropy = entr(shares).sum(1, keepdims=True)
    highest = np.cumsum(shares, axis=1)[:, tops]
    return np.hstack((np.log(total), np.log(detected), entropy, highest, *few, np.log(spread)))


def _factors(x: np.ndarray, genes: Any) -> np.ndarray | None:
    """Principal components of the control genes before normalisation, (cells, components)."""
    return None if genes is None else components(np.log1p(x[:, np.asarray(genes)]))


def _contrasts(labels: np.ndarray) -> np.ndarray:
    """Sum-to-zero contrasts, (cells, levels - 1)."""
    levels, codes = np.unique(labels, return_inverse=True)
    return np.vstack((np.eye(len(levels) - 1), -np.ones(len(levels) - 1)))[codes]


def _check_rows(x: np.ndarray, **given: Any) -> None:
    for name, values in given.items():
        if values is not None and (len(values) != len(x) or pd.isna(np.asarray(values)).any()):
            raise DataError(f"{name} must have a value for each of {len(x)} cells, none missing; got {len(values)}")
    if (infinite := np.flatnonzero(~np.isfinite(given["qc"]).all(1))).size:
        raise DataError(f"qc must be finite; cell {infinite[0]} is not. Drop the metric or the cell")
    for name in ("batch", "bio"):
        levels = 2 if given[name] is None else len(np.unique(given[name]))
        if not 2 <= levels < len(x):
            raise DataError(f"{name} must have 2 levels or more, fewer than {len(x)} cells; got {levels}: leave it out")
