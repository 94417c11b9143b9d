"""Whether cells and gamma have the columns of counts and covariates that a model was trained on."""

from typing import Any

import pandas as pd
import xarray as xr

from pyro_scvi.data.names import names_in
from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.data.scales import warn_of_size_units
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import SchemaError

_AS = "make the cells with Cells.from_anndata(adata, schema=fit.schema)"


def require_same_columns(fitted: Schema, given: Schema) -> None:
    """Refuse cells whose genes or covariates are others than those of a fit, or in another order or scale.

    Raises
    ------
    SchemaError
        If they are; says how to read them.

    Warns
    -----
    UserWarning
        If size factors are in another unit.
    """
    if fitted.gene_names != given.gene_names:
        same = len(set(fitted.gene_names) & set(given.gene_names))
        raise SchemaError(
            f"the genes of the cells are not those of the fit, in its order: the cells have {len(given.gene_names)} "
            f"genes, the fit has {len(fitted.gene_names)}, and {same} are in both; {_AS}"
        )
    if fitted.encoding != given.encoding:
        raise SchemaError(
            "the covariates of the cells are not those of the fit, on its scales: the cells have "
            f"{given.column_names}, the fit has {fitted.column_names}; {_AS}"
        )
    if fitted.size_factor is not None:
        warn_of_size_units(fitted.size_factor, given.size_unit, fitted.size_unit)


def in_order_of_columns(fitted: Schema | None, gamma: Any) -> Any:
    """Covariates (cells, covariates) in the order of a fit, by name if they are a table with names of columns.

    Raises
    ------
    SchemaError
        If the names are others, or there is no schema that knows the order.
    """
    gamma = gamma.to_pandas() if isinstance(gamma, xr.DataArray) and gamma.ndim == 2 else gamma
    names = names_in(gamma.columns) if isinstance(gamma, pd.DataFrame) else None
    if names is None:
        return gamma
    if fitted is None:
        raise SchemaError(
            f"gamma has columns with names, {quoted(names, 3)}, and the model is of no fit, so it does not know their "
            "order. Put them into the order of cells.schema.column_names, and pass gamma.to_numpy()."
        )
    if sorted(names) != sorted(fitted.column_names):
        raise SchemaError(
            f"gamma has the columns {quoted(names)}, the fit has {quoted(fitted.column_names)}: name them as there, or "
            "pass gamma.to_numpy() with the columns in that order."
        )
    return gamma.iloc[:, names.get_indexer(pd.Index(fitted.column_names))]
