"""The training loop: gradient steps on the evidence bound, and held-out cells after every epoch."""

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor

from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import FitError, PyroScviError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import conditional
from pyro_scvi.inference.compiled import NotCompiled, Recorded
from pyro_scvi.inference.elbo import Bound, ByLoss
from pyro_scvi.inference.evaluation import bound_terms, undisturbed
from pyro_scvi.model import SCVI
from pyro_scvi.nn.networks import Decoder
from pyro_scvi.training.checkpoint import Checkpoints
from pyro_scvi.training.checks import (
    OtherSite,
    SameSites,
    TemperedLatents,
    check_gradients,
    check_sites,
    unique_parameters,
)
from pyro_scvi.training.distributed import LossAndGrads
from pyro_scvi.training.divergence import HALVINGS, Diverged, nonfinite_parameters, suspects
from pyro_scvi.training.landmarks import evenly_spaced, note_landmarks
from pyro_scvi.training.options import TrainingOptions
from pyro_scvi.training.replayed import replayed
from pyro_scvi.training.resuming.progress import Course
from pyro_scvi.training.signals import Interrupted, Interrupts
from pyro_scvi.training.state import Snapshot, TrainingState
from pyro_scvi.utils.allocator import keep_freed_memory
from pyro_scvi.utils.execution import executing
from pyro_scvi.utils.progress_bars import progress_bar
from pyro_scvi.utils.random_state import seed_generators

WATCHED_IN_TRAINING = 256  # training cells whose bound is evaluated if no cells are held out
KEPT_DRAWS, MOST_OF_A_CELL = 2**14, 64  # for the loss of the epoch that is kept: over all cells, and of each
LEAST_KL = -1e4  # nats per cell; an estimate below it means that parameters have diverged

_log = logging.getLogger(__name__)


class TrainingData(NamedTuple):
    """The share of this process in the training cells and in the cells to watch.

    ``n_cells`` is the number of training cells over all processes, ``sizes`` the number of these in each step of an
    epoch, ``own_sizes`` those of this process.
    """

    train: Minibatches
    held_out: Minibatches | None
    n_cells: int
    sizes: list[int]
    own_sizes: list[int]

    def is_rest(self, step: int) -> bool:
        """Whether a step on a GPU is of another size than the others: too rare to be compiled."""
        return self.train.device.type != "cpu" and self.sizes[step] != self.sizes[0]


class Gradients(NamedTuple):
    """Two ways to take the gradient of a step: by the programs, and by their recording if there is one."""

    of_programs: LossAndGrads
    recorded: LossAndGrads


@dataclass(frozen=True, eq=False)
class Trainer:
    """One training run: model, guide, cells, options, state, and the signals that may end it.

    ``checkpoints`` is None if this process writes none. ``after_epoch`` is called when an epoch has ended.
    """

    model: SCVI
    guide: Guide
    data: TrainingData
    options: TrainingOptions
    gradients: Gradients
    state: TrainingState
    checkpoints: Checkpoints | None
    interrupts: Interrupts
    after_epoch: Callable[["Trainer"], None]

    @classmethod
    def at_start(
        cls,
        model: SCVI,
        guide: Guide,
        data: TrainingData,
        options: TrainingOptions,
        checkpoints: Checkpoints | None,
        interrupts: Interrupts,
        after_epoch: Callable[["Trainer"], None],
    ) -> "Trainer":
        """A run before its first step, with a new optimiser and schedule."""
        keep_freed_memory()
        parameters = unique_parameters((model, guide))
        by_programs = options.ranks.loss_and_grads(options.elbo, model, guide)
        bound = Bound(options.elbo, model, guide)
        if options.compiled:
            recorded = options.ranks.reduced(Recorded(bound), parameters)
        else:
            recorded = replayed(bound, by_programs, data.sizes * options.epochs) if options.replays else by_programs
        # The user's eps is for gradients per cell. These are for all cells, and Adam is invariant to scaling both.
        optimiser = torch.optim.Adam(parameters, eps=options.eps * data.n_cells, fused=True)
        optimiser.zero_grad()  # of gradients of the caller, or of a fit that was interrupted
        schedule = options.learning_rate(optimiser, len(data.sizes) * options.epochs)
        state = TrainingState(model, guide, optimiser, schedule, options.patience)
        return cls(
            model, guide, data, options, Gradients(by_programs, recorded), state, checkpoints, interrupts, after_epoch
        )

    def train(self) -> None:
        """Train until the epochs are done, patience runs out or a signal comes; then restore the best state.

        Raises
        ------
        FitError
            If the loss is not finite and halving the learning rate does not help.
        KeyboardInterrupt
            If a signal comes before the first epoch has ended, or comes twice.
        """
        try:
            self._train()
        finally:
            if self.checkpoints:
                self.checkpoints.end()

    def _train(self) -> None:
        state, epochs = self.state, self.options.epochs
        try:
            self._begin()
            shown = self.options.progress and self.options.ranks.first
            with warnings.catch_warnings(), progress_bar(epochs, "epoch", shown) as bar:
                # Pyro warns of a NaN loss; here that is an error with a better message.
                warnings.filterwarnings("ignore", "Encountered NaN")
                bar.update(len(state.rows))
                self._epochs(bar)
        except Interrupted:
            if not state.rows:
                raise KeyboardInterrupt(f"{self.interrupts.received} before the first epoch had ended") from None
        finally:
            state.finish()
        if self.checkpoints:
            self.checkpoints.note(state, last=True)
        if state.halvings:
            self._require_improvement()

    @cached_property
    def _course(self) -> Course:
        epochs = self.options.epochs
        return Course(epochs, len(self.data.sizes), self.options.kl_weight.at(epochs - 1, epochs))

    def _begin(self) -> None:
        """Resume from the checkpoint if there is one; the first rank reads it for all."""
        state = self.state

        def begun() -> Snapshot | None:
            if self.checkpoints:
                self.checkpoints.begin(state, self._course)
            return state.good if state.rows else None

        snapshot = self.options.ranks.from_first(begun)
        if snapshot and snapshot is not state.good:
            state.restore(snapshot)

    def _epochs(self, bar: Any) -> None:
        state, epochs, kl_weight = self.state, self.options.epochs, self.options.kl_weight
        while len(state.rows) < epochs and not state.best.waited_out:
            try:
                row = self._row(self._tempered(kl_weight.at(len(state.rows), epochs)))
            except Diverged as failure:
                self._roll_back(failure)
                continue
            note_landmarks(self.guide, self.data.train, self.options.ranks)
            # Epochs are compared under the last KL weight: 0 leaves the prior of z out of the comparison, too.
            state.advance(row, self._course.loss(row))
            if self.checkpoints:
                self.checkpoints.note(state)
            self.after_epoch(self)
            bar.set_postfix_str(_losses(row), refresh=False)
            bar.update()
        if state.best.waited_out:
            _log.info(
                "stopped after epoch %d: the held-out bound was better %d epochs before",
                len(state.rows),
                state.best.waited,
            )

    def _tempered(self, weight: float) -> TemperedLatents:
        # Not the library size, which earlier work leaves at full weight (Lopez et al. 2018, their code).
        known = self.guide.coordinates
        names = {name for name, site in known.local.items() if site is not known.library}
        return TemperedLatents(weight, names | known.enumerated.keys())

    def _row(self, tempered: TemperedLatents) -> dict[str, float]:
        """Train for one epoch and evaluate the held-out cells; returns the epoch's row of the history."""
        started, state, ranks = time.perf_counter(), self.state, self.options.ranks
        epoch = len(state.rows)
        row: dict[str, float] = {"learning_rate": state.learning_rate, "kl_weight": tempered.weight}
        try:
            row["train_loss"] = self.epoch(tempered, epoch)
        except NotCompiled:
            if self.interrupts.received:  # a terminal sends its signal to the compiler's process, too
                raise Interrupted from None
            raise
        except ValueError as error:  # raised by Pyro's checks in the first step
            if isinstance(error, PyroScviError):
                raise
            raise self._cannot_score(error) from error
        row["held_out_loss"], row["kl"] = self.evaluate(self.data.held_out or self.data.train, epoch)
        if not state.finite or (self.guide.amortized and _implausible(row["held_out_loss"], row["kl"])):
            raise Diverged(f"parameters or the held-out bound were NaN after epoch {epoch + 1}", trained=True)
        if self.data.held_out is None:
            row["held_out_loss"] = math.nan
        (seconds,) = ranks.sum(time.perf_counter() - started)
        return row | {"seconds": seconds / ranks.size}

    def _cannot_score(self, error: ValueError) -> FitError:
        lost = nonfinite_parameters(self.model, self.guide)
        what = lost or " ".join(str(error).split())[:300] or type(error).__name__
        return FitError(f"the model cannot score these cells: {what}; make a new model, or mend its parts")

    def _roll_back(self, failure: Diverged) -> None:
        """Go back to the last good state and halve the learning rate, if that can help."""
        state, rate, epoch = self.state, self.state.learning_rate, len(self.state.rows)
        _log.info("%s, at learning rate %.2g: training goes back to the end of epoch %d", failure, rate, epoch)
        if failure.trained and state.halvings < HALVINGS:
            state.halve()
            return
        state.restore(state.good)
        tried = f", halved {state.halvings} times in this run" if state.halvings else ""
        raise FitError(
            f"{failure}, at learning rate {rate:.2g}{tried}. With the parameters after epoch {epoch}, "
            f"{suspects(self.model, self.guide, self.data.train)}. Try a smaller learning_rate, another prior, "
            "or leave out such cells or genes"
        ) from failure

    def _require_improvement(self) -> None:
        """Refuse the result of a run that diverged if the untrained model explains cells better."""
        state, cells = self.state, self.data.held_out or self.data.train
        reached = state.good
        after, kl = self.evaluate(cells, 0)
        state.restore(state.start)
        before, _ = self.evaluate(cells, 0)
        state.restore(reached)
        state.finish()
        if after > before or _implausible(after, kl):
            raise FitError(
                f"the loss was NaN or infinite {state.halvings} times, the learning rate was halved each time, "
                f"and the fitted model still explains cells worse than the untrained one ({after:.1f} against "
                f"{before:.1f} nats per cell). Try a smaller learning_rate"
            )

    def epoch(self, tempered: TemperedLatents, epoch: int) -> float:
        """One pass through the training cells; returns the untempered loss in nats per cell."""
        ranks = self.options.ranks
        self.model.train()
        self.guide.train()
        if not ranks.first:  # the first goes on with its generator, which a checkpoint restores
            seed_generators(ranks.noise_seed(self.options.seed, epoch))
        total = 0.0
        for step, rows in enumerate(self.data.train.shuffled_into(self.data.own_sizes)):
            loss = self._gradient(rows, step, tempered, checked=epoch == 0 and step == 0)
            value, ends = ranks.sum(
                loss / self.data.n_cells * len(rows) + tempered.missing(), bool(self.interrupts.received)
            )
            if not math.isfinite(value):
                raise Diverged(f"the loss became {value} in step {step + 1} of an epoch", trained=step > 0)
            if isinstance(self.model.decoder, Decoder):
                self.model.decoder.add_gradient_of_prior()
            self.state.step()
            total += value
            if ends:  # all ranks have summed the same flags, so all end after the same step
                self.interrupts.note_another_rank()
                raise Interrupted
        ranks.average_statistics(self.model, self.guide)
        return total / self.data.n_cells

    def _gradient(self, rows: Tensor, step: int, tempered: TemperedLatents, *, checked: bool) -> float:
        """Take the gradient of one step's cells; returns the loss of the step, nats, scaled to all cells."""
        x, gamma = self.data.train.rows(rows)
        given: dict[str, Any] = {"index": self.options.ranks.among_all(rows), "n_cells": self.data.n_cells}
        if checked:
            check_sites(self.model, self.guide, x, gamma, **given)
        tempers = tempered.weight != 1
        by_programs = checked or tempers or self.data.is_rest(step)
        take = self.gradients.of_programs if by_programs else self.gradients.recorded
        same = self._same_sites()
        with self._validation(checked, x), self._execution(checked), tempered if tempers else nullcontext(), same:
            loss = take(x, gamma, len_all=self.data.sizes[step], **given)
        if checked:
            check_gradients(self.model, self.guide)
        return loss

    @cached_property
    def _sites(self) -> SameSites | None:
        """What every step must have sampled; None if the program is one whose sites never change."""
        known = self.guide.coordinates
        latents = {*known.local, *self.guide.weights.supports}
        return None if is_packaged(self.model) else SameSites(latents, known.enumerated)

    @contextmanager
    def _same_sites(self) -> Iterator[None]:
        """Refuse a step with other sites than the guide's."""
        if self._sites is None:
            yield
            return
        try:
            with self._sites:
                yield
        except OtherSite as error:
            raise conditional(str(error)) from error
        self._sites.require()

    @staticmethod
    @contextmanager
    def _validation(checked: bool, x: Tensor) -> Iterator[None]:
        """Pyro's checks of programs, and of values if x holds integers: corrected counts are outside the support."""
        check_values = checked and bool((x == x.round()).all())
        with pyro.validation_enabled(checked), pyro.distributions.validation_enabled(check_values):
            yield

    @contextmanager
    def _execution(self, checked: bool) -> Iterator[None]:
        """Matrix products in the type asked for; parameters registered only for Pyro's own ELBOs, which need that."""
        own = isinstance(self.options.elbo, ByLoss) and not checked
        with executing(matrix_products=self.options.autocast, register_parameters=not own, check_programs=checked):
            yield

    def kept_loss(self) -> float:
        """Negative bound of the held-out cells in the state that is kept, by many draws; NaN if no cells are held out.

        The history's is that of one draw a cell, and the kept epoch is the one where it was least: too low, by chance.
        Few cells differ from each other by more than what a cell's 64 draws leave open.
        """
        if self.data.held_out is None or not self.guide.amortized:
            return math.nan
        (n_cells,) = self.options.ranks.sum(float(self.data.held_out.n_cells))
        draws = min(max(1, KEPT_DRAWS // max(int(n_cells), 1)), MOST_OF_A_CELL)
        return self.evaluate(self.data.held_out, 0, draws)[0]

    def evaluate(self, cells: Minibatches, seed: int, samples: int = 1) -> tuple[float, float]:
        """Negative bound and KL in nats per cell, by draws for each held-out cell or for 256 training cells.

        Every rank evaluates its share of them.
        """
        if not self.guide.amortized:
            return math.nan, math.nan
        ranks, rows = self.options.ranks, torch.arange(cells.n_cells, device=cells.device)
        if cells is self.data.train:
            rows = rows[evenly_spaced(-(-WATCHED_IN_TRAINING // ranks.size), cells.n_cells)]
        sums, n = [0.0, 0.0], 0
        with undisturbed(ranks.noise_seed(seed), self.model, self.guide):
            for some in rows.split(512) if len(rows) else ():
                log_weight, gap = (of.mean(0) for of in bound_terms(self.guide, *cells.rows(some), samples))
                sums = [sums[0] - float(log_weight.sum()), sums[1] + float(gap.sum())]
                n += len(some)
        loss, kl, seen = ranks.sum(*sums, n)
        return loss / seen, kl / seen


def _losses(row: dict[str, float]) -> str:
    """Text of the progress bar after an epoch; the held-out loss is shown only if cells are held out."""
    losses = {"train": row["train_loss"], "held out": row["held_out_loss"]}
    return ", ".join(f"{name} {loss:.1f}" for name, loss in losses.items() if not math.isnan(loss)) + " nats per cell"


def _implausible(bound: float, kl: float) -> bool:
    """Whether a bound and a KL divergence cannot be right: not finite, or a divergence far below 0.

    One draw of the divergence may be some nats below 0. Diverged parameters give millions, and a bound to match.
    """
    return not math.isfinite(bound) or kl < LEAST_KL
