"""Spaces for an embedding: z itself, or principal components of what the decoder makes of it."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import batches_in_streams
from pyro_scvi.analysis.new_batches import in_known_batches, z_means
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.evaluation import evaluating, law_given, theta_given, watched, with_enumerated
from pyro_scvi.inference.proposals import refined
from pyro_scvi.nn.networks import Decoder
from pyro_scvi.utils.checks import brief, require_at_least

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["Expression", "FittedSpace", "Hidden", "Latent", "from_record"]


def __dir__() -> list[str]:
    return __all__


MOST_FEATURES = 25_000_000
"""Cells x features of which the principal axes are computed; of more cells, evenly spaced ones are taken."""

DENSE = 500
"""Cells or features up to which all singular vectors are computed; beyond, only the leading ones."""

LARGEST = 1e12
"""Numbers of a space that is read from a file are smaller: with others coordinates would not be finite in float32."""

LENGTH_ERROR = 1e-3  # of an axis of length 1 that was rounded to float32 on the way, many times over

MOST_COMPONENTS = 30
"""Components of expression where the caller does not say how many; docs/default.md compares 10, 30 and all of them."""

DECODED_AT_ONCE = 4_000_000  # cells x genes

DRAWS = 25
"""Draws of discrete latents, over which what is decoded is averaged."""


class Space(ABC):
    """Where cells are placed by ``ps.embed``."""

    @abstractmethod
    def fitted(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> Latent | FittedSpace:
        """The same with all that it takes from ``cells``, so that other cells are placed beside these."""

    @abstractmethod
    def place(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
        """Coordinates (cells, dimensions)."""


@dataclass(frozen=True)
class Latent(Space):
    r"""z itself: its posterior mean under the guide, E_q[z | x].

    .. math:: \hat z_n = \int z\, q(z | x_n)\, dz

    Euclidean distances in z have no meaning of their own: the decoder may stretch some directions and ignore others.

    Examples
    --------
    >>> ps.embed(fit, test, space=ps.spaces.Latent()).shape
    (12, 2)
    """

    def fitted(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> Latent:
        """The space itself, which learns nothing from the cells."""
        return self

    def place(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
        """E_q[z | x], (cells, latents)."""
        with evaluating(fit.model, fit.guide, seed):
            batches = batches_in_streams(fit, cells, batch_size, seed, new_batches=True)
            means = [watched(z_means(fit, x, gamma)) for x, gamma in batches]
            return torch.cat(means).squeeze(-2).cpu().numpy()


@dataclass(frozen=True)
class Decoded(Space):
    """Principal components of what the decoder makes of E[z | x], its batches averaged.

    The axes are those of the cells given to :meth:`fitted`, or to ``ps.embed``. No label is read.
    """

    components: int | None

    def __post_init__(self) -> None:
        if self.components is not None:
            require_at_least(1, components=self.components)

    @abstractmethod
    def require(self, fit: Fit) -> None:
        """Refuse a fit whose decoder does not give this."""

    @abstractmethod
    def features(self, guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
        """What is averaged over draws and batches, (draws, cells, features)."""

    @abstractmethod
    def scaled(self, mean: Tensor) -> Tensor:
        """What principal components are taken of, from the average (cells, features)."""

    @abstractmethod
    def size(self, cells: Cells) -> float:
        """A factor of all coordinates."""

    def fitted(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> FittedSpace:
        """The space with the principal axes of ``cells``, which places a query beside them.

        At most 25 million numbers, cells x features, are taken, of evenly spaced cells.

        Raises
        ------
        ModelError
            If the cells or features are too few for so many components, or the decoder does not give this.
        """
        wanted = self.components or MOST_COMPONENTS
        some = cells.take(_evenly_spaced(cells.n_cells, max(2 * wanted, MOST_FEATURES // fit.model.n_genes)))
        batches = tuple(fit.schema.batches)
        found = torch.cat(list(_decoded(self, fit, some, batches, batch_size, seed))).double().numpy()
        components, mean = self._number(*found.shape), found.mean(0)
        axes, chosen = _principal_axes(found - mean, components), replace(self, components=components)
        return FittedSpace(chosen, mean, axes, self.size(cells), batches, fingerprint(fit))

    def _number(self, n_cells: int, n_features: int) -> int:
        """The number of components, which is below those of cells and features."""
        most = min(n_cells, n_features) - 1
        if most < 1:
            raise ModelError(
                f"principal components need 2 cells and 2 features, got {n_cells} and {n_features}: pass a space that "
                f"was fitted to more cells: {self!r}.fitted(fit, reference)"
            )
        components = min(MOST_COMPONENTS, most) if self.components is None else self.components
        if components > most:
            raise ModelError(
                f"components={components} must be smaller than the numbers of cells and features, {n_cells} and "
                f"{n_features}. Pass fewer, or a space that was fitted to more cells: {self!r}.fitted(fit, reference)"
            )
        return components

    def place(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
        """Coordinates (cells, components) by the principal axes of these cells."""
        return self.fitted(fit, cells, batch_size=batch_size, seed=seed).place(
            fit, cells, batch_size=batch_size, seed=seed
        )


@dataclass(frozen=True)
class Expression(Decoded):
    r"""Principal components of decoded expression: distances compare what cells express.

    .. math:: s_{ng} = \frac{1}{B} \sum_b \frac{\mu_{ng}(\hat z_n, b)}{\sum_k \mu_{nk}(\hat z_n, b)}, \qquad
        f_{ng} = \sqrt{s_{ng}\, d}

    with mu the mean counts decoded at E[z | x] in each batch b, and d the median depth of the cells. The square root
    makes the noise of counts alike for all genes. Further columns of categories are averaged like batches, continuous
    covariates are at their mean, and labels are left out. Other latents are at the guide's location. For neighbours,
    UMAP and clusters.

    Parameters
    ----------
    components
        Number of principal components; None: 30, or as many as fewer cells or genes have.

    Examples
    --------
    A reference, and a query placed by the same axes:

    >>> space = ps.spaces.Expression(components=3).fitted(fit, train)
    >>> ps.embed(fit, test, space=space).shape
    (12, 3)
    """

    components: int | None = None

    def require(self, fit: Fit) -> None:
        """Every program that says what its theta is has shares."""

    def features(self, guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
        """Shares of the mean counts, (draws, cells, genes)."""
        return shares(theta_given(guide, x, gamma, sites, scores_x=False)["log_mean"])

    def scaled(self, mean: Tensor) -> Tensor:
        """Square roots of shares."""
        return mean.sqrt()

    def size(self, cells: Cells) -> float:
        """Square root of the median depth."""
        return float(np.sqrt(max(1.0, float(np.median(cells.totals)))))


@dataclass(frozen=True)
class Hidden(Decoded):
    r"""Principal components of the decoder's last hidden layer, averaged over batches.

    .. math:: f_n = \frac{1}{B} \sum_b h(\hat z_n, b)

    Covariates and other latents are treated as for :class:`Expression`.

    Parameters
    ----------
    components
        Number of principal components; None: 30, or as many as fewer cells or units have.

    Examples
    --------
    >>> ps.embed(fit, test, space=ps.spaces.Hidden(3)).shape
    (12, 3)
    """

    components: int | None = 10

    def require(self, fit: Fit) -> None:
        """Refuse decoders without hidden layers, and decoders of your own, whose layers are not known."""
        if not isinstance(fit.model.decoder, Decoder):
            raise ModelError(
                f"the decoder {type(fit.model.decoder).__name__} has no hidden layer that this space can read: "
                "take ps.spaces.Expression() or ps.spaces.Latent()"
            )

    def features(self, guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
        """The last hidden units (draws, cells, n_hidden), as the program computes them."""
        passed: list[Tensor] = []
        layers: Any = guide.model.decoder.layers
        hook = layers.register_forward_hook(lambda module, given, made: passed.append(made))
        try:
            law_given(guide, x, gamma, sites, scores_x=False)
        finally:
            hook.remove()
        if len(passed) != 1:
            raise ModelError(
                f"{type(guide.model).__name__} calls its decoder {len(passed)} times, so there is no single "
                "hidden layer: take ps.spaces.Expression()"
            )
        return passed[0].to(x.dtype)

    def scaled(self, mean: Tensor) -> Tensor:
        """The units themselves."""
        return mean

    def size(self, cells: Cells) -> float:
        """1: hidden units have no unit."""
        return 1.0


@dataclass(frozen=True, eq=False)
class FittedSpace(Space):
    """A space with principal axes learned from some cells; ``ps.embed`` places any cells in it.

    It is made by ``ps.spaces.Expression().fitted(fit, cells)``, or read by :func:`from_record` from an AnnData that
    ``ps.annotate`` wrote.

    Attributes
    ----------
    space
        What is decoded.
    mean, axes
        Mean (features,) and principal axes (components, features) of the cells; the entry of each axis that is
        largest by magnitude is positive.
    factor
        Of all coordinates.
    batches
        The batches that are averaged over. A fit that :func:`pyro_scvi.map_query` made of another has more.
    of
        A fingerprint of the fit's guide.

    Examples
    --------
    >>> ps.spaces.Expression(3).fitted(fit, train)
    FittedSpace(Expression(components=3), 20 features)
    """

    space: Decoded
    mean: np.ndarray
    axes: np.ndarray
    factor: float
    batches: tuple[str, ...]
    of: str

    def __repr__(self) -> str:
        return f"FittedSpace({self.space!r}, {self.mean.shape[0]} features)"

    def fitted(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> FittedSpace:
        """The space itself, whose axes stay those of the cells that it was fitted to."""
        return self

    def place(self, fit: Fit, cells: Cells, *, batch_size: int = 1024, seed: int = 0) -> np.ndarray:
        """Coordinates (cells, components) by these axes.

        Raises
        ------
        ModelError
            If the space was fitted with another fit: its axes would say nothing.
        DataError
            If it was read from a file, and its batches or sizes are not those of the fit.
        """
        if self.of != fingerprint(fit):
            raise ModelError(f"{self!r} belongs to another fit: make it again by {self.space!r}.fitted(fit, reference)")
        if not set(self.batches) <= set(fit.schema.batches) or bool(self.batches) != bool(fit.schema.batches):
            raise DataError(
                f"{self!r} was made with the batches {quoted(self.batches)}; the fit has {quoted(fit.schema.batches)}. "
                "Take the space of this fit"
            )
        parts = _decoded(self.space, fit, cells, self.batches, batch_size, seed)
        return torch.cat([self._projected(part).to(fit.dtype) for part in parts]).numpy()

    def _projected(self, features: Tensor) -> Tensor:
        """Coordinates (cells, components) of features (cells, features)."""
        if features.shape[1] != len(self.mean):
            raise DataError(
                f"{self!r} has {len(self.mean)} features, and the decoder of this fit gives {features.shape[1]}: it "
                "belongs to another fit"
            )
        axes = torch.from_numpy(self.factor * self.axes).T
        return (features.double() - torch.from_numpy(self.mean)) @ axes

    def record(self) -> dict[str, Any]:
        """Arrays, numbers and strings, as AnnData writes them to a file."""
        return {
            "space": type(self.space).__name__,
            "mean": self.mean,
            "axes": self.axes,
            "factor": self.factor,
            "batches": np.array(self.batches, dtype=object),
            "of": self.of,
        }


def from_record(adata: Any) -> FittedSpace:
    """The space in which ``ps.annotate`` placed the cells of an AnnData, to place a query in it.

    Parameters
    ----------
    adata
        The reference, annotated; also read from a file.

    Raises
    ------
    DataError
        If it holds no such space, or a part of it is missing, is not finite or does not fit the others.

    Examples
    --------
    >>> reference, query = adata[:40].copy(), adata[40:].copy()
    >>> ps.annotate(reference, fit)
    >>> ps.annotate(query, fit, space=ps.spaces.from_record(reference))
    >>> query.obsm["X_pyro_scvi_expression_pca"].shape
    (20, 19)
    """
    known = getattr(adata, "uns", {}).get("pyro_scvi", {})
    placed = known.get("X_pyro_scvi_expression_pca") if isinstance(known, Mapping) else None
    kept = placed.get("pca") if isinstance(placed, Mapping) else None
    if not isinstance(kept, Mapping):
        raise DataError(
            'uns["pyro_scvi"] holds no axes of expression: pass the AnnData of the reference, after '
            "ps.annotate(reference, fit)"
        )
    try:
        mean, axes, factor = (
            _finite(kept[name], name, ndim) for name, ndim in (("mean", 1), ("axes", 2), ("factor", 0))
        )
        space = {kind.__name__: kind for kind in (Expression, Hidden)}[str(kept["space"])](len(axes))
        batches = tuple(dict.fromkeys(map(str, np.atleast_1d(kept["batches"]))))
        if axes.shape[1] != len(mean) or (np.linalg.norm(axes, axis=1) > 1 + LENGTH_ERROR).any():
            raise ValueError(f"axes of shape {axes.shape} are longer than 1, or not of {len(mean)} features")
        return FittedSpace(space, mean, axes, float(factor), batches, str(kept["of"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f'the axes in uns["pyro_scvi"] are not as ps.annotate writes them: {error!r}') from error


def _finite(value: Any, name: str, ndim: int) -> np.ndarray:
    """A value of a file as an array of real numbers, which a file that was changed may lack."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiu" or array.ndim != ndim or not (np.abs(array) <= LARGEST).all():
        raise ValueError(f"{name} must be finite numbers of {ndim} dimensions, got {brief(value)}")
    return array.astype(np.float64)


def require_space(space: Any) -> None:
    """Refuse a class or a string in the place of a space.

    Raises
    ------
    ModelError
        If it is no space; names what was passed.
    """
    if not isinstance(space, Space):
        raise ModelError(f"space must be an object such as ps.spaces.Expression(), got {brief(space)}")


def shares(log_mean: Tensor) -> Tensor:
    """Share of each gene in a cell's mean counts, (..., cells, genes): they sum to 1 under any library size."""
    return torch.softmax(log_mean, -1)


def fingerprint(fit: Fit) -> str:
    """Tells one fit from another, but not from one to which a query was mapped: the guide stays as it is then."""
    digest = hashlib.sha256("\n".join(fit.schema.gene_names).encode())
    for name, value in fit.guide.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def known_settings(schema: Schema, batches: tuple[str, ...]) -> Tensor:
    """One row of gamma for each combination of ``batches`` and of the levels of further categories; the rest is 0."""
    columns = [[schema.batches.index(name) for name in batches]] if schema.batch is not None else []
    columns += [list(range(schema.n_covariates))[schema.columns[name]] for name in schema.categories]
    combined = list(product(*columns))
    rows = torch.zeros(len(combined), schema.n_covariates)
    for row, taken in zip(rows, combined, strict=True):
        row[list(taken)] = 1.0
    return rows


def latents_at_mean(fit: Fit, x: Tensor, gamma: Tensor) -> dict[str, Tensor]:
    """All latents (draws, cells, 1): z at its mean, others at the guide's location, discrete ones drawn.

    For cells of unknown batches there are draws in each known one.
    """
    found = []
    for own in in_known_batches(fit.schema, gamma):
        guide = fit.guide
        loc = (guide.start(x, own) if guide.amortized else refined(guide, x, own))[0]
        sites = guide.coordinates.sites(loc)
        sites["z"] = guide.mean(guide.coordinates.of_z(), x, own) if guide.amortized else sites["z"]
        repeated = {name: value.expand(_n_draws(guide), *value.shape) for name, value in sites.items()}
        found.append(with_enumerated(guide, x, own, repeated))
    z = torch.stack([sites["z"] for sites in found]).mean(0)
    return {name: torch.cat([sites[name] for sites in found]) for name in found[0]} | {
        "z": z.repeat(len(found), 1, 1, 1)
    }


def _n_draws(guide: Guide) -> int:
    return DRAWS if guide.coordinates.enumerated else 1


def _decoded(
    space: Decoded, fit: Fit, cells: Cells, batches: tuple[str, ...], batch_size: int, seed: int
) -> Iterator[Tensor]:
    """What principal components are taken of, (cells, features), in parts."""
    space.require(fit)
    settings = known_settings(fit.schema, batches)
    rows = max(1, min(batch_size, DECODED_AT_ONCE // (fit.model.n_genes * _n_draws(fit.guide))))
    with evaluating(fit.model, fit.guide, seed, theta=isinstance(space, Expression)):
        for x, gamma in batches_in_streams(fit, cells, rows, seed, new_batches=True):
            sites = latents_at_mean(fit, x, gamma)
            means = (space.features(fit.guide, x, row.expand_as(gamma), sites).mean(0) for row in settings.to(gamma))
            yield space.scaled(reduce(torch.add, means) / len(settings)).cpu()


def _evenly_spaced(n: int, most: int) -> np.ndarray:
    few = min(n, most)
    return np.arange(few) * n // few


def _principal_axes(centred: np.ndarray, n: int) -> np.ndarray:
    """The ``n`` directions of largest variance (n, features), each with its largest entry positive."""
    if min(centred.shape) <= DENSE or not centred.any():  # no leading vectors where all cells are alike
        axes = np.linalg.svd(centred, full_matrices=False)[2][:n]
    else:
        from scipy.sparse.linalg import svds  # 20 ms, which no training needs

        start = np.random.default_rng(0).standard_normal(min(centred.shape))
        _, values, found = svds(centred, n, v0=start)
        axes = found[np.argsort(-values)]
    largest = np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1)
    return np.where(largest < 0, -axes, axes)
