"""Held-out log probabilities of counts under the two peers: factor analysis and scvi-tools.

Every function takes dense matrices of raw counts, train (cells, genes) and test (cells, genes). Both peers are scored
in nats per test cell, in float64, with the latents integrated out by the importance sampler that also scores this
package's models: whatever error the sampler has left, it has on every side of a comparison.
"""

import copy
import logging
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import FactorAnalysis
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.importance import LogJoint, adaptive_importance

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
LIBRARY_START_SCALE = 0.1  # of the log library around the observed log total, before refinement


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

    def log_joint(self, cells: slice = slice(None)) -> LogJoint:
        r"""Make the function u (samples, cells, latents + 1) -> log p(x, u), (samples, cells), of some test cells.

        With z the first latents of u and l the last one, rho = softmax of the decoder's scale head, r per gene,

        .. math:: z \sim N(0, I), \quad l \sim N(\bar l, s^2), \qquad
                  x_g \mid z, l \sim ZINB(e^l \rho_g(z), r_g, \pi_g(z)).

        The likelihood is evaluated here and not by scvi-tools: theirs adds 1e-8 inside every logarithm and in
        float32 is off by up to a tenth of a nat per entry where r is large; in float64 the two differ by that
        addition alone (6e-6 nats per cell on the cortex data). The gamma functions depend on x and r only and are
        computed once.
        """
        x, log_r = self.counts[cells], self.network.px_r.detach()
        r = log_r.exp()
        constant = torch.lgamma(x + r) - torch.lgamma(r) - torch.lgamma(x + 1)  # (cells, genes)

        def log_joint(u: Tensor) -> Tensor:
            z, library = u[..., :-1], u[..., -1]
            log_mean, gate = self.decode(z, library)
            log_prior = standard_normal_log_prob(z) + standard_normal_log_prob(
                ((library - self.library_loc) / self.library_scale)[..., None]
            )
            log_likelihood = log_zinb(x, log_mean - log_r, r, gate, constant).sum(-1)
            return log_prior - math.log(self.library_scale) + log_likelihood

        return log_joint

    def decode(self, z: Tensor, library: Tensor) -> tuple[Tensor, Tensor]:
        """Log mean and dropout logits, (samples, cells, genes) each, of the fitted generative network.

        The softmax is taken in logarithms; otherwise these are the steps of the decoder's own forward.
        """
        decoder = self.network.decoder
        flat = z.reshape(-1, z.shape[-1])  # its batch norm takes two axes
        hidden = decoder.px_decoder(flat, torch.zeros_like(flat[:, :1]))
        log_scale = F.log_softmax(decoder.px_scale_decoder[0](hidden), -1)
        gate = decoder.px_dropout_decoder(hidden)
        shape = (*z.shape[:-1], -1)
        return library[..., None] + log_scale.reshape(shape), gate.reshape(shape)

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
    model = _fit_scvi(train, epochs, seed, n_latent)
    fit_seconds = time.perf_counter() - started
    network = copy.deepcopy(model.module).cpu().double().eval().requires_grad_(False)
    log_totals = np.log(train.sum(1, dtype=np.float64))
    counts = torch.from_numpy(test.astype(np.float64))
    loc, scale = _encoder_start(network, counts)
    return ScviTools(model, network, log_totals.mean(), log_totals.std(), counts, loc, scale, fit_seconds)


def log_zinb(x: Tensor, log_odds: Tensor, r: Tensor, gate: Tensor, constant: Tensor) -> Tensor:
    r"""Log probability of counts under the zero-inflated negative binomial, elementwise.

    With :math:`\delta = \log \mu - \log r` (``log_odds``) and :math:`c = \log\Gamma(x + r) - \log\Gamma(r) - \log x!`
    (``constant``),

    .. math:: \log NB(x) = c + x \delta - (x + r) \log(1 + e^\delta), \qquad
              \log p(0) = \log(e^{gate} + NB(0)) - \log(1 + e^{gate}).
    """
    softplus = F.softplus(log_odds, threshold=30.0)  # its default of 20 drops 2e-9, which a large r magnifies
    log_nb = constant + x * log_odds - (x + r) * softplus
    return torch.where(x > 0, log_nb, torch.logaddexp(gate, log_nb)) - F.softplus(gate)


def _fit_scvi(train: np.ndarray, epochs: int, seed: int, n_latent: int) -> Any:
    try:
        import anndata
        import scvi
    except ImportError as error:
        raise ImportError("The peer is not installed: pip install 'pyro-scvi[peer]' brings scvi-tools.") from error
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity = logging.ERROR
    scvi.settings.seed = seed
    data = anndata.AnnData(train.astype(np.float32))
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(data, n_latent=n_latent)
    model.train(
        max_epochs=epochs,
        train_size=1.0,
        accelerator="cpu",
        plan_kwargs={"n_epochs_kl_warmup": max(1, min(20, epochs // 2))},
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    return model


@torch.no_grad()
def _encoder_start(network: torch.nn.Module, counts: Tensor) -> tuple[Tensor, Tensor]:
    q, _ = network.z_encoder(counts.log1p(), torch.zeros_like(counts[:, :1]))
    log_total = counts.sum(1, keepdim=True).clamp(min=1).log()
    loc = torch.cat([q.loc, log_total], 1)
    return loc, torch.cat([q.scale, torch.full_like(log_total, LIBRARY_START_SCALE)], 1)


def _check_varying(train: np.ndarray) -> None:
    constant = int((train.max(0) == train.min(0)).sum())
    if constant:
        raise ValueError(
            f"Factor analysis needs genes that vary over the training cells; {constant} do not, "
            "their noise variance would be zero and any other count infinitely improbable. Drop these genes."
        )
