"""Fits whose posteriors are known, and fits to real counts."""

from itertools import product
from typing import NamedTuple

import numpy as np
import pyro
import torch
from scipy import special, stats

import pyro_scvi as ps

SHAPE, PI = 2.0, 0.2  # r, and the probability that a count is lost
LEVEL = np.array([1.0, 0.5, 1.5, 0.0, 1.2, 0.8, 2.0, -0.5])  # log mu at z = 0
SLOPE = np.array([0.8, -0.6, 0.5, 1.0, -0.9, 0.3, -0.4, 0.7])
GRID = np.linspace(-7, 7, 561)  # of z


class Drawn(NamedTuple):
    """Cells with what made them: z (cells,), and w, h and x (cells, genes)."""

    z: np.ndarray
    w: np.ndarray
    h: np.ndarray
    x: np.ndarray

    @property
    def cells(self) -> ps.Cells:
        """The counts."""
        return ps.Cells.from_counts(self.x)


def line(n_cells: int, seed: int) -> Drawn:
    """Cells of z ~ N(0, 1), log mu = level + slope z, and zero-inflated negative binomial counts."""
    r = np.random.default_rng(seed)
    z = r.normal(size=n_cells)
    mu = np.exp(LEVEL + SLOPE * z[:, None])
    w = r.gamma(SHAPE, mu / SHAPE)
    h = r.random(w.shape) < PI
    x = r.poisson(w) * ~h
    kept = x.sum(1) > 0
    return Drawn(z[kept], w[kept], h[kept], x[kept])


def line_fit(shape: float = SHAPE) -> ps.Fit:
    """A fit with the decoder of :func:`line`, and another inverse dispersion if one is given; only the guide learns."""
    n_genes = len(LEVEL)
    likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(n_genes))
    linear, none = ps.networks.LinearDecoder(), ps.libraries.NoLibrary()
    model = ps.SCVI(n_genes, 1, likelihood=likelihood, library=none, decoder=linear).requires_grad_(False)
    known = {"log_mean": (SLOPE, LEVEL), "gate_logits": (0 * SLOPE, 0 * LEVEL + special.logit(PI))}
    for name, (slope, level) in known.items():
        model.decoder.heads[name].weight.copy_(torch.as_tensor(slope)[:, None])
        model.decoder.heads[name].bias.copy_(torch.as_tensor(level))
    model.likelihood.dispersion.log_inverse_dispersion.fill_(np.log(shape))
    return ps.fit(model, line(400, 0).cells, epochs=20, validation=0, data_start=False, progress=False)


def log_density_on_grid(x: np.ndarray, shape: float = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """Log p(x_ng | z) (cells, genes, grid) and log p(z) times the step of the grid (grid,), by SciPy."""
    mu = np.exp(LEVEL[:, None] + SLOPE[:, None] * GRID)
    counts = np.log1p(-PI) + stats.nbinom.logpmf(x[..., None], shape, shape / (shape + mu))
    log_p = np.where(x[..., None] == 0, np.logaddexp(np.log(PI), counts), counts)
    return log_p, stats.norm.logpdf(GRID) + np.log(GRID[1] - GRID[0])


def log_evidence(x: np.ndarray, shape: float = SHAPE) -> np.ndarray:
    """Log p(x) of cells (cells,), by quadrature."""
    log_p, of_grid = log_density_on_grid(x, shape)
    return special.logsumexp(log_p.sum(1) + of_grid, -1)


def trained(n_genes: int = 40) -> ps.Fit:
    """The default model, fitted to negative binomial counts of 400 cells with one latent."""
    r = np.random.default_rng(0)
    mu = np.exp(r.normal(1, 0.8, n_genes) + r.normal(size=(400, 1)) * r.normal(size=n_genes) * 0.7)
    model = ps.SCVI(n_genes, 2, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(n_genes)))
    return ps.fit(model, ps.Cells.from_counts(r.poisson(r.gamma(2, mu / 2))), epochs=30, progress=False)


def real() -> dict[str, ps.Fit]:
    """Two models, each fitted to the 100 genes with most counts of 700 blood cells."""
    counts = ps.datasets.pbmc68k_reduced().X.toarray()
    cells = ps.Cells.from_counts(counts[:, np.sort(np.argsort(-counts.sum(0))[:100])])
    likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(100))
    models = {
        "pbmc68k, default": ps.SCVI(100, 4),
        "pbmc68k, NB, Student-t": ps.SCVI(100, 3, likelihood=likelihood, prior=ps.priors.StudentT(3)),
    }
    return {name: ps.fit(model, cells, epochs=20, progress=False) for name, model in models.items()}


def simulated(fit: ps.Fit, n_cells: int) -> dict[str, np.ndarray]:
    """Values of all sites in cells of the fit's model with one count or more, by Pyro's own trace of the program."""
    torch.manual_seed(0)
    constants = torch.zeros(n_cells, fit.model.n_covariates)
    with torch.no_grad():
        nodes = pyro.poutine.trace(fit.model.eval()).get_trace(None, constants, marginal=False).nodes
    values = {name: nodes[name]["value"].numpy() for name in nodes if name in {"z", "l", "w", "h", "x"}}
    kept = values["x"].sum(1) > 0
    return {name: value[kept] for name, value in values.items()}


def points(n: int, low: float, high: float, size: int) -> np.ndarray:
    """A grid (n ** size, size) of the cube from low to high, and none of its points is 0 if n is even."""
    return np.array(list(product(*[np.linspace(low, high, n)] * size)))
