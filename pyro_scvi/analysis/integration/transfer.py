"""transfer_labels: labels of a query by its neighbours in a reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_scvi.analysis.differential.labels import Groupby, unknown_column, values_of
from pyro_scvi.analysis.inputs import require_inputs
from pyro_scvi.analysis.integration.spaces import Latent, Space, require_space
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import labels_of, warn_of_lookalikes
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def transfer_labels(
    fit: Fit,
    reference: Cells,
    query: Cells,
    labels: Groupby,
    *,
    neighbors: int = 15,
    space: Space = Latent(),
    seed: int = 0,
) -> pd.DataFrame:
    r"""Label cells by their nearest neighbours among labelled cells of a reference.

    .. math:: P(c | n) = \frac{1}{k} \sum_{m \in N_k(n)} 1[c_m = c]

    Parameters
    ----------
    fit
        The fit of the reference, or what ``map_query`` made of it.
    reference, query
        Cells of its schema. The query may be of batches that the fit does not know, if it was read with
        ``allow_new_batches=True``.
    labels
        Column of ``reference.obs``, a Series or dict matched by the names of its cells, or one value per cell. Cells
        without a value are left out.
    neighbors
        Number of neighbours, k.
    space
        Where distances are taken. The axes of an ``Expression`` or ``Hidden`` are those of the reference.
    seed
        Of the embedding's draws, where there are any.

    Returns
    -------
    DataFrame
        By cell of the query: ``label``, the most frequent among its neighbours, of two alike the one whose neighbours
        are nearer; ``probability``, its share; and ``distance_quantile``, the share of the labelled reference cells
        that are nearer to their neighbours than this cell is, by the mean distance. Near 1 for a kind of cells that the
        reference lacks: its label is then wrong, whatever its probability.

    Raises
    ------
    DataError
        If there are no more labelled cells than neighbours, or labels are of other cells.
    SchemaError
        If there is no such column, or the cells' genes or covariates are not those of the fit.
    ModelError
        If an argument has the wrong type, or ``neighbors`` is below 1.

    Examples
    --------
    >>> labelled = ps.transfer_labels(fit, train, test, "kind", neighbors=5)
    >>> labelled.columns.tolist(), float((labelled.label == test.obs["kind"]).mean())
    (['label', 'probability', 'distance_quantile'], 1.0)
    """
    require_inputs(fit, reference, "reference")
    require_inputs(fit, query, "query")
    require_space(space)
    require_at_least(1, neighbors=neighbors)
    words, codes = _labels(reference, labels)
    warn_of_lookalikes("labels", "labels", words)
    known = np.flatnonzero(codes >= 0)
    if len(known) <= neighbors:
        raise DataError(f"{len(known)} cells of the reference have a label, too few for {neighbors=}")
    space = space.fitted(fit, reference, seed=seed)
    beside = space.place(fit, reference.take(known), seed=seed)
    distances, nearest = _neighbors(beside, space.place(fit, query, seed=seed), neighbors)
    own = np.sort(_neighbors(beside, beside, neighbors + 1)[0][:, 1:].mean(1))  # without the cell itself
    table = _votes(codes[known][nearest], distances, words)
    table["distance_quantile"] = np.searchsorted(own, distances.mean(1)) / len(own)
    return table.set_axis(pd.Index(query.cell_names, name="cell"))


def _labels(reference: Cells, labels: Groupby) -> tuple[list[str], np.ndarray]:
    """The labels, and the position of each reference cell's among them; -1 without one."""
    if not isinstance(labels, str):
        obs = pd.DataFrame({"labels": values_of(reference, labels, "labels")}, reference.cell_names)
        return labels_of(obs, "labels")
    if labels not in reference.obs:
        raise SchemaError(unknown_column(reference, labels, "labels"))
    return labels_of(reference.obs, labels)


def _neighbors(among: np.ndarray, of: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and positions (cells, n) of the nearest neighbours, nearest first."""
    from scipy.spatial import cKDTree  # 10 ms, which no training needs

    tree: Any = cKDTree(among)
    distances, places = tree.query(of, k=[*range(1, n + 1)])
    return distances, places


def _votes(codes: np.ndarray, distances: np.ndarray, words: list[str]) -> pd.DataFrame:
    """The most frequent of the neighbours' labels (cells, neighbours), and its share."""
    n_labels, (n_cells, n) = len(words), codes.shape
    flat = (np.arange(n_cells)[:, None] * n_labels + codes).ravel()
    counts = np.bincount(flat, minlength=n_cells * n_labels).reshape(n_cells, n_labels)
    apart = np.bincount(flat, distances.ravel(), minlength=n_cells * n_labels).reshape(n_cells, n_labels)
    farther = apart / (1e-12 + apart.sum(1, keepdims=True))  # below 1: it decides between equal counts only
    best = (counts - 0.5 * farther).argmax(1)
    share = counts[np.arange(n_cells), best] / n
    return pd.DataFrame({"label": np.asarray(words, dtype=object)[best], "probability": share})
