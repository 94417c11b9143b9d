"""What is computed from posteriors: evidence, comparison, effective draws, intervals, ranks, left-out entries."""

import numpy as np
from scipy import special, stats

import pyro_scvi as ps
from benchmarks.truth.finding import Finding
from benchmarks.truth.fits import GRID, PI, SHAPE, line, line_fit, log_density_on_grid, log_evidence, simulated
from pyro_scvi.inference.samplers import Sampler

LEVELS = (0.5, 0.9, 0.99)
SEEDS, SETS, RUNS = 50, 40, 20
DRAWS = 1000  # of z: a 99 % interval of 100 draws ends at the outermost ones


def evidence(fit: ps.Fit) -> list[Finding]:
    """Evidence of few cells with many seeds: its error in units of the stated one."""
    cells = line(8, 1)
    truth = log_evidence(cells.x)
    tables = [ps.evidence(fit, cells.cells, samples=200, seed=seed, progress=False) for seed in range(SEEDS)]
    z = np.array([(table.log_evidence - truth) / table.se for table in tables])
    size = float(np.sqrt((z**2).mean()))
    text = f"error / se over {SEEDS} seeds and {len(truth)} cells: root mean square {size:.2f}, mean {z.mean():.2f}"
    return [Finding("evidence", "sums over a grid", text, abs(size - 1), 0.25, "the first is off 1 by .25")]


def comparison(fit: ps.Fit, n_cells: int) -> list[Finding]:
    """Whether intervals of the difference between two models hold that of all cells."""
    other, many = line_fit(SHAPE / 2), line(10_000, 2).x
    truth = (log_evidence(many, SHAPE / 2) - log_evidence(many)).mean()
    held = []
    for seed in range(SETS):
        fits = {"right": fit, "wrong": other}
        table = ps.compare(fits, line(n_cells, 100 + seed).cells, samples=200, seed=seed, progress=False)
        row = table.iloc[1]  # from the better one, whichever it is in this data set
        difference = row.difference * (1 if row.name == "wrong" else -1)
        held.append(abs(difference - truth) < stats.t.ppf(0.975, n_cells - 1) * row.difference_se)
    share = float(np.mean(held))
    text = f"95 % intervals of the difference hold {share:.3f} over {SETS} sets of {n_cells} cells"
    known = "sums over a grid, 10,000 cells"
    return [Finding("compare", known, text, abs(share - 0.95), 0.11, "the share is off by 3 of its errors")]


def effective_draws(fit: ps.Fit) -> list[Finding]:
    """The effective number of draws against the spread of means over runs."""
    cells = line(8, 3)
    log_p, of_grid = log_density_on_grid(cells.x)
    weight = special.softmax(log_p.sum(1) + of_grid, -1)
    mean = weight @ GRID
    variance = weight @ GRID**2 - mean**2
    sampler = ps.HMC(warmup=50, least=50)
    options = {"samples": 200, "sites": ("z",), "sampler": sampler, "progress": False}
    runs = [ps.sample_posterior(fit, cells.cells, seed=seed, **options) for seed in range(RUNS)]
    squares = np.mean([(run.z.values[..., 0].mean(0) - mean) ** 2 for run in runs], 0)
    ratio = float(np.mean(squares * np.mean([run.ess.values for run in runs], 0) / variance))
    text = f"squared error of the mean of z times ess / variance: {ratio:.2f}, {RUNS} runs of {len(mean)} cells"
    return [Finding("ess of HMC", "sums over a grid", text, abs(np.log(ratio)), 0.4, "the ratio is off 1 by half")]


def left_out(fit: ps.Fit) -> list[Finding]:
    """Single entries given the others of their cell, and their probability integral transforms."""
    few, many = line(8, 4), line(60, 5)
    log_p, of_grid = log_density_on_grid(few.x)
    without = log_p.sum(1, keepdims=True) - log_p + of_grid
    truth = special.logsumexp(without + log_p, -1) - special.logsumexp(without, -1)
    found = ps.leave_one_out(fit, few.cells, samples=4000, progress=False)
    off = np.abs(found.elpd.values - truth)[found.khat.values < 0.7].max()
    text = f"{truth.size} entries, worst error of log p(x | the others), nats, where k-hat is below .7"
    pit = ps.leave_one_out(fit, many.cells, samples=500, progress=False).pit.values
    p = stats.kstest(pit.ravel(), "uniform").pvalue
    uniform = f"Kolmogorov-Smirnov of {pit.size} transforms, p = {p:.2f}"
    return [
        Finding("leave_one_out", "sums over a grid", text, off, 0.1, "any is wrong by .1"),
        Finding("its PIT", "cells of the fit", uniform, 1 - p, 0.999, "p is below .001"),
    ]


def technical_zeros(fit: ps.Fit) -> list[Finding]:
    """P(h = 1 | x): by sums over the latent, and by how often h was 1."""
    few, many = line(8, 6), line(600, 7)
    log_p, of_grid = log_density_on_grid(few.x)
    at_zero, _ = log_density_on_grid(np.zeros_like(few.x[:1]))
    weight = special.softmax(log_p.sum(1) + of_grid, -1)
    truth = np.einsum("cz,gz->cg", weight, PI / np.exp(at_zero[0])) * (few.x == 0)
    found = ps.technical_zero_probability(fit, few.cells, samples=1000, sampler=ps.Importance())
    off = np.abs(found - truth).max()
    p = ps.technical_zero_probability(fit, many.cells, samples=50, sampler=ps.Refined(steps=30))[many.x == 0]
    excess = float((many.h[many.x == 0] - p).sum() / np.sqrt((p * (1 - p)).sum()))
    text, frequency = (
        f"{truth.size} entries, worst error",
        f"of {len(p):,} zeros, technical ones minus expected ones: {excess:.1f} standard errors",
    )
    return [
        Finding("technical zeros", "sums over a grid", text, off, 0.03, "any is wrong by .03"),
        Finding("the same", "h that made the counts", frequency, abs(excess), 4, "4 standard errors or more"),
    ]


def intervals(fit: ps.Fit, name: str, n_cells: int) -> list[Finding]:
    """Intervals of w and of z at default settings, in cells whose w and z are known."""
    known = simulated(fit, n_cells)
    cells, tails = ps.Cells.from_counts(known["x"].astype(np.int64)), [(1 - level) / 2 for level in LEVELS]
    rows = []
    for sampler in (ps.Refined(), ps.Importance()):
        ends = ps.impute(fit, cells, quantiles=[*tails, *(1 - tail for tail in tails)], sampler=sampler)
        where = f"{type(sampler).__name__}, {name}"
        rows.append(_held(f"w, {where}", known["w"], ends, ""))
        draws = ps.sample_posterior(fit, cells, samples=DRAWS, sites=("z",), sampler=sampler, progress=False)
        sure = draws.khat.values <= 0.7
        ends = np.quantile(draws.z.values[:, sure], [*tails, *(1 - tail for tail in tails)], axis=0)
        flagged = f"; k-hat is above .7 for {1 - sure.mean():.0%} of the cells, not counted"
        rows.append(_held(f"z, {where}", known["z"][sure, 0], ends, flagged))
    return rows


def _held(name: str, truth: np.ndarray, ends: np.ndarray, note: str) -> Finding:
    """Shares of ``truth`` between the ends at lower and upper tails; the error is beyond two of the shares' own."""
    inside = [(truth >= low) & (truth <= high) for low, high in zip(*np.split(ends, 2), strict=True)]
    # Values of a cell hang together: the spread is that of shares of cells.
    se = [each.reshape(len(each), -1).mean(1).std(ddof=1) / len(each) ** 0.5 for each in inside]
    text = ", ".join(f"{level:.0%}: {each.mean():.3f}" for level, each in zip(LEVELS, inside, strict=True))
    off = [abs(each.mean() - level) - 2 * s for each, level, s in zip(inside, LEVELS, se, strict=True)]
    text, bar = f"{text} (se {max(se):.3f}){note}", "a share is off by 2 points and 2 se"
    return Finding(f"intervals of {name}", "values that made the counts", text, max(0.0, *off), 0.02, bar)


def ranks(fit: ps.Fit, name: str, n_cells: int) -> list[Finding]:
    """Simulation-based calibration of the samplers."""
    rows = []
    samplers: list[tuple[Sampler, int]] = [(ps.Refined(), 1), (ps.Importance(), 1), (ps.HMC(), 5)]
    for sampler, thin in samplers:
        table = ps.calibrate(fit, n_cells, sampler=sampler, thin=thin, progress=False).summary
        p, held = table.rank_p.min(), table.coverage_90.min()
        text = f"{n_cells} cells, smallest p of uniform ranks {p:.2g}, 90 % hold {held:.3f} or more"
        error = float((table.coverage_90 - 0.9).abs().max() / table.se_90.max())
        bar = "coverage is off by 4 se"
        title = f"ranks, {type(sampler).__name__}, {name}"
        rows.append(Finding(title, "latents that made the counts", text, error, 4, bar))
    return rows
