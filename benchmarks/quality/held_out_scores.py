"""Held-out scores of a fit of this package or of scvi-tools: the evidence bound (ELBO), or the evidence."""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pyro_scvi as ps
from benchmarks.harness.data import dense
from benchmarks.harness.elbo import Estimate, Outputs, held_out_elbo
from benchmarks.systems import peers
from benchmarks.systems.our_models import as_cells
from pyro_scvi.baselines.scvi_tools import Generative


def our_outputs(fit: ps.Fit) -> Outputs:
    """A fit of ours for the shared estimator; for models with an observed library and without covariates."""
    guide = copy.deepcopy(fit.guide).double().eval()
    model = guide.model.double().eval()

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        code = guide.encode(x, x.new_zeros(len(x), 0), None)
        return code.loc["z"], code.scale["z"]

    def decode(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gamma = x.new_zeros(len(x), 0)
        theta = model.decode(z[..., None, :], model.library(x, gamma), gamma)
        return theta["log_mean"], theta["log_inverse_dispersion"], theta["gate_logits"]

    return Outputs(encode, decode)


def peer_outputs(model: Any) -> Outputs:
    """A fit of scvi-tools for the shared estimator; for its default configuration without batches."""
    fitted = peer_with_evidence(model, np.ones((2, model.module.n_input), dtype=np.float32), None)
    network = fitted.network

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        q, _ = network.z_encoder(x.log1p(), torch.zeros_like(x[:, :1]))
        return q.loc, q.scale

    def decode(z: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_mean, gate = fitted.decode(z, x.sum(-1).log().expand(z.shape[:-1]))
        return log_mean, network.px_r.detach(), gate

    return Outputs(encode, decode)


def peer_with_evidence(model: Any, train: np.ndarray, test: np.ndarray | None) -> peers.ScviTools:
    """A fit of scvi-tools with what its evidence needs: z and the library are integrated out of the test cells."""
    network = copy.deepcopy(model.module).cpu().double().eval().requires_grad_(False)
    log_totals = np.log(train.sum(1, dtype=np.float64))
    counts = torch.from_numpy((train if test is None else test).astype(np.float64))
    loc, scale = Generative(network, 0.0, 1.0).start(counts)
    return peers.ScviTools(model, network, log_totals.mean(), log_totals.std(), counts, loc, scale, 0.0)


class Bound:
    """Judges by the held-out evidence bound, nats per cell."""

    def ours(self, fit: ps.Fit, held_out: Any) -> Estimate:
        """The bound of a fit of ours."""
        return held_out_elbo(our_outputs(fit), torch.from_numpy(dense(held_out)).double())

    def peer(self, model: Any, train: Any, held_out: Any) -> Estimate:
        """The bound of a fit of scvi-tools."""
        return held_out_elbo(peer_outputs(model), torch.from_numpy(dense(held_out)).double())


@dataclass(frozen=True)
class Evidence:
    """Judges by log p(x) of the first held-out cells, all latents integrated out, nats per cell."""

    cells: int = 128
    samples: int = 1000

    def ours(self, fit: ps.Fit, held_out: Any) -> Estimate:
        """The evidence of a fit of ours."""
        table = ps.evidence(fit, as_cells(held_out[: self.cells]), samples=self.samples)
        return _mean(table.log_evidence.to_numpy(), table.se.to_numpy())

    def peer(self, model: Any, train: Any, held_out: Any) -> Estimate:
        """The evidence of a fit of scvi-tools."""
        fitted = peer_with_evidence(model, dense(train), dense(held_out[: self.cells]))
        table = fitted.evidence(samples=self.samples)
        return _mean(table.log_evidence, table.se)


JUDGES: dict[str, Bound | Evidence] = {
    "bound": Bound(),
    "evidence": Evidence(),
    "evidence of few": Evidence(cells=4, samples=50),
}


def _mean(values: np.ndarray, se: np.ndarray) -> Estimate:
    return Estimate(float(values.mean()), float(np.sqrt(np.square(se).sum()) / len(se)))
