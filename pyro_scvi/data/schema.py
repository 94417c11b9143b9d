"""Schema: genes, batches and covariate scales on which a model was fitted, and which a query must match."""

import logging
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import pandas as pd

from pyro_scvi.data.names import warn_of_numbered_genes
from pyro_scvi.data.obs_columns import categories, label_of, numbers, quoted, warn_of_batches
from pyro_scvi.data.places import Place
from pyro_scvi.data.scales import require_near, require_not_tiny, warn_of_units
from pyro_scvi.errors import DataError, SchemaError
from pyro_scvi.utils.checks import brief, warn

_log = logging.getLogger(__name__)


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

    Examples
    --------
    >>> cells.schema
    Schema(genes: 'gene_0', 'gene_1', 'gene_2', ... (20 in all))
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

    @classmethod
    def learn(
        cls,
        gene_names: Sequence[str] | pd.Index,
        obs: pd.DataFrame,
        place: Place,
        batch: str | None,
        covariates: Sequence[str],
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
            If the batch column is mostly a slip, see :func:`warn_of_batches`.
        """
        names = _listed(covariates)
        for name in (batch, *names):
            if not isinstance(name, Hashable):
                raise DataError(f"a column is named by one word, as in batch='donor'; got {name!r}.")
        if len({*names, batch}) <= len(names):  # without a batch, None is the extra element
            raise DataError(f"batch and covariates must be different columns; got batch {batch!r}, covariates {names}.")
        values = [numbers(obs, name) for name in names]
        for name, value in zip(names, values, strict=True):
            require_not_tiny(name, value)
            if not value.std() > 1e-10 * abs(value.mean()):  # the rounding error of a constant column is below this
                raise DataError(f"covariate column {name!r} is constant ({value[0]:g}); leave it out of covariates.")
            require_near(name, value, value.mean(), value.std(), obs.index)
        if batch is not None:
            warn_of_batches(obs, batch)
        return cls(
            gene_names=tuple(map(str, gene_names)),
            layer=place.layer,
            raw=place.raw,
            batch=batch,
            batches=() if batch is None else tuple(dict.fromkeys(categories(obs, batch)[0])),
            covariates=names,
            means=tuple(float(value.mean()) for value in values),
            sds=tuple(float(value.std()) for value in values),
        )

    def __repr__(self) -> str:
        parts = [f"genes: {quoted(self.gene_names, 3)}"]
        parts += [f"layer: {self.layer!r}"] if self.layer else []
        parts += ["raw"] if self.raw else []
        parts += [f"batch: {self.batch!r} of {quoted(self.batches, 3)}"] if self.batch else []
        parts += [f"covariates: {quoted(self.covariates)}"] if self.covariates else []
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
        """Number of columns of gamma: batches, then continuous covariates."""
        return len(self.batches) + len(self.covariates)

    def to_dict(self) -> dict[str, Any]:
        """Return plain lists, strings and numbers, as JSON takes them."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return values if self.raw else {key: values[key] for key in values if key != "raw"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Schema":
        """Rebuild a schema from :meth:`to_dict`.

        Raises
        ------
        SchemaError
            If keys are unknown or missing, or lengths disagree.
        """
        expected = {field.name for field in fields(cls)}
        if {*values, "raw"} != expected:  # schemas without it are of counts in X or a layer
            raise SchemaError(f"a schema has the keys {sorted(expected)}; got {sorted(values)}.")
        plain: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        schema = cls(**plain)
        if not len(schema.covariates) == len(schema.means) == len(schema.sds):
            raise SchemaError("a schema has one mean and one sd for each covariate; the lengths differ.")
        return schema

    def check_columns(self, batch: str | None, covariates: Sequence[str]) -> None:
        """Refuse columns other than the schema's own, in any order, which None and () stand for.

        Raises
        ------
        SchemaError
            If another column is named.
        """
        names = _listed(covariates)
        known = not names or sorted(names, key=str) == sorted(self.covariates)
        if batch not in (None, self.batch) or not known:
            raise SchemaError(
                f"the schema has batch {self.batch!r} and covariates {self.covariates}, got {batch!r} and {names}; "
                "leave both out, and rename the columns of obs if they have other names."
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
        summary = f"{n_matched} of the {self.n_genes} genes of the schema are in the query"
        if n_matched == 0:
            raise SchemaError(
                f"{summary}: it expects names like {quoted(wanted, 3)}, the query's are {quoted(query, 3)}."
            )
        if len(missing) and not fill_missing:
            raise SchemaError(
                f"{summary}; {len(missing)} are missing: {quoted(missing)}. "
                "Pass fill_missing_genes=True to count them as zero in every cell."
            )
        if len(missing):
            text = f"{summary}; {len(missing)} are filled with zeros: {quoted(missing)}."
            warn(text)
        warn_of_numbered_genes(wanted, query)
        if len(query) > n_matched:
            extra = query.difference(wanted, sort=False)
            _log.info("%d genes of the query are not in the schema and are left out: %s.", len(extra), quoted(extra))
        return positions

    def encode(self, obs: pd.DataFrame) -> np.ndarray:
        """One-hot batches, then standardised covariates: (cells, covariates), float32.

        Raises
        ------
        SchemaError
            If a column does not exist, or a batch is not one of the schema's.
        DataError
            If a value is missing, not numeric or implausibly far from those of the training cells.

        Warns
        -----
        UserWarning
            If a covariate looks as if it were in another unit.
        """
        encoded = np.empty((len(obs), self.n_covariates), dtype=np.float32)
        if self.batch is not None:
            encoded[:, : self.n_batches] = self._one_hot(obs, self.batch)
        for i, name in enumerate(self.covariates):
            value, mean, sd = numbers(obs, name), self.means[i], self.sds[i]
            require_near(name, value, mean, sd, obs.index)
            warn_of_units(name, value, mean, sd)
            encoded[:, self.n_batches + i] = (value - mean) / sd
        return encoded

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

    def _one_hot(self, obs: pd.DataFrame, batch: str) -> np.ndarray:
        labels, codes = categories(obs, batch)
        unseen = [label for label in labels if label not in self.batches]
        if unseen:
            raise SchemaError(
                f"column {batch!r} holds {quoted(unseen)}, which the schema does not know; its batches are "
                f"{quoted(self.batches)}. For cells of an unknown batch, set the column to any known batch, then "
                "average the results of cells.with_batch(name) over the known names."
            )
        positions = np.array([self.batches.index(label) for label in labels])
        return np.eye(self.n_batches, dtype=np.float32)[positions[codes]]


def _listed(covariates: Any) -> tuple[str, ...]:
    if not isinstance(covariates, Iterable):
        raise DataError(f"covariates must be names of columns, as in ['age'] or (), got {brief(covariates)}.")
    return (covariates,) if isinstance(covariates, str) else tuple(covariates)
