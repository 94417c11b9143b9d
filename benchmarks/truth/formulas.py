"""Closed forms against exact arithmetic, SciPy's densities, and numerical integrals."""

import math
from collections.abc import Callable
from itertools import product

import numpy as np
import pyro
import torch
from scipy import special, stats

import pyro_scvi as ps
from benchmarks.quality.likelihood_accuracy import errors
from benchmarks.truth.finding import Finding
from benchmarks.truth.fits import points
from pyro_scvi.distributions.gamma_ratio import SharedDispersion, Side, probability_less
from pyro_scvi.likelihoods.negative_binomial import ZINB

POINTS = 2_000  # random parameters of the conditionals
LOG_RATES = np.linspace(-150, 8, 8_001)  # where rates w are integrated over: a shape of .1 puts much below mu / 1000
SHAPES, MEANS = (0.1, 1.0, 7.0, 60.0), (0.02, 1.0, 30.0)
N_DRAWS, BINS, STEP = 20_000, 20, 0.1  # of each prior; of the grid over its plane


def law() -> list[Finding]:
    """Log p(x) in float32 at extreme parameters."""
    facts = errors(thinned=7)().facts
    text = f"{facts['points']:,} points, worst error relative to 1 + abs(log p)"
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
    mean, r, pi = math.exp(1.0), math.exp(0.4), special.expit(-1.2)
    p = (1 - pi) * stats.nbinom.pmf(np.arange(20), r, r / (r + mean)) + pi * (np.arange(20) == 0)
    chi2 = stats.chisquare(np.bincount(drawn.numpy(), minlength=21), np.append(p, 1 - p.sum()) * n)
    text = f"chi-square of {n:,} draws in 21 cells, p = {chi2.pvalue:.2f}"
    return [Finding("draws of counts", "SciPy", text, 1 - chi2.pvalue, 0.999, "p is below .001")]


def conditionals() -> list[Finding]:
    """w, y and h given x and theta: every draw by Bayes' rule, and the mean of w by an integral."""
    r = np.random.default_rng(0)
    log_mean, log_r, gate = r.uniform(-3, 4, POINTS), r.uniform(-2, 4, POINTS), r.uniform(-4, 2, POINTS)
    mu, shape, pi = np.exp(log_mean), np.exp(log_r), special.expit(gate)
    x = r.poisson(r.gamma(shape, mu / shape)) * (r.random(POINTS) > pi)
    numbers = {"log_mean": log_mean, "log_inverse_dispersion": log_r, "gate_logits": gate}
    theta = {name: torch.as_tensor(value) for name, value in numbers.items()}
    torch.manual_seed(0)
    nodes = pyro.poutine.trace(ZINB().condition).get_trace(torch.as_tensor(x).double(), theta)
    nodes.compute_log_prob()
    w, y, h = (nodes.nodes[name]["value"].numpy() for name in "wyh")
    log_q = sum(nodes.nodes[name]["log_prob"].numpy() for name in "wyh")
    joint = stats.gamma.logpdf(w, shape, scale=mu / shape) + stats.poisson.logpmf(y, w) + stats.bernoulli.logpmf(h, pi)
    joint = np.where(x == y * (1 - h), joint, -np.inf)
    gap = np.abs(joint - log_q - _log_zinb(x, mu, shape, pi)).max()
    mean = ZINB().expected_rate(torch.as_tensor(x).double(), theta).numpy()
    off = np.abs(mean / _mean_rate(x, mu, shape, pi) - 1).max()
    rule, bar = "p(x, y, w, h) by SciPy", "a draw breaks Bayes' rule by 1e-6 nats"
    text = f"{POINTS:,} draws, worst log p(x, y, w, h) - log q(y, w, h) - log p(x)"
    mean_text = f"{POINTS:,} parameters, worst relative error"
    return [
        Finding("w, y, h given x and z", rule, text, gap, 1e-6, bar),
        Finding("E[w] given x and z", "an integral over w", mean_text, off, 1e-3, "any is wrong by .1 %"),
    ]


def _log_zinb(x: np.ndarray, mu: np.ndarray, shape: np.ndarray, pi: np.ndarray) -> np.ndarray:
    counts = np.log1p(-pi) + stats.nbinom.logpmf(x, shape, shape / (shape + mu))
    return np.where(x == 0, np.logaddexp(np.log(pi), counts), counts)


def _mean_rate(x: np.ndarray, mu: np.ndarray, shape: np.ndarray, pi: np.ndarray) -> np.ndarray:
    """E[w | x] by sums over log w, in which the density has the factor w."""
    w = np.exp(LOG_RATES)
    means = []
    for count, mean, r, lost in zip(x, mu, shape, pi, strict=True):
        seen = (1 - lost) * stats.poisson.pmf(count, w) + lost * (count == 0)
        log_prior = r * LOG_RATES - r * w / mean
        weight = seen * np.exp(log_prior - log_prior.max())
        means.append((weight * w).sum() / weight.sum())
    return np.array(means)


def pairs() -> list[Finding]:
    """P(w_a < w_b), which differential expression averages: the exact form, and the table for a shared r."""
    found, exact, from_table, shared = [], [], [], []
    for r_a, r_b, mean_a, mean_b in product(SHAPES, SHAPES, MEANS, MEANS):
        sides = [Side(*torch.tensor([[[m]], [[r]]]).log()) for m, r in ((mean_a, r_a), (mean_b, r_b))]
        found.append(float(probability_less(*sides)))
        exact.append(_probability_less(r_a, mean_a, r_b, mean_b))
        if r_a == r_b:
            table = SharedDispersion(torch.tensor([math.log(r_a)]))
            from_table.append(float(table(*sides)))
            shared.append(exact[-1])
    worst, worst_table = (float(np.abs(np.subtract(*both)).max()) for both in ((found, exact), (from_table, shared)))
    text, integral = "{} pairs of distributions, worst error", "an integral over w"
    return [
        Finding("P(w_a < w_b)", integral, text.format(len(exact)), worst, 1e-5, "any pair is wrong by 1e-5"),
        Finding("the same, shared r", integral, text.format(len(shared)), worst_table, 3e-5, "any is wrong by 3e-5"),
    ]


def _probability_less(r_a: float, mean_a: float, r_b: float, mean_b: float) -> float:
    """The sum over w of the density of a times the survival of b."""
    w = np.exp(LOG_RATES)
    log_density = r_a * LOG_RATES - r_a * w / mean_a + r_a * math.log(r_a / mean_a) - special.gammaln(r_a)
    above = special.gammaincc(r_b, w * r_b / mean_b)
    return float((np.exp(log_density) * above).sum() * (LOG_RATES[1] - LOG_RATES[0]))


def priors() -> list[Finding]:
    """Every prior with a density: its integral over two latents, and its draws."""
    torch.manual_seed(0)
    pseudo = torch.poisson(torch.full((5, 6), 3.0))
    made = {
        "StandardNormal": ps.priors.StandardNormal(2),
        "ARDNormal": ps.priors.ARDNormal(2),
        "StudentT": ps.priors.StudentT(2),
        "Laplace": ps.priors.Laplace(2),
        "GaussianMixture": ps.priors.GaussianMixture(2, 4),
        "VampPrior": ps.priors.VampPrior(6, 2, 5, pseudo_cells=pseudo),
        "Flow": ps.priors.Flow(2),
    }
    on_simplex = {"LogisticNormal": ps.priors.LogisticNormal(2), "Dirichlet": ps.priors.Dirichlet(2, 1.5)}
    found = [_plane(prior) for prior in made.values()] + [_simplex(prior) for prior in on_simplex.values()]
    off, p = max(abs(total - 1) for total, _ in found), min(value for _, value in found)
    bar = 0.001 / len(found)
    text = f"{len(found)} priors, largest distance from 1"
    drawn = f"chi-square of {N_DRAWS:,} draws each, smallest p {p:.2g}"
    return [
        Finding("integrals of priors", "sums over a grid", text, off, 0.003, "one is off by .003"),
        Finding("draws of priors", "sums of their densities", drawn, 1 - p, 1 - bar, f"a p is below {bar:.1g}"),
    ]


@torch.no_grad()
def _plane(prior: Callable) -> tuple[float, float]:
    """The integral over the plane, and the p-value of draws in bins of the first latent plus half the second."""
    grid, law = points(401, -20, 20, 2), prior()
    mass = law.log_prob(torch.as_tensor(grid).float()).exp().double().numpy() * STEP**2
    torch.manual_seed(0)
    drawn = (law.sample((N_DRAWS,)) / STEP).round().double().numpy() * STEP  # to the points of the grid
    return mass.sum(), _p_of_draws(drawn @ [1, 0.5], grid @ [1, 0.5], mass)


@torch.no_grad()
def _simplex(prior: Callable) -> tuple[float, float]:
    """The same over proportions (t, 1 - t), with midpoints."""
    t, law = (np.arange(20_000) + 0.5) / 20_000, prior()
    density = law.log_prob(torch.as_tensor(np.stack([t, 1 - t], 1)).float()).exp().double().numpy()
    torch.manual_seed(0)
    return density.mean(), _p_of_draws(law.sample((N_DRAWS,))[:, 0].double().numpy(), t, density / len(t))


def _p_of_draws(drawn: np.ndarray, grid: np.ndarray, mass: np.ndarray) -> float:
    """Chi-square over bins that hold equal shares of the mass on the grid."""
    order = np.argsort(grid)
    upto = mass[order].cumsum() / mass.sum()
    edges = grid[order][np.searchsorted(upto, np.arange(1, BINS) / BINS)] + 1e-6  # points on an edge are below it
    expected = np.diff(np.concatenate([[0], [mass[grid <= edge].sum() / mass.sum() for edge in edges], [1]]))
    counts = np.bincount(np.searchsorted(edges, drawn), minlength=BINS)
    return float(stats.chisquare(counts, expected * len(drawn)).pvalue)


def weight_priors() -> list[Finding]:
    """Priors on weights: their densities, and their share in the log joint of minibatches."""
    worst = max(_joint_gap(name, prior) for name, prior in WEIGHT_PRIORS.items())
    text = f"{len(WEIGHT_PRIORS)} priors, log joint of all cells and mean over 4 minibatches, worst relative error"
    return [Finding("priors on weights", "SciPy", text, worst, 1e-5, "one is wrong by 1e-5")]


WEIGHT_PRIORS = {
    "normal": ps.weights.NormalWeights(0.7),
    "ard": ps.weights.ARDWeights(0.5),
    "horseshoe": ps.weights.HorseshoeWeights(0.3),
    "hierarchical": ps.weights.HierarchicalWeights(1.5),
    "random walk": ps.weights.RandomWalkWeights(0.4, 1.2),
}
NAME = "decoder.heads.log_mean.weight"


def _joint_gap(kind: str, prior: Callable) -> float:
    linear, none, poisson = ps.networks.LinearDecoder(), ps.libraries.NoLibrary(), ps.likelihoods.Poisson()
    model = ps.SCVI(5, 2, decoder=linear, library=none, likelihood=poisson, weight_priors={NAME: prior}).double().eval()
    torch.manual_seed(0)
    x = torch.poisson(torch.full((12, 5), 2.0)).double()
    drawn = pyro.poutine.trace(model).get_trace(x)
    fixed = {name: drawn.nodes[name]["value"].detach() for name in drawn.nodes if name == "z" or name.startswith(NAME)}
    found = [_log_joint(model, x, fixed, rows) for rows in (slice(None), *(slice(k, k + 3) for k in range(0, 12, 3)))]
    bias = model.decoder.heads["log_mean"].bias.detach().numpy()
    values = {name: value.numpy() for name, value in fixed.items()}
    exact = _by_scipy(kind, values, x.numpy(), bias)
    return max(abs(found[0] - exact), abs(np.mean(found[1:]) - exact)) / abs(exact)


@torch.no_grad()
def _log_joint(model: ps.SCVI, x: torch.Tensor, fixed: dict[str, torch.Tensor], rows: slice) -> float:
    """That of the program with the cells in ``rows`` as a minibatch."""
    own = {name: value[rows] if name == "z" else value for name, value in fixed.items()}
    index = torch.arange(len(x))[rows]
    run = pyro.poutine.trace(pyro.poutine.condition(model, data=own))
    return float(run.get_trace(x[rows], index=index, n_cells=len(x)).log_prob_sum())


def _by_scipy(kind: str, at: dict[str, np.ndarray], x: np.ndarray, bias: np.ndarray) -> float:
    """Log p(x, z, weights) of all cells."""
    weight, log_prior = LOG_PRIORS[kind]({name.removeprefix(NAME): value for name, value in at.items()})
    z = at["z"][:, 0]
    return log_prior + stats.norm.logpdf(z).sum() + stats.poisson.logpmf(x, np.exp(z @ weight.T + bias)).sum()


def _normal(at: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    return at[""], stats.norm.logpdf(at[""], 0, 0.7).sum()


def _ard(at: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    scale = at[".scale"]
    return at[""], stats.halfcauchy.logpdf(scale, 0, 0.5).sum() + stats.norm.logpdf(at[""], 0, scale).sum()


def _horseshoe(at: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    t, local, raw = at[".global"], at[".local"], at[".raw"]
    log_p = stats.halfcauchy.logpdf(t, 0, 0.3) + stats.halfcauchy.logpdf(local).sum() + stats.norm.logpdf(raw).sum()
    return t * local * raw, log_p


def _hierarchical(at: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    mean, sd = at[".mean"], at[".sd"]
    log_p = stats.norm.logpdf(mean, 0, 1.5) + stats.halfnorm.logpdf(sd, 0, 1.5)
    return at[""], log_p + stats.norm.logpdf(at[""], mean, sd).sum()


def _random_walk(at: dict[str, np.ndarray]) -> tuple[np.ndarray, float]:
    steps = np.diff(at[""], axis=0)
    return at[""], stats.norm.logpdf(at[""][0], 0, 1.2).sum() + stats.norm.logpdf(steps, 0, 0.4).sum()


LOG_PRIORS = {
    "normal": _normal,
    "ard": _ard,
    "horseshoe": _horseshoe,
    "hierarchical": _hierarchical,
    "random walk": _random_walk,
}
