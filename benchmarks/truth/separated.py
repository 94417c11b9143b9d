"""Posteriors with two, three and four modes: evidence, samplers and their flags against sums over a grid."""

from dataclasses import dataclass

import numpy as np
import pyro.distributions as dist
import torch
from scipy import special, stats

import pyro_scvi as ps
from benchmarks.truth.finding import Finding
from benchmarks.truth.fits import points

SD = 0.3  # of each component of the prior
CENTRES = {
    "2 modes": [[1.6, 1.6], [-1.6, -1.6]],
    "4 modes": [[1.6, 1.6], [-1.6, -1.6], [1.6, -1.6], [-1.6, 1.6]],
    "4 modes of 3 latents": [[1.6, 1.6, 1.6], [-1.6, -1.6, 1.6], [-1.6, 1.6, -1.6], [1.6, -1.6, -1.6]],
}
POINTS = {1: 2_000, 2: 300, 3: 60}  # of the grid, along each latent


class Mixture:
    """Normals of sd 0.3 at the centres, in equal shares."""

    def __init__(self, centres: list[list[float]]) -> None:
        self.centres = torch.tensor(centres)

    def __call__(self) -> dist.MixtureSameFamily:
        """The prior of z."""
        normals = dist.Normal(self.centres, torch.full_like(self.centres, SD)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(self.centres))), normals)

    def log_density(self, at: np.ndarray) -> np.ndarray:
        """At points (n, latents)."""
        parts = stats.norm.logpdf(at[:, None], self.centres.numpy(), SD).sum(-1)
        return special.logsumexp(parts, 1) - np.log(len(self.centres))


@dataclass(frozen=True)
class Mirrored:
    """A fit with log mu = 1 + A |z|, cells of it, their evidence, and the masses of the orthants of z."""

    fit: ps.Fit
    cells: ps.Cells
    evidence: np.ndarray
    masses: np.ndarray


def slopes(n_genes: int, n_latent: int) -> np.ndarray:
    """A: the counts of all genes together tell each abs(z) to some .3."""
    return np.random.default_rng(0).normal(size=(n_genes, n_latent)) * 1.5 / n_genes**0.5


def mirrored(centres: list[list[float]], n_cells: int, n_genes: int = 6) -> Mirrored:
    """Latents whose sign the counts do not tell: as many modes as the prior has components."""
    prior, generator, size = Mixture(centres), np.random.default_rng(0), len(centres[0])
    library, likelihood = ps.libraries.NoLibrary(), ps.likelihoods.Poisson()
    options = {"n_hidden": 2 * size, "n_layers": 1, "norm": None, "likelihood": likelihood}
    model = ps.SCVI(n_genes, size, prior=prior, library=library, **options)
    torch.manual_seed(0)
    drawn = prior().sample((64 + n_cells,)).numpy()
    x = generator.poisson(np.exp(1 + np.abs(drawn) @ slopes(n_genes, size).T))
    x[x.sum(1) == 0, 0] = 1
    fit = ps.fit(model, ps.Cells.from_counts(x[:64]), epochs=3, progress=False, validation=0)
    fold(fit.model)
    evidence, masses = by_orthant(x[64:], prior)
    return Mirrored(fit, ps.Cells.from_counts(x[64:]), evidence, masses)


def by_orthant(x: np.ndarray, prior: Mixture) -> tuple[np.ndarray, np.ndarray]:
    """Log p(x) of cells (cells,), and the posterior probability of each orthant (cells, orthants)."""
    size = prior.centres.shape[1]
    n = POINTS[size]
    at = points(n, -4.5, 4.5, size)
    log_mean = 1 + np.abs(at) @ slopes(x.shape[1], size).T
    log_p = x @ log_mean.T - np.exp(log_mean).sum(1) - special.gammaln(x + 1).sum(1)[:, None]
    log_p = log_p + prior.log_density(at) + size * np.log(9 / (n - 1))
    evidence, own = special.logsumexp(log_p, 1), orthant(at)
    masses = [special.logsumexp(log_p[:, own == k], 1) for k in range(2**size)]
    return evidence, np.exp(np.stack(masses, 1) - evidence[:, None])


def orthant(z: np.ndarray) -> np.ndarray:
    """The number of the orthant of z (..., latents)."""
    return (z > 0) @ (2 ** np.arange(z.shape[-1]))


@torch.no_grad()
def fold(model: ps.SCVI) -> None:
    """Set a decoder of two hidden units for each latent to log mu = 1 + A |z|, as |z| = relu(z) + relu(-z)."""
    eye, head = torch.eye(model.n_latent), model.decoder.heads["log_mean"]
    a = torch.as_tensor(slopes(model.n_genes, model.n_latent)).float()
    hidden = [value for name, value in model.decoder.named_parameters() if not name.startswith("heads")]
    for value in hidden:
        value.copy_(torch.cat([eye, -eye]) if value.dim() > 1 else torch.zeros_like(value))
    head.weight.copy_(torch.cat([a, a], 1))
    head.bias.fill_(1.0)


def modes(n_cells: int) -> list[Finding]:
    """Evidence and samplers where the posterior has several modes, with few genes and with many."""
    rows = []
    for name, centres in CENTRES.items():
        for n_genes in (6, 60):
            toy, where = mirrored(centres, n_cells, n_genes), f"{name}, {n_genes} genes"
            rows.append(_evidence(toy, where))
            rows += [_shares(toy, where, sampler) for sampler in (ps.Refined(), ps.Importance(), ps.HMC())]
    return rows


def _evidence(toy: Mirrored, where: str) -> Finding:
    table = ps.evidence(toy.fit, toy.cells, progress=False)
    far = (np.abs(table.log_evidence - toy.evidence) > 4 * table.se + 0.02) & (table.khat <= 0.7)
    text = f"{far.mean():.0%} of {len(far)} cells are off by 4 se and .02 nats, not flagged"
    return Finding(f"evidence, {where}", "sums over a grid", text, far.mean(), 0.05, "more than 5 %")


def _shares(toy: Mirrored, where: str, sampler: ps.Refined | ps.Importance | ps.HMC) -> Finding:
    draws = ps.sample_posterior(toy.fit, toy.cells, samples=400, sites=("z",), sampler=sampler, progress=False)
    own = orthant(draws.z.values)
    found = np.stack([(own == k).mean(0) for k in range(toy.masses.shape[1])], 1)
    told = draws.rhat.values > 1.05 if "rhat" in draws else draws.khat.values > 0.7
    off = (np.abs(found - toy.masses).max(1) > 0.1) & ~told
    text = f"{off.mean():.0%} of {len(off)} cells have a P(mode) off by .1, not flagged"
    return Finding(f"{type(sampler).__name__}, {where}", "sums over a grid", text, off.mean(), 0.05, "more than 5 %")
