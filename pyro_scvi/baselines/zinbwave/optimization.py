"""Maximum penalised likelihood of ZINB-WaVE: for all parameters together, or for those of the cells alone."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_scvi.baselines.zinbwave.initialization import regressed_logs, start
from pyro_scvi.baselines.zinbwave.lbfgs import Minimum, Separable, Tensors, minimise
from pyro_scvi.baselines.zinbwave.model import (
    CellParameters,
    GammaTerms,
    GeneParameters,
    Penalties,
    gate_logits,
    log_likelihood,
    log_mean,
    without_gamma,
)

ENTRIES = 2**17  # cells x genes treated together on a processor, whose cache then holds the intermediate results
ENTRIES_OF_GPU = 2**22  # on a GPU, which wants large pieces: some GB of its memory


class Distribution(NamedTuple):
    """Counts of some cells with their log mean and dropout logits, (cells, genes), and log theta, (genes or 1,)."""

    x: Tensor
    log_mu: Tensor
    gate: Tensor
    zeta: Tensor


class Problem(NamedTuple):
    """Counts (cells, genes) in float64 with the covariates X (cells, .) and V (genes, .), and the penalties."""

    x: Tensor
    x_cov: Tensor
    v_cov: Tensor
    penalties: Penalties

    @property
    def chunks(self) -> list[slice]:
        """Slices of cells processed together."""
        size = max(1, (ENTRIES if self.x.device.type == "cpu" else ENTRIES_OF_GPU) // self.x.shape[1])
        return [slice(first, first + size) for first in range(0, len(self.x), size)]

    def start(self, latents: int) -> tuple[CellParameters, GeneParameters]:
        """Starting values of the fit."""
        return start(self.x, self.x_cov, self.v_cov, latents, self.penalties, self.chunks)

    def law(self, chunk: slice, cells: CellParameters, genes: GeneParameters) -> Distribution:
        """Distribution of one slice of cells; ``cells`` are the parameters of that slice."""
        x_cov, gate = self.x_cov[chunk], (genes.alpha_pi, genes.beta_pi)
        logits = gate_logits(x_cov, self.v_cov, cells.w, cells.gamma_pi, *gate)
        return Distribution(self.x[chunk], log_mean(x_cov, self.v_cov, cells, genes), logits, genes.zeta)

    def laws(self, cells: CellParameters, genes: GeneParameters) -> Iterator[Distribution]:
        """Distribution of every slice in turn."""
        for chunk in self.chunks:
            yield self.law(chunk, CellParameters(*(t[chunk] for t in cells)), genes)

    def log_likelihood(self, cells: CellParameters, genes: GeneParameters) -> Tensor:
        """Without penalties, nats (cells,)."""
        return torch.cat([log_likelihood(*law) for law in self.laws(cells, genes)])

    def negative(self) -> Separable:
        """The negative penalised log likelihood as a function of (w, gamma) and (alpha, beta, zeta)."""
        gamma_terms = GammaTerms(self.x)

        def loss(chunk: slice, rows: Tensors, shared: Tensors) -> Tensor:
            return -without_gamma(*self.law(chunk, CellParameters(*rows), GeneParameters(*shared)))

        def penalty(rows: Tensors, shared: Tensors) -> Tensor:
            cells, genes = CellParameters(*rows), GeneParameters(*shared)
            return self.penalties.of_cells(cells) + self.penalties.of_genes(genes) - gamma_terms(genes.zeta)

        return Separable(loss, penalty, self.chunks)

    def maximise(self, cells: CellParameters, genes: GeneParameters, tol: float, max_iter: int) -> Minimum:
        """All parameters, from a start."""
        return minimise(self.negative(), tuple(cells), tuple(genes), tol=tol, max_iter=max_iter)

    def refit(self, genes: GeneParameters, tol: float, max_iter: int) -> Minimum:
        """The parameters of these cells, with those of the genes held fixed; from W = 0 and the mean residual log."""

        def loss(chunk: slice, rows: Tensors, _: Tensors) -> Tensor:
            return -without_gamma(*self.law(chunk, CellParameters(*rows), genes))

        def penalty(rows: Tensors, _: Tensors) -> Tensor:
            return self.penalties.of_cells(CellParameters(*rows))

        gamma_mu = regressed_logs(self.x, self.x_cov @ genes.beta_mu, self.v_cov, self.penalties.w)
        w = self.x.new_zeros(len(self.x), len(genes.alpha_mu))
        rows = w, gamma_mu, torch.zeros_like(gamma_mu)
        return minimise(Separable(loss, penalty, self.chunks), rows, (), tol=tol, max_iter=max_iter)
