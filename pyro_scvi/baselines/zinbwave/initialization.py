"""Starting values of ZINB-WaVE: matrix completion of the log counts, then a logistic regression of the zeros."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyro_scvi.baselines.zinbwave.lbfgs import Separable, Tensors, minimise
from pyro_scvi.baselines.zinbwave.model import (
    CellParameters,
    GammaTerms,
    GeneParameters,
    Penalties,
    gate_logits,
    without_gamma,
)

ALTERNATIONS = 2  # of the two regressions, as in zinbwave
COMPLETIONS, COMPLETED = 100, 1e-5  # most steps of the completion, and the relative change that ends it
LOGISTIC_TOL = 1e-3  # relative gain: this is a start
GRID = -4.0, 8.5, 0.5  # of log theta
TINY = 1e-300  # stands for the zeros, whose logarithm is never used


def start(
    x: Tensor, x_cov: Tensor, v_cov: Tensor, latents: int, penalties: Penalties, chunks: Sequence[slice]
) -> tuple[CellParameters, GeneParameters]:
    """Parameters before the fit (Risso et al. 2018, Methods, "Initialization"); deterministic.

    Where x > 0, log x is regressed on the covariates, and its residual, missing at the zeros, is completed by a matrix
    W alpha_mu of low rank. The zeros are then regressed on the covariates and W. Zeta is the best of a grid, equal for
    all genes. From a bad zeta the first step of the fit reaches the plateau of Poisson distributions, where the
    gradient of zeta vanishes.

    Parameters
    ----------
    x
        Counts, (cells, genes).
    x_cov, v_cov
        Covariates with the intercept first, (cells, .) and (genes, .).
    latents, penalties
        Columns of W, and the weights of the penalty.
    chunks
        Cells processed together.
    """
    gamma_mu, beta_mu = intercepts(x, x_cov, v_cov, penalties)
    left, right = torch.cat((x_cov, gamma_mu), 1), torch.cat((beta_mu, v_cov.T))
    w, alpha_mu = completed(x, left, right, latents, penalties, chunks)
    gamma_pi, alpha_pi, beta_pi = _regressed_zeros(x, x_cov, v_cov, w, penalties, chunks)

    def law(chunk: slice) -> tuple[Tensor, Tensor]:
        gate = gate_logits(x_cov[chunk], v_cov, w[chunk], gamma_pi[chunk], alpha_pi, beta_pi)
        return left[chunk] @ right + w[chunk] @ alpha_mu, gate

    zeta = _best_dispersion(x, law, chunks).repeat(penalties.dispersion.values(x.shape[1]))
    return CellParameters(w, gamma_mu, gamma_pi), GeneParameters(alpha_mu, alpha_pi, beta_mu, beta_pi, zeta)


def intercepts(x: Tensor, x_cov: Tensor, v_cov: Tensor, penalties: Penalties) -> tuple[Tensor, Tensor]:
    """Regressions of log x, x > 0, in turn on V for every cell and on X for every gene: gamma_mu and beta_mu."""
    beta = x.new_zeros(x_cov.shape[1], x.shape[1])
    for _ in range(ALTERNATIONS):
        gamma = regressed_logs(x, x_cov @ beta, v_cov, penalties.w)
        beta = regressed_logs(x.T, v_cov @ gamma.T, x_cov, penalties.alpha).T
    return gamma, beta


def regressed_logs(x: Tensor, offset: Tensor, design: Tensor, penalty: float) -> Tensor:
    """Ridge regression, for every row, of log x - offset where x > 0 on the design; its intercept is free.

    ``x`` and ``offset`` (rows, points), ``design`` (points, covariates); returns (rows, covariates).
    """
    observed = (x > 0).to(x.dtype)
    target = observed * (x.clamp(min=TINY).log() - offset)
    covariates = design.shape[1]
    products = (design[:, :, None] * design[:, None, :]).flatten(1)  # (points, covariates^2)
    gram = (observed @ products).unflatten(1, (covariates, covariates))
    ridge = torch.full((covariates,), penalty, dtype=x.dtype, device=x.device)
    ridge[0] = 0.0
    return torch.linalg.solve(gram + ridge.diag(), target @ design)


def completed(
    x: Tensor, left: Tensor, right: Tensor, latents: int, penalties: Penalties, chunks: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    r"""W and alpha_mu from the low-rank completion of R = log x - left right, missing where x = 0.

    .. math:: \min_M \tfrac12 \|P_{x > 0}(R - M)\|^2 + \lambda \|M\|_*, \quad rank(M) \le K, \quad
              \lambda = \sqrt{\epsilon_W \epsilon_\alpha}

    This repeatedly soft-thresholds the singular values of R filled with the last M (Mazumder, Hastie and Tibshirani
    2010, JMLR 11, Algorithm 1). One step of subspace iteration from the last right vectors replaces the singular value
    decomposition. Lambda is halved while M has a lower rank than K.
    """

    def filled(cells: slice) -> Tensor:
        residual = x[cells].clamp(min=TINY).log() - left[cells] @ right
        return torch.where(x[cells] > 0, residual, (u[cells] * s) @ v.T)

    u, s, v = x.new_zeros(len(x), latents), x.new_zeros(latents), x.new_zeros(x.shape[1], latents)
    # The first right vectors are those of R with zeros for what is missing.
    gram = torch.stack([filled(cells).T @ filled(cells) for cells in chunks]).sum(0)
    v = torch.linalg.eigh(gram)[1].flip(1)[:, :latents]
    threshold = (penalties.w * penalties.alpha) ** 0.5
    for _ in range(COMPLETIONS):
        # One step of subspace iteration in place of a singular value decomposition.
        q = torch.linalg.qr(torch.cat([filled(cells) @ v for cells in chunks]))[0]
        projected = torch.stack([q[cells].T @ filled(cells) for cells in chunks]).sum(0)
        rotation, values, vt = torch.linalg.svd(projected, full_matrices=False)
        while 0 < values[-1] <= threshold:
            threshold /= 2
        before, u, s, v = s, q @ rotation, (values - threshold).clamp(min=0), vt.T
        if (s - before).abs().max() <= COMPLETED * s[0]:
            break
    return penalties.balance * u * s.sqrt(), s.sqrt()[:, None] * v.T / penalties.balance


def _regressed_zeros(
    x: Tensor, x_cov: Tensor, v_cov: Tensor, w: Tensor, penalties: Penalties, chunks: Sequence[slice]
) -> Tensors:
    """Penalised logistic regression of 1[x = 0] on X, V and W: gamma_pi, alpha_pi, beta_pi."""

    def loss(cells: slice, rows: Tensors, shared: Tensors) -> Tensor:
        gate = gate_logits(x_cov[cells], v_cov, w[cells], *rows, *shared)
        return F.binary_cross_entropy_with_logits(gate, (x[cells] == 0).to(x.dtype), reduction="sum")

    def penalty(rows: Tensors, shared: Tensors) -> Tensor:
        return penalties.of_gate_cells(*rows) + penalties.of_gate_genes(*shared)

    gamma = x.new_zeros(len(x), v_cov.shape[1])
    alpha, beta = x.new_zeros(w.shape[1], x.shape[1]), x.new_zeros(x_cov.shape[1], x.shape[1])
    minimum = minimise(Separable(loss, penalty, chunks), (gamma,), (alpha, beta), tol=LOGISTIC_TOL, max_iter=100)
    return (*minimum.rows, *minimum.shared)


def _best_dispersion(x: Tensor, law: Callable[[slice], tuple[Tensor, Tensor]], chunks: Sequence[slice]) -> Tensor:
    """Zeta of the greatest likelihood on the grid, (1,); ``law`` gives log mu and logit pi of a slice of cells."""
    grid = torch.arange(*GRID, dtype=x.dtype, device=x.device)
    gamma_terms = GammaTerms(x)
    log_likelihoods = torch.stack([gamma_terms(zeta) for zeta in grid])
    for chunk in chunks:
        log_mu, gate = law(chunk)
        log_likelihoods += torch.stack([without_gamma(x[chunk], log_mu, gate, zeta) for zeta in grid])
    return grid[log_likelihoods.argmax()].reshape(1)
