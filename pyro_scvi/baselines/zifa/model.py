r"""The model of zero-inflated factor analysis: posterior and marginal likelihood, exactly, in K dimensions per cell.

With y = log(1 + x) (cells, genes), latents z, and a latent log count u (cells, genes):

.. math::

    z_n \sim N(0, I), \quad u_{nj} | z_n \sim N(\eta_{nj}, \sigma_j^2), \quad \eta_{nj} = a_j^T z_n + \mu_j, \quad
    y_{nj} = 0 \text{ with probability } e^{-\lambda u_{nj}^2}, \text{ else } y_{nj} = u_{nj}

A zero leaves a Gaussian in eta: the integral of N(u; eta, sigma^2) exp(-lambda u^2) over u is
sqrt(c) exp(-lambda c eta^2) with c = 1 / (1 + 2 lambda sigma^2). So z | y is normal, with one K x K precision per
cell, where Pierson and Yau (2015), Algorithm 1, invert a genes x genes matrix per cell. All tensors are float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.baselines.unit_bins import UnitBins, standard_normal_log_prob
from pyro_scvi.types import LogJoint


class Parameters(NamedTuple):
    """A (genes, latents), mu (genes,), sigma (genes,) in units of log counts, and lambda, a scalar."""

    loadings: Tensor
    mean: Tensor
    scale: Tensor
    decay: Tensor

    @property
    def shrinkage(self) -> Tensor:
        """C (genes,): factor by which a lost log count shrinks from eta towards 0."""
        return 1 / (1 + 2 * self.decay * self.scale.square())

    @property
    def outer(self) -> Tensor:
        """a_j a_j^T of every gene, flat: (genes, latents * latents)."""
        return (self.loadings[:, :, None] * self.loadings[:, None, :]).flatten(1)


class Posterior(NamedTuple):
    """z | y = N(mean, covariance): (cells, latents), (cells, latents, latents).

    ``log_integral`` (cells,), nats: log of the integral over z of all factors of p(z, y) that depend on z, relative to
    their values at z = 0.
    """

    mean: Tensor
    covariance: Tensor
    log_integral: Tensor

    @property
    def second_moment(self) -> Tensor:
        """E[z z^T | y], (cells, latents, latents)."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


def posterior(y: Tensor, parameters: Parameters) -> Posterior:
    r"""E-step: the distribution of z given y (cells, genes).

    .. math::

        P_n = I + \sum_{j: y > 0} a_j a_j^T / \sigma_j^2 + \sum_{j: y = 0} w_j a_j a_j^T, \quad
        b_n = \sum_{j: y > 0} a_j (y_{nj} - \mu_j) / \sigma_j^2 - \sum_{j: y = 0} w_j \mu_j a_j

    with w = 2 lambda c; covariance P^-1, mean P^-1 b.
    """
    a, mu, precision = parameters.loadings, parameters.mean, parameters.scale**-2
    lost = (y == 0).to(y)
    change = 2 * parameters.decay * parameters.shrinkage - precision  # of the precision, where a count is lost
    eye = torch.eye(a.shape[1], dtype=y.dtype, device=y.device)
    # Precisions as if no count were lost, then corrected at the zeros: both are matrix products over all cells.
    weighted = precision @ parameters.outer + lost @ (change[:, None] * parameters.outer)
    b = y @ (precision[:, None] * a) - (precision * mu) @ a - lost @ ((change * mu)[:, None] * a)
    factor = torch.linalg.cholesky(eye + weighted.unflatten(1, eye.shape))
    mean = torch.cholesky_solve(b[:, :, None], factor).squeeze(-1)
    log_integral = 0.5 * (b * mean).sum(1) - factor.diagonal(dim1=1, dim2=2).log().sum(1)
    return Posterior(mean, torch.cholesky_inverse(factor), log_integral)


def log_marginal(y: Tensor, parameters: Parameters, latents: Posterior) -> Tensor:
    r"""Log p(y) of every cell without the factors of :func:`log_kept`, (cells,), nats; a density in y where y > 0.

    .. math::

        -\tfrac12 \sum_{j: y = 0} [w_j \mu_j^2 + \log(1 + 2 \lambda \sigma_j^2)]
        - \tfrac12 \sum_{j: y > 0} [(y_{nj} - \mu_j)^2 / \sigma_j^2 + \log 2 \pi \sigma_j^2]
        + \tfrac12 b_n^T P_n^{-1} b_n - \tfrac12 \log |P_n|
    """
    c, lost = parameters.shrinkage, (y == 0).to(y)
    at_zero = 2 * parameters.decay * c * parameters.mean.square() - c.log()
    seen = ((y - parameters.mean) / parameters.scale).square() + 2 * parameters.scale.log() + math.log(2 * math.pi)
    return latents.log_integral - 0.5 * torch.where(y == 0, 0.0, seen).sum(1) - 0.5 * lost @ at_zero


def log_kept(y: Tensor, decay: Tensor) -> Tensor:
    """Sum over y > 0 of log(1 - exp(-lambda y^2)), the probability that these counts were not lost: (cells,), nats."""
    kept = torch.log(-torch.expm1(-decay * y.square()))
    return torch.where(y == 0, 0.0, kept).sum(1)


def binned_log_joint(x: Tensor, parameters: Parameters) -> LogJoint:
    r"""Make the function z (samples, cells, latents) -> log N(z; 0, I) + sum over genes of log P(x | z), counts x.

    A count that is kept falls into its unit bin, a zero into everything below 1/2. With c as above,

    .. math::

        P(x > 0 | z) = \int_{bin} N(u; \eta, \sigma^2) (1 - e^{-\lambda u^2}) du, \qquad
        P(0 | z) = \Phi\Big(\frac{t - \eta}{\sigma}\Big)
        + \sqrt c e^{-\lambda c \eta^2} \Big[1 - \Phi\Big(\frac{t - c \eta}{\sigma \sqrt c}\Big)\Big], \quad
        t = \log \tfrac32,

    where a log count below the end of zero's bin gives a zero, lost or not.
    """
    bins, c = UnitBins.of(x), parameters.shrinkage

    def log_joint(z: Tensor) -> Tensor:
        eta = z @ parameters.loadings.T + parameters.mean  # (samples, cells, genes)
        log_lost = 0.5 * c.log() - parameters.decay * c * eta.square()  # of a count anywhere on the line
        lost_loc, lost_scale = c * eta, parameters.scale * c.sqrt()
        inside = bins.log_probability(eta, parameters.scale)
        lost_above = log_lost + torch.special.log_ndtr((lost_loc - bins.upper) / lost_scale)
        lost_inside = log_lost + bins.log_probability(lost_loc, lost_scale)
        # A zero has no second branch and a count no first: a stand-in keeps the gradient of what is not taken finite.
        log_ratio = torch.where(bins.zero, -1.0, lost_inside - inside).clamp(max=-1e-12)
        log_p = torch.where(bins.zero, torch.logaddexp(inside, lost_above), inside + torch.log(-torch.expm1(log_ratio)))
        return standard_normal_log_prob(z) + log_p.sum(-1)

    return log_joint


def log_counts(y: Tensor, parameters: Parameters, latents: Posterior) -> tuple[Tensor, Tensor]:
    """E[u | y] and E[u^2 | y], (cells, genes) each: y and y^2 where y > 0."""
    c = parameters.shrinkage
    eta, eta2 = _predictor(parameters, latents)
    lost2 = c * parameters.scale.square() + c.square() * eta2
    return torch.where(y == 0, c * eta, y), torch.where(y == 0, lost2, y.square())


def expected_complete(y: Tensor, parameters: Parameters, latents: Posterior) -> Tensor:
    """E[log p(z) + log p(u | z) + log p(y | u)] under p(z, u | y), (cells,), nats.

    EM maximises this expectation. It lacks the entropy that would make it a likelihood.
    """
    c, variance = parameters.shrinkage, parameters.scale.square()
    eta, eta2 = _predictor(parameters, latents)
    _, u2 = log_counts(y, parameters, latents)
    # E(u - eta)^2: a lost u given eta is N(c eta, c sigma^2)
    residual = torch.where(y == 0, c * variance + (1 - c).square() * eta2, y.square() - 2 * y * eta + eta2)
    of_u = -0.5 * (residual / variance + torch.log(2 * math.pi * variance)).sum(1)
    of_y = log_kept(y, parameters.decay) - parameters.decay * torch.where(y == 0, u2, 0.0).sum(1)
    z2 = latents.second_moment.diagonal(dim1=1, dim2=2).sum(1)
    return of_u + of_y - 0.5 * z2 - 0.5 * latents.mean.shape[1] * math.log(2 * math.pi)


def _predictor(parameters: Parameters, latents: Posterior) -> tuple[Tensor, Tensor]:
    """E[eta | y] and E[eta^2 | y], (cells, genes)."""
    eta = latents.mean @ parameters.loadings.T + parameters.mean
    return eta, eta.square() + latents.covariance.flatten(1) @ parameters.outer.T
