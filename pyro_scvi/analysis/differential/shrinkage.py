"""Shrunken fold changes: a unimodal prior around no change, learned over the genes (Stephens 2017, ash)."""

from __future__ import annotations

import numpy as np
from scipy.special import log_expit

SCALES = 0.25 * 2.0 ** np.arange(0, 6, 0.5)  # sd of the prior's components, in log2 units
NULL_COUNT = 10  # genes without change that the prior is given beforehand, as ash does
REACH, POINTS = 8, 161  # of the grid: standard errors to either side, and points
ROUNDS, TOLERANCE = 1000, 1e-4  # of expectation maximisation
AT_ONCE = 1024  # genes
TINY = 1e-300  # a component that explains nothing of a gene
TABLE = ("lfc_shrunk", "lfc_shrunk_sd", "lfsr")


def shrunken(molecules_a: np.ndarray, molecules_b: np.ndarray, per_mean: np.ndarray) -> dict[str, np.ndarray]:
    r"""Posterior mean and sd of the log2 fold change, and the local false sign rate, (genes,) each.

    .. math:: L(\beta) \propto p^{N_a} (1 - p)^{N_b}, \qquad logit\, p = \beta \log 2 + \log (s_b / s_a), \qquad
        \beta \sim \pi_0 \delta_0 + \sum_k \pi_k N(0, \sigma_k^2)

    Given its total, a gene's molecules are split between the groups binomially. N = m / s is the number of molecules
    that would leave a mean m as uncertain as it is, its variance being s times the mean. Unlike a normal law of lfc
    this holds for a gene that one group never shows. The weights of the prior are those that make all genes likeliest.

    Parameters
    ----------
    molecules_a, molecules_b
        N of either group, (genes,).
    per_mean
        log (s_b / s_a), (genes,).

    Returns
    -------
    dict
        ``lfc_shrunk``, ``lfc_shrunk_sd`` and ``lfsr``: the probability that the sign of the change is the other one, or
        that there is none.
    """
    columns = np.stack([molecules_a, molecules_b, per_mean])
    parts = np.array_split(columns, max(1, len(per_mean) // AT_ONCE), axis=1)
    integrals = np.concatenate([_integrals(*part) for part in parts], axis=1)  # (integrals, genes, components)
    component = integrals[0] * _weights(integrals[0])
    component /= component.sum(1, keepdims=True)
    mean, square, above, below = (component * integrals[1:] / np.maximum(integrals[0], TINY)).sum(2)
    sd = np.sqrt(np.maximum(square - mean**2, 0))
    return dict(zip(TABLE, (mean, sd, component[:, 0] + np.minimum(above, below)), strict=True))


def _integrals(n_a: np.ndarray, n_b: np.ndarray, per_mean: np.ndarray) -> np.ndarray:
    """Integrals of the likelihood of each component times 1, beta, beta^2, beta > 0 and beta < 0.

    (5, genes, components), the first component that of no change. A gene's likelihood is relative to its largest value.
    """
    half_a, half_b = n_a + 0.5, n_b + 0.5
    centre, se = (np.log(half_a / half_b) - per_mean) / np.log(2), np.sqrt(1 / half_a + 1 / half_b) / np.log(2)
    beta = centre[:, None] + se[:, None] * np.linspace(-REACH, REACH, POINTS)  # (genes, points)
    counts = n_a[:, None], n_b[:, None], per_mean[:, None]
    log_likelihood = _log_likelihood(beta, *counts)
    peak = log_likelihood.max(1, keepdims=True)
    likelihood = np.exp(log_likelihood - peak) * (se * 2 * REACH / (POINTS - 1))[:, None]
    prior = np.exp(-0.5 * (beta / SCALES[:, None, None]) ** 2) / (SCALES * np.sqrt(2 * np.pi))[:, None, None]
    powers = np.stack([np.ones_like(beta), beta, beta**2, beta > 0, beta < 0])
    of_normals = np.einsum("gp,kgp,ogp->ogk", likelihood, prior, powers, optimize=True)
    of_null = np.zeros((len(powers), len(n_a), 1))
    of_null[0] = np.exp(_log_likelihood(np.zeros_like(peak), *counts) - peak)
    return np.concatenate([of_null, of_normals], 2)


def _log_likelihood(beta: np.ndarray, n_a: np.ndarray, n_b: np.ndarray, per_mean: np.ndarray) -> np.ndarray:
    logit = beta * np.log(2) + per_mean
    return n_a * log_expit(logit) + n_b * log_expit(-logit)


def _weights(evidence: np.ndarray) -> np.ndarray:
    """Weights of the components (components,) by expectation maximisation, the first of them that of no change."""
    weights = np.full(evidence.shape[1], 1 / evidence.shape[1])
    for _ in range(ROUNDS):
        before = weights
        share = evidence * weights
        weights = (share / np.maximum(share.sum(1, keepdims=True), TINY)).sum(0)
        weights[0] += NULL_COUNT
        weights /= weights.sum()
        if np.abs(weights - before).max() < TOLERANCE:
            break
    return weights
