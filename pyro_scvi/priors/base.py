"""Base class of priors p(z), how a prior is called, and the check that it is proper."""

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import brief, require_at_least


class Prior(Component):
    """A prior on ``n_latent`` latents; if ``learned``, its own shape is fitted to the data.

    A prior whose ``forward`` takes an argument is given gamma (cells, 1, covariates), and its distribution has batch
    shape (cells, 1). ``columns`` are those columns of gamma that the decoder leaves to it.
    """

    learned = False
    columns: slice | None = None
    zeros: Tensor
    ones: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        require_at_least(1, n_latent=n_latent)
        self.n_latent = n_latent
        # They carry device and dtype. A plain number in a distribution is copied to the device in every step.
        self.register_buffer("zeros", torch.zeros(n_latent), persistent=False)
        self.register_buffer("ones", torch.ones(n_latent), persistent=False)

    def forward(self, *args: Any, **kwargs: Any) -> Distribution:
        """The distribution of z, event shape (latents,)."""
        raise NotImplementedError


class ConditionalPrior(Prior):
    """A prior that depends on some ``columns`` of gamma."""

    columns: slice

    def __init__(self, n_latent: int, columns: slice) -> None:
        super().__init__(n_latent)
        require_columns(columns, "columns")
        self.columns = columns

    @property
    def n_columns(self) -> int:
        """Number of these columns."""
        return int(self.columns.stop - self.columns.start)


def require_columns(columns: Any, what: str, n_covariates: int | None = None) -> None:
    """Refuse what is no slice of columns of gamma, such as ``cells.columns["donor"]``.

    Raises
    ------
    ModelError
        If it is none, or ends beyond the ``n_covariates`` columns that there are.
    """
    start, stop = (columns.start, columns.stop) if isinstance(columns, slice) and columns.step is None else (0, 0)
    if not (type(start) is int and type(stop) is int and 0 <= start < stop):
        raise ModelError(f'{what} must be columns of gamma, as cells.columns["donor"] gives them, got {brief(columns)}')
    if n_covariates is not None and stop > n_covariates:
        raise ModelError(
            f"{what} are columns {start} to {stop - 1} of gamma, of which the model has {n_covariates}: make "
            "it with n_covariates=cells.n_covariates"
        )


def require_prior(prior: Any, n_latent: int) -> None:
    """Refuse what cannot be called for a distribution of z.

    Raises
    ------
    ModelError
        If it is a class, not callable, or a distribution itself: to call that would draw from it.
    """
    if isinstance(prior, type) or not callable(prior):
        raise ModelError(f"prior must be an object such as ps.priors.StudentT({n_latent}), got {brief(prior)}")
    if isinstance(prior, TorchDistributionMixin):
        name = type(prior).__name__
        raise ModelError(
            f"prior must be a function or object that returns a distribution, got the distribution {name} itself; "
            f"pass lambda: {name}(...)"
        )


def takes_gamma(prior: Callable[..., Distribution]) -> bool:
    """Whether a prior is to be called with gamma: if it needs an argument, or has one of that name.

    Raises
    ------
    ModelError
        If it needs more than one argument.
    """
    try:
        signature = inspect.signature(prior.forward if isinstance(prior, nn.Module) else prior)
    except ValueError:  # of what is compiled
        return False
    given = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    needed = [p.name for p in given if p.default is p.empty]
    if len(needed) > 1 or any(p.kind is p.KEYWORD_ONLY for p in given if p.default is p.empty):
        raise ModelError(f"a prior takes no argument, or gamma (cells, 1, covariates) alone; this one needs {needed}")
    return bool(needed) or any(p.name == "gamma" and p.kind is not p.KEYWORD_ONLY for p in given[:1])


def law_of(prior: Callable[..., Distribution], gamma: Tensor) -> Distribution:
    """The distribution of z for cells with covariates gamma (cells, covariates)."""
    return prior(gamma[..., None, :]) if takes_gamma(prior) else prior()


class HasPrior(Protocol):
    """A model with a prior of z."""

    prior: Any

    def example_law(self) -> Distribution:
        """Some distribution of z that the prior returns."""
        ...


def has_density(model: HasPrior) -> bool:
    """Whether the model's prior of z integrates to one."""
    return not _is_improper(model.example_law())


def require_proper(model: HasPrior, what: str) -> None:
    """Refuse a model whose prior's density does not integrate to one; ``what`` completes the message.

    Raises
    ------
    ModelError
        For ``Flat``, and for any distribution that is improper or masked.
    """
    if not has_density(model):
        name = getattr(model.prior, "__name__", type(model.prior).__name__)
        raise ModelError(f"the prior {name} has no density: {what}; fit with a proper prior")


def _is_improper(distribution: Any) -> bool:
    """Whether a distribution, or what it wraps, is improper or masked."""
    improper = dist.ImproperUniform | dist.MaskedDistribution
    while not isinstance(distribution, improper) and hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return isinstance(distribution, improper)
