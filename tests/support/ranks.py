"""One rank of distributed training: ``torchrun ... ranks.py FOLDER TASK ...``, or python for one process alone."""

import json
import os
import signal
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyro
import torch
from pyro.distributions import Normal
from pyro.infer import RenyiELBO, Trace_ELBO
from torch.optim.optimizer import register_optimizer_step_post_hook

import pyro_scvi as ps
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.inference.compiled import Recorded
from pyro_scvi.inference.elbo import Bound, MeanFieldELBO
from pyro_scvi.training.checks import unique_parameters
from pyro_scvi.utils.execution import executing
from tests.support.simulate import simulated_counts

N_GENES = 20
LAYER = ps.networks.LayerNorm()


def parts(n_covariates=0, norm=LAYER, dropout=0.0, **options):
    shared = {"n_hidden": 16, "n_layers": 1, "norm": norm, "dropout": dropout}
    model = ps.SCVI(N_GENES, 3, n_covariates, **shared, **options)
    return model, ps.guides.DiagonalNormal(model, **shared)


def state(*modules):
    return torch.cat([value.double().flatten() for module in modules for value in module.state_dict().values()])


@contextmanager
def noise_of(rows):
    """Standard normal noise by cell: what a row draws does not depend on which rank has it, nor global noise."""
    table = torch.randn(64, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def fixed(shape, dtype, device):
        if len(shape) and shape[0] == len(rows) and len(shape) < 4 and shape[-1] <= 3 and torch.Size(shape).numel():
            return table[rows, : shape[-1]].reshape(shape).to(dtype)
        return torch.linspace(-1, 1, torch.Size(shape).numel(), dtype=dtype).reshape(shape)

    before = torch.distributions.normal._standard_normal
    torch.distributions.normal._standard_normal = fixed
    try:
        yield
    finally:
        torch.distributions.normal._standard_normal = before


def gradient(ranks, folder):
    """The gradient of 9 of 40 cells in float64, of which ranks have unequal shares; global latents are in."""
    cells = ps.Cells.from_counts(simulated_counts(40))
    weights = {"decoder.heads.log_mean.weight": ps.weights.NormalWeights()}
    model, guide = parts(weight_priors=weights)
    model.double(), guide.double()
    batch = np.arange(9)
    rows = torch.from_numpy(ranks.shard(batch))
    x, gamma = Minibatches(cells, torch.device("cpu"), torch.float64).rows(rows)
    bound = ranks.loss_and_grads(MeanFieldELBO(), model, guide)
    with noise_of(rows):
        bound(x, gamma, len_all=len(batch), index=rows, n_cells=cells.n_cells)
    grads = [parameter.grad.flatten() for part in (model, guide) for parameter in part.parameters()]
    torch.save(torch.cat(grads), folder / f"gradient-{ranks.size}-{ranks.rank}.pt")


def compiled(ranks, folder):
    """The same gradient by a compiled recording."""
    cells = ps.Cells.from_counts(simulated_counts(40))
    model, guide = parts(weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights()})
    model.double(), guide.double()
    batch = np.arange(9)
    rows = torch.from_numpy(ranks.shard(batch))
    x, gamma = Minibatches(cells, torch.device("cpu"), torch.float64).rows(rows)
    ranks.loss_and_grads(MeanFieldELBO(), model, guide)
    parameters = unique_parameters((model, guide))
    bound = ranks.reduced(Recorded(Bound(MeanFieldELBO(), model, guide)), parameters)
    direct = executing(register_parameters=False, check_programs=False)
    with noise_of(rows), direct, pyro.validation_enabled(False):
        bound(x, gamma, len_all=len(batch), index=rows, n_cells=cells.n_cells)
    grads = [parameter.grad.flatten() for part in (model, guide) for parameter in part.parameters()]
    torch.save(torch.cat(grads), folder / f"compiled-{ranks.size}-{ranks.rank}.pt")


class Noting(ps.priors.StandardNormal):
    """A prior that notes the seed of torch's generator whenever it is asked."""

    seeds = set()

    def forward(self):
        self.seeds.add(torch.initial_seed())
        return super().forward()


def trained(ranks, folder):
    """100 steps; the states of all ranks."""
    cells = ps.Cells.from_counts(simulated_counts(101))
    model, guide = parts(norm=ps.networks.BatchNorm(), dropout=0.1, prior=Noting(3))
    if ranks.rank:  # ranks start as the first does, whatever weights and statistics they were given
        with torch.no_grad():
            for value in (*model.state_dict().values(), *guide.state_dict().values()):
                value.add_(1)
    Noting.seeds.clear()
    fit = ps.fit(model, cells, guide, epochs=25, batch_size=24, validation=5, progress=False, ranks=ranks)
    torch.save(state(fit.model, fit.guide), folder / f"state-{ranks.size}-{ranks.rank}.pt")
    (folder / f"seeds-{ranks.size}-{ranks.rank}.json").write_text(json.dumps(sorted(Noting.seeds)))
    fit.history.to_csv(folder / f"history-{ranks.size}-{ranks.rank}.csv")


@dataclass(frozen=True)
class Fatal(ps.schedules.ConstantKL):
    """Weight 1, until the second rank is killed in the fourth epoch."""

    def at(self, epoch, epochs):
        if epoch == 3 and epochs > epoch + 1 and os.environ.get("RANK") == "1" and "FATAL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().at(epoch, epochs)


def checkpointed(ranks, folder):
    """A run of 8 epochs with a checkpoint; goes on with the one that is there."""
    cells = ps.Cells.from_counts(simulated_counts(101))
    model, guide = parts()
    options = {"epochs": 8, "batch_size": 24, "kl_weight": Fatal(), "progress": False, "device": "cpu"}
    fit = ps.fit(model, cells, guide, checkpoint=folder / "checkpoint", resume=True, ranks=ranks, **options)
    if ranks.first:
        fit.history.to_csv(folder / "history.csv")
        torch.save(state(fit.model, fit.guide), folder / "final.pt")


def checkpointed_in(name):
    """The same in a folder of its own."""
    return lambda ranks, folder: checkpointed(ranks, folder / name)


def signalled(ranks, folder):
    """SIGTERM to one rank ends all after the same step."""

    @dataclass(frozen=True)
    class Ended(ps.schedules.ConstantKL):
        def at(self, epoch, epochs):
            if epoch == 3 and ranks.rank == ranks.size - 1 and epochs == 8 and not ended:
                ended.append(True)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().at(epoch, epochs)

    ended, (model, guide) = [], parts()
    cells = ps.Cells.from_counts(simulated_counts(101))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = ps.fit(model, cells, guide, epochs=8, batch_size=24, kl_weight=Ended(), progress=False, ranks=ranks)
    told = {"epochs": len(fit.history), "warned": [str(note.message) for note in caught]}
    (folder / f"signalled-{ranks.rank}.json").write_text(json.dumps(told))


def refused(ranks, folder):
    """Errors that a user can mend, on every rank."""
    cells = ps.Cells.from_counts(simulated_counts(101))
    told = []
    (folder / "checkpoint").mkdir(exist_ok=True)
    (folder / "checkpoint" / "mine.txt").write_text("mine")
    for options in ({"batch_size": 1}, {"checkpoint": folder / "checkpoint"}, {"elbo": RenyiELBO()}, {"ranks": 2}):
        model, guide = parts()
        try:
            ps.fit(model, cells, guide, epochs=2, progress=False, **{"ranks": ranks, **options})
        except ps.errors.PyroScviError as error:
            told.append(f"{type(error).__name__}: {error}")
    (folder / f"refused-{ranks.rank}.json").write_text(json.dumps(told))


def late(ranks, folder):
    """SIGTERM to one rank while its optimiser steps, after the ranks have told each other of signals."""
    steps, (model, guide) = [], parts()

    def sent(*_):
        steps.append(1)
        if len(steps) == 12 and ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    cells, hook = ps.Cells.from_counts(simulated_counts(101)), register_optimizer_step_post_hook(sent)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit = ps.fit(model, cells, guide, epochs=8, batch_size=24, progress=False, ranks=ranks, device="cpu")
    hook.remove()
    told = {"steps": len(steps), "epochs": len(fit.history), "warned": [str(note.message) for note in caught]}
    (folder / f"late-{ranks.rank}.json").write_text(json.dumps(told))


def unlike(ranks, folder):
    """What the second rank is given differently; then a run in which both get the same."""
    model, guide = parts()
    other, heavy = ps.SCVI(N_GENES, 4, n_hidden=16, n_layers=1), parts(prior=ps.priors.StudentT(3))[0]
    cells = simulated_counts(101)
    given = (
        {"batch_size": 12},
        {"epochs": 3},
        {"seed": 1},
        {"validation": 7},
        {"validation": ps.Cells.from_counts(cells[:20])},
        {"learning_rate": ps.schedules.OneCycle(0.003)},
        {"kl_weight": ps.schedules.ConstantKL(0.5)},
        {"patience": 1},
        {"eps": 1e-4},
        {"elbo": Trace_ELBO()},
        {"cells": ps.Cells.from_counts(cells[:90])},
        {"cells": ps.Cells.from_counts(cells[::-1].copy())},
        {"guide": ps.guides.DiagonalNormal(model, n_hidden=16, n_layers=2)},
        {"model": other, "guide": ps.guides.DiagonalNormal(other, n_hidden=16, n_layers=1)},
        {"model": heavy, "guide": ps.guides.DiagonalNormal(heavy, n_hidden=16, n_layers=1)},
    )
    told, same = [], {"model": model, "cells": ps.Cells.from_counts(cells), "guide": guide}
    same |= {"epochs": 2, "batch_size": 24, "progress": False, "device": "cpu", "ranks": ranks}
    for options in given:
        try:
            ps.fit(**(same | options if ranks.rank else same))
        except ps.errors.FitError as error:
            told.append(str(error))
    fit = ps.fit(**same)
    told.append(len(fit.history))
    (folder / f"unlike-{ranks.rank}.json").write_text(json.dumps(told))


def few(ranks, folder):
    """Fewer cells than ranks, with and without a start from the data."""
    told = []
    for options in ({"validation": 2}, {"validation": 2, "data_start": False}):
        model, guide = parts()
        try:
            ps.fit(model, ps.Cells.from_counts(simulated_counts(3)), guide, ranks=ranks, progress=False, **options)
        except ps.errors.ModelError as error:
            told.append(str(error))
    (folder / f"few-{ranks.rank}.json").write_text(json.dumps(told))


class Broken(torch.autograd.Function):
    """An operation of a user's own whose backward pass has a fault."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("my backward pass has a fault")


class BrokenPrior(ps.priors.StandardNormal):
    def forward(self):
        law = super().forward().base_dist
        return Normal(Broken.apply(law.loc.clone().requires_grad_()), law.scale).to_event(1)


def broken(ranks, folder):
    """The error of a part of one's own, in the backward pass of both ranks."""
    model, guide = parts(prior=BrokenPrior(3))
    cells = ps.Cells.from_counts(simulated_counts(101))
    try:
        ps.fit(model, cells, guide, epochs=2, progress=False, ranks=ranks, device="cpu")
    except Exception as error:
        (folder / f"broken-{ranks.rank}.json").write_text(json.dumps([type(error).__name__, str(error)]))


def inferred(ranks, folder):
    """Embedding, expression and evidence, each rank its own blocks of one file."""
    cells, fit = ps.Cells.from_counts(simulated_counts(101)), ps.load(folder / "fit")
    verbs = {"z": ps.embed, "w": partial(ps.impute, samples=3), "p": partial(ps.evidence, samples=30, steps=2)}
    options = {"block": 16, "seed": 4, "progress": False}
    ps.shards.write(fit, cells, folder / "out.zarr", verbs, shard=(ranks.rank, ranks.size), **options)


TASKS = {
    task.__name__: task
    for task in (gradient, compiled, trained, checkpointed, signalled, late, refused, unlike, few, broken, inferred)
} | {name: checkpointed_in(name) for name in ("whole", "resumed", "resumed-alone")}

if __name__ == "__main__":
    torch.set_num_threads(1)
    with ps.distributed.joined() as ranks:
        for task in sys.argv[2:]:
            TASKS[task](ranks, Path(sys.argv[1]))
