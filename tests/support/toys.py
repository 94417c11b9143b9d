"""Small programs with latents of their own, and their posteriors on grids, by code that the package does not have."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import stats
from scipy.special import logsumexp

import pyro_scvi as ps
from pyro_scvi.program import cells_plate, check_inputs, register

N_GENES = 4
WEIGHTS, MEANS = torch.tensor([0.2, 0.3, 0.5]), torch.tensor([[-2.0], [0.0], [2.5]])
SHIFTS = torch.tensor([-1.0, 0.0, 1.2])
AFTER = torch.tensor([[0.7, 0.3], [0.5, 0.5], [0.1, 0.9]])


class Toy(ps.SCVI):
    """A program of one's own around ``log_mean``, which samples what is added to the decoder's."""

    def more(self):
        """What is added to every log mean, (..., cells, 1)."""
        raise NotImplementedError

    def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
        register(self)
        gamma = check_inputs(self, x, gamma)
        with cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior())
            more = self.more()
            theta = self.decode(z, self.library(x, gamma), gamma)
            theta["log_mean"] = theta["log_mean"] + more
            return self.observe(x, theta, marginal=marginal, mask=mask)


class Effect(Toy):
    def more(self):
        return pyro.sample("e", dist.Normal(0.0, 1.0))


class Cluster(Toy):
    def more(self):
        c = pyro.sample("c", dist.Categorical(WEIGHTS.double()), infer={"enumerate": "parallel"})
        return SHIFTS.double()[c]


class Chain(Toy):
    """Two discrete latents, the second given the first."""

    def more(self):
        c = pyro.sample("c", dist.Categorical(WEIGHTS.double()), infer={"enumerate": "parallel"})
        d = pyro.sample("d", dist.Categorical(AFTER.double()[c]), infer={"enumerate": "parallel"})
        return SHIFTS.double()[c] - 0.8 * d


class Positive(Toy):
    def more(self):
        return pyro.sample("a", dist.LogNormal(0.2, 0.5)).log() + pyro.sample("b", dist.Beta(2.0, 3.0))


def clusters():
    """A prior with a cluster that is summed out."""
    c = pyro.sample("c", dist.Categorical(WEIGHTS.double()), infer={"enumerate": "parallel"})
    return dist.Normal(MEANS.double()[c], 0.5).to_event(1)


def mixture():
    """The same law in closed form."""
    return dist.MixtureSameFamily(
        dist.Categorical(WEIGHTS.double()), dist.Normal(MEANS.double(), 0.5 * torch.ones(3, 1).double()).to_event(1)
    )


def toy(kind=ps.SCVI, **options):
    """A model of Poisson counts with one latent, in double precision."""
    options = {"likelihood": ps.likelihoods.Poisson(), "library": ps.libraries.NoLibrary()} | options
    return kind(N_GENES, 1, n_hidden=4, n_layers=1, norm=None, **options).double()


def cells_of(n=8, seed=0):
    return ps.Cells.from_counts(np.random.default_rng(seed).poisson(2.0, (n, N_GENES)))


def fit_of(model, guide=ps.guides.DiagonalNormal):
    """A fit as one makes it by hand, without training."""
    return ps.Fit(model.eval(), guide(model).double().eval(), pd.DataFrame(), cells_of().schema)


class Grid(NamedTuple):
    """Log p(x, latents) (cells, points) at points of a grid, each with its volume in it, and the latents there."""

    log_joint: np.ndarray
    latents: dict[str, np.ndarray]

    @property
    def log_evidence(self) -> np.ndarray:
        return logsumexp(self.log_joint, 1)

    def moments(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and sd of a latent, by cell."""
        weights = np.exp(self.log_joint - self.log_evidence[:, None])
        mean = weights @ self.latents[name]
        return mean, np.sqrt(weights @ self.latents[name] ** 2 - mean**2)


def grid_of(
    model: ps.SCVI,
    cells: ps.Cells,
    axes: dict[str, tuple[np.ndarray, np.ndarray]],
    more: Callable[[dict[str, np.ndarray]], np.ndarray],
) -> Grid:
    """The posterior on a grid: by latent its points and their log prior mass, and what is added to the log means."""
    points = np.meshgrid(*(points for points, _ in axes.values()), indexing="ij")
    masses = np.meshgrid(*(mass for _, mass in axes.values()), indexing="ij")
    latents = {name: values.ravel() for name, values in zip(axes, points, strict=True)}
    with torch.no_grad():
        eta = model.decoder(torch.as_tensor(latents["z"])[:, None], torch.zeros(len(latents["z"]), 0).double())
    rate = np.exp(eta["log_mean"].numpy() + more(latents)[:, None])
    log_p = sum(stats.poisson.logpmf(cells.counts[:, [g]], rate[:, g]) for g in range(N_GENES))
    return Grid(log_p + sum(mass.ravel() for mass in masses), latents)


def on_line(law, low, high, n):
    """Midpoints of an interval, and the log of a law's mass around each."""
    edges = np.linspace(low, high, n + 1)
    points = (edges[1:] + edges[:-1]) / 2
    return points, law.logpdf(points) + np.log(edges[1] - edges[0])


def of_values(weights):
    """The values of a discrete latent, and their log probabilities."""
    return np.arange(len(weights)), np.log(np.asarray(weights, float))
