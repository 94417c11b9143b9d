"""Systems whose held-out evidence is compared: how each is fitted, and the log probabilities it gives to counts."""

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import numpy as np

import pyro_scvi as ps
from benchmarks.harness.cortex_split import Task
from benchmarks.systems import peers
from benchmarks.systems.our_models import Configured, default, default_bfloat16, seed_2017

DENSITY = "log density of log1p counts, Jacobian added"
INTEGRATED = "log probability, latents integrated out"
AMORTIZED = "evidence bound of the amortized posterior"
SYSTEMS = "fa", "scvi-tools", "seed", "default", "bfloat16"


class Score(NamedTuple):
    """One quantity of one fit: ``value`` and ``khat`` (cells,); ``khat`` is None where nothing was sampled."""

    quantity: str
    value: np.ndarray
    khat: np.ndarray | None
    fit_seconds: float
    score_seconds: float


class System(NamedTuple):
    """A row of the table: its name, how it is fitted and scored, and whether a seed makes another fit of it."""

    name: str
    score: Callable[[Task, int], Iterable[Score]]
    seeded: bool = True


def score_factor_analysis(task: Task, seed: int) -> list[Score]:
    """Score factor analysis: the paper's density and, from the same fit, the probability of counts."""
    result = peers.factor_analysis(*task.counts, seed=seed, samples=task.samples)
    probability = result.probability
    return [
        Score(DENSITY, result.log_density, None, result.fit_seconds, 0.0),
        Score(INTEGRATED, probability.log_evidence, probability.khat, result.fit_seconds, result.score_seconds),
    ]


def score_scvi_tools(task: Task, seed: int, *, epochs: int) -> list[Score]:
    """Fit and score scvi-tools with its defaults, the library integrated out with z."""
    fitted = peers.scvi_tools(*task.counts, epochs=epochs, seed=seed)
    started = time.perf_counter()
    result = fitted.evidence(samples=task.samples, seed=0)
    return [Score(INTEGRATED, result.log_evidence, result.khat, fitted.fit_seconds, time.perf_counter() - started)]


def score_ours(task: Task, seed: int, *, configure: Callable[[ps.Cells, int], Configured]) -> list[Score]:
    """Fit and score this package's model; ``configure`` (training cells, seed) gives the model and options of fit."""
    cells = ps.Cells.from_anndata(task.data)
    train, test = cells.take(task.train), cells.take(task.test)
    started = time.perf_counter()
    model, options = configure(train, seed)
    # As with the peers, on one kind of machine and on all training cells: nothing is stopped by held-out cells.
    options = {"seed": seed, "device": "cpu", "validation": 0, "progress": False, **options}
    fit = ps.fit(model, train, **options)
    fitted = time.perf_counter()
    table = ps.evidence(fit, test, samples=task.samples, seed=0)
    seconds = fitted - started, time.perf_counter() - fitted
    return [
        Score(INTEGRATED, table["log_evidence"].to_numpy(), table["khat"].to_numpy(), *seconds),
        Score(AMORTIZED, table["amortized_bound"].to_numpy(), None, *seconds),
    ]


def systems(names: Iterable[str], epochs: Iterable[int]) -> list[System]:
    """Look up the systems of the table; scvi-tools comes once for every number of ``epochs``."""
    rows = {
        "fa": [System("factor analysis", score_factor_analysis, seeded=False)],
        "scvi-tools": [System(f"scvi-tools, {n} epochs", partial(score_scvi_tools, epochs=n)) for n in epochs],
        "seed": [System("pyro-scvi, seed 2017", partial(score_ours, configure=seed_2017))],
        "default": [System("pyro-scvi, default", partial(score_ours, configure=default))],
        "bfloat16": [System("pyro-scvi, default, bfloat16", partial(score_ours, configure=default_bfloat16))],
    }
    return [system for name in names for system in rows[name]]
