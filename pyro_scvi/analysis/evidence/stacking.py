"""stacking_weights: how much each model counts in a mixture of their predictions, with bootstrap errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_at_least, require_seed

TOLERANCE = 1e-8  # of the mean log score, nats per cell, where the path ends
CERTAIN = 1e-6  # by which no other weights may score better, nats per cell
WEAKER = 10.0  # the barrier, from one point of the path to the next
MOST_SHRUNK = 1 - 1 / WEAKER  # of a weight, in one step: a weight of 0 at the end is as large as the barrier
MOST_STEPS = 100  # of Newton at one point of the path
SMALL = 1e-3  # of what a step gains, relative to the barrier, and of its length


def stacking_weights(table: pd.DataFrame, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    r"""Weights of models in a mixture of their predictions of new cells.

    See Yao, Vehtari, Simpson and Gelman (2018).

    .. math:: \hat w = \arg\max_w \sum_n \log \sum_m w_m\, p_m(x_n), \qquad
        w^{BMA+}_m = E_\alpha\, \frac{\exp(N \sum_n \alpha_n \log p_m(x_n))}
        {\sum_k \exp(N \sum_n \alpha_n \log p_k(x_n))}, \quad \alpha \sim Dirichlet(1)

    Stacking gives a model weight for the cells that it predicts best, so that two models which complement each other
    share it, and a second copy of a model gains nothing. Pseudo-BMA+ says which single model is best, and how sure
    that is.

    Parameters
    ----------
    table
        What ``ps.compare(fits, cells, pointwise=True)`` returned, of cells that no fit has seen. Of a model with
        several refits, log p(x) of a cell is the mean over these.
    draws
        Weightings of the cells in the Bayesian bootstrap.
    seed
        Of the bootstrap.

    Returns
    -------
    DataFrame by model, in the order of ``table``
        ``stacking`` and ``pseudo_bma``, each a sum of 1, with their bootstrap errors ``stacking_se`` and
        ``pseudo_bma_se``.

    Raises
    ------
    ModelError
        If ``table`` has no values by cell, ``draws`` is below 2, the seed is no integer of 0 or more, or the weights
        found are not certain to be the best.

    Examples
    --------
    >>> other = ps.fit(ps.SCVI(20, 2, prior=ps.priors.StudentT(2)), train, epochs=5, progress=False)
    >>> table = ps.compare({"normal": fit, "student-t": other}, test.take(range(4)), samples=100, pointwise=True)
    >>> ps.stacking_weights(table).columns.tolist()
    ['stacking', 'stacking_se', 'pseudo_bma', 'pseudo_bma_se']
    """
    require_at_least(2, draws=draws)
    require_seed(seed)
    by_cell = _pointwise(table)
    log_p = by_cell.to_numpy(dtype=float)
    n_cells = len(log_p)
    shares = np.random.default_rng(seed).dirichlet(np.ones(n_cells), draws)  # (draws, cells)
    stacked = np.stack([_stacked(log_p, share) for share in shares])
    totals = n_cells * shares @ log_p
    averaged = np.exp(totals - np.logaddexp.reduce(totals, axis=1, keepdims=True))
    columns = {
        "stacking": _stacked(log_p, np.full(n_cells, 1 / n_cells)),
        "stacking_se": stacked.std(0, ddof=1),
        "pseudo_bma": averaged.mean(0),
        "pseudo_bma_se": averaged.std(0, ddof=1),
    }
    return pd.DataFrame(columns, index=pd.Index(by_cell.columns, name="model"))


def _pointwise(table: Any) -> pd.DataFrame:
    """Values by cell, in the order of their names, and by model, in the order of the table."""
    by_cell = table.attrs.get("pointwise") if isinstance(table, pd.DataFrame) else None
    if not isinstance(by_cell, pd.DataFrame) or not set(table.index) <= set(by_cell.columns):
        raise ModelError("stacking needs log p(x) of every cell: pass ps.compare(fits, cells, pointwise=True)")
    by_cell = by_cell[list(table.index)]
    if not np.isfinite(by_cell.to_numpy(dtype=float)).all():
        raise ModelError("log p(x) is NaN or infinite for some cells: leave these cells out")
    # The bootstrap's weightings go by the names of cells, and cells of one name by their values.
    order = np.lexsort((*by_cell.to_numpy(dtype=float).T, by_cell.index.to_numpy(dtype=str)))
    return by_cell.iloc[order]


def _stacked(log_p: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The weights with the largest mean log score, cells counting by their share.

    Newton steps along a path on which a barrier keeps all weights positive, and weakens. Solvers of general constrained
    problems report success at a wrong place, where one cell is hundreds of nats better under a model of small weight.
    """
    n_models = log_p.shape[1]
    p = np.exp(log_p - log_p.max(1, keepdims=True))  # a factor for each cell changes no weight
    weights, barrier = np.full(n_models, 1 / n_models), 1 / n_models
    while barrier > TOLERANCE / n_models:
        barrier /= WEAKER
        weights = _centred(p, share, weights, barrier)
    weights = weights / weights.sum()
    # No weights score better by more than this: the score is concave in them.
    if not (share / (p @ weights) @ p).max() - 1 < CERTAIN:
        raise ModelError("the stacking weights did not converge: leave models out one by one")
    return weights


def _centred(p: np.ndarray, share: np.ndarray, weights: np.ndarray, barrier: float) -> np.ndarray:
    """Newton's minimum of sum(w) - sum(share * log(p w)) - barrier * sum(log w), whose weights sum to about 1."""

    def loss(at: np.ndarray) -> float:
        return float(at.sum() - share @ np.log(p @ at) - barrier * np.log(at).sum())

    for _ in range(MOST_STEPS):
        mixed = p @ weights
        slope = 1 - share / mixed @ p - barrier / weights
        curvature = (p.T * (share / mixed**2)) @ p + np.diag(barrier / weights**2)
        step = -np.linalg.solve(curvature * np.outer(weights, weights), slope * weights) * weights
        if -slope @ step < barrier * SMALL:
            break
        length = min(1.0, MOST_SHRUNK / max((-step / weights).max(), MOST_SHRUNK))
        while loss(weights + length * step) > loss(weights) + 0.1 * length * slope @ step and length > SMALL:
            length /= 2
        weights = weights + length * step
    return weights
