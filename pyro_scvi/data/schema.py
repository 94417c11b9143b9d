"""Schema: genes, batches and covariate scales on which a model was fitted, and which a query must match."""

import logging
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.data.covariates import MEAN, NONE, Covariates, Numbers, Part, Words
from pyro_scvi.data.names import other_forms, warn_of_numbered_genes
from pyro_scvi.data.obs_columns import (
    categories,
    has_order,
    label_of,
    labels_of,
    numbers,
    positive,
    quoted,
    warn_of_batches,
    warn_of_lookalikes,
    warn_of_new_batches,
)
from pyro_scvi.data.places import Place
from pyro_scvi.data.scales import require_near, require_not_tiny, unit_of_sizes, warn_of_size_factors, warn_of_units
from pyro_scvi.errors import DataError, ModelError, SchemaError
from pyro_scvi.utils.checks import brief, items_of, warn

_log = logging.getLogger(__name__)

SAME_SCALE = 1e-6  # of a standard deviation: float32 and another order of adding up change less
LATER = ("raw", "categories", "levels", "labels", "label_names", "ordered", "size_factor", "size_unit")
"""Fields that saves leave out where they are empty, as those written before there were any do."""


_NO_BATCH = (
    "its batches are {}. Pass allow_new_batches=True to read cells of other batches: ps.embed and "
    "ps.normalized_expression take them as they are, and ps.map_query learns their batches."
)
_NO_CATEGORY = "its categories are {}."
_NO_LABEL = "its labels are {}. Cells whose label is none of these must have a missing value there."


@dataclass(frozen=True)
class Schema:
    """The meaning of the columns of counts and covariates.

    Parameters
    ----------
    gene_names
        (genes,), in the order of the columns of the counts.
    layer
        Layer of the AnnData that holds the counts; None for ``X``.
    batch
        Column of ``obs`` with the batch of each cell; None without batches.
    batches
        (batches,): its categories, in the order of the one-hot columns.
    covariates
        Names of the continuous columns of ``obs``, in the order of the columns after the batches.
    means, sds
        (continuous covariates,): mean and standard deviation of each, in the column's own unit.
    raw
        Whether the counts are those of ``adata.raw``.
    categories
        Further columns of ``obs`` with a category for each cell.
    levels
        (categories,): the categories of each, in the order of its one-hot columns.
    labels
        Column of ``obs`` with labels, which cells may lack; None without labels.
    label_names
        (labels,): in the order of the one-hot columns.
    ordered
        Those of the columns of categories and labels whose words have an order: numbers, dates, ordered Categoricals.
    size_factor
        Column of ``obs`` with a size factor of each cell; None without one.
    size_unit
        Median and standard deviation, over the training cells, of the log of their counts per size factor: by these,
        size factors of a query in another unit are seen. () without size factors.

    Examples
    --------
    >>> cells.schema
    Schema(genes: 'GENE0', 'GENE1', 'GENE2', ... (20 in all))
    >>> query = ps.Cells.from_anndata(adata[:5, ::-1].copy(), schema=cells.schema)
    >>> query.schema == cells.schema
    True
    """

    gene_names: tuple[str, ...]
    layer: str | None = None
    batch: str | None = None
    batches: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    means: tuple[float, ...] = ()
    sds: tuple[float, ...] = ()
    raw: bool = False
    categories: tuple[str, ...] = ()
    levels: tuple[tuple[str, ...], ...] = ()
    labels: str | None = None
    label_names: tuple[str, ...] = ()
    ordered: tuple[str, ...] = ()
    size_factor: str | None = None
    size_unit: tuple[float, ...] = ()

    @classmethod
    def learn(
        cls,
        gene_names: Sequence[str] | pd.Index,
        obs: pd.DataFrame,
        place: Place,
        batch: str | None,
        covariates: Sequence[str],
        categorical: Sequence[str] = (),
        labels: str | None = None,
        size_factor: str | None = None,
    ) -> "Schema":
        """Take categories, means and standard deviations from the annotations, (cells, columns), of the training cells.

        Raises
        ------
        SchemaError
            If a column does not exist.
        DataError
            If a batch is missing or looks continuous, or a covariate is missing, not numeric, constant or has values
            that are implausibly far from the others.

        Warns
        -----
        UserWarning
            If a column of categories is mostly a slip, see :func:`warn_of_batches` and :func:`labels_of`.
        """
        names, further = _listed(covariates), _listed(categorical, "categories")
        _require_distinct(batch, further, names, labels, size_factor)
        values = [numbers(obs, name) for name in names]
        for name, value in zip(names, values, strict=True):
            require_not_tiny(name, value)
            if not value.std() > 1e-10 * abs(value.mean()):  # the rounding error of a constant column is below this
                raise DataError(f"covariate column {name!r} is constant ({value[0]:g}); leave it out of covariates.")
            require_near(name, value, value.mean(), value.std(), obs.index)
        if batch is not None:
            warn_of_batches(obs, batch)
        for name in further:
            warn_of_batches(obs, name, "category")
        label_names = () if labels is None else tuple(labels_of(obs, labels)[0])
        warn_of_lookalikes(f"label column {labels!r}", "labels", label_names)
        return cls(
            gene_names=tuple(map(str, gene_names)),
            layer=place.layer,
            raw=place.raw,
            batch=batch,
            batches=() if batch is None else tuple(categories(obs, batch)[0]),
            covariates=names,
            means=tuple(float(value.mean()) for value in values),
            sds=tuple(float(value.std()) for value in values),
            categories=further,
            levels=tuple(tuple(categories(obs, name, "category")[0]) for name in further),
            labels=labels,
            label_names=label_names,
            ordered=tuple(name for name in (batch, *further, labels) if name is not None and has_order(obs, name)),
            size_factor=size_factor,
        )

    def __repr__(self) -> str:
        parts = [f"genes: {quoted(self.gene_names, 3)}"]
        parts += [f"layer: {self.layer!r}"] if self.layer else []
        parts += ["raw"] if self.raw else []
        parts += [f"batch: {self.batch!r} of {quoted(self.batches, 3)}"] if self.batch else []
        parts += [f"{name!r} of {quoted(levels, 3)}" for name, levels in zip(self.categories, self.levels, strict=True)]
        parts += [f"covariates: {quoted(self.covariates)}"] if self.covariates else []
        parts += [f"size factor: {self.size_factor!r}"] if self.size_factor else []
        parts += [f"labels: {self.labels!r} of {quoted(self.label_names, 3)}"] if self.labels else []
        return f"Schema({'; '.join(parts)})"

    @property
    def place(self) -> Place:
        """Where the counts of an AnnData are."""
        return Place(self.layer, self.raw)

    @property
    def n_genes(self) -> int:
        """Number of genes."""
        return len(self.gene_names)

    @property
    def n_batches(self) -> int:
        """Number of one-hot columns; 0 without a batch column."""
        return len(self.batches)

    @property
    def n_covariates(self) -> int:
        """Number of columns of gamma: batches, further categories, continuous covariates, labels, log size factor."""
        return len(self.column_names)

    @property
    def columns(self) -> dict[str, slice]:
        """What each column of gamma is: the name of a column of ``obs`` -> its columns of gamma, in their order."""
        ends = list(accumulate(len(words) for _, words in self._parts()))
        return {name: slice(end - len(words), end) for (name, words), end in zip(self._parts(), ends, strict=True)}

    @property
    def column_names(self) -> tuple[str, ...]:
        """One name for each column of gamma, such as "donor=a" or "age"."""
        return tuple(name if word is None else f"{name}={word}" for name, words in self._parts() for word in words)

    @property
    def encoding(self) -> tuple[Any, ...]:
        """What two schemas share if they encode the same columns of annotations, but for the scales of numbers."""
        return (
            self.batch,
            self.batches,
            self.categories,
            self.levels,
            self.covariates,
            self.labels,
            self.label_names,
            self.size_factor,
        )

    def has_scales_of(self, other: "Schema") -> bool:
        """Whether means and standard deviations are those of another, up to the order in which cells were added."""
        ours, theirs = (np.array([each.means, each.sds]) for each in (self, other))
        return bool((np.abs(ours - theirs) <= SAME_SCALE * theirs[1]).all())

    def words(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Columns of ``obs`` that hold words: what these are, the column's name, and the words."""
        found = [] if self.batch is None else [("batch", self.batch, self.batches)]
        found += [("category", name, levels) for name, levels in zip(self.categories, self.levels, strict=True)]
        return found if self.labels is None else [*found, ("label", self.labels, self.label_names)]

    def _parts(self) -> list[tuple[str, Sequence[str | None]]]:
        """Columns of ``obs`` and their categories, in the order of gamma; a continuous one has a single None."""
        parts: list[tuple[str, Sequence[str | None]]] = [] if self.batch is None else [(self.batch, self.batches)]
        parts += zip(self.categories, self.levels, strict=True)
        parts += [(name, (None,)) for name in self.covariates]
        parts += [] if self.labels is None else [(self.labels, self.label_names)]
        return parts if self.size_factor is None else [*parts, (self.size_factor, (None,))]

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers, as JSON takes them."""
        values = {key: _plain(value) for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value or key not in LATER}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schema":
        """Rebuild a schema from :meth:`to_dict`.

        Raises
        ------
        SchemaError
            If keys are unknown or missing, or lengths disagree.
        """
        expected = {field.name for field in fields(cls)}
        if {*values, *LATER} != expected:
            raise SchemaError(f"a schema has the keys {sorted(expected)}; got {sorted(values)}.")
        plain: dict[str, Any] = {key: _frozen(value) for key, value in values.items()}
        schema = cls(**plain)
        if len(schema.categories) != len(schema.levels):
            raise SchemaError("a schema has a list of levels for each column of categories; the lengths differ.")
        if not len(schema.covariates) == len(schema.means) == len(schema.sds):
            raise SchemaError("a schema has one mean and one sd for each covariate; the lengths differ.")
        return schema

    def check_columns(
        self,
        batch: str | None,
        covariates: Sequence[str],
        categorical: Sequence[str] = (),
        labels: str | None = None,
        size_factor: str | None = None,
    ) -> None:
        """Refuse columns other than the schema's own, in any order, which None and () stand for.

        Raises
        ------
        SchemaError
            If another column is named.
        """
        names, further = _listed(covariates), _listed(categorical, "categories")
        known = not names or sorted(names, key=str) == sorted(self.covariates)
        if batch not in (None, self.batch) or not known:
            raise SchemaError(
                f"the schema has batch {self.batch!r} and covariates {self.covariates}, got {batch!r} and {names}; "
                "leave both out, and rename the columns of obs if they have other names."
            )
        known = not further or sorted(further, key=str) == sorted(self.categories)
        if labels not in (None, self.labels) or not known:
            raise SchemaError(
                f"the schema has categories {self.categories} and labels {self.labels!r}, got {further} and "
                f"{labels!r}; leave both out, and rename the columns of obs if they have other names."
            )

        if size_factor not in (None, self.size_factor):
            raise SchemaError(
                f"the schema has size factors {self.size_factor!r}, got {size_factor!r}; leave it out, and rename the "
                "column of obs if it has another name."
            )

    def gene_positions(self, query: pd.Index, *, fill_missing: bool) -> np.ndarray:
        """Match genes by name.

        Parameters
        ----------
        query
            (query genes,): unique names.
        fill_missing
            Return -1 for genes that the query lacks, with a warning, instead of raising an error.

        Returns
        -------
        ndarray
            (genes,): position of each gene of the schema in the query.

        Raises
        ------
        SchemaError
            If no gene matches, or some are missing and ``fill_missing`` is False.

        Warns
        -----
        UserWarning
            If genes are filled in, or match only because both sides number them.
        """
        wanted = pd.Index(self.gene_names)
        positions = query.get_indexer(wanted)
        missing = wanted[positions < 0]
        n_matched = self.n_genes - len(missing)
        forms = other_forms(missing, query[~query.isin(wanted)])
        summary = f"{n_matched} of the {self.n_genes} genes of the schema are in the query"
        if n_matched == 0:
            raise SchemaError(
                f"{summary}: it expects names like {quoted(wanted, 3)}, the query's are {quoted(query, 3)}.{forms}"
            )
        if len(missing) and not fill_missing:
            raise SchemaError(
                f"{summary}; {len(missing)} are missing: {quoted(missing)}. "
                f"Pass fill_missing_genes=True to count them as zero in every cell.{forms}"
            )
        if len(missing):
            text = f"{summary}; {len(missing)} are filled with zeros: {quoted(missing)}.{forms}"
            warn(text)
        warn_of_numbered_genes(wanted, query)
        if len(query) > n_matched:
            extra = query.difference(wanted, sort=False)
            _log.info("%d genes of the query are not in the schema and are left out: %s.", len(extra), quoted(extra))
        return positions

    def with_sizes(self, obs: pd.DataFrame, totals: np.ndarray) -> "Schema":
        """The same, knowing the unit of the size factors by the total counts (cells,) of the training cells."""
        if self.size_factor is None:
            return self
        return replace(self, size_unit=unit_of_sizes(totals, positive(obs, self.size_factor)))

    def check_sizes(self, obs: pd.DataFrame, totals: np.ndarray) -> None:
        """Warn of size factors of a query in another unit; ``totals`` (cells,) are its counts of the schema's genes."""
        if self.size_factor is not None:
            warn_of_size_factors(self.size_factor, totals, positive(obs, self.size_factor), self.size_unit)

    def encode(self, obs: pd.DataFrame, *, allow_new_batches: bool = False) -> Covariates:
        """One-hot batches and categories, standardised covariates, one-hot labels, log size factor: gamma.

        (cells, covariates), float32. Cells without a label have zeros there, all of them if there is no column of
        labels. Cells of a batch that the schema does not know have the mean over the known ones if
        ``allow_new_batches``.

        Raises
        ------
        SchemaError
            If a column other than that of the labels does not exist, or a category is not one of the schema's.
        DataError
            If a value is missing, not numeric or implausibly far from those of the training cells.

        Warns
        -----
        UserWarning
            If a covariate looks as if it were in another unit.
        """
        parts: dict[str, Part] = {}
        if self.batch is not None:
            parts[self.batch] = self._batches(obs, self.batch, allow_new_batches)
        for name, levels in zip(self.categories, self.levels, strict=True):
            parts[name] = _words(name, levels, *categories(obs, name, "category"), _NO_CATEGORY)
        for name, mean, sd in zip(self.covariates, self.means, self.sds, strict=True):
            value = numbers(obs, name)
            require_near(name, value, mean, sd, obs.index)
            warn_of_units(name, value, mean, sd)
            parts[name] = Numbers(((value - mean) / sd).astype(np.float32))
        if self.labels is not None:
            parts[self.labels] = self._labels(obs, self.labels)
        if self.size_factor is not None:
            parts[self.size_factor] = Numbers(np.log(positive(obs, self.size_factor)).astype(np.float32))
        return Covariates(len(obs), parts)

    def batch_position(self, name: Hashable) -> int:
        """Column of a batch among the one-hot columns; the batch of a column of numbers may be named by its number.

        Raises
        ------
        SchemaError
            If there is no batch column, or no batch of this name.
        """
        if self.batch is None:
            raise SchemaError(f"there is no batch {name!r}: these cells were made without batch=.")
        name = label_of(name)
        if name not in self.batches:
            raise SchemaError(f"column {self.batch!r} has no batch {name!r}; its batches are {quoted(self.batches)}.")
        return self.batches.index(name)

    def of_unknown_batch(self, gamma: np.ndarray) -> np.ndarray:
        """Which cells (cells,) of gamma (cells, covariates) are of a batch that is not known: they have a mean there.

        Where only one batch is known, :meth:`encode` refuses others.
        """
        unknown: np.ndarray = ~(gamma[:, : self.n_batches] == 1).any(1) & (self.n_batches > 0)
        return unknown

    def _batches(self, obs: pd.DataFrame, batch: str, allow_new: bool) -> Words:
        found, codes = categories(obs, batch)
        if not allow_new:
            return _words(batch, self.batches, found, codes, _NO_BATCH)
        if self.n_batches == 1 and found != list(self.batches):
            raise SchemaError(
                f"column {batch!r} holds {quoted(found)}, and the schema knows only one batch, "
                f"{self.batches[0]!r}: its cells and those of a new batch would look alike. Fit without batch=, "
                "or with several batches."
            )
        positions = {word: place for place, word in enumerate(self.batches)}
        if (new := ~np.isin(found, self.batches)[codes]).any():
            warn_of_new_batches(obs[new], batch, self.batches)
        return Words.of(np.array([positions.get(word, MEAN) for word in found])[codes], self.n_batches)

    def _labels(self, obs: pd.DataFrame, name: str) -> Words:
        """Labels of those cells that have one; none where there is no such column."""
        positions = np.full(len(obs), NONE)
        if name in obs.columns and obs[name].notna().to_numpy().any():
            labels, codes = labels_of(obs, name)
            known = codes >= 0
            positions[known] = _words(name, self.label_names, labels, codes[known], _NO_LABEL).codes
        return Words.of(positions, len(self.label_names))


def _words(name: str, known: Sequence[str], found: list[str], codes: np.ndarray, hint: str) -> Words:
    """Codes among the ``known`` words, from ``codes`` among the words ``found``."""
    if unseen := [word for word in found if word not in known]:
        raise SchemaError(
            f"column {name!r} holds {quoted(unseen)}, which the schema does not know; {hint.format(quoted(known))}"
        )
    positions = {word: place for place, word in enumerate(known)}
    return Words.of(np.array([positions[word] for word in found], dtype=int)[codes], len(known))


def _require_distinct(
    batch: Any, categorical: tuple[Any, ...], covariates: tuple[Any, ...], labels: Any, size_factor: Any
) -> None:
    """Refuse names that are no single words, and a column that is named twice."""
    given = {"batch": batch, "categories": categorical, "covariates": covariates, "labels": labels}
    given |= {} if size_factor is None else {"size_factor": size_factor}
    names = [name for name in (batch, *categorical, *covariates, labels, size_factor) if name is not None]
    for name in names:
        if not isinstance(name, Hashable):
            raise ModelError(f"a column is given by its name, as in batch='donor'; got {name!r}.")
    if len(set(names)) < len(names):
        shown = ", ".join(f"{what} {value!r}" for what, value in given.items() if value)
        raise ModelError(f"batch, covariates and all other named columns must be different columns; got {shown}.")


def _listed(names: Any, what: str = "covariates") -> tuple[str, ...]:
    listed = [names] if isinstance(names, str) else items_of(names)
    if listed is None:
        raise ModelError(f"{what} must be names of columns, as in ['age'] or (), got {brief(names)}.")
    return tuple(listed)


def _plain(value: Any) -> Any:
    """Tuples as lists, at any depth."""
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _frozen(value: Any) -> Any:
    """Lists as tuples, at any depth."""
    return tuple(_frozen(item) for item in value) if isinstance(value, list) else value
