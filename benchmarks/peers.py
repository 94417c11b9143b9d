"""Held-out log probabilities of counts under the two peers: factor analysis and scvi-tools.

Every function takes dense matrices of raw counts, train (cells, genes) and test (cells, genes). Both peers are scored
in nats per test cell, in float64, with the latents integrated out by the importance sampler that also scores this
package's models: whatever error the sampler has left, it has on every side of a comparison.
"""

import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import FactorAnalysis
from torch import Tensor

from pyro_scvi.baselines.scvi_tools import Generative, log_zinb, trained
from pyro_scvi.importance import LogJoint, adaptive_importance

__all__ = ["Evidence", "FactorScores", "ScviTools", "factor_analysis", "integrate", "log_zinb", "scvi_tools"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Evidence(NamedTuple):
    """Integrated log probability of each cell's counts, all (cells,), with what the sampler says about itself.

    ``log_evidence`` in nats per cell, ``se`` its Monte Carlo standard error, ``ess`` the effective number of draws,
    ``khat`` the Pareto tail index of the weights (above 0.7 the value cannot be vouched for).
    """

    log_evidence: np.ndarray
    se: np.ndarray
    ess: np.ndarray
    khat: np.ndarray


def integrate(
    log_joint_of: Callable[[slice], LogJoint],
    loc: Tensor,
    scale: Tensor,
    *,
    samples: int = 1000,
    seed: int = 0,
    chunk: int = 32,
) -> Evidence:
    """Integrate the latents out of every cell, ``chunk`` cells at a time.

    Parameters
    ----------
    log_joint_of
        For a slice of cells the function u (samples, cells, latents) -> log p(x, u), (samples, cells).
    loc, scale
        Centre and standard deviation of the starting proposal, (cells, latents) each.
    samples, seed
        Draws of every round of the sampler, and its seed.
    chunk
        Cells that are evaluated together; memory grows with it, the result only changes by Monte Carlo error.
    """
    parts = []
    for start in range(0, len(loc), chunk):
        cells = slice(start, start + chunk)
        result = adaptive_importance(log_joint_of(cells), loc[cells], scale[cells], samples=samples, seed=seed + start)
        parts.append((result.log_evidence, result.se, result.ess, result.khat))
    return Evidence(*(torch.cat(column).numpy() for column in zip(*parts, strict=True)))


class FactorScores(NamedTuple):
    """What :func:`factor_analysis` says of the test cells.

    ``log_density`` (cells,) is a density, ``probability`` the evidence of the same fit for counts; seconds of the fit
    and of the integration.
    """

    log_density: np.ndarray
    probability: Evidence
    fit_seconds: float
    score_seconds: float


def factor_analysis(
    train: np.ndarray, test: np.ndarray, n_latent: int = 10, seed: int = 0, *, samples: int = 1000
) -> FactorScores:
    r"""Factor analysis of :math:`y = \log(1 + x)`, scored as a density and as a probability of counts.

    .. math:: z \sim N(0, I), \qquad y_g \mid z \sim N(m_g + (W^T z)_g, \psi_g)

    The density is the paper's figure (Lopez et al. 2017, Table 1): the exact marginal of y and the Jacobian of log1p,

    .. math:: \log N(y; m, W^T W + \Psi) - \sum_g \log(1 + x_g).

    A density is no probability of counts: it can be made arbitrarily large where y has an atom. The like-for-like
    figure gives each count its unit bin, with everything below 1/2 for a zero,

    .. math:: \log \int N(z; 0, I) \prod_g P\big(y_g \in [\log(x_g + \tfrac12), \log(x_g + \tfrac32)] \mid z\big) dz,

    where the sampler starts from the Gaussian posterior of z given y, which factor analysis has in closed form.

    Parameters
    ----------
    train, test
        Raw counts, (cells, genes).
    n_latent
        Number of factors.
    seed
        Of the randomised decomposition and of the sampler.
    samples
        Draws of every round of the sampler.
    """
    _check_varying(train)
    started = time.perf_counter()
    fitted = FactorAnalysis(n_components=n_latent, random_state=seed).fit(np.log1p(train))
    fit_seconds = time.perf_counter() - started
    y = np.log1p(test.astype(np.float64))
    log_density = fitted.score_samples(y) - y.sum(1)
    started = time.perf_counter()
    mean, loadings, noise = (
        torch.from_numpy(a).double() for a in (fitted.mean_, fitted.components_, fitted.noise_variance_)
    )
    loc, scale = gaussian_posterior(torch.from_numpy(y) - mean, loadings, noise)
    counts = torch.from_numpy(test.astype(np.float64))
    probability = integrate(
        lambda cells: binned_log_joint(counts[cells], mean, loadings, noise), loc, scale, samples=samples, seed=seed
    )
    return FactorScores(log_density, probability, fit_seconds, time.perf_counter() - started)


def gaussian_posterior(residual: Tensor, loadings: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and standard deviations (cells, latents) of z given y in factor analysis.

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


def binned_log_joint(counts: Tensor, mean: Tensor, loadings: Tensor, noise: Tensor) -> LogJoint:
    """Make the function z (samples, cells, latents) -> log N(z; 0, I) + sum over genes of log P(bin of x | z).

    ``counts`` is (cells, genes), ``mean`` and ``noise`` (genes,), ``loadings`` (latents, genes).
    """
    sd = noise.sqrt()
    lower, upper = (counts + 0.5).log() - mean, (counts + 1.5).log() - mean
    zero = counts == 0

    def log_joint(z: Tensor) -> Tensor:
        centre = z @ loadings  # (samples, cells, genes)
        below, above = (lower - centre) / sd, (upper - centre) / sd
        return standard_normal_log_prob(z) + log_bin_probability(below, above, zero).sum(-1)

    return log_joint


def log_bin_probability(below: Tensor, above: Tensor, from_minus_infinity: Tensor) -> Tensor:
    r"""Log of :math:`\Phi(b) - \Phi(a)`, or of :math:`\Phi(b)` where the bin has no lower end; elementwise.

    A bin right of zero is reflected, so that the difference is taken where the two probabilities are small and keeps
    its digits however far out it lies: :math:`\log \Phi(b) + \log(1 - e^{\log \Phi(a) - \log \Phi(b)})`.
    """
    # Open bins get a finite stand-in for a, or the branch that is not taken would give NaN gradients.
    below = torch.where(from_minus_infinity, above - 1, below)
    reflected = (below > 0) & ~from_minus_infinity
    a, b = torch.where(reflected, -above, below), torch.where(reflected, -below, above)
    log_b = torch.special.log_ndtr(b)
    log_rest = (-torch.expm1(torch.special.log_ndtr(a) - log_b)).log()
    return torch.where(from_minus_infinity, log_b, log_b + log_rest)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """Log N(z; 0, I) summed over the last axis."""
    return -0.5 * z.square().sum(-1) - z.shape[-1] * _HALF_LOG_2PI


class ScviTools(NamedTuple):
    """A fitted scvi-tools model with what is needed to integrate its latents; made by :func:`scvi_tools`.

    ``model`` is the fitted SCVI, ``network`` its module in float64 and eval mode, ``library_loc`` and
    ``library_scale`` the normal law of the log totals of the training cells, ``counts`` the test cells (cells, genes),
    ``loc`` and ``scale`` the encoder's start for u = (z, log library), (cells, latents + 1).
    """

    model: Any
    network: torch.nn.Module
    library_loc: float
    library_scale: float
    counts: Tensor
    loc: Tensor
    scale: Tensor
    fit_seconds: float

    @property
    def generative(self) -> Generative:
        """The law of the fitted model."""
        return Generative(self.network, self.library_loc, self.library_scale)

    def log_joint(self, cells: slice = slice(None)) -> LogJoint:
        """The function u (samples, cells, latents + 1) -> log p(x, u), (samples, cells), of some test cells."""
        return self.generative.log_joint(self.counts[cells])

    def decode(self, z: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Log mean and dropout logits, (samples, cells, genes) each, of the fitted generative network."""
        return self.generative.decode(z, library)

    def evidence(self, *, samples: int = 1000, seed: int = 0) -> Evidence:
        """Log probability of every test cell's counts, z and the library integrated out."""
        return integrate(self.log_joint, self.loc, self.scale, samples=samples, seed=seed)


def scvi_tools(train: np.ndarray, test: np.ndarray, epochs: int, seed: int, *, n_latent: int = 10) -> ScviTools:
    """Fit scvi-tools' SCVI with its defaults and prepare the evidence of the test cells.

    Its settings are the defaults but for the length of training (``epochs``, of which the first min(20, epochs / 2)
    warm up the Kullback-Leibler term) and for the share of cells that is fitted: all of ``train``, since without
    early stopping its validation cells would be left unused. By default SCVI takes a cell's total as given, which is
    no probability of that cell's counts; the total is therefore integrated out under a normal law of the log totals
    of the training cells, the prior that SCVI itself has for a library that is not observed.

    Parameters
    ----------
    train, test
        Raw counts, (cells, genes).
    epochs, seed, n_latent
        Passes through the training cells, the seed, the number of latents.

    Raises
    ------
    ImportError
        If scvi-tools is not installed.
    """
    started = time.perf_counter()
    model = trained(train, epochs, seed, n_latent)
    fit_seconds = time.perf_counter() - started
    generative = Generative.of(model, train)
    counts = torch.from_numpy(test.astype(np.float64))
    return ScviTools(model, *generative, counts, *generative.start(counts), fit_seconds)


@torch.no_grad()
def _encoder_start(network: torch.nn.Module, counts: Tensor) -> tuple[Tensor, Tensor]:
    return Generative(network, 0.0, 1.0).start(counts)


def _check_varying(train: np.ndarray) -> None:
    constant = int((train.max(0) == train.min(0)).sum())
    if constant:
        raise ValueError(
            f"Factor analysis needs genes that vary over the training cells; {constant} do not, "
            "their noise variance would be zero and any other count infinitely improbable. Drop these genes."
        )
