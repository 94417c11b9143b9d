"""Exceptions of the package; each is also the built-in exception that a caller would expect."""

from typing import Any

__all__ = ["CheckpointError", "DataError", "FitError", "ModelError", "PyroScviError", "SchemaError", "StoreError"]


def __dir__() -> list[str]:
    return __all__


class PyroScviError(Exception):
    """Base class of every error that this package raises on purpose.

    Each subclass is also a built-in exception.

    Examples
    --------
    >>> try:
    ...     ps.Cells.from_counts(-counts)
    ... except ps.errors.PyroScviError as error:
    ...     print(type(error).__name__, isinstance(error, ValueError))
    ...
    DataError True
    """


class DataError(PyroScviError, ValueError):
    """Counts or annotations that a count model cannot use. A ValueError.

    For example: negative, missing, not integers, empty.

    Examples
    --------
    >>> ps.Cells.from_counts(counts / 2)
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.DataError: counts must hold raw integer counts; cell 'cell_0', gene 'gene_1' holds 2.5. ...
    """


class SchemaError(PyroScviError, KeyError):
    """Genes, categories or columns that do not match what a model was fitted on. A KeyError.

    Examples
    --------
    >>> ps.Cells.from_anndata(adata, batch="hospital")
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.SchemaError: obs has no column 'hospital'; its columns are ['donor', 'kind'].
    """

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the repr


class ModelError(PyroScviError, ValueError):
    """Parts that do not fit together, or an argument that is out of range. A ValueError.

    Also, by name, a site of the program that a verb cannot do right by.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.StandardNormal(3))
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.ModelError: the prior must have event shape (2,), got (3,); make it for 2 latents
    """


class FitError(PyroScviError, RuntimeError):
    """Training that failed. A RuntimeError.

    ``fit`` is the Fit of the last good epoch, None if no epoch had ended.

    Examples
    --------
    >>> ps.fit(ps.SCVI(20, 2), cells, epochs=2, learning_rate=ps.schedules.Constant(1e30), progress=False)
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.FitError: ...
    """

    fit: Any = None  # a Fit, whose module imports this one


class CheckpointError(PyroScviError, OSError):
    """A saved fit or checkpoint that cannot be written, read or trusted. An OSError.

    ``fit`` is as in :class:`FitError`.

    Examples
    --------
    >>> ps.load(folder / "nothing")
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.CheckpointError: there is no saved fit or checkpoint, or a part of it is missing: ...
    """

    fit: Any = None


class StoreError(PyroScviError, OSError):
    """A store of counts that cannot be written, read or trusted. An OSError.

    Examples
    --------
    >>> ps.Cells.from_store(folder / "nothing.store")
    Traceback (most recent call last):
        ...
    pyro_scvi.errors.StoreError: ... is not a store of counts: ...
    """
