"""The model of ZINB-WaVE (Risso et al. 2018): its parameters, likelihood, penalty and orthogonal form."""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.distributions.nb_log_prob import log_negative_binomial, log_zero_inflated

GATE_INTERCEPTS = 1e-3  # penalty of the intercepts of logit pi, in zinbwave's units; those of log mu are free


class CellParameters(NamedTuple):
    """W (cells, latents); gamma of log mu and of logit pi, (cells, gene covariates)."""

    w: Tensor
    gamma_mu: Tensor
    gamma_pi: Tensor


class GeneParameters(NamedTuple):
    """alpha (latents, genes) and beta (cell covariates, genes), of both predictors; zeta = log theta, (genes or 1,)."""

    alpha_mu: Tensor
    alpha_pi: Tensor
    beta_mu: Tensor
    beta_pi: Tensor
    zeta: Tensor


class Dispersion(Protocol):
    """Interface of a parametrisation of zeta."""

    def values(self, genes: int) -> int:
        """How many values of zeta there are."""

    def variance(self, zeta: Tensor) -> Tensor:
        """The variance that is penalised."""


@dataclass(frozen=True)
class CommonDispersion:
    """One theta for all genes.

    Examples
    --------
    >>> ps.baselines.CommonDispersion().values(20)
    1
    """

    def values(self, genes: int) -> int:
        """How many values of zeta there are: one."""
        return 1

    def variance(self, zeta: Tensor) -> Tensor:
        """Zero: there is one value."""
        return torch.zeros_like(zeta[0])


@dataclass(frozen=True)
class GenewiseDispersion:
    """One theta per gene, with a penalty on the variance of their logarithms.

    Examples
    --------
    >>> ps.baselines.GenewiseDispersion().values(20)
    20
    """

    def values(self, genes: int) -> int:
        """How many values of zeta there are: one per gene."""
        return genes

    def variance(self, zeta: Tensor) -> Tensor:
        """Variance of zeta over genes, with genes - 1 as its divisor; 0 of one gene."""
        return zeta.var() if len(zeta) > 1 else torch.zeros_like(zeta[0])


@dataclass(frozen=True)
class Penalties:
    r"""Weights of the penalty (Risso et al. 2018, Methods, "Parameter estimation"), for J genes and n cells.

    .. math:: \frac12 \Big[\epsilon_W \|W\|^2 + \epsilon_\alpha (\|\alpha_\mu\|^2 + \|\alpha_\pi\|^2)
              + \epsilon_\beta (\|\beta_\mu\|^2 + \|\beta_\pi\|^2) + \epsilon_\gamma (\|\gamma_\mu\|^2
              + \|\gamma_\pi\|^2) + \epsilon_\zeta Var(\zeta)\Big]

    with :math:`\epsilon_W = \epsilon_\gamma = \epsilon / n`, :math:`\epsilon_\alpha = \epsilon_\beta = \epsilon / J`,
    :math:`\epsilon_\zeta = \epsilon`. The intercepts (the first column of X and of V) have weights of their own, as in
    zinbwave: 0 in log mu and 0.001 in logit pi.
    """

    epsilon: float
    cells: int
    genes: int
    dispersion: Dispersion

    @property
    def w(self) -> float:
        """Epsilon_W."""
        return self.epsilon / self.cells

    @property
    def alpha(self) -> float:
        """Epsilon_alpha."""
        return self.epsilon / self.genes

    @property
    def balance(self) -> float:
        """(epsilon_alpha / epsilon_W)^(1/4): the scale of W over that of alpha where the penalty is least."""
        return (self.alpha / self.w) ** 0.25

    def of_cells(self, cells: CellParameters) -> Tensor:
        """The part of W and gamma."""
        gamma = _beside_intercept(cells.gamma_mu.T, 0.0, self.w) + self.of_gate_cells(cells.gamma_pi)
        return 0.5 * self.w * cells.w.square().sum() + gamma

    def of_genes(self, genes: GeneParameters) -> Tensor:
        """The part of alpha, beta and zeta."""
        alpha_mu = 0.5 * self.alpha * genes.alpha_mu.square().sum()
        beta_mu = _beside_intercept(genes.beta_mu, 0.0, self.alpha)
        zeta = 0.5 * self.epsilon * self.dispersion.variance(genes.zeta)
        return alpha_mu + beta_mu + zeta + self.of_gate_genes(genes.alpha_pi, genes.beta_pi)

    def of_gate_cells(self, gamma_pi: Tensor) -> Tensor:
        """The part of gamma_pi."""
        return _beside_intercept(gamma_pi.T, GATE_INTERCEPTS, self.w)

    def of_gate_genes(self, alpha_pi: Tensor, beta_pi: Tensor) -> Tensor:
        """The part of alpha_pi and beta_pi."""
        return 0.5 * self.alpha * alpha_pi.square().sum() + _beside_intercept(beta_pi, GATE_INTERCEPTS, self.alpha)


def _beside_intercept(coefficients: Tensor, intercept: float, others: float) -> Tensor:
    """Half the weighted sum of squares of (covariates, ...), whose first row belongs to the intercept."""
    return 0.5 * (intercept * coefficients[0].square().sum() + others * coefficients[1:].square().sum())


def log_mean(x_cov: Tensor, v_cov: Tensor, cells: CellParameters, genes: GeneParameters) -> Tensor:
    """Log mu = X beta_mu + (V gamma_mu)' + W alpha_mu, (cells, genes); X (cells, .), V (genes, .)."""
    left = torch.cat((x_cov, cells.gamma_mu, cells.w), 1)
    return left @ torch.cat((genes.beta_mu, v_cov.T, genes.alpha_mu))


def gate_logits(x_cov: Tensor, v_cov: Tensor, w: Tensor, gamma_pi: Tensor, alpha_pi: Tensor, beta_pi: Tensor) -> Tensor:
    """Logit pi = X beta_pi + (V gamma_pi)' + W alpha_pi, (cells, genes)."""
    return torch.cat((x_cov, gamma_pi, w), 1) @ torch.cat((beta_pi, v_cov.T, alpha_pi))


def log_likelihood(x: Tensor, log_mu: Tensor, gate: Tensor, zeta: Tensor) -> Tensor:
    r"""Log of :math:`\pi 1[x = 0] + (1 - \pi) NB(x; \mu, \theta)` summed over genes, nats (cells,)."""
    return log_zero_inflated(x, log_mu, zeta.expand_as(log_mu), gate).sum(-1)


def without_gamma(x: Tensor, log_mu: Tensor, gate: Tensor, zeta: Tensor) -> Tensor:
    r"""Log likelihood without the terms of :class:`GammaTerms`, summed over cells and genes.

    With :math:`\delta = \log \mu - \zeta` and :math:`n = -\theta \log(1 + e^\delta)`, the log probability of 0,

    .. math:: x > 0:\; x (\delta - \log(1 + e^\delta)) + n, \qquad x = 0:\; \log(e^{gate} + e^n), \qquad
              \text{both} - \log(1 + e^{gate})
    """
    counted, zero = _counted(x, log_mu, zeta)
    return (torch.where(x > 0, counted, torch.logaddexp(gate, zero)) - _softplus(gate)).sum()


def _counted(x: Tensor, log_mu: Tensor, zeta: Tensor) -> tuple[Tensor, Tensor]:
    """Log NB(x) without its gamma functions, and log NB(0)."""
    delta = log_mu - zeta
    softplus = _softplus(delta)
    zero = -zeta.exp() * softplus
    return x * (delta - softplus) + zero, zero


class GammaTerms:
    r"""The sum over counts above zero of :math:`\log\Gamma(x + \theta) - \log\Gamma(\theta) - \log x!`.

    It depends on a gene's counts and theta alone, so each distinct count of a gene is computed once. An iteration takes
    a ninth of the time that it takes with gamma functions of every entry. For large theta the gamma functions differ by
    less than their rounding. The sum is therefore computed as the stable log probability at mu = x minus the part in
    :func:`without_gamma`.
    """

    def __init__(self, x: Tensor) -> None:
        by_gene = [np.unique(column[column > 0], return_counts=True) for column in x.cpu().numpy().T]
        gene = np.repeat(np.arange(len(by_gene)), [len(values) for values, _ in by_gene])
        self.genes = x.shape[1]
        self.gene, self.count, self.times = (
            torch.from_numpy(part).to(x.device)
            for part in (gene, *(np.concatenate(parts) for parts in zip(*by_gene, strict=True)))
        )

    def __call__(self, zeta: Tensor) -> Tensor:
        """The sum at log theta = zeta, (genes or 1,)."""
        of_count, log_mu = zeta.expand(self.genes)[self.gene], self.count.log()
        terms = log_negative_binomial(self.count, log_mu, of_count) - _counted(self.count, log_mu, of_count)[0]
        return (self.times * terms).sum()


def orthogonal(
    cells: CellParameters, genes: GeneParameters, penalties: Penalties
) -> tuple[CellParameters, GeneParameters]:
    r"""Rotate and scale W and alpha so that W has orthogonal columns and the penalty is least; W alpha stays.

    With QR decompositions :math:`W = Q_1 R_1`, :math:`[\alpha_\mu\, \alpha_\pi]' = Q_2 R_2` and
    :math:`R_1 R_2' = A S B'`, W becomes :math:`b\, Q_1 A S^{1/2}` and alpha :math:`b^{-1} S^{1/2} (Q_2 B)'`,
    b = :attr:`Penalties.balance` (Risso et al. 2018, Methods). The largest loading of every latent is positive.
    """
    # W alpha = Q1 (R1 R2') Q2': a decomposition of the small middle matrix suffices.
    q_w, r_w = torch.linalg.qr(cells.w)
    q_a, r_a = torch.linalg.qr(torch.cat((genes.alpha_mu, genes.alpha_pi), 1).T)
    a, s, bt = torch.linalg.svd(r_w @ r_a.T)
    loadings = bt @ q_a.T  # (latents, 2 genes)
    sign = torch.sign(loadings.gather(1, loadings.abs().argmax(1, keepdim=True)))
    alpha = sign * s.sqrt()[:, None] * loadings / penalties.balance
    alpha_mu, alpha_pi = alpha.split(genes.alpha_mu.shape[1], 1)
    w = penalties.balance * (q_w @ a) * s.sqrt() * sign.T
    return cells._replace(w=w), genes._replace(alpha_mu=alpha_mu, alpha_pi=alpha_pi)


def _softplus(t: Tensor) -> Tensor:
    return F.softplus(t, threshold=40.0)  # torch's default of 20 is off by 2e-9, which a large theta magnifies
