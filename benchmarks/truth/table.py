"""Checks of inference against references that share no code with it: quadrature, exact arithmetic, known latents.

Each row says what would have made it fail, and whether it did.
"""

import copy
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import torch
from scipy import special, stats

import pyro_scvi as ps
from benchmarks.quality.likelihood_accuracy import errors
from pyro_scvi.likelihoods.negative_binomial import ZINB

LEVELS = (0.5, 0.9, 0.99)
SLOPES = np.array([[1.0, 0.3], [0.8, -0.5], [-1.0, 0.4], [0.5, 0.9], [-0.7, -0.8], [1.2, 0.2]]) * 0.6
GRID = np.linspace(-6, 6, 301)
CENTRES = torch.tensor([[1.6, 1.6], [-1.6, -1.6], [1.6, -1.6], [-1.6, 1.6]])


@dataclass(frozen=True)
class Finding:
    """A row of the table; ``limit`` is what the error must stay below."""

    check: str
    reference: str
    result: str
    error: float
    limit: float
    fails_if: str


class Mixture:
    """Normals of sd 0.3 at the first of the centres, in equal shares."""

    def __init__(self, components: int) -> None:
        self.centres = CENTRES[:components]

    def __call__(self) -> dist.MixtureSameFamily:
        """The prior of z."""
        normals = dist.Normal(self.centres, torch.full_like(self.centres, 0.3)).to_event(1)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(len(self.centres))), normals)

    def log_density(self, points: np.ndarray) -> np.ndarray:
        """At points (n, 2)."""
        parts = stats.norm.logpdf(points[:, None], self.centres.numpy(), 0.3).sum(-1)
        return special.logsumexp(parts, 1) - np.log(len(self.centres))


@dataclass(frozen=True)
class Mirrored:
    """A fit with log mu = 1 + A |z|, cells of it, their evidence and the masses of the four quadrants of z."""

    fit: ps.Fit
    cells: ps.Cells
    evidence: np.ndarray
    masses: np.ndarray


def mirrored(components: int, n_cells: int) -> Mirrored:
    """Two latents whose sign the counts do not tell: as many modes as the prior has components."""
    prior, generator = Mixture(components), np.random.default_rng(0)
    library, likelihood = ps.libraries.NoLibrary(), ps.likelihoods.Poisson()
    model = ps.SCVI(6, 2, prior=prior, library=library, n_hidden=4, n_layers=1, norm=None, likelihood=likelihood)
    torch.manual_seed(0)
    x = generator.poisson(np.exp(1 + np.abs(prior().sample((64 + n_cells,)).numpy()) @ SLOPES.T))
    x[x.sum(1) == 0, 0] = 1
    fit = ps.fit(model, ps.Cells.from_counts(x[:64]), epochs=3, progress=False, validation=0)
    fold(fit.model)
    points = np.array(list(product(GRID, GRID)))
    log_mean = 1 + np.abs(points) @ SLOPES.T
    log_p = x[64:] @ log_mean.T - np.exp(log_mean).sum(1) - special.gammaln(x[64:] + 1).sum(1)[:, None]
    log_p = log_p + prior.log_density(points) + 2 * np.log(GRID[1] - GRID[0])
    evidence, quadrant = special.logsumexp(log_p, 1), (points > 0) @ [1, 2]
    masses = [special.logsumexp(log_p[:, quadrant == k], 1) for k in range(4)]
    return Mirrored(fit, ps.Cells.from_counts(x[64:]), evidence, np.exp(np.stack(masses, 1) - evidence[:, None]))


@torch.no_grad()
def fold(model: ps.SCVI) -> None:
    """Set a decoder of four hidden units to log mu = 1 + A |z|, as |z| = relu(z) + relu(-z)."""
    eye = torch.eye(2)
    slopes = torch.as_tensor(SLOPES).float()
    known = {(4, 2): torch.cat([eye, -eye]), (6, 4): torch.cat([slopes, slopes], 1), (4,): torch.zeros(4)}
    for value in model.decoder.parameters():
        value.copy_(known.get(tuple(value.shape), torch.ones(())))


def law() -> list[Finding]:
    """Log p(x) in float32 at extreme parameters."""
    facts = errors(thinned=7)().facts
    text = f"{facts['points']:,} points, worst |d| / (1 + |log p|)"
    return [
        Finding("log p(x), float32", "60 digits (mpmath)", text, facts["value"], 1e-5, "any point is wrong by 1e-5"),
        Finding("its gradients", "60 digits (mpmath)", text, facts["gradient"], 1e-3, "any point is wrong by 1e-3"),
    ]


def counts_drawn(n: int) -> list[Finding]:
    """Draws of zero-inflated negative binomial counts."""
    theta = {"log_mean": 1.0, "log_inverse_dispersion": 0.4, "gate_logits": -1.2}
    one = ZINB().marginal(**{name: torch.tensor([value]) for name, value in theta.items()})
    torch.manual_seed(0)
    drawn = one.sample((n,)).flatten().long().clamp(max=20)
    p = one.log_prob(torch.arange(20.0)[:, None]).exp().flatten().double().numpy()
    found = np.bincount(drawn.numpy(), minlength=21)
    chi2 = stats.chisquare(found, np.append(p, 1 - p.sum()) * n)
    text = f"chi-square of {n:,} draws in 21 cells, p = {chi2.pvalue:.2f}"
    return [Finding("draws of counts", "its own p(x)", text, 1 - chi2.pvalue, 0.999, "p is below .001")]


def modes(n_cells: int) -> list[Finding]:
    """Evidence and samplers where the posterior has two and four modes."""
    rows = []
    for components in (2, 4):
        toy, where = mirrored(components, n_cells), f"{components} modes, {n_cells} cells"
        table = ps.evidence(toy.fit, toy.cells, progress=False)
        far = (np.abs(table.log_evidence - toy.evidence) > 4 * table.se + 0.02) & (table.khat <= 0.7)
        text = f"{far.mean():.0%} of the cells are off by 4 se and .02 nats, not flagged"
        rows.append(Finding(f"evidence, {where}", "quadrature", text, far.mean(), 0.05, "more than 5 %"))
        for sampler in (ps.Refined(), ps.Importance(), ps.HMC()):
            draws = ps.sample_posterior(toy.fit, toy.cells, samples=400, sampler=sampler, progress=False)
            quadrant = (draws.z.values > 0) @ [1, 2]
            found = np.stack([(quadrant == k).mean(0) for k in range(4)], 1)
            told = draws.rhat.values > 1.05 if "rhat" in draws else draws.khat.values > 0.7
            off = (np.abs(found - toy.masses).max(1) > 0.1) & ~told
            text = f"{off.mean():.0%} of the cells have a P(mode) off by .1, not flagged"
            name = f"{type(sampler).__name__}, {where}"
            rows.append(Finding(name, "quadrature", text, off.mean(), 0.05, "more than 5 %"))
    return rows


def trained(n_genes: int = 40) -> ps.Fit:
    """The default model, fitted to negative binomial counts of 400 cells with one latent."""
    r = np.random.default_rng(0)
    mu = np.exp(r.normal(1, 0.8, n_genes) + r.normal(size=(400, 1)) * r.normal(size=n_genes) * 0.7)
    model = ps.SCVI(n_genes, 2, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(n_genes)))
    return ps.fit(model, ps.Cells.from_counts(r.poisson(r.gamma(2, mu / 2))), epochs=30, progress=False)


def intervals(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Intervals of w in cells whose w is known."""
    torch.manual_seed(0)
    with torch.no_grad():
        nodes = pyro.poutine.trace(fit.model.eval()).get_trace(None, torch.zeros(n_cells, 0), marginal=False).nodes
    w, x = (nodes[name]["value"].numpy() for name in "wx")
    kept = x.sum(1) > 0
    cells, tails = ps.Cells.from_counts(x[kept].astype(np.int64)), [(1 - level) / 2 for level in LEVELS]
    rows = []
    for sampler in (ps.Refined(), ps.Importance()):
        ends = ps.impute(fit, cells, quantiles=[*tails, *(1 - tail for tail in tails)], sampler=sampler)
        held = [((w[kept] >= low) & (w[kept] <= high)).mean() for low, high in zip(ends[:3], ends[3:], strict=True)]
        text = ", ".join(f"{level:.0%}: {share:.3f}" for level, share in zip(LEVELS, held, strict=True))
        worst = max(abs(share - level) for share, level in zip(held, LEVELS, strict=True))
        name = f"intervals of w, {type(sampler).__name__}, {n_cells} cells"
        rows.append(Finding(name, "w that made the counts", text, worst, 0.02, "a share is off by 2 points"))
    return rows


def ranks(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Simulation-based calibration of the samplers."""
    rows = []
    for sampler, thin in ((ps.Refined(), 1), (ps.Importance(), 1), (ps.HMC(), 5)):
        table = ps.calibrate(fit, n_cells, sampler=sampler, thin=thin, progress=False).summary
        text = f"smallest p of uniform ranks {table.rank_p.min():.2g}, 90 % hold {table.coverage_90.min():.3f} or more"
        name = f"ranks, {type(sampler).__name__}, {n_cells} cells"
        error = float((table.coverage_90 - 0.9).abs().max() / table.se_90.max())
        rows.append(Finding(name, "latents that made the counts", text, error, 4, "coverage is off by 4 se"))
    return rows


def checks(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Predictive checks of cells of the fit, and of one with other dispersions."""
    wider = copy.deepcopy(fit.model)
    with torch.no_grad():
        wider.likelihood.dispersion.log_inverse_dispersion.sub_(1.0)
    own, other = (_checked(fit, model, n_cells, sets) for model, sets in ((fit.model, 6), (wider, 2)))
    names = own[0].genes.columns.unique(0)
    held = np.mean([_inside(check.genes[name]) for check in own for name in names])
    outside = np.mean([1 - _inside(check.genes["variance_given_mean"]) for check in other])
    first = f"{held:.3f} of genes and statistics, 6 sets of {n_cells} cells"
    second = f"{outside:.0%} of the genes outside their band of variance given the mean"
    return [
        Finding("90 % bands of check_predictions", "the fit's own cells", first, abs(held - 0.9), 0.03, "off by .03"),
        Finding("a dispersion wrong by 2.7", "the fit's cells", second, 1 - outside, 0.7, "30 % or fewer are outside"),
    ]


def _checked(fit: ps.Fit, model: ps.SCVI, n_cells: int, sets: int) -> list[ps.criticism.Checks]:
    drawn = (ps.prior_predictive(model, n_cells, seed=seed) for seed in range(sets))
    return [ps.check_predictions(fit, ps.Cells.from_counts(x[x.sum(1) > 0])) for x in drawn]


def _inside(statistic: pd.DataFrame) -> float:
    return float(((statistic.observed >= statistic.low) & (statistic.observed <= statistic.high)).mean())


def rows_of(n_cells: int) -> list[Callable[[], list[Finding]]]:
    """The checks, most with so many cells."""
    fit = trained()
    return [
        law,
        lambda: counts_drawn(1000 * n_cells),
        lambda: modes(n_cells // 4),
        lambda: intervals(fit, n_cells),
        lambda: ranks(fit, n_cells),
        lambda: checks(fit, n_cells),
    ]


def table_of(n_cells: int) -> pd.DataFrame:
    """Run all checks; progress goes to the error stream."""
    found = list[Finding]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of k-hat, which the rows count
        for row in rows_of(n_cells):
            started = time.perf_counter()
            found += row()
            sys.stderr.write(f"{found[-1].check}: {time.perf_counter() - started:.0f} s\n")
    return pd.DataFrame(found).assign(holds=[row.error < row.limit for row in found])


def printed(table: pd.DataFrame) -> str:
    """The table in Markdown."""
    lines = ["| check | reference | result | error | fails if | holds |", "|---|---|---|---|---|---|"]
    for row in table.itertuples():
        held = "yes" if row.holds else "**no**"
        lines.append(f"| {row.check} | {row.reference} | {row.result} | {row.error:.2g} | {row.fails_if} | {held} |")
    return "\n".join(lines) + "\n"
