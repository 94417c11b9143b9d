"""The training loop: gradient steps on the evidence bound, and a look at held-out cells after every epoch."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pandas as pd
import pyro
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_scvi.elbo import MeanFieldELBO
from pyro_scvi.errors import FitError
from pyro_scvi.guards import TemperedZ, check_gradients, check_sites, unique_parameters
from pyro_scvi.guides import Guide
from pyro_scvi.minibatches import Minibatches
from pyro_scvi.model import SCVI
from pyro_scvi.networks import matrix_products_in
from pyro_scvi.plates import optimised_directly
from pyro_scvi.posterior import bound_terms, evaluating
from pyro_scvi.schedules import KLWeight, LearningRate

_log = logging.getLogger(__name__)


@dataclass
class Run:
    """One training run over its minibatches."""

    model: SCVI
    guide: Guide
    train_cells: Minibatches
    held_out: Minibatches | None
    elbo: Any
    autocast: torch.dtype | None

    def train(
        self,
        epochs: int,
        batch_size: int,
        learning_rate: LearningRate,
        eps: float,
        kl_weight: KLWeight,
        patience: int | None,
        progress: bool,
    ) -> pd.DataFrame:
        """Train for ``epochs`` epochs, or until patience runs out; the history by epoch, best state put back."""
        # eps is meant for nats per cell; gradients are for all cells, and Adam steps alike when both grow alike.
        eps = eps * self.train_cells.n_cells
        optimiser = torch.optim.Adam(unique_parameters((self.model, self.guide)), eps=eps, fused=True)
        optimiser.zero_grad()  # gradients of the caller's own, or of a fit that was interrupted
        steps = math.ceil(self.train_cells.n_cells / batch_size) * epochs
        schedule = learning_rate(optimiser, steps)
        rows: list[dict[str, float]] = []
        best, lasting = Best(patience), kl_weight.at(epochs - 1, epochs)
        with warnings.catch_warnings(), tqdm(total=epochs, disable=not progress, unit="epoch") as bar:
            # Pyro warns of a loss that is NaN; here that is an error, which says more.
            warnings.filterwarnings("ignore", "Encountered NaN")
            for epoch in range(epochs):
                started = time.perf_counter()
                tempered = TemperedZ(kl_weight.at(epoch, epochs))
                row: dict[str, float] = {
                    "learning_rate": float(schedule.get_last_lr()[0]),
                    "kl_weight": tempered.weight,
                }
                row["train_loss"] = self.epoch(optimiser, schedule, tempered, batch_size, first=epoch == 0)
                row["held_out_loss"], row["kl"] = self.evaluate(self.held_out or self.train_cells, epoch)
                if self.guide.amortized:
                    _require_finite(row["held_out_loss"], f"after epoch {epoch + 1}", schedule)
                if self.held_out is None:
                    row["held_out_loss"] = math.nan
                rows.append(row | {"seconds": time.perf_counter() - started})
                bar.set_postfix_str(f"train {row['train_loss']:.1f}, held out {row['held_out_loss']:.1f} nats per cell")
                bar.update()
                # Judged by what is trained for: without the prior of z where its weight ends at 0.
                if best.stops(row["held_out_loss"] - (1 - lasting) * row["kl"], self.model, self.guide):
                    _log.info("stopped after epoch %d: no better held-out bound for %d epochs", epoch + 1, patience)
                    break
        best.restore(self.model, self.guide)
        return pd.DataFrame(rows, index=pd.RangeIndex(1, len(rows) + 1, name="epoch"))[list(HISTORY)]

    def epoch(self, optimiser: Any, schedule: Any, tempered: TemperedZ, batch_size: int, first: bool) -> float:
        """One pass through the training cells; returns the untempered loss in nats per cell."""
        self.model.train()
        self.guide.train()
        n_cells, total, tempers = self.train_cells.n_cells, 0.0, tempered.weight != 1
        for step, rows in enumerate(self.train_cells.shuffled(batch_size)):
            x, gamma = self.train_cells.rows(rows)
            checked = first and step == 0
            if checked:
                check_sites(self.model, self.guide, x, gamma, index=rows, n_cells=n_cells)
            with self._validating(checked, x), self._quickly(checked), tempered if tempers else nullcontext():
                loss = self.elbo.loss_and_grads(self.model, self.guide, x, gamma, index=rows, n_cells=n_cells)
            if checked:
                check_gradients(self.model, self.guide)
            value = loss / n_cells * len(rows) + tempered.missing()
            _require_finite(value, f"in step {step + 1} of an epoch", schedule)
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
            total += value
        return total / n_cells

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
        with matrix_products_in(self.autocast), optimised_directly() if own else nullcontext():
            yield

    def evaluate(self, cells: Minibatches, seed: int) -> tuple[float, float]:
        """Negative bound and KL in nats per cell, by one draw for each of 2,048 held-out or 256 training cells.

        Where there are more, those looked at are spread evenly over them: files are sorted by cell type or donor.
        """
        if not self.guide.amortized:
            return math.nan, math.nan
        looked_at = min(256 if cells is self.train_cells else 2048, cells.n_cells)
        spread = torch.arange(looked_at, device=cells.device) * cells.n_cells // looked_at
        sums, n = [0.0, 0.0], 0
        with evaluating(self.model, self.guide, seed):
            for rows in spread.split(512):
                log_weight, gap = bound_terms(self.guide, *cells.rows(rows))
                sums = [sums[0] - float(log_weight.sum()), sums[1] + float(gap.sum())]
                n += len(rows)
        return sums[0] / n, sums[1] / n


def _require_finite(loss: float, when: str, schedule: Any) -> None:
    if not math.isfinite(loss):
        raise FitError(
            f"the loss became {loss} {when}, at learning rate {float(schedule.get_last_lr()[0]):.2g}; "
            "make a new model and try a smaller learning_rate, or look for extreme counts"
        )


HISTORY = ("train_loss", "held_out_loss", "kl", "learning_rate", "kl_weight", "seconds")


class Best:
    """The best held-out state so far, and how long ago it was."""

    def __init__(self, patience: int | None) -> None:
        self.patience, self.loss, self.waited = patience, math.inf, 0
        self.states: tuple[dict[str, Tensor], ...] | None = None

    def stops(self, loss: float, *parts: torch.nn.Module) -> bool:
        """Note this epoch's held-out loss; whether patience has run out."""
        if math.isnan(loss):
            return False
        self.waited += 1
        if loss < self.loss:
            self.loss, self.waited = loss, 0
            self.states = tuple({k: v.clone() for k, v in part.state_dict().items()} for part in parts)
        return self.patience is not None and self.waited >= self.patience

    def restore(self, *parts: torch.nn.Module) -> None:
        """Put the best state back."""
        for part, state in zip(parts, self.states or (), strict=False):
            part.load_state_dict(state)
