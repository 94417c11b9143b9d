"""stacking_weights: how much each model counts in a mixture of their predictions, with bootstrap errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.errors import ModelError
from pyro_scvi.utils.checks import require_at_least, require_seed

TOLERANCE = 1e-10  # of the mean log score, nats per cell


def stacking_weights(table: pd.DataFrame, *, draws: int = 200, seed: int = 0) -> pd.DataFrame:
    r"""Weights of models in a mixture of their predictions of new cells (Yao, Vehtari, Simpson and Gelman 2018).

    .. math:: \hat w = \arg\max_w \sum_n \log \sum_m w_m\, p_m(x_n), \qquad
        w^{BMA+}_m = E_\alpha\, \frac{\exp(N \sum_n \alpha_n \log p_m(x_n))}
        {\sum_k \exp(N \sum_n \alpha_n \log p_k(x_n))}, \quad \alpha \sim Dirichlet(1)

    Stacking gives a model weight for the cells that it predicts best, so that two models which complement each other
    share it, and a second copy of a model gains nothing. Pseudo-BMA+ says which single model is best, and how sure
    that is.

    Parameters
    ----------
    table
        What ``ps.compare(fits, cells, pointwise=True)`` returned, of cells that no fit has seen.
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
        If ``table`` has no values by cell, ``draws`` is below 2, or the seed is no integer of 0 or more.

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
    """Values by cell and model, in the order of the table."""
    by_cell = table.attrs.get("pointwise") if isinstance(table, pd.DataFrame) else None
    if not isinstance(by_cell, pd.DataFrame) or not set(table.index) <= set(by_cell.columns):
        raise ModelError("stacking needs log p(x) of every cell: pass ps.compare(fits, cells, pointwise=True)")
    by_cell = by_cell[list(table.index)]
    if not np.isfinite(by_cell.to_numpy(dtype=float)).all():
        raise ModelError("log p(x) is no number for some cells, so that no weights can be had")
    return by_cell


def _stacked(log_p: np.ndarray, share: np.ndarray) -> np.ndarray:
    """The weights with the largest mean log score, cells counting by their share."""
    from scipy.optimize import minimize  # 45 MB, which no training needs

    n_models = log_p.shape[1]
    if n_models == 1:
        return np.ones(1)
    p = np.exp(log_p - log_p.max(1, keepdims=True))  # a factor for each cell changes no weight

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        mixed = np.maximum(p @ weights, np.finfo(float).tiny)
        return -float(share @ np.log(mixed)), -(share / mixed) @ p

    sums_to_one: Any = {"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like}
    found = minimize(
        loss,
        np.full(n_models, 1 / n_models),
        jac=True,
        bounds=[(0, 1)] * n_models,
        constraints=[sums_to_one],
        method="SLSQP",
        options={"ftol": TOLERANCE, "maxiter": 1000},
    )
    weights = np.clip(found.x, 0, None)
    return weights / weights.sum()
