"""Diagnostics with faults planted: what is right must pass, and what is wrong must be found."""

import copy
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import special

import pyro_scvi as ps
from benchmarks.truth.finding import Finding
from benchmarks.truth.fits import LEVEL, SLOPE, line, log_density_on_grid
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.samplers import Draws, Sampler

SETS, OF_WRONG = 12, 3  # data sets of the fit, and of another
STEP = 0.01  # of the power, as prior_sensitivity takes it


@dataclass(frozen=True)
class Wrong:
    """A sampler whose draws are moved and stretched by so many posterior standard deviations."""

    shift: float = 0.0
    stretch: float = 1.0

    def draw(self, guide: Guide, x: torch.Tensor, gamma: torch.Tensor, samples: int) -> Draws:
        """Draw from the posterior, then do wrong."""
        draws = ps.Importance().draw(guide, x, gamma, samples)
        z = draws.sites["z"]
        moved = z.mean(0) + self.stretch * (z - z.mean(0)) + self.shift * z.std(0)
        return draws._replace(sites=draws.sites | {"z": moved})


def calibration(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Calibrate with a right sampler and with wrong ones."""
    wrong = {"narrow": Wrong(stretch=0.7), "wide": Wrong(stretch=1.4), "moved": Wrong(shift=0.4)}
    right = _rank_p(fit, ps.Importance(), n_cells)
    found = {name: _rank_p(fit, sampler, n_cells) for name, sampler in wrong.items()}
    worst = max(found.values())
    text = f"{n_cells} cells, p of ranks of z " + ", ".join(f"{p:.1g} {name}" for name, p in found.items())
    title, planted = "calibrate", "draws .7 and 1.4 times as wide, or moved by .4 sd"
    return [
        Finding(
            title, "an exact sampler", f"{n_cells} cells, p of ranks of z {right:.2g}", 1 - right, 0.999, "p < .001"
        ),
        Finding(title, planted, text, worst, 0.01, "one has p above .01"),
    ]


def _rank_p(fit: ps.Fit, sampler: Sampler, n_cells: int) -> float:
    return float(ps.calibrate(fit, n_cells, sampler=sampler, thin=1, progress=False).summary.rank_p["z_0"])


def checks(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Predictive checks of cells of the fit, and of one with other dispersions."""
    wider = copy.deepcopy(fit.model)
    with torch.no_grad():
        wider.likelihood.dispersion.log_inverse_dispersion.sub_(1.0)
    rows = []
    for sampler in (ps.Amortized(), ps.criticism.NewLatents()):
        held = np.array([_inside(check) for check in _checked(fit, fit.model, n_cells, SETS, sampler)])
        share, se = held.mean(), held.mean(1).std(ddof=1) / SETS**0.5
        text = f"{share:.3f} (se {se:.3f}) of genes and statistics, {SETS} sets of {n_cells} cells"
        title = f"90 % bands of check_predictions, {type(sampler).__name__}"
        error = max(0.0, abs(share - 0.9) - 2 * se)
        rows.append(Finding(title, "the fit's own cells", text, error, 0.03, "off by .03 and 2 se"))
    other = _checked(fit, wider, n_cells, OF_WRONG, ps.Amortized())
    outside = np.mean([1 - _share(check.genes["variance_given_mean"]) for check in other])
    text = f"{outside:.0%} of the genes outside their band of variance given the mean"
    bar = "30 % or fewer are outside"
    return [*rows, Finding("a dispersion wrong by a factor of 2.7", "the fit's cells", text, 1 - outside, 0.7, bar)]


def _checked(fit: ps.Fit, model: ps.SCVI, n_cells: int, sets: int, sampler: Sampler) -> list[ps.criticism.Checks]:
    """Each with a seed of its own: one seed would compare all of them with the same few simulated sets."""
    drawn = [ps.prior_predictive(model, n_cells, seed=seed) for seed in range(sets)]
    cells = [ps.Cells.from_counts(x[x.sum(1) > 0]) for x in drawn]
    return [ps.check_predictions(fit, one, sampler=sampler, seed=seed) for seed, one in enumerate(cells)]


def _inside(check: ps.criticism.Checks) -> list[float]:
    return [_share(check.genes[name]) for name in check.genes.columns.unique(0)]


def _share(statistic: pd.DataFrame) -> float:
    return float(((statistic.observed >= statistic.low) & (statistic.observed <= statistic.high)).mean())


def sensitivity(fit: ps.Fit) -> list[Finding]:
    """Prior_sensitivity of usual cells, and of one that the prior contradicts."""
    usual = line(4, 8).x
    far = np.random.default_rng(0).poisson(np.exp(LEVEL + SLOPE * 4.5))[None]  # z = 4.5 under a prior N(0, 1)
    x = np.concatenate([usual, far])
    tree = ps.to_datatree(
        fit, ps.Cells.from_counts(x), samples=4000, sites=("z",), sampler=ps.Importance(proposals=4000)
    )
    table = ps.prior_sensitivity(tree)
    exact = np.stack([_exact(x, powers) for powers in (lambda a: (a, 1.0), lambda a: (1.0, a))], 1)
    off = float(np.abs(table[["prior", "likelihood"]].to_numpy() - exact).max())
    text = f"{len(x)} cells, 4,000 draws, worst error; noise is up to {table.prior_noise.max():.3f}"
    told = f"prior {table.prior.iloc[-1]:.3f} where z is 4.5, {table.prior.iloc[:-1].max():.3f} or less in usual cells"
    gap = float(table.prior.iloc[:-1].max() / table.prior.iloc[-1])
    return [
        Finding("prior_sensitivity", "sums over a grid", text, off, 0.03, "any is wrong by .03"),
        Finding("the same", "a cell beyond its prior", told, gap, 0.7, "the cell does not stand out"),
    ]


def _exact(x: np.ndarray, powers) -> np.ndarray:
    """Cumulative Jensen-Shannon distance to posteriors with scaled powers, per unit of log2 alpha, of each cell."""
    log_p, of_grid = log_density_on_grid(x)
    base, moved = _masses(log_p, of_grid, 1.0, 1.0), []
    for alpha in (1 - STEP, 1 + STEP):
        scaled = _masses(log_p, of_grid, *powers(alpha))
        sides = [_distance(b, s) for b, s in ((base, scaled), (base[:, ::-1], scaled[:, ::-1]))]
        moved.append(np.maximum(*sides) / abs(np.log2(alpha)))
    return np.mean(moved, 0)


def _masses(log_p: np.ndarray, of_grid: np.ndarray, prior: float, likelihood: float) -> np.ndarray:
    return special.softmax(likelihood * log_p.sum(1) + prior * of_grid, -1)


def _distance(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Of laws on the grid (cells, grid), over the range in which draws lie."""
    f, g = p.cumsum(-1), q.cumsum(-1)
    drawn = (f > 2e-4) & (f < 1 - 2e-4)
    both = np.maximum(f + g, 1e-300)
    total = special.xlogy(f, 2 * f / both) + special.xlogy(g, 2 * g / both)
    return np.sqrt((total * drawn).sum(-1) / np.log(2) / ((f + g) * drawn).sum(-1))
