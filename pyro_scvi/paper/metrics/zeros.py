"""Probabilities that zero counts are technical, from every zero-inflated model of Table 2."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pyro_scvi import baselines
from pyro_scvi.analysis.inputs import batches_in_streams
from pyro_scvi.analysis.posterior_samples import decoded
from pyro_scvi.baselines.zinbwave import model as zinbwave_model
from pyro_scvi.data.cells import Cells
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.samplers import Amortized
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.negative_binomial import ZINB
from pyro_scvi.paper.data.corruption import EXPECTED_ZERO
from pyro_scvi.training.fitted import Fit
from pyro_scvi.types import Theta
from pyro_scvi.utils.random_state import seeded

MEAN, RATE = "mu", "E[w | x]"
PI, RHO, ZERO = "pi", "rho", EXPECTED_ZERO
AT_ONCE = 64  # cells whose draws are decoded together

Answers = dict[str, np.ndarray]


def answers(likelihood: Likelihood, x: Tensor, theta: Theta) -> dict[str, Tensor]:
    r"""Averages over draws of z, each (cells, genes), of counts x (cells, genes) and theta (samples, cells, genes).

    mu, the mean given no dropout; E[w | x, z]; pi = P(h = 1 | z); rho = P(h = 1 | x = 0, z) = pi / P(x = 0 | z),
    computed as if the entry were zero, since a positive count would reveal the answer; P(x = 0 | z) = pi + (1 - pi)
    NB(0).
    """
    logits = likelihood.technical_zero_logits(**theta)
    if logits is None:
        raise ValueError(f"expected a likelihood with technical zeros, got {likelihood!r}; take ZINB")
    drawn = {
        MEAN: theta["log_mean"].exp(),
        RATE: likelihood.expected_rate(x, theta),
        PI: torch.sigmoid(theta["gate_logits"]),
        RHO: torch.sigmoid(logits),
        ZERO: likelihood.marginal(**theta).log_prob(torch.zeros_like(x)).exp(),
    }
    return {name: value.mean(0) for name, value in drawn.items()}


def of_fit(fit: Fit, cells: Cells, *, samples: int, seed: int) -> Answers:
    """:func:`answers` of a model of ours, over draws of its guide."""
    parts = []
    with evaluating(fit.model, fit.guide, seed):
        for x, gamma in batches_in_streams(fit, cells, AT_ONCE, seed):
            drawn = Amortized().draw(fit.guide, x, gamma, samples)
            parts.append(answers(fit.model.likelihood, x, decoded(fit, x, gamma, drawn)))
    return _joined(parts)


def of_scvi_tools(method: baselines.SCVITools, counts: np.ndarray, *, samples: int, seed: int) -> Answers:
    """:func:`answers` of scvi-tools, over draws of its encoder, at each cell's own total as its defaults have it."""
    law, parts = method.generative_, []
    log_r = law.network.px_r.detach()
    with seeded(seed), torch.no_grad():
        for x in torch.from_numpy(counts).double().split(AT_ONCE):
            loc, scale = law.start(x)
            z = loc[:, :-1] + scale[:, :-1] * torch.randn(samples, len(x), loc.shape[1] - 1, dtype=x.dtype)
            log_mean, gate = law.decode(z, loc[:, -1].expand(samples, -1))
            theta = {"log_mean": log_mean, "log_inverse_dispersion": log_r, "gate_logits": gate}
            parts.append(answers(ZINB(), x, theta))
    return _joined(parts)


def of_zinb_wave(method: baselines.ZINBWaVE, counts: np.ndarray) -> Answers:
    """:func:`answers` of ZINB-WaVE at the W and gamma of its fit to these counts."""
    cells = zinbwave_model.CellParameters(*map(torch.from_numpy, (method.W_, method.gamma_mu_, method.gamma_pi_)))
    fitted = method.alpha_mu_, method.alpha_pi_, method.beta_mu_, method.beta_pi_, method.zeta_
    genes = zinbwave_model.GeneParameters(*map(torch.from_numpy, fitted))
    ones, v_cov = torch.ones(len(counts), 1, dtype=torch.float64), torch.from_numpy(method.gene_covariates_)
    gate = zinbwave_model.gate_logits(ones, v_cov, cells.w, cells.gamma_pi, genes.alpha_pi, genes.beta_pi)
    log_mean = zinbwave_model.log_mean(ones, v_cov, cells, genes)
    theta = {"log_mean": log_mean, "log_inverse_dispersion": genes.zeta, "gate_logits": gate}
    return _joined([answers(ZINB(), torch.from_numpy(counts), {name: value[None] for name, value in theta.items()})])


def of_zifa(method: baselines.ZIFA, counts: np.ndarray) -> Answers:
    r"""ZIFA's counterparts, at the posterior mean of z, with eta = A z + mu and c = 1 / (1 + 2 lambda sigma^2).

    pi is the authors' probability, :math:`e^{-\lambda E[u | x = 0]^2}` with :math:`E[u | x = 0, z] = c \eta`;
    :math:`P(x = 0 | z) = \sqrt c\, e^{-\lambda c \eta^2}`. There is no rho: every zero is technical.
    """
    eta = method.transform(counts) @ method.loadings_.T + method.mean_
    c = 1 / (1 + 2 * method.decay_ * np.square(method.scale_))
    return {
        PI: np.exp(-method.decay_ * np.square(c * eta)),
        ZERO: np.sqrt(c) * np.exp(-method.decay_ * c * np.square(eta)),
    }


def _joined(parts: list[dict[str, Tensor]]) -> Answers:
    return {name: torch.cat([part[name] for part in parts]).cpu().numpy() for name in parts[0]}
