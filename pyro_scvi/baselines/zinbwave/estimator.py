"""The estimator ZINBWaVE: the zero-inflated negative binomial factor model of Risso et al. (2018), fitted by L-BFGS."""

import warnings
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from pyro_scvi.baselines.inputs import dense_counts, remember_genes, require_fitted, require_latents
from pyro_scvi.baselines.zinbwave.lbfgs import Minimum
from pyro_scvi.baselines.zinbwave.model import (
    CellParameters,
    CommonDispersion,
    Dispersion,
    GeneParameters,
    GenewiseDispersion,
    Penalties,
    orthogonal,
)
from pyro_scvi.baselines.zinbwave.optimization import Distribution, Problem
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_at_least

__all__ = ["CommonDispersion", "GenewiseDispersion", "ZINBWaVE"]

REFIT = 1e-2  # a refit of single cells is cheap, so its stop rule is so much stricter


class ZINBWaVE(TransformerMixin, BaseEstimator):
    r"""Zero-inflated negative binomial counts, log mean and dropout logit linear in latents W.

    .. math:: x_{nj} \sim \pi_{nj} \delta_0 + (1 - \pi_{nj}) NB(\mu_{nj}, \theta_j), \quad
              \log \mu = X \beta_\mu + (V \gamma_\mu)^T + W \alpha_\mu, \quad
              logit\, \pi = X \beta_\pi + (V \gamma_\pi)^T + W \alpha_\pi

    X (cells, covariates) and V (genes, covariates) begin with an intercept (Risso et al. 2018, Eqs. 1-5). L-BFGS in
    float64 maximises the log likelihood minus :class:`~pyro_scvi.baselines.zinbwave.model.Penalties` over all
    parameters together. The original alternates over genes and cells, which ends lower. W is then made orthogonal. The
    fit stops only when 10 iterations gain less than ``tol`` relative to the objective, because cluster scores on W keep
    drifting long after the objective looks flat. There is no randomness. If nearly all counts are 0 or 1, mu, pi and
    theta predict almost the same. zeta then grows without limit, and convergence takes thousands of iterations.

    Parameters
    ----------
    n_latent
        Columns of W.
    dispersion
        :class:`CommonDispersion` or :class:`GenewiseDispersion`.
    epsilon
        The weight of the penalty; None for the number of genes, as in the original.
    tol, max_iter
        The stopping rule, and the most iterations, rounded up to tens; a warning tells if they did not suffice.
    device
        Torch device to compute on.

    Attributes
    ----------
    W_, gamma_mu_, gamma_pi_
        (cells, latents), (cells, gene covariates) and the same.
    alpha_mu_, alpha_pi_, beta_mu_, beta_pi_, zeta_
        (latents, genes), the same, (cell covariates, genes), the same, log theta (genes,) or (1,).
    log_likelihood_, penalised_log_likelihood_
        Of all training cells, nats.
    penalties_
        The weights of the penalty, which refits of cells keep.
    n_iter_, converged_
        Iterations of the fit, and whether the stop rule was met.

    Examples
    --------
    >>> system = ps.baselines.ZINBWaVE(2, tol=1e-4).fit(counts)
    >>> system.W_.shape, system.converged_
    ((60, 2), True)
    """

    def __init__(
        self,
        n_latent: int = 10,
        *,
        dispersion: Dispersion = CommonDispersion(),
        epsilon: float | None = None,
        tol: float = 1e-6,
        max_iter: int = 2000,
        device: str | torch.device = "cpu",
    ) -> None:
        self.n_latent = n_latent
        self.dispersion = dispersion
        self.epsilon = epsilon
        self.tol = tol
        self.max_iter = max_iter
        self.device = device

    def fit(self, counts: Any, y: None = None, *, cell_covariates: Any = None, gene_covariates: Any = None) -> Self:
        """Fit all parameters to counts; if this raises, the previous fit stays.

        Parameters
        ----------
        counts
            Raw counts, (cells, genes).
        y
            Ignored.
        cell_covariates, gene_covariates
            X (cells, covariates) and V (genes, covariates) without the intercepts, which are added.

        Raises
        ------
        DataError
            For counts that are negative or not finite, a gene or cell without counts (its mean would have no maximum),
            or covariates of another length.
        ModelError
            For ``n_latent`` that is not from 1 to the number of cells or of genes, or another option out of range.
        """
        x = dense_counts(counts, unseen_genes=False)
        self._check_options(x)
        x_cov = _design(cell_covariates, len(x), "cell_covariates")
        v_cov = _design(gene_covariates, x.shape[1], "gene_covariates")
        epsilon = float(x.shape[1] if self.epsilon is None else self.epsilon)
        problem = self._problem(x, x_cov, v_cov, Penalties(epsilon, len(x), x.shape[1], self.dispersion))
        self._maximise(problem, *problem.start(self.n_latent))
        remember_genes(self, counts)
        return self

    def fit_transform(
        self, counts: Any, y: None = None, *, cell_covariates: Any = None, gene_covariates: Any = None
    ) -> np.ndarray:
        """Fit, then transform the same cells; arguments as of :meth:`fit`.

        Raises
        ------
        DataError, ModelError
            As in :meth:`fit`.
        """
        self.fit(counts, cell_covariates=cell_covariates, gene_covariates=gene_covariates)
        return self.transform(counts, cell_covariates)

    def transform(self, counts: Any, cell_covariates: Any = None) -> np.ndarray:
        """W (cells, latents) of any cells: W and gamma refitted under their penalties, all else as fitted.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, a cell has none, or genes or covariates are not those of the fit.
        """
        return self._refitted(counts, cell_covariates)[1].w.cpu().numpy()

    def score_samples(self, counts: Any, cell_covariates: Any = None) -> np.ndarray:
        """Conditional, not marginal, log likelihood, nats per cell (cells,).

        The counts are scored given the W and gamma that were refitted to these same counts, without penalties, as in
        Lopez et al. (2017). A marginal likelihood integrates over W and is lower.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, a cell has none, or genes or covariates are not those of the fit.
        """
        problem, cells = self._refitted(counts, cell_covariates)
        return problem.log_likelihood(cells, self._genes()).cpu().numpy()

    def impute(self, counts: Any, cell_covariates: Any = None) -> np.ndarray:
        """Mu at the refitted W, counts (cells, genes): its imputation in Lopez et al. (2017).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, a cell has none, or genes or covariates are not those of the fit.
        """
        return np.concatenate([law.log_mu.exp().cpu() for law in self._laws(counts, cell_covariates)])

    def impute_zeros(self, counts: Any, cell_covariates: Any = None) -> np.ndarray:
        """The counts with mu P(technical | zero) for every zero: zinbwave's own imputation, (cells, genes).

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, a cell has none, or genes or covariates are not those of the fit.
        """
        return np.concatenate([zeros_imputed(law).cpu() for law in self._laws(counts, cell_covariates)])

    def technical_zero_probability(self, counts: Any, cell_covariates: Any = None) -> np.ndarray:
        """P(technical | zero) at the refitted W, (cells, genes); 0 where the count is no zero.

        Raises
        ------
        ModelError
            Before the fit.
        DataError
            If a count is negative or not finite, a cell has none, or genes or covariates are not those of the fit.
        """
        probability = np.concatenate([technical_zero(law).cpu() for law in self._laws(counts, cell_covariates)])
        return np.where(dense_counts(counts, fitted=self) > 0, 0.0, probability)

    def _maximise(self, problem: Problem, cells: CellParameters, genes: GeneParameters) -> None:
        minimum = problem.maximise(cells, genes, self.tol, self.max_iter)
        self._warn(minimum)
        cells, genes = CellParameters(*minimum.rows), GeneParameters(*minimum.shared)
        cells, genes = orthogonal(cells, genes, problem.penalties)
        log_likelihood = float(problem.log_likelihood(cells, genes).sum())
        penalty = float(problem.penalties.of_cells(cells) + problem.penalties.of_genes(genes))
        self.penalties_, self.n_cell_covariates_ = problem.penalties, problem.x_cov.shape[1]
        self.gene_covariates_ = problem.v_cov.cpu().numpy()
        self.n_iter_, self.converged_ = minimum.iterations, minimum.converged
        self.W_, self.gamma_mu_, self.gamma_pi_ = (t.cpu().numpy() for t in cells)
        self.alpha_mu_, self.alpha_pi_, self.beta_mu_, self.beta_pi_, self.zeta_ = (t.cpu().numpy() for t in genes)
        self.log_likelihood_, self.penalised_log_likelihood_ = log_likelihood, log_likelihood - penalty

    def _refitted(self, counts: Any, cell_covariates: Any) -> tuple[Problem, CellParameters]:
        require_fitted(self, "W_")
        x = dense_counts(counts, n_genes=len(self.gene_covariates_), fitted=self)
        design = _design(cell_covariates, len(x), "cell_covariates")
        if design.shape[1] != self.n_cell_covariates_:
            raise DataError(
                f"the fit had {self.n_cell_covariates_ - 1} cell_covariates, now there are {design.shape[1] - 1}; "
                "pass the same ones, in the same order"
            )
        problem = self._problem(x, design, self.gene_covariates_, self.penalties_)
        minimum = problem.refit(self._genes(), self.tol * REFIT, self.max_iter)
        self._warn(minimum)
        return problem, CellParameters(*minimum.rows)

    def _laws(self, counts: Any, cell_covariates: Any) -> Iterator[Distribution]:
        problem, cells = self._refitted(counts, cell_covariates)
        return problem.laws(cells, self._genes())

    def _problem(self, x: np.ndarray, x_cov: np.ndarray, v_cov: np.ndarray, penalties: Penalties) -> Problem:
        if (empty := np.flatnonzero(~x.any(1))).size:
            raise DataError(f"{empty.size} cells have no count, the first of them cell {empty[0]}; drop them")
        return Problem(self._tensor(x), self._tensor(x_cov), self._tensor(v_cov), penalties)

    def _genes(self) -> GeneParameters:
        fitted = self.alpha_mu_, self.alpha_pi_, self.beta_mu_, self.beta_pi_, self.zeta_
        return GeneParameters(*map(self._tensor, fitted))

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(array, dtype=torch.float64, device=self.device)

    def _check_options(self, x: np.ndarray) -> None:
        require_latents(self.n_latent, x)
        require_at_least(1, max_iter=self.max_iter)
        if not isinstance(self.dispersion, CommonDispersion | GenewiseDispersion):
            raise ModelError(
                f"dispersion must be CommonDispersion() or GenewiseDispersion(), got {self.dispersion!r}; pass one"
            )
        if self.epsilon is not None and not self.epsilon > 0:
            raise ModelError(f"epsilon must be above 0, got {self.epsilon}")

    def _warn(self, minimum: Minimum) -> None:
        if not minimum.converged:
            warnings.warn(
                f"ZINB-WaVE has not converged in {minimum.iterations} iterations; raise max_iter or tol",
                ConvergenceWarning,
                stacklevel=4,
            )


def technical_zero(law: Distribution) -> Tensor:
    r"""P(technical | zero), (cells, genes): :math:`\pi / (\pi + (1 - \pi) (1 + \mu / \theta)^{-\theta})`."""
    log_zero = -law.zeta.exp() * torch.logaddexp(torch.zeros_like(law.log_mu), law.log_mu - law.zeta)
    return torch.sigmoid(law.gate - log_zero)


def zeros_imputed(law: Distribution) -> Tensor:
    """Counts (cells, genes), with mu P(technical | zero) for the zeros."""
    return torch.where(law.x > 0, law.x, law.log_mu.exp() * technical_zero(law))


def _design(covariates: Any, length: int, name: str) -> np.ndarray:
    """The intercept and the covariates, (length, 1 + covariates)."""
    intercept = np.ones((length, 1))
    if covariates is None:
        return intercept
    given = np.asarray(covariates, dtype=np.float64).reshape(len(covariates), -1)
    if len(given) != length or not np.isfinite(given).all():
        raise DataError(f"{name} must be {length} rows of finite numbers, got shape {given.shape}")
    return np.hstack((intercept, given))
