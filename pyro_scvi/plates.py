"""What model and guide have in common: plate over cells, check of arguments, registration of parameters."""

from typing import TYPE_CHECKING

import pyro
import torch
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.execution import execution

if TYPE_CHECKING:
    from pyro_scvi.model import SCVI
    from pyro_scvi.parts import Part


def register(program: "Part") -> None:
    """Tell Pyro of a program's parameters, for whoever trains it with Pyro's own tools."""
    if execution().register_parameters:
        pyro.module(program.pyro_name, program)


def cells_plate(gamma: Tensor, index: Tensor | None, n_cells: int | None) -> pyro.plate:
    """The plate over cells, for rows ``index`` of ``n_cells`` or for all of them."""
    rows = torch.arange(len(gamma), device=gamma.device) if index is None else index
    return pyro.plate("cells", n_cells or len(gamma), subsample=rows, dim=-2)


def constants(model: "SCVI", x: Tensor | None, gamma: Tensor | None) -> Tensor:
    """The covariates (cells, covariates), none where the model has none, checked against x and the model.

    Raises
    ------
    ModelError
        If genes, covariates or rows do not agree.
    """
    if gamma is None:
        if x is None or model.n_covariates:
            raise ModelError(f"the model needs gamma of shape (cells, {model.n_covariates}) beside x")
        gamma = x.new_zeros(len(x), 0)
    if gamma.shape[-1] != model.n_covariates:
        raise ModelError(f"gamma must have {model.n_covariates} columns, got {gamma.shape[-1]}")
    if x is not None and x.shape[-1] != model.n_genes:
        raise ModelError(f"x must have {model.n_genes} genes, got {x.shape[-1]}")
    if x is not None and len(x) != len(gamma):
        raise ModelError(f"x and gamma must have the same rows, one per cell; got {len(x)} and {len(gamma)}")
    return gamma
