"""Scores of an embedding (cells, latents): how it separates types, mixes batches and depends on quality."""

from __future__ import annotations

import numpy as np
from scipy.special import entr
from sklearn.cluster import KMeans
from sklearn.linear_model import LinearRegression
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, r2_score, silhouette_score
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import OneHotEncoder

VOTERS = 15  # nearest cells that name a cell's type
NEIGHBOURS = 50  # among which batches are to be mixed


def explained(predictors: np.ndarray, quality: np.ndarray) -> float:
    r"""R^2 of a linear regression of quality (cells, metrics) on predictors (cells, columns), metrics pooled.

    .. math:: R^2 = 1 - \sum_{nm} (q_{nm} - \hat q_{nm})^2 / \sum_{nm} (q_{nm} - \bar q_m)^2

    That is the mean over metrics weighted by their variances, which is what scikit-learn's ``score`` was in 2017.
    """
    predicted = LinearRegression().fit(predictors, quality).predict(predictors)
    return float(r2_score(quality, predicted, multioutput="variance_weighted"))


def one_hot(*labels: np.ndarray) -> np.ndarray:
    """Indicators of the levels of several labels, (cells, levels)."""
    return OneHotEncoder(sparse_output=False).fit_transform(np.column_stack(labels))


def of_types(latents: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well the known types (cells,) are separated.

    Silhouette (Euclidean); adjusted Rand index and normalised mutual information of k-means with as many clusters as
    types; share of cells whose type is the most frequent among their 15 nearest other cells.
    """
    types, codes = np.unique(labels, return_inverse=True)
    clusters = KMeans(len(types), n_init=10, random_state=0).fit_predict(latents)
    votes = one_hot(labels)[_nearest(latents, VOTERS)].sum(1)
    return {
        "silhouette": float(silhouette_score(latents, labels)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
        "accuracy": float((votes.argmax(1) == codes).mean()),
    }


def batch_entropy(latents: np.ndarray, batch: np.ndarray) -> float:
    """Entropy of the batches among a cell's 50 nearest other cells, mean over cells, over that among all cells.

    1 if batches are mixed around each cell as in the whole data, 0 if a cell's neighbours are all of its own batch.
    """
    indicators = one_hot(batch)
    shares = indicators[_nearest(latents, min(NEIGHBOURS, len(latents) - 1))].mean(1)
    return float(entr(shares).sum(1).mean() / entr(indicators.mean(0)).sum())


def _nearest(latents: np.ndarray, n: int) -> np.ndarray:
    """Positions of the ``n`` nearest other cells, (cells, n)."""
    return NearestNeighbors(n_neighbors=n).fit(latents).kneighbors(return_distance=False)
