"""Inverse dispersions: one per cell and gene, per gene, or per gene and batch."""

import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Theta
from pyro_scvi.utils.checks import require_at_least


class PerCellAndGene(Component):
    r"""Inverse dispersion as one more head of the decoder (Lopez et al. 2017, Sec. 1).

    .. math:: r_{ng} = \exp(\eta^r_{ng}), \quad \eta^r_n = f_w(z_n, \gamma_n)

    (samples, cells, genes); counts have the variance mu + mu^2 / r.

    Examples
    --------
    >>> ps.likelihoods.NB(ps.likelihoods.PerCellAndGene()).heads
    ('log_mean', 'log_inverse_dispersion')
    """

    heads = ("log_inverse_dispersion",)

    def __init__(self) -> None:
        super().__init__()

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return eta["log_inverse_dispersion"]


class PerGene(Component):
    """One inverse dispersion per gene, a parameter (genes,).

    .. math:: r_{ng} = r_g

    starting at 1.

    Parameters
    ----------
    n_genes
        As in the model, which refuses another number.

    Raises
    ------
    ModelError
        If n_genes is no integer of 1 or more.

    Examples
    --------
    >>> likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(20))
    >>> likelihood.heads, [tuple(parameter.shape) for parameter in likelihood.parameters()]
    (('log_mean',), [(20,)])
    """

    heads = ()

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        require_at_least(1, n_genes=n_genes)
        self.expected_genes = n_genes
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (genes,)."""
        return self.log_inverse_dispersion


class PerGeneAndBatch(Component):
    r"""One inverse dispersion per gene and batch, parameters (batches, genes).

    .. math:: \log r_{ng} = \sum_b \gamma_{nb} \log r_{bg}

    over the first ``n_batches`` columns of gamma, which are the one-hot batch.

    Parameters
    ----------
    n_genes, n_batches
        As in the model, which refuses another number, and ``cells.n_batches``.

    Raises
    ------
    ModelError
        If a number is no integer of 1 or more. When called, if gamma has fewer columns than there are batches.

    Examples
    --------
    >>> likelihood = ps.likelihoods.NB(ps.likelihoods.PerGeneAndBatch(20, n_batches=2))
    >>> ps.SCVI(20, 2, n_covariates=2, likelihood=likelihood).likelihood
    NB(dispersion=PerGeneAndBatch(n_genes=20, n_batches=2))
    """

    heads = ()

    def __init__(self, n_genes: int, n_batches: int) -> None:
        super().__init__()
        require_at_least(1, n_genes=n_genes, n_batches=n_batches)
        self.expected_genes, self.n_batches = n_genes, n_batches
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_batches, n_genes))

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (cells, genes)."""
        if gamma.shape[-1] < self.n_batches:
            raise ModelError(
                f"PerGeneAndBatch expects {self.n_batches} batch columns in gamma, got {gamma.shape[-1]} columns; "
                "make the Cells with batch="
            )
        return gamma[..., : self.n_batches] @ self.log_inverse_dispersion


Dispersion = PerCellAndGene | PerGene | PerGeneAndBatch
