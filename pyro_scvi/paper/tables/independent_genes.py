"""The lowest baseline of held-out likelihood: genes independent of each other and of the cell."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import gammaln
from torch import Tensor

from pyro_scvi.baselines.inputs import dense_counts
from pyro_scvi.distributions.nb_log_prob import log_negative_binomial
from pyro_scvi.utils.checks import require_found

MOST = 12.0  # log of the inverse dispersion above which counts are Poisson's


class IndependentGenes:
    r"""Each gene's counts are negative binomial by themselves, :math:`x_{ng} \sim NB(\mu_g, r_g)`.

    Attributes
    ----------
    log_mean_, log_r_
        (genes,).
    """

    log_mean_: Tensor
    log_r_: Tensor

    def fit(self, counts: Any) -> IndependentGenes:
        """Maximum likelihood for raw counts (cells, genes): mu is the mean, whatever r; r is searched for.

        Raises
        ------
        DataError
            If a gene has no count: its mean would be 0, any other count impossible.
        FitError
            If the search for a dispersion fails.
        """
        x = dense_counts(counts, unseen_genes=False)
        self.log_mean_ = torch.from_numpy(np.log(x.mean(0)))
        self.log_r_ = torch.tensor([_log_r(gene, mean) for gene, mean in zip(x.T, x.mean(0), strict=True)])
        return self

    def score_samples(self, counts: Any) -> np.ndarray:
        """Log p(x), (cells,), nats per cell."""
        x = torch.from_numpy(dense_counts(counts, n_genes=len(self.log_mean_)))
        return log_negative_binomial(x, self.log_mean_, self.log_r_.double()).sum(-1).numpy()


def _log_r(gene: np.ndarray, mean: float) -> float:
    values, cells = np.unique(gene, return_counts=True)

    def loss(log_r: float) -> float:
        r = np.exp(log_r)
        log_p = gammaln(values + r) - gammaln(r) - (values + r) * np.log1p(mean / r) - values * log_r
        return -float(log_p @ cells)

    found = minimize_scalar(loss, bounds=(-MOST, MOST), method="bounded")
    require_found(found, "the dispersion of a gene by itself")
    return float(found.x)
