"""Whether cells and gamma have the columns of counts and covariates that a model was trained on."""

from typing import Any

import pandas as pd
import xarray as xr

from pyro_scvi.data.names import names_in
from pyro_scvi.data.obs_columns import quoted
from pyro_scvi.data.scales import warn_of_size_units
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import SchemaError
from pyro_scvi.utils.checks import warn

_FAR = 10.0  # standard deviations; half of the cells of a data set do not lie as far from another's mean
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
            "the genes of the cells differ from those of the fit, or are in another order: the cells have "
            f"{len(given.gene_names)} genes, the fit has {len(fitted.gene_names)}, and {same} are in both; {_AS}"
        )
    if fitted.encoding != given.encoding:
        raise SchemaError(
            "the covariates of the cells differ from those of the fit, or are in another order: the cells have "
            f"{quoted(given.column_names)}, the fit has {quoted(fitted.column_names)}; {_AS}"
        )
    if not given.has_scales_of(fitted):
        raise SchemaError(
            f"covariates {quoted(fitted.covariates)} have other scales than in the fit: there they have means of "
            f"{_few_digits(fitted.means)} and standard deviations of {_few_digits(fitted.sds)}, here of "
            f"{_few_digits(given.means)} and {_few_digits(given.sds)}; {_AS}"
        )
    if fitted.size_factor is not None:
        warn_of_size_units(fitted.size_factor, given.size_unit, fitted.size_unit)


def _few_digits(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


def in_order_of_columns(fitted: Schema | None, gamma: Any) -> Any:
    """Covariates (cells, covariates) in the order of a fit, by name if they are a table with names of columns.

    Raises
    ------
    SchemaError
        If the names are others, or there is no schema that knows the order.

    Warns
    -----
    UserWarning
        If a continuous covariate lies so far from its mean that it may be as in ``obs``.
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
    for name in fitted.covariates:
        if (middle := abs(float(gamma[name].median()))) > _FAR:
            warn(
                f"gamma column {name!r} lies {middle:.3g} standard deviations from the mean. Is it as in obs? In "
                "gamma it is (value - mean) / sd, with mean and sd of the fit's cells, as in cells.covariates."
            )
    return gamma.iloc[:, names.get_indexer(pd.Index(fitted.column_names))]
