"""Plain Pyro: the same model trained by SVI as a user would, and the evidence bound written out without Pyro."""

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import PyroOptim
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pyro_scvi as ps
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import as_cells, matched, matched_constant
from pyro_scvi.likelihoods.negative_binomial import ZINB


class PyroZINB(ZINB):
    """The likelihood by Pyro's own distribution."""

    def marginal(self, log_mean: Tensor, log_inverse_dispersion: Tensor, gate_logits: Tensor) -> dist.TorchDistribution:
        """Total count r and odds mu / r."""
        return dist.ZeroInflatedNegativeBinomial(
            log_inverse_dispersion.exp(), logits=log_mean - log_inverse_dispersion, gate_logits=gate_logits
        )


def plain(n_cells: int, n_genes: int, batch_size: int, epochs: int) -> Callable[[], Sample]:
    """Train as Pyro's tutorials do: SVI, Trace_ELBO, Pyro's likelihood and Adam, a DataLoader with default collate."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = matched(cells, 0)
    guide, likelihood = options["guide"], PyroZINB(model.likelihood.dispersion)
    model.likelihood = likelihood
    pyro.clear_param_store()
    svi = SVI(model, guide, PyroOptim(torch.optim.Adam, {"lr": 1e-3, "eps": 0.01}), Trace_ELBO())
    loader = DataLoader(TensorDataset(*cells[:]), batch_size=batch_size, shuffle=True)

    def epoch() -> float:
        return sum(svi.step(x, gamma) for x, gamma in loader) / n_cells

    epoch()

    def measure() -> Sample:
        with Stopwatch() as watch:
            losses = [epoch() for _ in range(epochs)]
        return watch.sample(work=n_cells * epochs, train_loss=losses[-1])

    return measure


class ByHand(Trace_ELBO):
    r"""The evidence bound of the matched model written out: no trace, no handler, no site.

    .. math:: L(n) = \log p(x_n | z_n) - KL(q(z | x_n) \| N(0, I)), \qquad z_n = loc + scale\, \epsilon
    """

    def loss_and_grads(
        self, model: ps.SCVI, guide: ps.guides.Guide, x: Tensor, gamma: Tensor, *, index: Tensor, n_cells: int
    ) -> float:
        """Negative bound of all ``n_cells`` estimated by the batch, nats; adds its gradients."""
        code = guide.encode(x, gamma, index)
        loc, scale = code.loc["z"], code.scale["z"]
        z = loc + scale * torch.randn_like(loc)
        theta = model.decode(z[:, None], model.library(x, gamma), gamma)
        kl = 0.5 * (loc.square() + scale.square() - 1).sum() - scale.log().sum()
        loss = (kl - model.likelihood.marginal(**theta).log_prob(x).sum()) * (n_cells / len(x))
        loss.backward()
        return loss.item()


def by_hand(n_cells: int, n_genes: int, batch_size: int, epochs: int) -> Callable[[], Sample]:
    """Train by ``ps.fit`` with the bound by hand: modules, likelihood, batches and optimiser are the same."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = matched_constant(cells, 0)
    options |= {"batch_size": batch_size, "device": "cpu", "validation": 0, "progress": False, "elbo": ByHand()}
    ps.fit(model, cells, **options | {"epochs": 1})

    def measure() -> Sample:
        with Stopwatch() as watch:
            fit = ps.fit(model, cells, **options | {"epochs": epochs})
        return watch.sample(work=n_cells * epochs, train_loss=float(fit.history.train_loss.iloc[-1]))

    return measure
