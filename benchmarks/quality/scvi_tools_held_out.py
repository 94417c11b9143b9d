"""Held-out scores of scvi-tools: a fit to real cells, scored after some of its epochs."""

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch.callbacks import Callback

from benchmarks.harness.data import real, split
from benchmarks.harness.stopwatch import Sample, Stopwatch
from benchmarks.quality.held_out_scores import JUDGES
from benchmarks.quality.ours_held_out import WARM_UP_CELLS
from benchmarks.systems.scvi_tools import fit, model_of


class Snapshots(Callback):
    """Keeps the weights after every epoch with the seconds until then; copying them is not timed."""

    def __init__(self, watch: Stopwatch, module: Any) -> None:
        self.watch, self.module = watch, module
        self.states: list[tuple[float, dict[str, Any]]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Copy the weights."""
        self.watch.stop()
        self.states.append((self.watch.cpu, copy.deepcopy(self.module.state_dict())))
        self.watch.start()


def judged(
    path: str,
    seed: int,
    epochs: int | None,
    judge: str,
    plan: dict[str, Any] | None = None,
    n_cells: int | None = None,
) -> Callable[[], Sample]:
    """One fit, its ``curve`` a list of (epoch, CPU seconds, value, standard error).

    ``epochs`` of None is scvi-tools' own choice. Its learning rate and Kullback-Leibler weight depend on the epoch and
    not on the number of them, so that the state after an epoch is what a run of so many would have given. The bound is
    judged after every epoch, the evidence, which takes long, after the last.
    """
    train, held_out = split(real(path, n_cells))
    fit(model_of(train[:WARM_UP_CELLS], seed=seed), 1)
    model = model_of(train, seed=seed)

    def measure() -> Sample:
        with Stopwatch() as watch:
            snapshots = Snapshots(watch, model.module)
            fit(model, epochs, callbacks=[snapshots], plan_kwargs=plan or {})
        kept = list(enumerate(snapshots.states, start=1))
        curve = []
        for epoch, (seconds, state) in kept if judge == "bound" else kept[-1:]:
            model.module.load_state_dict(state)
            estimate = JUDGES[judge].peer(model, train, held_out)
            curve.append([epoch, seconds, estimate.value, estimate.se])
        return watch.sample(work=1, curve=curve)

    return measure
