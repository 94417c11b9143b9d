"""Base class of priors p(z), and the check that a prior is proper."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_at_least
from pyro_scvi.utils.random_state import seeded


class Prior(Component):
    """A prior on ``n_latent`` latents; if ``learned``, its own shape is fitted to the data."""

    learned = False
    zeros: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        require_at_least(1, n_latent=n_latent)
        self.n_latent = n_latent
        self.register_buffer("zeros", torch.zeros(n_latent), persistent=False)  # carries device and dtype

    def forward(self) -> Distribution:
        """The distribution of z, event shape (latents,)."""
        raise NotImplementedError


def require_proper(prior: Callable[[], Distribution], what: str) -> None:
    """Refuse a prior whose density does not integrate to one; ``what`` completes the message.

    Raises
    ------
    ModelError
        For ``Flat``, and for any distribution that is improper or masked.
    """
    with seeded(0), pyro.get_param_store().scope(), pyro.poutine.block():
        distribution: Any = prior()
    improper = dist.ImproperUniform | dist.MaskedDistribution
    while not isinstance(distribution, improper) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    if isinstance(distribution, improper):
        name = getattr(prior, "__name__", type(prior).__name__)
        raise ModelError(f"the prior {name} has no density: {what}; fit with a proper prior")
