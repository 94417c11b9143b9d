"""What evidence means where a cell's observed total is the model's library size."""

from __future__ import annotations

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.likelihoods.library_size import ObservedLibrary
from pyro_scvi.likelihoods.poisson import Poisson
from pyro_scvi.model import SCVI
from pyro_scvi.utils.checks import warn

CONDITIONAL = "conditional_on_total"
"""Name in the table's ``attrs``."""


def is_conditional(model: SCVI) -> bool:
    """Whether the evidence is that of counts given their total, and no probability of the counts.

    An observed total enters the means, and the counts then have a total of their own as well. For Poisson counts that
    of the counts given z is known, and so is their distribution given both. For others it has no closed form, and for
    programs of one's own nobody knows whether the means still sum to the total.
    """
    own = any(getattr(type(model), name) is not getattr(SCVI, name) for name in ("forward", "decode", "observe"))
    own = own or type(model.library) is not ObservedLibrary
    return isinstance(model.library, ObservedLibrary) and (own or type(model.likelihood) is not Poisson)


def total_term(model: SCVI, x: Tensor, gamma: Tensor) -> Tensor:
    r"""What makes log p(x | z, l) of Poisson counts with the observed total l a log probability of x, (cells,).

    .. math:: \log p(l) - \log Poisson(\textstyle\sum_g x_g; l)

    because Poisson counts given their sum are multinomial, whatever z. Zero for models without an observed total, and
    for those whose evidence :func:`is_conditional`.
    """
    if not isinstance(model.library, ObservedLibrary) or is_conditional(model):
        return torch.zeros_like(x[:, 0])
    total = x.sum(-1)
    implied: Tensor = dist.Poisson(total.clamp(min=1)).log_prob(total)
    return model.library.log_prob_of_total(x, gamma) - implied


def warn_if_conditional(model: SCVI) -> bool:
    """Say that evidence is conditional, if it is; returns whether."""
    conditional = is_conditional(model)
    if conditional:
        warn(
            "with an ObservedLibrary this is the evidence of the counts given their total (only ps.SCVI with "
            "Poisson counts includes the probability of the total). Compare it with models of the same kind only, "
            "or fit with LatentLibrary"
        )
    return conditional
