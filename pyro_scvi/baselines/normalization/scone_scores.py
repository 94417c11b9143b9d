"""The eight scores by which SCONE ranks normalisations (Cole et al. 2019, Box 1); each is better when higher."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from scipy.spatial.distance import cdist
from sklearn.metrics import silhouette_score

COMPONENTS = 3  # principal components that stand for a normalised matrix, and for a set of control genes
CLUSTERS = range(2, 11)  # numbers of clusters tried for PAM_SIL
PAM_CELLS = 500  # cells that are clustered: the search for medoids is quadratic


class Known(NamedTuple):
    """What is known about the cells: labels (cells,), factors (cells, components), None if not given; ``sample`` rows.

    ``unwanted`` and ``wanted`` come from the negative and positive control genes before normalisation.
    """

    bio: np.ndarray | None
    batch: np.ndarray | None
    quality: np.ndarray
    unwanted: np.ndarray | None
    wanted: np.ndarray | None
    sample: np.ndarray


def scores(adjusted: np.ndarray, known: Known) -> Mapping[str, float]:
    """Scores of one normalised matrix (cells, genes), log scale; NaN if the information for a score is missing.

    On U, the first three left singular vectors of the matrix with standardised genes: silhouette of ``bio``, negative
    silhouette of ``batch``, best silhouette of a clustering, and the share of U that a regression on quality,
    unwanted (both negative) and wanted factors explains. From the matrix itself: the negative mean over cells of the
    squared median, and the negative variance over cells of the interquartile range, of the relative log expression.
    """
    u = components(adjusted)
    relative = adjusted - np.median(adjusted, axis=0)
    quartiles = np.percentile(relative, [25, 75], axis=1)
    return {
        "BIO_SIL": _silhouette(u, known.bio),
        "PAM_SIL": _best_silhouette(u[known.sample]),
        "EXP_WV_COR": _explained(u, known.wanted),
        "BATCH_SIL": -_silhouette(u, known.batch),
        "EXP_QC_COR": -_explained(u, known.quality),
        "EXP_UV_COR": -_explained(u, known.unwanted),
        "RLE_MED": -float(np.square(np.median(relative, axis=1)).mean()),
        "RLE_IQR": -float((quartiles[1] - quartiles[0]).var(ddof=1)),
    }


def standardised(values: np.ndarray) -> np.ndarray:
    """Columns of mean 0 and variance 1, without those that do not vary."""
    sd = values.std(0)
    varying = sd > 1e-12 * np.abs(values).max(0)
    return (values[:, varying] - values[:, varying].mean(0)) / sd[varying]


def components(values: np.ndarray, n: int = COMPONENTS) -> np.ndarray:
    """First left singular vectors of the standardised columns of (cells, columns), not scaled: (cells, n)."""
    z = standardised(values)
    transposed = z.shape[0] > z.shape[1]  # the smaller of the two Gram matrices
    eigenvalues, vectors = np.linalg.eigh(z.T @ z if transposed else z @ z.T)
    kept = np.argsort(eigenvalues)[::-1][:n]
    kept = kept[eigenvalues[kept] > 1e-10 * eigenvalues.max(initial=0)]
    return z @ vectors[:, kept] / np.sqrt(eigenvalues[kept]) if transposed else vectors[:, kept]


def medoids(distance: np.ndarray, k: int) -> np.ndarray:
    """Partition around medoids (Kaufman and Rousseeuw 1990): their rows, (k,), from distances (cells, cells).

    A greedy build is followed by swaps of a medoid with another cell, the best first, while one lowers the sum of
    distances to the nearest medoid.
    """
    chosen = [int(distance.sum(0).argmin())]
    while len(chosen) < k:
        nearest = distance[:, chosen].min(1, keepdims=True)
        chosen.append(int(np.minimum(distance, nearest).sum(0).argmin()))
    cost = distance[:, chosen].min(1).sum()
    while True:
        # Distances to the nearest medoid with each one left out: the cost of every swap follows at once.
        others = [distance[:, chosen[:i] + chosen[i + 1 :]].min(1, keepdims=True) for i in range(k)]
        costs = np.stack([np.minimum(distance, other).sum(0) for other in others])  # (medoid out, cell in)
        out, into = np.unravel_index(costs.argmin(), costs.shape)
        if costs[out, into] >= cost * (1 - 1e-12):
            return np.array(chosen)
        chosen[out], cost = int(into), costs[out, into]


def _best_silhouette(u: np.ndarray) -> float:
    distance = cdist(u, u)
    silhouettes = []
    for k in CLUSTERS:
        if k < len(u):
            labels = distance[:, medoids(distance, k)].argmin(1)
            silhouettes.append(float(silhouette_score(distance, labels, metric="precomputed")))
    return max(silhouettes)


def _silhouette(u: np.ndarray, labels: np.ndarray | None) -> float:
    return float("nan") if labels is None else float(silhouette_score(u, labels))


def _explained(u: np.ndarray, factors: np.ndarray | None) -> float:
    """1 - RSS / TSS of all columns of u together, regressed on the factors and an intercept."""
    if factors is None:
        return float("nan")
    design = np.column_stack((np.ones(len(u)), factors))
    residual = u - design @ np.linalg.lstsq(design, u, rcond=None)[0]
    return 1 - float(np.square(residual).sum() / np.square(u - u.mean(0)).sum())
