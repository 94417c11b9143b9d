"""Library size: how many molecules of a cell were sequenced, and how this scales the mean counts."""

import math
from abc import ABC, abstractmethod
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.utils.checks import brief

__all__ = ["LatentLibrary", "NoLibrary", "ObservedLibrary"]


def __dir__() -> list[str]:
    return __all__


class Library(Component, ABC):
    """How a cell's depth enters the mean of its counts; if ``latent``, it is a site ``l`` of the model."""

    latent: bool

    @abstractmethod
    def forward(self, x: Tensor | None, gamma: Tensor) -> Tensor | None:
        """Log library size of every cell (..., cells, 1), or None if there is none."""

    @abstractmethod
    def log_mean(self, eta: Tensor, log_library: Tensor | None) -> Tensor:
        """Log mean count (..., cells, genes) from the decoder's head and the log library size."""

    @abstractmethod
    def start_from(self, totals: Tensor, gamma: Tensor) -> None:
        """Set what the user did not give, from the totals (cells,) of the training cells."""

    def log_prob_of_total(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Zero, (cells,): the total is part of what the model explains."""
        return torch.zeros_like(x[:, 0])


class NoLibrary(Library):
    r"""No library size: z must capture depth (Lopez et al. 2017, Sec. 1).

    .. math:: \log \mu_{ng} = \eta_{ng}

    with eta the decoder's head, mu in counts.

    Examples
    --------
    >>> [site.name for site in ps.SCVI(20, 2, library=ps.libraries.NoLibrary()).sites(marginal=True)]
    ['z', 'x']
    """

    latent = False

    def __init__(self) -> None:
        super().__init__()

    def forward(self, x: Tensor | None, gamma: Tensor) -> Tensor | None:
        """No library size."""
        return None

    def log_mean(self, eta: Tensor, log_library: Tensor | None) -> Tensor:
        """Log mean count: the head itself, (..., cells, genes)."""
        return eta

    def start_from(self, totals: Tensor, gamma: Tensor) -> None:
        """Nothing to take from the data."""


class LogNormalLibrary(Library):
    """A size per cell, distributed over the genes; its LogNormal is one for all cells or one for each batch."""

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        loc: float | list[float] | None = None,
        scale: float | list[float] | None = None,
    ) -> None:
        super().__init__()
        self.loc_given, self.scale_given = loc is not None, scale is not None
        given = math.log(1000.0) if loc is None else loc, 1.0 if scale is None else scale
        locs, scales = _numbers(given[0], "loc"), _numbers(given[1], "scale")
        if len({len(locs), len(scales)} - {1}) > 1:
            raise ModelError(f"loc and scale must have one entry per batch each, got {len(locs)} and {len(scales)}")
        if not bool((scales > 0).all()):
            raise ModelError(f"scale must be above 0, the sd of log l; got {scales.tolist()}")
        locs, scales = torch.broadcast_tensors(locs, scales)
        self.register_buffer("loc", locs.clone())
        self.register_buffer("scale", scales.clone())

    def log_mean(self, eta: Tensor, log_library: Any) -> Tensor:
        """Log mean count: the library size distributed over the genes, (..., cells, genes)."""
        return log_library + torch.log_softmax(eta, -1)

    def start_from(self, totals: Tensor, gamma: Tensor) -> None:
        """Take loc and scale from the totals (cells,) of the training cells, unless they were given."""
        log_totals = totals.clamp(min=1).log()
        if not self.loc_given:
            self.loc.copy_(log_totals.mean())
        if not self.scale_given:
            self.scale.copy_(log_totals.std(correction=0).clamp(min=0.05))  # proper where all totals are equal

    def law(self, gamma: Tensor) -> dist.LogNormal:
        """The distribution of every cell's size, (cells, 1)."""
        if len(self.loc) == 1:
            ones = self.loc.new_ones(len(gamma), 1)
            return dist.LogNormal(self.loc * ones, self.scale * ones)
        batch = gamma[:, : len(self.loc)]  # one-hot
        return dist.LogNormal((batch @ self.loc)[:, None], (batch @ self.scale)[:, None])


class LatentLibrary(LogNormalLibrary):
    r"""A latent size per cell, site ``l``, distributed over the genes (Lopez et al. 2018, Methods).

    .. math:: l_n \sim LogNormal(loc_b, scale_b^2), \qquad \mu_{ng} = l_n\, softmax(\eta_n)_g

    for the batch b of the cell and the decoder's head eta; l and mu in counts. ``loc`` and ``scale`` are constants, not
    trained.

    Parameters
    ----------
    loc, scale
        Mean and standard deviation of log l, natural logarithm: numbers, one per batch, or None. None means log 1000
        and 1; ``fit`` replaces these by those of the training cells' log totals, unless ``data_start=False``.

    Raises
    ------
    ModelError
        If ``loc`` and ``scale`` are for different numbers of batches, or no finite numbers, or ``scale`` not above 0.

    Examples
    --------
    >>> [site.name for site in ps.SCVI(20, 2, library=ps.libraries.LatentLibrary()).sites(marginal=True)]
    ['z', 'l', 'x']
    """

    latent = True

    def forward(self, x: Tensor | None, gamma: Tensor) -> Tensor | None:
        """Sample l at every cell; log l (..., cells, 1)."""
        return pyro.sample("l", self.law(gamma)).log()


class ObservedLibrary(LogNormalLibrary):
    r"""The cell's total count as its size: the model is conditional on the total.

    .. math:: l_n = \max(1, \textstyle\sum_g x_{ng}), \qquad \mu_{ng} = l_n\, softmax(\eta_n)_g

    If x is not observed, l is drawn from LogNormal(loc, scale^2). For Poisson counts, evidence is that of the counts
    given their total, which are multinomial, and of the total under the same distribution. For other counts it is
    conditional on the total, and ``compare`` refuses it beside models that are not.

    Parameters
    ----------
    loc, scale
        Mean and standard deviation of log l, natural logarithm: numbers, one per batch, or None. None means log 1000
        and 1; ``fit`` replaces these by those of the training cells' log totals, unless ``data_start=False``.

    Raises
    ------
    ModelError
        If ``loc`` and ``scale`` are for different numbers of batches, or no finite numbers, or ``scale`` not above 0.

    Examples
    --------
    >>> [site.name for site in ps.SCVI(20, 2, library=ps.libraries.ObservedLibrary()).sites(marginal=True)]
    ['z', 'x']
    """

    latent = False

    def forward(self, x: Tensor | None, gamma: Tensor) -> Tensor | None:
        """Log total count of every cell, (cells, 1)."""
        if x is None:
            return self.law(gamma).sample().log()
        return x.sum(-1, keepdim=True).clamp(min=1).log()

    def log_prob_of_total(self, x: Tensor, gamma: Tensor) -> Tensor:
        """Log probability of the cells' totals (cells,): that of a size that rounds to it."""
        law, total = self.law(gamma), x.sum(-1, keepdim=True)
        upper, lower = ((at.log() - law.loc) / law.scale for at in (total + 0.5, (total - 0.5).clamp(min=0)))
        # From the side on which both are small, or their difference would be lost.
        low, high = (torch.where(upper + lower > 0, *pair) for pair in ((-upper, lower), (-lower, upper)))
        inner, outer = (torch.special.log_ndtr(at.double()) for at in (high, low))
        inside: Tensor = inner + torch.log1p(-(outer - inner).exp())
        # Bins of large totals are so narrow that the density in the middle is exact enough, and the difference is not.
        dense = law.log_prob(total.clamp(min=1)).double()
        return torch.where(total > 1000, dense, inside).to(x.dtype).squeeze(-1)


def _numbers(value: Any, name: str) -> Tensor:
    try:
        values = torch.as_tensor(value).float().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for strings, objects and ragged lists
        raise ModelError(f"{name} must be a number, or a list with one for each batch; got {brief(value)}") from error
    if not len(values) or not bool(values.isfinite().all()):
        raise ModelError(f"{name} must hold finite numbers, one or one for each batch; got {values.tolist()}")
    return values
