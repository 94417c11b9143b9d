"""A trial of weights that were read: two cells are computed, so that no fit is handed out whose results are NaN."""

import torch
from torch import Tensor

from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import CheckpointError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import log_joint
from pyro_scvi.inference.evaluation import theta_given, undisturbed
from pyro_scvi.likelihoods.library_size import LogNormalLibrary
from pyro_scvi.model import SCVI

USUAL_TOTAL = 1000.0  # of a cell, where the model does not know it
MOST_LOG_TOTAL = 20.0  # 5e8 molecules, more than a cell has


def require_finite_results(model: SCVI, guide: Guide, schema: Schema) -> None:
    """Refuse weights that cannot come from training: scales not above 0, and results that are NaN or infinite.

    The results are those of a cell without counts, and of one with the usual total and all genes alike.

    Raises
    ------
    CheckpointError
        If they are refused; says what would be NaN.
    """
    if isinstance(model.library, LogNormalLibrary) and not bool((model.library.scale > 0).all()):
        raise CheckpointError("the scale of its library sizes is not above 0")
    gamma = _first_of_each(schema).to(next(guide.parameters())).expand(2, -1)
    x = torch.stack([gamma.new_zeros(model.n_genes), _usual(model).to(gamma)])
    with undisturbed(0, model, guide):
        lost = [name for name, values in _results(model, guide, x, gamma).items() if not values.isfinite().all()]
    if lost:
        raise CheckpointError(
            f"its weights cannot come from training: {' and '.join(lost[:2])} would be NaN or infinite"
        )


def _results(model: SCVI, guide: Guide, x: Tensor, gamma: Tensor) -> dict[str, Tensor]:
    loc, scale = guide.start(x, gamma)
    theta = theta_given(guide, x, gamma, guide.coordinates.sites(loc[None]), scores_x=False)
    density = log_joint(model, x, gamma, guide.weights.medians())(loc[None])
    places = {"the place of a cell": loc, "the scale of a cell": scale}
    return places | {f"{name} of a cell": value for name, value in theta.items()} | {"the density of a cell": density}


def _usual(model: SCVI) -> Tensor:
    """Counts (genes,) of a cell with the usual total, all genes alike."""
    total = torch.tensor(USUAL_TOTAL)
    if isinstance(model.library, LogNormalLibrary):
        total = model.library.loc[0].clamp(max=MOST_LOG_TOTAL).exp()
    return (total / model.n_genes).round().clamp(min=1).expand(model.n_genes)


def _first_of_each(schema: Schema) -> Tensor:
    """Covariates (columns,) of a cell of the first batch and categories, without a label, else with the mean."""
    gamma = torch.zeros(schema.n_covariates)
    for name, columns in schema.columns.items():
        if name in (schema.batch, *schema.categories):
            gamma[columns.start] = 1
    return gamma
