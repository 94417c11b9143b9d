"""The two peers, factor analysis and scvi-tools: held-out log probabilities of counts.

Every function takes dense matrices of raw counts, train (cells, genes) and test (cells, genes). Both peers are scored
in nats per test cell, in float64, with the latents integrated out by the importance sampler that also scores this
package's models: so any remaining error of the sampler is on every side of a comparison.
"""

import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.baselines import FactorAnalysis
from pyro_scvi.baselines.evidence import Evidence, integrate
from pyro_scvi.baselines.scvi_tools import Generative, trained
from pyro_scvi.types import LogJoint


class FactorScores(NamedTuple):
    """Scores of the test cells by :func:`factor_analysis`.

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

    .. math:: \log \int N(z; 0, I) \prod_g P\big(y_g \in [\log(x_g + \tfrac12), \log(x_g + \tfrac32)] \mid z\big) dz

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
    started = time.perf_counter()
    fitted = FactorAnalysis(n_latent, seed=seed).fit(train)
    fit_seconds = time.perf_counter() - started
    log_density = fitted.score_samples(test)
    started = time.perf_counter()
    probability = fitted.evidence(test, samples=samples, seed=seed)
    return FactorScores(log_density, probability, fit_seconds, time.perf_counter() - started)


class ScviTools(NamedTuple):
    """A fitted scvi-tools model with what is needed to integrate its latents; made by :func:`scvi_tools`.

    ``model`` is the fitted SCVI, ``network`` its module in float64 and eval mode, ``library_loc`` and
    ``library_scale`` the normal law of the log totals of the training cells, ``counts`` the test cells (cells, genes),
    ``loc`` and ``scale`` the encoder's start for u = (z, log library), (cells, latents + 1).
    """

    model: Any
    network: Any  # a module of scvi-tools, which has no types
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

    def log_joint(self, cells: slice | Tensor = slice(None)) -> LogJoint:
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
