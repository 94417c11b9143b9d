"""Inputs of analyses: a Fit and Cells of the same schema, checked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import ModelError, SchemaError
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.utils.cell_streams import cell_streams

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


def require_inputs(fit: Any, cells: Any) -> None:
    """Raise unless ``fit`` is a Fit and ``cells`` are Cells; users often pass an AnnData.

    Raises
    ------
    ModelError
        If it is not; the message names the type given.
    """
    require_fit(fit)
    if not isinstance(cells, Cells):
        raise ModelError(
            f"expected Cells, got {type(cells).__name__}; make them with Cells.from_anndata(adata, schema=fit.schema)"
        )


def batches_in_streams(fit: Fit, cells: Cells, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Counts and covariates of all cells in order; while a batch is computed, its cells have their random streams.

    Raises
    ------
    SchemaError
        As :func:`minibatches`.
    """
    done = 0
    for x, gamma in minibatches(fit, cells).in_order(batch_size):
        rows = slice(done, done := done + len(x))
        with cell_streams(seed, cells.cell_names[rows]):
            yield x, gamma


def minibatches(fit: Fit, cells: Cells) -> Minibatches:
    """Minibatches of the cells on the fit's device, once their genes and covariates match the fit's.

    Raises
    ------
    SchemaError
        If they do not match.
    """
    fitted, given = fit.schema, cells.schema
    if fitted.gene_names != given.gene_names:
        same = len(set(fitted.gene_names) & set(given.gene_names))
        raise SchemaError(
            f"the cells have {len(given.gene_names)} genes, {same} of them among the {len(fitted.gene_names)} of the "
            "fit, or in another order; make them with Cells.from_anndata(adata, schema=fit.schema)"
        )
    if fitted.encoding != given.encoding:
        raise SchemaError(
            f"the fit has covariates {fitted.column_names}, the cells have {given.column_names}, or other scales; make "
            "them with Cells.from_anndata(adata, schema=fit.schema)"
        )
    return Minibatches(cells, fit.device, fit.dtype)
