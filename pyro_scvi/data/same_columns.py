"""Whether cells have the columns of counts and covariates that a model was trained on."""

from pyro_scvi.data.scales import warn_of_size_units
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import SchemaError

_AS = "make them with Cells.from_anndata(adata, schema=fit.schema)"


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
            f"the cells have {len(given.gene_names)} genes, {same} of them among the {len(fitted.gene_names)} of the "
            f"fit, or in another order; {_AS}"
        )
    if fitted.encoding != given.encoding:
        raise SchemaError(
            f"the fit has covariates {fitted.column_names}, the cells have {given.column_names}, or other scales; {_AS}"
        )
    if fitted.size_factor is not None:
        warn_of_size_units(fitted.size_factor, given.size_unit, fitted.size_unit)
