"""Factor analysis of log1p counts: the paper's linear Gaussian baseline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn import decomposition
from sklearn.base import BaseEstimator, TransformerMixin
from torch import Tensor

from pyro_scvi.baselines.evidence import Evidence, integrate
from pyro_scvi.baselines.inputs import (
    dense_counts,
    remember_genes,
    require_fitted,
    require_latents,
    require_varying_genes,
)
from pyro_scvi.baselines.unit_bins import VARIANCE, UnitBins, standard_normal_log_prob
from pyro_scvi.types import LogJoint


class FactorAnalysis(TransformerMixin, BaseEstimator):
    r"""Factor analysis of y = log(1 + x), by scikit-learn.

    .. math:: z_n \sim N(0, I), \quad y_n | z_n \sim N(A z_n + \mu, diag(\sigma^2))

    Parameters
    ----------
    n_latent
        Number of factors.
    tol, max_iter
        When to stop: smallest gain of the log likelihood, nats over all cells, and most iterations of EM.
    seed
        Of the randomised singular value decomposition inside EM.

    Attributes
    ----------
    model_
        The fitted :class:`sklearn.decomposition.FactorAnalysis` of log1p counts.

    References
    ----------
    Lopez et al. 2017, Sec. 4 (FA).

    Examples
    --------
    >>> system = ps.baselines.FactorAnalysis(2).fit(counts)
    >>> system.transform(counts).shape, system.score_samples(counts).shape
    ((60, 2), (60,))
    """

    def __init__(self, n_latent: int = 10, *, tol: float = 1e-2, max_iter: int = 1000, seed: int = 0) -> None:
        self.n_latent = n_latent
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed

    def fit(self, counts: Any, y: None = None) -> FactorAnalysis:
        """Fit to raw counts (cells, genes); ``y`` is ignored.

        Raises
        ------
        DataError
            If a count is negative or not finite, or a gene has the same value in all cells, which makes its density
            unbounded.
        ModelError
            If there are more latents than genes or cells.
        """
        x = dense_counts(counts, unseen_genes=False)
        require_varying_genes(x)
        require_latents(self.n_latent, x)
        model = decomposition.FactorAnalysis(
            self.n_latent, tol=self.tol, max_iter=self.max_iter, random_state=self.seed
        )
        self.model_ = model.fit(np.log1p(x))
        remember_genes(self, counts)
        return self

    def transform(self, counts: Any) -> np.ndarray:
        """E[z | x], (cells, latents).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        y = self._log1p(counts)
        return self.model_.transform(y)

    def score_samples(self, counts: Any) -> np.ndarray:
        r"""Log density of the counts, (cells,), nats per cell.

        .. math:: \log p(x_n) = \log N(y_n; \mu, A A^T + diag(\sigma^2)) - \sum_g \log(1 + x_{ng})

        The last term is the Jacobian of log1p, so this is a density of counts, with respect to dx.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        y = self._log1p(counts)
        # The Jacobian of log1p turns a density of y into one of counts.
        return self.model_.score_samples(y) - y.sum(1)

    def evidence(self, counts: Any, *, samples: int = 1000, seed: int = 0) -> Evidence:
        r"""Log probability of the counts, nats per cell, z integrated out by ``samples`` draws of importance sampling.

        .. math:: \log \int N(z; 0, I) \prod_g P\big(y_g \in [\log(x_g + \tfrac12), \log(x_g + \tfrac32)] | z\big) dz

        The bin of a zero is everything below log(3/2). This is a probability of counts, whereas :meth:`score_samples`
        is a density. The sampler starts from the normal posterior of z given y, with the bins' width added to the
        noise, because a nearly constant gene has almost none of its own.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        require_fitted(self, "model_")
        x = torch.from_numpy(dense_counts(counts, n_genes=self.model_.n_features_in_, fitted=self))
        fitted = self.model_.mean_, self.model_.components_, self.model_.noise_variance_
        mean, loadings, noise = map(torch.as_tensor, fitted)
        loc, scale = gaussian_posterior(x.log1p() - mean, loadings, noise + VARIANCE)
        return integrate(
            lambda rows: binned_log_joint(x[rows], mean, loadings, noise), loc, scale, samples=samples, seed=seed
        )

    def _log1p(self, counts: Any) -> np.ndarray:
        require_fitted(self, "model_")
        return np.log1p(dense_counts(counts, n_genes=self.model_.n_features_in_, fitted=self))


def gaussian_posterior(residual: Tensor, loadings: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviations (cells, latents) of z given y.

    .. math:: V = (I + W \Psi^{-1} W^T)^{-1}, \qquad E[z \mid y] = V W \Psi^{-1} (y - m)

    Parameters
    ----------
    residual
        y - m, (cells, genes).
    loadings
        W, (latents, genes).
    noise
        The diagonal of Psi, (genes,).
    """
    weighted = loadings / noise
    precision = torch.eye(len(loadings), dtype=loadings.dtype) + weighted @ loadings.T
    covariance = torch.linalg.inv(precision)
    loc = residual @ weighted.T @ covariance
    return loc, covariance.diagonal().sqrt().expand_as(loc)


def binned_log_joint(x: Tensor, mean: Tensor, loadings: Tensor, noise: Tensor) -> LogJoint:
    """Make the function z (samples, cells, latents) -> log N(z; 0, I) + sum over genes of log P(bin of x | z).

    ``x`` is (cells, genes), ``mean`` and ``noise`` (genes,), ``loadings`` (latents, genes).
    """
    bins, sd = UnitBins.of(x), noise.sqrt()

    def log_joint(z: Tensor) -> Tensor:
        centre = mean + z @ loadings  # (samples, cells, genes)
        return standard_normal_log_prob(z) + bins.log_probability(centre, sd).sum(-1)

    return log_joint
