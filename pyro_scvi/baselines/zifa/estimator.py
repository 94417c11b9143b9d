"""The estimator ZIFA (Pierson and Yau 2015), in its exact form with K dimensions per cell."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import reduce
from typing import Any

import numpy as np
import torch
from scipy.optimize import least_squares
from sklearn import decomposition
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyro_scvi.baselines.evidence import Evidence, integrate
from pyro_scvi.baselines.inputs import (
    dense_counts,
    remember_genes,
    require_fitted,
    require_latents,
    require_varying_genes,
)
from pyro_scvi.baselines.unit_bins import VARIANCE
from pyro_scvi.baselines.zifa import model
from pyro_scvi.baselines.zifa.em import LEAST_VARIANCE, Seen, Sums, maximised
from pyro_scvi.baselines.zifa.model import Parameters, Posterior, posterior
from pyro_scvi.errors import DataError
from pyro_scvi.utils.checks import require_at_least, require_found

Quantity = Callable[[Tensor, Parameters, Posterior], Tensor]


class ZIFA(TransformerMixin, BaseEstimator):
    r"""Factor analysis of log counts, where small counts are more likely to be lost.

    .. math::

        z_n \sim N(0, I), \quad u_n | z_n \sim N(A z_n + \mu, diag(\sigma^2)), \quad
        \log(1 + x_{nj}) = 0 \text{ with probability } e^{-\lambda u_{nj}^2}, \text{ else } u_{nj}

    Fitted by EM in float64; the mathematics is in ``model`` and ``em`` beside this file. Memory holds the dense counts
    twice, the latents' second moments of one minibatch, and genes x latents^2 numbers.

    Parameters
    ----------
    n_latent
        Dimensions of z.
    tol, max_iter
        Stop when the mean relative change of each of A, mu, sigma and lambda is below ``tol``, or after ``max_iter``
        iterations. The defaults are the authors' and stop early: on the paper's cortex cells after 6 iterations,
        whereas ``tol=1e-4`` takes 91.
    seed
        Of the factor analysis that EM starts from.
    batch_size
        Cells processed together.
    device
        A torch device that has float64.

    Attributes
    ----------
    loadings_, mean_, scale_, decay_
        A (genes, latents), mu (genes,), sigma (genes,), lambda.
    log_likelihoods_
        (iterations,): exact log likelihood before each iteration, nats per cell. It never falls.
    n_iter_
        Iterations of EM.

    References
    ----------
    Pierson and Yau 2015, "ZIFA", Genome Biology 16:241; Lopez et al. 2017, Sec. 4.

    Examples
    --------
    >>> system = ps.baselines.ZIFA(2, max_iter=5).fit(counts)
    >>> system.transform(counts).shape, system.score_samples(counts).shape
    ((60, 2), (60,))
    """

    def __init__(
        self,
        n_latent: int = 10,
        *,
        tol: float = 1e-2,
        max_iter: int = 100,
        seed: int = 0,
        batch_size: int = 512,
        device: str | torch.device = "cpu",
    ) -> None:
        self.n_latent = n_latent
        self.tol = tol
        self.max_iter = max_iter
        self.seed = seed
        self.batch_size = batch_size
        self.device = device

    def fit(self, counts: Any, y: None = None) -> ZIFA:
        """Fit to raw counts (cells, genes); warns if EM has not met ``tol``. ``y`` is ignored.

        Raises
        ------
        DataError
            If a count is negative or not finite, no count is zero, or a gene has one value in all cells.
        ModelError
            If there are more latents than genes or cells, or a setting is out of range.
        FitError
            If the search for the decay that EM starts from fails.
        """
        require_at_least(1, max_iter=self.max_iter, batch_size=self.batch_size)
        logs = np.log1p(dense_counts(counts, unseen_genes=False))
        require_varying_genes(logs)
        require_latents(self.n_latent, logs)
        if logs.all():
            raise DataError("no count is zero, so nothing shows which counts are lost. Take FactorAnalysis instead")
        self._keep(self._maximise(torch.as_tensor(logs, device=self.device), self._start(logs)))
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
        return self._computed(counts, lambda y, parameters, latents: latents.mean)

    def score_samples(self, counts: Any) -> np.ndarray:
        r"""Exact log marginal of the counts, (cells,), nats per cell.

        .. math:: \log p(x_n) = \log \int p(y_n | z) p(z) dz - \sum_j \log(1 + x_{nj})

        This is a probability at x = 0 and a density with respect to dx elsewhere (the last sum is the Jacobian of
        log1p). It can be compared with a density, such as that of factor analysis, only if a zero is read as a bin of
        width 1.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """

        def log_marginal(y: Tensor, parameters: Parameters, latents: Posterior) -> Tensor:
            return model.log_marginal(y, parameters, latents) + model.log_kept(y, parameters.decay) - y.sum(1)

        return self._computed(counts, log_marginal)

    def evidence(self, counts: Any, *, samples: int = 1000, seed: int = 0) -> Evidence:
        """Log probability of the counts, nats per cell, z integrated out by ``samples`` draws of importance sampling.

        This is a probability of counts, whereas :meth:`score_samples` is a density above 0. A count that is kept falls
        into its unit bin, a zero into everything below 1/2 (:func:`~pyro_scvi.baselines.zifa.model.binned_log_joint`).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        x = self._counts(counts).to(self.device)
        law = self._law(x.dtype)
        wide = law._replace(scale=(law.scale.square() + VARIANCE).sqrt())  # bins are wide
        proposal = posterior(x.log1p(), wide)
        scale = proposal.covariance.diagonal(dim1=1, dim2=2).sqrt()
        return integrate(
            lambda rows: model.binned_log_joint(x[rows], law), proposal.mean, scale, samples=samples, seed=seed
        )

    def expected_complete_log_likelihood(self, counts: Any) -> np.ndarray:
        r"""The paper's score of ZIFA, (cells,), nats per cell: no likelihood, and below the exact marginal.

        .. math:: E_{p(z, u | y_n)}[\log p(z) + \log p(u | z) + \log p(y_n | u)] - \sum_j \log(1 + x_{nj})

        It lacks the entropy of z and u given y, yet Lopez et al. 2017, Table 1, compare it with likelihoods.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        return self._computed(counts, lambda *of: model.expected_complete(*of) - of[0].sum(1))

    def impute(self, counts: Any) -> np.ndarray:
        """exp(E[u | x]) - 1 where x = 0, else x: (cells, genes), counts.

        u is normal, so values slightly below 0 occur.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """
        return self._computed(counts, lambda *of: torch.expm1(model.log_counts(*of)[0]))

    def technical_zero_probability(self, counts: Any) -> np.ndarray:
        """exp(-lambda E[u | x]^2) where x = 0, else 0: (cells, genes).

        This is the probability of losing a count of the imputed size. Given x = 0 the loss itself is certain: ZIFA has
        no other zeros.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, or the genes are not those of the fit.
        """

        def lost(y: Tensor, parameters: Parameters, latents: Posterior) -> Tensor:
            u, _ = model.log_counts(y, parameters, latents)
            return torch.where(y == 0, torch.exp(-parameters.decay * u.square()), 0.0)

        return self._computed(counts, lost)

    def _start(self, y: np.ndarray) -> Parameters:
        """Factor analysis of y, and the lambda whose loss curve fits the fractions of zeros best."""
        factors = decomposition.FactorAnalysis(self.n_latent, random_state=self.seed).fit(y)
        scale = np.sqrt(factors.noise_variance_.clip(min=LEAST_VARIANCE))
        start = (factors.components_.T, y.mean(0), scale, _decay_of_zeros(y))
        return Parameters(*(torch.as_tensor(value, dtype=torch.float64, device=self.device) for value in start))

    def _maximise(self, y: Tensor, parameters: Parameters) -> Parameters:
        seen, self.log_likelihoods_ = Seen.of(y), np.empty(0)
        for _ in range(self.max_iter):
            sums, log_likelihood = self._summed(y, parameters)
            log_likelihood += seen.log_kept(float(parameters.decay)) - float(seen.y.sum())
            self.log_likelihoods_ = np.append(self.log_likelihoods_, log_likelihood / len(y))
            old, parameters = parameters, maximised(sums, seen, parameters)
            if relative_change(old, parameters) < self.tol:
                return parameters
        warnings.warn(
            f"EM stopped after {self.max_iter} iterations with a relative change above tol={self.tol}; raise max_iter",
            ConvergenceWarning,
            stacklevel=3,
        )
        return parameters

    def _summed(self, y: Tensor, parameters: Parameters) -> tuple[Sums, float]:
        """Sums of the posterior over all cells, and the log likelihood without log_kept and Jacobian, nats."""

        def of(part: Tensor) -> tuple[Sums, float]:
            latents = posterior(part, parameters)
            return Sums.of(part, latents), float(model.log_marginal(part, parameters, latents).sum())

        return reduce(lambda a, b: (a[0] + b[0], a[1] + b[1]), map(of, y.split(self.batch_size)))

    def _keep(self, parameters: Parameters) -> None:
        self.loadings_, self.mean_, self.scale_ = (value.cpu().numpy() for value in parameters[:3])
        self.decay_ = float(parameters.decay)
        self.n_iter_ = len(self.log_likelihoods_)

    def _computed(self, counts: Any, quantity: Quantity) -> np.ndarray:
        """Apply a function to all cells, minibatch by minibatch."""
        y = self._counts(counts).log1p()
        return np.concatenate([part.cpu().numpy() for part in self._by_minibatch(y, self._law(y.dtype), quantity)])

    def _counts(self, counts: Any) -> Tensor:
        require_fitted(self, "loadings_")
        return torch.from_numpy(dense_counts(counts, n_genes=len(self.loadings_), fitted=self))

    def _law(self, dtype: torch.dtype) -> Parameters:
        fitted = (self.loadings_, self.mean_, self.scale_, self.decay_)
        return Parameters(*(torch.as_tensor(value, dtype=dtype, device=self.device) for value in fitted))

    def _by_minibatch(self, y: Tensor, parameters: Parameters, quantity: Quantity) -> Iterator[Tensor]:
        for part in y.split(self.batch_size):
            part = part.to(self.device)
            yield quantity(part, parameters, posterior(part, parameters))


def _decay_of_zeros(y: np.ndarray) -> float:
    """The lambda that brings exp(-lambda m^2) closest to each gene's fraction of zeros, m its mean where y > 0."""
    zeros = (y == 0).mean(0)
    mean_square = (y.sum(0) / (y > 0).sum(0)) ** 2

    def misfit(log_decay: np.ndarray) -> np.ndarray:
        return np.exp(-np.exp(log_decay) * mean_square) - zeros

    found = least_squares(misfit, np.log(0.05), xtol=1e-12)
    require_found(found, "the decay of zeros that ZIFA starts from")
    return float(np.exp(found.x[0]))


def relative_change(old: Parameters, new: Parameters) -> float:
    """The largest mean absolute change of a parameter, relative to its new mean absolute value."""
    return max(float((b - a).abs().mean() / b.abs().mean()) for a, b in zip(old, new, strict=True))
