"""Our package: training of several models, posterior predictive draws, evidence, differential expression."""

import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from unittest.mock import patch

import torch

import pyro_scvi as ps
from benchmarks.harness.accelerator import synchronise
from benchmarks.harness.data import simulated
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.systems.our_models import CONFIGURATIONS, HALF, as_cells, matched
from pyro_scvi.guides.log_joint import log_joint
from pyro_scvi.inference.compiled import RecordedJoint
from pyro_scvi.inference.evaluation import draws_at_once, evaluating
from pyro_scvi.training import replayed


def autocast_available() -> Callable[[], Sample]:
    """Say why there is no training in bfloat16, if there is none."""
    reason = "" if HALF.keys() <= inspect.signature(ps.fit).parameters.keys() else "fit has no option autocast"
    return lambda: Sample(0.0, 0.0, {"reason": reason})


@dataclass(frozen=True)
class FromTheSecond(ps.schedules.ConstantKL):
    """The weight 1, which starts a watch when the second epoch begins."""

    watch: Stopwatch = field(default_factory=Stopwatch)

    def at(self, epoch: int, epochs: int) -> float:
        """Called at the start of every epoch, and before the first for the last."""
        if epoch == 1:
            self.watch.start()
        return 1.0


def train(
    configuration: str,
    n_cells: int,
    n_genes: int,
    batch_size: int,
    epochs: int,
    device: str = "cpu",
    half: bool = False,
    compiled: bool = False,
) -> Callable[[], Sample]:
    """Train on synthetic cells: a call of ``fit`` for ``epochs`` passes, on a model that had one of them before.

    Compiled, the call makes one more before the watch starts, in which its steps are compiled.
    """
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = CONFIGURATIONS[configuration](cells, 0)
    options |= {
        "batch_size": batch_size,
        "device": device,
        "validation": 0,
        "progress": False,
        **(HALF if half else {}),
    }
    ps.fit(model, cells, **options | {"epochs": 1})

    def measure_compiled() -> Sample:
        started = FromTheSecond()
        fit = ps.fit(model, cells, **options | {"epochs": epochs + 1, "kl_weight": started, "compiled": True})
        synchronise(device)
        started.watch.stop()
        first, *others = fit.history.seconds
        facts = {"train_loss": float(fit.history.train_loss.iloc[-1]), "first_epoch": first - sum(others) / epochs}
        return started.watch.sample(work=n_cells * epochs, **facts)

    def measure() -> Sample:
        with Stopwatch() as watch:
            fit = ps.fit(model, cells, **options | {"epochs": epochs})
            synchronise(device)
        return watch.sample(work=n_cells * epochs, train_loss=float(fit.history.train_loss.iloc[-1]))

    return measure_compiled if compiled else measure


def train_replaying(
    configuration: str, n_cells: int, n_genes: int, batch_size: int, epochs: int, replays: bool
) -> Callable[[], Sample]:
    """Whole calls of ``fit``, recording included, that replay all steps but a few, or none."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = CONFIGURATIONS[configuration](cells, 0)
    options |= {"batch_size": batch_size, "device": "cpu", "validation": 0, "progress": False, "epochs": epochs}

    def measure() -> Sample:
        least = 1 if replays else sys.maxsize
        with patch.object(replayed, "LEAST_STEPS", least), Stopwatch() as watch:
            fit = ps.fit(model, cells, **options)
        return watch.sample(work=n_cells * epochs, train_loss=float(fit.history.train_loss.iloc[-1]))

    return measure


def fitted(n_cells: int, n_genes: int, epochs: int = 2) -> tuple[ps.Fit, ps.Cells]:
    """A short fit of the matched model: time does not depend on how well it fits."""
    cells = as_cells(simulated(n_cells, n_genes))
    model, options = matched(cells, 0)
    return ps.fit(model, cells, epochs=epochs, validation=0, progress=False, device="cpu", **options), cells


def predictive_draws(n_cells: int, n_genes: int, cells: int, samples: int, warm: bool = True) -> Callable[[], Sample]:
    """Posterior predictive counts of some cells; ``warm`` makes a first call that is not measured."""
    fit, everything = fitted(n_cells, n_genes)
    chosen = everything.take(slice(cells))

    def measure() -> Sample:
        with Stopwatch() as watch:
            drawn = ps.posterior_predictive(fit, chosen, samples=samples)
        return watch.sample(work=drawn.size, mean=float(drawn.mean()))

    if warm:
        measure()
    return measure


def weighted_evidence(
    n_cells: int, n_genes: int, cells: int, samples: int, compiled: bool = False
) -> Callable[[], Sample]:
    """Log p(x) of some cells by importance weights of draws from the guide, without any refinement.

    ``compiled``, the density is that of ``ps.evidence(compiled=True)``, compiled before the watch starts.
    """
    fit, everything = fitted(n_cells, n_genes)
    x, gamma = everything.take(slice(cells))[:]
    guide, joint = fit.guide, RecordedJoint(cells) if compiled else log_joint

    def measure() -> Sample:
        with Stopwatch() as watch, evaluating(fit.model, guide, 0):
            sites, log_q = guide.draw(x, gamma, samples)
            u = guide.coordinates.of(sites)
            density = joint(fit.model, x, gamma, guide.weights.medians())
            log_p = torch.cat([density(part) for part in u.split(draws_at_once(x))])
            log_weights = log_p - log_q - guide.coordinates.log_abs_det(u)
            log_evidence = log_weights.logsumexp(0) - torch.tensor(float(samples)).log()
        return watch.sample(work=cells * samples, mean=float(log_evidence.mean()))

    measure()
    return measure


def refined_evidence(n_cells: int, n_genes: int, cells: int, samples: int) -> Callable[[], Sample]:
    """Log p(x) of some cells as ``ps.evidence`` gives it, its proposal worked on cell by cell."""
    fit, everything = fitted(n_cells, n_genes)
    chosen = everything.take(slice(cells))

    def measure() -> Sample:
        with Stopwatch() as watch:
            table = ps.evidence(fit, chosen, samples=samples)
        return watch.sample(work=cells * samples, mean=float(table.log_evidence.mean()))

    return measure


def differential_expression(n_cells: int, n_genes: int) -> Callable[[], Sample]:
    """Compare the first half of the cells with the second."""
    fit, cells = fitted(n_cells, n_genes)
    half = ["a" if i < n_cells // 2 else "b" for i in range(n_cells)]
    pairs = ps.differential.RandomPairs()

    def measure() -> Sample:
        with Stopwatch() as watch:
            table = ps.differential_expression(fit, cells, groupby=half, group_a="a", group_b="b", estimand=pairs)
        return watch.sample(work=1, largest_se=float(table.se.max()))

    return measure
