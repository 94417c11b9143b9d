"""The training loop: gradient steps on the evidence bound, and a look at held-out cells after every epoch."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_scvi.bars import progress_bar
from pyro_scvi.checkpoint import Checkpoints
from pyro_scvi.distributed import Alone, LossAndGrads
from pyro_scvi.divergence import HALVINGS, Diverged, numberless, suspects
from pyro_scvi.elbo import Bound, MeanFieldELBO
from pyro_scvi.errors import FitError, PyroScviError
from pyro_scvi.execution import executing
from pyro_scvi.guards import TemperedZ, check_gradients, check_sites, unique_parameters
from pyro_scvi.guides import Guide
from pyro_scvi.interrupts import Interrupted, Interrupts
from pyro_scvi.memory import keep_freed_memory
from pyro_scvi.minibatches import Minibatches
from pyro_scvi.model import SCVI
from pyro_scvi.posterior import bound_terms, evaluating
from pyro_scvi.progress import Progress, Snapshot
from pyro_scvi.recorded import NotCompiled, Recorded
from pyro_scvi.schedules import KLWeight, LearningRate

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One training run over its minibatches, those of ``n_cells`` cells that are the share of this one of the ranks."""

    model: SCVI
    guide: Guide
    train_cells: Minibatches
    held_out: Minibatches | None
    n_cells: int
    elbo: Any
    autocast: torch.dtype | None
    compiled: bool
    seed: int
    ranks: Alone
    checkpoints: Checkpoints | None = None
    interrupts: Interrupts = field(default_factory=Interrupts)
    done: Progress | None = None

    def train(
        self,
        epochs: int,
        sizes: list[int],
        learning_rate: LearningRate,
        eps: float,
        kl_weight: KLWeight,
        patience: int | None,
        progress: bool,
    ) -> None:
        """Train for ``epochs`` epochs, until patience runs out or a signal comes; the best state is put back.

        Steps are of ``sizes`` cells over all ranks.

        Raises
        ------
        FitError
            If the loss is no number and halving the learning rate does not help.
        KeyboardInterrupt
            If a signal comes before the first epoch has ended, or comes twice.
        """
        keep_freed_memory()
        # eps is meant for nats per cell; gradients are for all cells, and Adam steps alike when both grow alike.
        eps = eps * self.n_cells
        parameters = unique_parameters((self.model, self.guide))
        loss_and_grads = self.ranks.loss_and_grads(self.elbo, self.model, self.guide)
        recorded = loss_and_grads
        if self.compiled:
            recorded = self.ranks.reduced(Recorded(Bound(self.elbo, self.model, self.guide)), parameters)
        optimiser = torch.optim.Adam(parameters, eps=eps, fused=True)
        optimiser.zero_grad()  # gradients of the caller's own, or of a fit that was interrupted
        schedule = learning_rate(optimiser, len(sizes) * epochs)
        self.done = done = Progress(self.model, self.guide, optimiser, schedule, patience)
        try:
            self._begin(done)
            shown = progress and self.ranks.first
            with warnings.catch_warnings(), progress_bar(epochs, "epoch", shown) as bar:
                # Pyro warns of a loss that is NaN; here that is an error, which says more.
                warnings.filterwarnings("ignore", "Encountered NaN")
                bar.update(len(done.rows))
                self._epochs(done, epochs, Steps(loss_and_grads, recorded, sizes), kl_weight, bar)
        except Interrupted:
            if not done.rows:
                raise KeyboardInterrupt(f"{self.interrupts.received} before the first epoch had ended") from None
        finally:
            done.finish()
        if self.checkpoints:
            self.checkpoints.note(done, last=True)
        if done.halvings:
            self._require_improvement(done)

    def _begin(self, done: Progress) -> None:
        """Go on from the checkpoint, which the first rank has read, if there is one."""

        def begun() -> Snapshot | None:
            if self.checkpoints:
                self.checkpoints.begin(done)
            return done.good if done.rows else None

        found = self.ranks.from_first(begun)
        if found and found is not done.good:
            done.restore(found)

    def _epochs(self, done: Progress, epochs: int, steps: "Steps", kl_weight: KLWeight, bar: Any) -> None:
        lasting = kl_weight.at(epochs - 1, epochs)
        while len(done.rows) < epochs and not done.best.waited_out:
            try:
                row = self._row(done, steps, TemperedZ(kl_weight.at(len(done.rows), epochs)))
            except Diverged as failure:
                self._retreat(done, failure)
                continue
            # Judged by what is trained for: without the prior of z where its weight ends at 0.
            done.advance(row, row["held_out_loss"] - (1 - lasting) * row["kl"])
            if self.checkpoints:
                self.checkpoints.note(done)
            bar.set_postfix_str(_losses(row), refresh=False)
            bar.update()
        if done.best.waited_out:
            _log.info(
                "stopped after epoch %d: the held-out bound was better %d epochs before",
                len(done.rows),
                done.best.waited,
            )

    def _row(self, done: Progress, steps: "Steps", tempered: TemperedZ) -> dict[str, float]:
        """Train for one epoch and look at the held-out cells: the epoch's row of the history."""
        started, epoch = time.perf_counter(), len(done.rows)
        row: dict[str, float] = {"learning_rate": done.learning_rate, "kl_weight": tempered.weight}
        try:
            row["train_loss"] = self.epoch(done.optimiser, done.schedule, tempered, steps, epoch)
        except NotCompiled:
            if self.interrupts.received:  # a terminal's signal goes to the compiler, too
                raise Interrupted from None
            raise
        except ValueError as error:  # of Pyro's checks in the first step
            if isinstance(error, PyroScviError):
                raise
            what = numberless(self.model, self.guide) or " ".join(str(error).split())[:300] or type(error).__name__
            raise FitError(
                f"the model cannot score these cells: {what}; make a new model, or mend its parts"
            ) from error
        row["held_out_loss"], row["kl"] = self.evaluate(self.held_out or self.train_cells, epoch)
        if not done.finite or (self.guide.amortized and _impossible(row["held_out_loss"], row["kl"])):
            raise Diverged(f"parameters or held-out bound were no numbers after epoch {epoch + 1}", trained=True)
        if self.held_out is None:
            row["held_out_loss"] = math.nan
        (seconds,) = self.ranks.sum(time.perf_counter() - started)
        return row | {"seconds": seconds / self.ranks.size}

    def _retreat(self, done: Progress, failure: Diverged) -> None:
        """Go back to the last good state and halve the learning rate, as long as that can help."""
        rate, epoch = done.learning_rate, len(done.rows)
        _log.info("%s, at learning rate %.2g: back to the end of epoch %d", failure, rate, epoch)
        if failure.trained and done.halvings < HALVINGS:
            done.halve()
            return
        done.restore(done.good)
        tried = f", halved {done.halvings} times in this run" if done.halvings else ""
        raise FitError(
            f"{failure}, at learning rate {rate:.2g}{tried}. Model and guide are as after epoch {epoch}: there "
            f"{suspects(self.model, self.guide, self.train_cells)}. Try a smaller learning_rate, another prior, "
            "or leave out such cells or genes"
        ) from failure

    def _require_improvement(self, done: Progress) -> None:
        """Refuse what is left of a run that diverged, where the untrained model explains cells better."""
        cells, reached = self.held_out or self.train_cells, done.good
        after, kl = self.evaluate(cells, 0)
        done.restore(done.start)
        before, _ = self.evaluate(cells, 0)
        done.restore(reached)
        done.finish()
        if after > before or _impossible(after, kl):
            raise FitError(
                f"the loss was no number {done.halvings} times, and what was learned at half the learning rate each "
                f"time explains cells worse than the untrained model, {after:.1f} against {before:.1f} nats per cell: "
                "make a new model and try a smaller learning_rate"
            )

    def epoch(self, optimiser: Any, schedule: Any, tempered: TemperedZ, steps: "Steps", epoch: int) -> float:
        """One pass through the training cells; returns the untempered loss in nats per cell."""
        self.model.train()
        self.guide.train()
        if not self.ranks.first:  # the first goes on with what it, or the checkpoint, drew before
            torch.manual_seed(self.ranks.noise_seed(self.seed, epoch))
        total, tempers = 0.0, tempered.weight != 1
        for step, rows in enumerate(self.train_cells.shuffled_into(len(steps.sizes))):
            x, gamma = self.train_cells.rows(rows)
            checked = epoch == 0 and step == 0
            given: dict[str, Any] = {"index": self.ranks.among_all(rows), "n_cells": self.n_cells}
            if checked:
                check_sites(self.model, self.guide, x, gamma, **given)
            with self._validating(checked, x), self._quickly(checked), tempered if tempers else nullcontext():
                take = steps.loss_and_grads if checked or tempers else steps.recorded
                loss = take(x, gamma, len_all=steps.sizes[step], **given)
            if checked:
                check_gradients(self.model, self.guide)
            value, ends = self.ranks.sum(
                loss / self.n_cells * len(rows) + tempered.missing(), bool(self.interrupts.received)
            )
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value} in step {step + 1} of an epoch", trained=step > 0)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            total += value
            if ends:  # what came since is for the next step: all ranks end after the same
                self.interrupts.received = self.interrupts.received or "a signal to another rank"
                raise Interrupted
        self.ranks.average_statistics(self.model, self.guide)
        return total / self.n_cells

    @staticmethod
    @contextmanager
    def _validating(checked: bool, x: Tensor) -> Iterator[None]:
        """Pyro's checks of the programs; its laws' only of counts, because corrected ones are outside their support."""
        with pyro.validation_enabled(checked):
            with pyro.distributions.validation_enabled(checked and bool((x == x.round()).all())):
                yield

    @contextmanager
    def _quickly(self, checked: bool) -> Iterator[None]:
        """Matrix products as asked for; parameters unregistered, but for Pyro's own ELBOs, which look for them."""
        own = isinstance(self.elbo, MeanFieldELBO) and not checked
        with executing(matrix_products=self.autocast, register_parameters=not own, check_programs=checked):
            yield

    def evaluate(self, cells: Minibatches, seed: int) -> tuple[float, float]:
        """Negative bound and KL in nats per cell, by one draw for each held-out cell or for 256 training cells.

        Every rank looks at its share of them.
        """
        if not self.guide.amortized:
            return math.nan, math.nan
        rows = torch.arange(cells.n_cells, device=cells.device)
        if cells is self.train_cells:
            rows = rows[spread(-(-256 // self.ranks.size), cells.n_cells)]
        sums, n = [0.0, 0.0], 0
        with evaluating(self.model, self.guide, self.ranks.noise_seed(seed)):
            for some in rows.split(512) if len(rows) else ():
                log_weight, gap = bound_terms(self.guide, *cells.rows(some))
                sums = [sums[0] - float(log_weight.sum()), sums[1] + float(gap.sum())]
                n += len(some)
        loss, kl, seen = self.ranks.sum(*sums, n)
        return loss / seen, kl / seen


class Steps(NamedTuple):
    """The steps of an epoch: how a gradient is taken, where a recording may take it, and of how many cells."""

    loss_and_grads: LossAndGrads
    recorded: LossAndGrads
    sizes: list[int]


def _losses(row: dict[str, float]) -> str:
    """What a progress bar says of an epoch: the held-out loss only where cells were watched."""
    losses = {"train": row["train_loss"], "held out": row["held_out_loss"]}
    return ", ".join(f"{name} {loss:.1f}" for name, loss in losses.items() if not math.isnan(loss)) + " nats per cell"


def spread(at_most: int, n: int) -> Tensor:
    """At most so many of n positions, spread evenly over them: files are sorted by cell type or donor."""
    few = min(at_most, n)
    return torch.arange(few) * n // max(few, 1)


def _impossible(bound: float, kl: float) -> bool:
    """Whether a look at cells gave what no law gives: no number, or a divergence far below 0.

    One draw of the divergence may lie some nats below 0; parameters gone wild give millions, and a bound to match.
    """
    return not math.isfinite(bound) or kl < -1e4
