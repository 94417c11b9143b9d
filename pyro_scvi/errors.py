"""The package's errors, each also the built-in exception that a caller would catch; and the check of plain numbers."""

from numbers import Integral


class PyroScviError(Exception):
    """Root of every error that this package raises on purpose."""


class DataError(PyroScviError, ValueError):
    """Counts or annotations that no count model can take: negative, missing, not integers, empty."""


class SchemaError(PyroScviError, KeyError):
    """Genes, categories or columns that do not match what a model was fitted on."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""  # KeyError would print the repr


class ModelError(PyroScviError, ValueError):
    """Parts of a model or guide that do not fit together."""


class FitError(PyroScviError, RuntimeError):
    """Training that could not go on."""


class StoreError(PyroScviError, OSError):
    """A saved fit or a store of counts that cannot be written, read or trusted."""


def require_at_least(least: int, /, **named: int) -> None:
    """Refuse numbers of draws, cells or steps that are no integers or too small.

    Raises
    ------
    ModelError
        Naming the argument.
    """
    for name, value in named.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            raise ModelError(f"{name} must be an integer of {least} or more, got {value!r}")
