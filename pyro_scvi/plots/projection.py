"""Scatter plots of cells in two dimensions."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr
from matplotlib import colormaps
from matplotlib.colors import to_rgba
from matplotlib.lines import Line2D

from pyro_scvi.data.names import as_series, in_order_of, require_one_order
from pyro_scvi.data.obs_columns import inferred, of_one_kind
from pyro_scvi.errors import DataError
from pyro_scvi.plots.canvas import MISSING, TRAIN, given_or_new, legend_beside
from pyro_scvi.utils.checks import brief, require_seed, warn
from pyro_scvi.utils.random_state import global_state_kept

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UMAP, PCA = "UMAP", "PCA"


class Projection(NamedTuple):
    """Cells in two dimensions, (cells, 2), and the method used, which names the axes.

    The coordinates are a DataFrame by cell name if the embedding was one.

    Examples
    --------
    >>> placed = ps.plots.Projection(np.zeros((60, 2)), "UMAP")
    >>> ps.plots.embedding(placed, cells.obs["kind"]).get_xlabel()
    'UMAP 1'
    """

    coordinates: np.ndarray | pd.DataFrame
    method: str


def project(latent: np.ndarray | pd.DataFrame | xr.DataArray, *, seed: int = 0) -> Projection:
    """Reduce an embedding (cells, latents) to two dimensions by UMAP.

    One of two dimensions is returned as it is.

    Principal components are used if umap-learn (a dependency of scanpy) is missing or fails, or if there are fewer
    cells than two neighbourhoods. The global random states are left as they were.

    Parameters
    ----------
    latent
        (cells, latents); a DataFrame or DataArray keeps the names of its cells.
    seed
        Of UMAP.

    Returns
    -------
    Projection
        ``coordinates`` (cells, 2), and ``method``: "latent", "UMAP" or "PCA".

    Raises
    ------
    DataError
        If the embedding is not a finite matrix.
    ModelError
        If the seed is no integer of 0 or more.

    Examples
    --------
    >>> ps.plots.project(ps.embed(fit, cells))._fields
    ('coordinates', 'method')
    """
    require_seed(seed)
    names = _names_of(latent)
    method, coordinates = _projected(_array(latent), seed)
    return Projection(coordinates if names is None else pd.DataFrame(coordinates, index=names), method)


def _array(latent: Any) -> np.ndarray:
    try:
        return np.asarray(latent)
    except (TypeError, ValueError) as error:
        raise DataError(f"an embedding must be a finite matrix (cells, latents), got {brief(latent)}") from error


def _projected(latent: np.ndarray, seed: int) -> tuple[str, np.ndarray]:
    if latent.ndim != 2 or not latent.size or latent.dtype.kind not in "iuf" or not np.isfinite(latent).all():
        raise DataError(
            "an embedding must be a finite matrix (cells, latents), as ps.embed(fit, cells) gives it; got shape "
            f"{latent.shape} of {latent.dtype}"
        )
    if latent.shape[1] == 2:
        return "latent", latent
    coordinates = _umap(latent, seed) if len(latent) >= 30 else None
    return (PCA, _pca(latent)) if coordinates is None else (UMAP, coordinates)


def _names_of(values: Any) -> pd.Index | None:
    """Names of the cells of an embedding, if it has any."""
    if isinstance(values, xr.DataArray):
        return values.indexes.get(values.dims[0])
    return values.index if isinstance(values, pd.DataFrame) else None


def embedding(
    latent: np.ndarray | pd.DataFrame | xr.DataArray | Projection,
    labels: Sequence[Any] | np.ndarray | pd.Series | Mapping[str, Any] | None = None,
    ax: Axes | None = None,
    *,
    seed: int = 0,
) -> Axes:
    """Draw cells in two dimensions, coloured by labels.

    Parameters
    ----------
    latent
        (cells, latents), or the result of :func:`project`.
    labels
        (cells,): numbers, also in a column of objects, are shown as a colour scale, all else as categories, missing
        ones in grey. Where both have names of cells, as a Series and a DataFrame or DataArray have, they are matched by
        name. A dict is by name.
    ax
        Axes to draw into; None: axes of a new pyplot figure.
    seed
        Of UMAP and of the order in which points are drawn.

    Returns
    -------
    Axes
        The axes drawn into.

    Raises
    ------
    DataError
        If there is not one label per cell, labels are of other cells, or ``latent`` is no finite matrix.
    ModelError
        If the seed is no integer of 0 or more, or ``ax`` are no axes.

    Examples
    --------
    >>> ax = ps.plots.embedding(ps.embed(fit, cells), cells.obs["kind"])
    >>> ax.get_xlabel(), ax.get_ylabel()
    ('latent 1', 'latent 2')
    """
    require_seed(seed)
    placed, method = latent if isinstance(latent, Projection) else project(latent, seed=seed)
    values = None if labels is None else inferred(_of_cells(labels, _names_of(placed), len(placed)))
    points = np.asarray(placed)
    ax = given_or_new(ax, (6.4, 4.4))
    # A fixed random order: no category lies on top of another because it comes later.
    order = np.random.default_rng(seed).permutation(len(points))
    size = float(np.clip(12000 / len(points), 2, 40))
    style: dict[str, Any] = {"s": size, "linewidths": 0, "alpha": 0.85, "rasterized": True}
    if values is not None and pd.api.types.is_numeric_dtype(values) and not pd.api.types.is_bool_dtype(values):
        numbers = values.to_numpy(float, na_value=np.nan)
        drawn = ax.scatter(points[order, 0], points[order, 1], c=numbers[order], cmap="viridis", **style)
        bar = ax.figure.colorbar(drawn, ax=ax, shrink=0.8)
        bar.set_label(str(values.name or ""), parse_math=False)
    else:
        colours, legend = _categories(values, len(points))
        ax.scatter(points[order, 0], points[order, 1], c=colours[order], **style)
        _legend(ax, legend)
    for axis, number in ((ax.xaxis, 1), (ax.yaxis, 2)):
        axis.set_label_text(f"{method} {number}")
        axis.set_ticks([])
    ax.set_aspect("equal", "datalim")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _of_cells(labels: Any, names: pd.Index | None, n_cells: int) -> pd.Series:
    """Labels in the order of the cells: by name if both have names."""
    given = as_series(in_order_of(names, labels, "labels") if isinstance(labels, Mapping) else labels)
    try:
        values = given if isinstance(given, pd.Series) else pd.Series(given)
    except (TypeError, ValueError) as error:  # a set, which has no order, or a table
        raise DataError(f"labels must have one value for each of the {n_cells} cells, got {brief(given)}") from error
    by_name = names is not None and values is given
    if len(values) < n_cells or (not by_name and len(values) > n_cells):
        raise DataError(f"labels must have one value for each of the {n_cells} cells, got {len(values)}")
    if names is None:  # an array has no names; rows that were renumbered are seen nevertheless
        require_one_order(pd.RangeIndex(n_cells), values.index, "labels")
    return (in_order_of(names, values, "labels") if by_name else values).reset_index(drop=True)


def _umap(latent: np.ndarray, seed: int) -> np.ndarray | None:
    """UMAP as umap-learn makes it, which scanpy brings along; None without it, or where it fails.

    Not through scanpy.pp.neighbors: with scipy 1.17 scanpy 1.11 raises there from 8,192 cells on.
    """
    try:
        with warnings.catch_warnings(), global_state_kept():  # the import draws random numbers, too
            warnings.filterwarnings("ignore", message="Tensorflow not installed", category=ImportWarning)
            import umap
    except ImportError:
        return None
    try:
        with warnings.catch_warnings(), global_state_kept():
            warnings.simplefilter("ignore")  # of its own dependencies' versions; nothing that a user could mend
            return umap.UMAP(n_neighbors=15, min_dist=0.5, random_state=seed, n_jobs=1).fit_transform(latent)
    except Exception as error:  # a picture must not cost a fit
        warn(f"UMAP failed ({error}); the picture shows principal components instead")
        return None


def _pca(latent: np.ndarray) -> np.ndarray:
    """Scores on the first two principal components, the second 0 if there is but one."""
    centred = latent - latent.mean(0)
    u, s, vt = np.linalg.svd(centred, full_matrices=False)
    signs = np.sign(vt[np.arange(len(vt)), np.abs(vt).argmax(1)])  # fixes what the decomposition leaves open
    scores = (u * s * signs)[:, :2]
    return np.pad(scores, ((0, 0), (0, 2 - scores.shape[1])))


def _categories(values: pd.Series | None, n: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Colours (cells, 4), and the colour of every category for the legend."""
    if values is None:
        return np.tile(to_rgba(TRAIN), (n, 1)), {}
    codes, names = pd.factorize(of_one_kind(values).astype("category").cat.remove_unused_categories(), sort=True)
    if len(names) <= 20:
        palette = colormaps["tab10" if len(names) <= 10 else "tab20"](np.arange(len(names)))
    else:
        palette = colormaps["turbo"](np.linspace(0, 1, len(names)))
    colours = np.vstack([palette, to_rgba(MISSING)])[codes]  # code -1: missing
    legend = dict(zip(map(str, names), palette, strict=True))
    return colours, legend | ({"missing": to_rgba(MISSING)} if (codes < 0).any() else {})


def _legend(ax: Axes, colours: Mapping[str, Any]) -> None:
    if colours:
        dots = [Line2D([], [], marker="o", linestyle="", color=colour, label=name) for name, colour in colours.items()]
        legend_beside(ax, dots)
