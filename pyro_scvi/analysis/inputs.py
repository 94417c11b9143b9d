"""Inputs of analyses: a Fit and Cells of the same schema, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.data.obs_columns import label_of, quoted
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.training.same_columns import require_same_columns
from pyro_scvi.utils.cell_streams import cell_streams, own_names
from pyro_scvi.utils.checks import brief, items_of

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def require_fit(fit: Any) -> None:
    """Raise unless ``fit`` is a Fit.

    Raises
    ------
    ModelError
        If it is not; the message names the type given.
    """
    if not (isinstance(getattr(fit, "model", None), SCVI) and isinstance(getattr(fit, "guide", None), Guide)):
        raise ModelError(f"expected the Fit that ps.fit or ps.load returns, got {type(fit).__name__}")


def require_inputs(fit: Any, cells: Any, name: str = "cells") -> None:
    """Raise unless ``fit`` is a Fit and ``cells`` are Cells; users often pass an AnnData.

    ``name`` is that of the argument, for the message.

    Raises
    ------
    ModelError
        If it is not; the message names the type given.
    """
    require_fit(fit)
    if not isinstance(cells, Cells):
        as_what = "" if name == "cells" else f" as {name}="
        raise ModelError(
            f"expected Cells{as_what}, got {type(cells).__name__}; make them with "
            "Cells.from_anndata(adata, schema=fit.schema)"
        )


def batches_in_streams(
    fit: Fit, cells: Cells, batch_size: int, seed: int, *, new_batches: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts and covariates of all cells in order; while a batch is computed, its cells have their random streams.

    Raises
    ------
    SchemaError
        As :func:`minibatches`.
    """
    done, names = 0, own_names(cells.cell_names)
    for x, gamma in minibatches(fit, cells, new_batches=new_batches).in_order(batch_size):
        rows = slice(done, done := done + len(x))
        with cell_streams(seed, names[rows]):
            yield x, gamma


def minibatches(fit: Fit, cells: Cells, *, new_batches: bool = False) -> Minibatches:
    """Minibatches of the cells on the fit's device, once their genes and covariates match the fit's.

    ``new_batches``: the caller knows what to do with cells of batches that the fit does not know.

    Raises
    ------
    SchemaError
        If they do not match, or there are such cells and the caller does not know.
    """
    require_same_columns(fit.schema, cells.schema)
    return Minibatches(cells, fit.device, fit.dtype, new_batches=new_batches)


def listed_quantiles(quantiles: Any) -> list[float]:
    """Numbers from 0 to 1 as a list, of any container; refuses others.

    Raises
    ------
    ModelError
        If it is refused.
    """
    listed = items_of(quantiles)
    if listed is None:
        raise ModelError(f"quantiles must be numbers in a list or tuple, got {brief(quantiles)}")
    if not all(isinstance(quantile, int | float | np.number) and 0 <= quantile <= 1 for quantile in listed):
        raise ModelError(f"quantiles must be between 0 and 1, got {listed}")
    return [float(quantile) for quantile in listed]


def listed_names(names: Any, what: str) -> list[Any]:
    """Names as a list, of any container, such as an array; refuses one name, or what holds none.

    Raises
    ------
    ModelError
        If it is refused.
    """
    if isinstance(names, str):
        raise ModelError(f"{what} must be names in a list or tuple, as in [{names!r}], got {names!r}")
    listed = items_of(names)
    if listed is None or not all(isinstance(name, Hashable) for name in listed):
        raise ModelError(f"{what} must be names in a list or tuple, got {brief(names)}")
    return listed


def listed_batches(batches: Any) -> list[Any]:
    """Names of batches as a list, of any container; refuses one that is there twice, in whatever form.

    Raises
    ------
    ModelError
        If it is refused.
    """
    listed = listed_names(batches, "batches")
    times = Counter(map(label_of, listed))
    if twice := [name for name, n in times.items() if n > 1]:
        raise ModelError(f"batches name {quoted(twice)} more than once, and it would count as often: name each once")
    return listed
