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
from pyro_scvi.utils.precision import in_float64, put_back

__all__ = ["LatentLibrary", "NoLibrary", "ObservedLibrary", "SizeFactor"]


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
    def start_from(self, totals: Tensor, gamma: Any) -> None:
        """Set what the user did not give, from the totals (cells,) and covariates of the training cells.

        ``gamma[:, columns]`` is an array (cells, columns), float32.
        """

    def depth(self, total: Tensor, gamma: Tensor) -> Tensor:
        """What counts of cells are divided by to be compared, (cells, 1): the total, also where l is a latent."""
        return total.clamp(min=1)

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

    def start_from(self, totals: Tensor, gamma: Any) -> None:
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

    def start_from(self, totals: Tensor, gamma: Any) -> None:
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
    r"""A latent size per cell, site ``l``, distributed over the genes.

    See Lopez et al. (2018), Methods.

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
        inner, outer = (torch.special.log_ndtr(in_float64(at)) for at in (high, low))
        inside: Tensor = inner + torch.log1p(-(outer - inner).exp())
        # Bins of large totals are so narrow that the density in the middle is exact enough, and the difference is not.
        dense = in_float64(law.log_prob(total.clamp(min=1)))
        return put_back(torch.where(in_float64(total) > 1000, dense, inside), x).squeeze(-1)


class SizeFactor(Library):
    r"""A known size factor of each cell, such as that of DESeq2 or scran, which scales the means.

    .. math:: \log \mu_{ng} = \log s_n - loc + \eta_{ng}

    with s the size factor and eta the decoder's head. The means are not shares: the total of a cell is a part of what
    the model explains, and evidence is given the size factors. ``loc`` is the mean of log s over the training cells,
    so that the unit of s does not matter; it is a constant, not trained.

    Parameters
    ----------
    columns
        Where log s is in gamma: ``cells.columns["size_factor"]`` of cells read with ``size_factor="size_factor"``. The
        decoder leaves this column out.

    Raises
    ------
    ModelError
        If ``columns`` is no slice of one column.

    Examples
    --------
    >>> sized = adata.copy()
    >>> sized.obs["size_factor"] = np.asarray(sized.X.sum(1)) / 100
    >>> known = ps.Cells.from_anndata(sized, size_factor="size_factor")
    >>> library = ps.libraries.SizeFactor(known.columns["size_factor"])
    >>> made = ps.fit(ps.SCVI(20, 2, known.n_covariates, library=library), known, epochs=1, progress=False)
    >>> made.model.decoder.layers.linear[0].in_features  # z alone
    2
    """

    latent = False
    loc: Tensor

    def __init__(self, columns: slice) -> None:
        super().__init__()
        if not isinstance(columns, slice) or columns.start is None or columns.stop != columns.start + 1:
            raise ModelError(
                f'columns must be the slice of one column of gamma, as cells.columns["size_factor"], got {columns!r}'
            )
        self.columns = columns
        self.register_buffer("loc", torch.zeros(()))

    def forward(self, x: Tensor | None, gamma: Tensor) -> Tensor | None:
        """Log size factor of every cell less its mean over the training cells, (cells, 1)."""
        if gamma.shape[-1] < self.columns.stop:
            raise ModelError(
                f"SizeFactor reads column {self.columns.start} of gamma, which has {gamma.shape[-1]} columns: read the "
                "cells with size_factor="
            )
        return gamma[..., self.columns] - self.loc

    def log_mean(self, eta: Tensor, log_library: Any) -> Tensor:
        """Log mean count: the head and the log size factor, (..., cells, genes)."""
        mean: Tensor = eta + log_library
        return mean

    def depth(self, total: Tensor, gamma: Tensor) -> Tensor:
        """The size factor of every cell, (cells, 1), whatever its total."""
        return (gamma[..., self.columns] - self.loc).exp()

    def start_from(self, totals: Tensor, gamma: Any) -> None:
        """Take loc from the training cells."""
        self.loc.copy_(torch.as_tensor(gamma[:, self.columns]).mean())


def _numbers(value: Any, name: str) -> Tensor:
    try:
        values = torch.as_tensor(value).float().reshape(-1)
    except (TypeError, ValueError, RuntimeError) as error:  # what torch raises for strings, objects and ragged lists
        raise ModelError(f"{name} must be a number, or a list with one for each batch; got {brief(value)}") from error
    if not len(values) or not bool(values.isfinite().all()):
        raise ModelError(f"{name} must hold finite numbers, one or one for each batch; got {values.tolist()}")
    return values
