"""fit: stochastic variational inference on minibatches, and the Fit that it returns."""

import logging
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor
from tqdm.auto import tqdm

from pyro_scvi.cells import Cells
from pyro_scvi.display import curve, table
from pyro_scvi.elbo import MeanFieldELBO
from pyro_scvi.errors import FitError, ModelError, SchemaError
from pyro_scvi.guards import TemperedZ, check_gradients, check_sites, unique_parameters
from pyro_scvi.guides import DiagonalNormal, Guide
from pyro_scvi.minibatches import Minibatches, resolve_device
from pyro_scvi.model import SCVI
from pyro_scvi.networks import matrix_products_in
from pyro_scvi.plates import optimised_directly
from pyro_scvi.posterior import bound_terms, evaluating
from pyro_scvi.schedules import KLWeight, LearningRate, OneCycle, Weight
from pyro_scvi.schema import Schema
from pyro_scvi.seeding import seeded

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class Fit:
    """A trained model: ``model`` (the law), ``guide`` (q), ``history`` by epoch, ``schema`` of its cells.

    ``history`` holds ``train_loss`` and ``held_out_loss`` (negative evidence bound, untempered), ``kl``, all in nats
    per cell, ``learning_rate``, ``kl_weight`` and ``seconds``. ``settings`` says how the fit was made.
    """

    model: SCVI
    guide: Guide
    history: pd.DataFrame
    schema: Schema
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.guide.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' precision."""
        return next(self.guide.parameters()).dtype

    def to(self, device: str | torch.device) -> "Fit":
        """Move model and guide in place; returns the fit."""
        self.model.to(device)
        self.guide.to(device)
        return self

    def save(self, path: str | Path) -> None:
        """Write weights (safetensors) and configuration (JSON) into the directory ``path``; see :func:`load`."""
        from pyro_scvi.store import save  # the store builds Fits, so it imports this module

        save(self, path)

    def __repr__(self) -> str:
        return "Fit\n" + "\n".join(f"  {name}: {fact}" for name, fact in self._facts().items())

    def _repr_html_(self) -> str:
        return table("Fit", self._facts(), curve(self.history.train_loss.tolist()))

    def _facts(self) -> dict[str, str]:
        last, seconds = self.history.iloc[-1], self.history.seconds.sum()
        best = self.history.held_out_loss.min()
        return {
            "model": repr(self.model),
            "guide": type(self.guide).__name__,
            "training": f"{len(self.history)} epochs of {self.settings['n_cells']} cells, {seconds:.1f} s",
            "device": str(self.device),
            "train loss": f"{last.train_loss:.2f} nats per cell",
            "held-out loss": "no cells held out" if math.isnan(best) else f"{best:.2f} nats per cell in the best epoch",
        }


def fit(
    model: SCVI,
    cells: Cells,
    guide: Guide | None = None,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    seed: int = 0,
    device: str | torch.device = "auto",
    dtype: torch.dtype = torch.float32,
    autocast: torch.dtype | None = None,
    validation: float | int | Cells = 0.1,
    patience: int | None = None,
    learning_rate: LearningRate = OneCycle(),
    eps: float = 1e-8,
    kl_weight: KLWeight = Weight(),
    elbo: ELBO | None = None,
    data_start: bool = True,
    progress: bool = True,
) -> Fit:
    r"""Train model and guide, in place, by stochastic gradient steps on the evidence bound.

    .. math:: L(n) = E_{q(z | x_n)} \log p(x_n | z) - KL(q(z | x_n) \| p(z))

    (Lopez et al. 2017, Eq. 1), with the KL divergence in closed form where there is one.

    Parameters
    ----------
    model, cells
        The law and the training cells.
    guide
        q(z | x); None: DiagonalNormal(model, seed=seed).
    epochs
        Passes through the cells; None: 60 up to 2,500 cells, fewer for more (see :func:`default_epochs`).
    batch_size
        Cells per step.
    seed
        Of shuffling, dropout and reparameterised noise; the global random state is left alone.
    device
        "auto" takes CUDA, else MPS, else the CPU.
    dtype
        Precision of parameters and likelihood.
    autocast
        torch.bfloat16: the networks multiply matrices in that precision during training, which processors that have
        it do about twice as fast. What is lost in held-out evidence is in the README.
    validation
        Cells held out to watch the bound: a share or number of ``cells``, or Cells of their own; 0 for none. The
        state of the epoch with the best held-out bound (under the last ``kl_weight``) is what the fit returns, so
        judge it on yet other cells. A guide that is not amortized trains on all cells and watches none.
    patience
        Stop when the held-out bound has not improved for so many epochs; None: never.
    learning_rate, eps
        Schedule and epsilon of the Adam optimiser.
    kl_weight
        Weight of the KL divergence of z. The history always reports the untempered bound.
    elbo
        Any Pyro ELBO; None: the fastest, with the value of TraceMeanField_ELBO.
    data_start
        Start the genes' means and the library's law at the data's, unless the model was trained before.
    progress
        Whether to show a progress bar.

    Raises
    ------
    ModelError
        If model and guide do not fit together, or a parameter takes no part in the loss.
    FitError
        If the loss is not finite, a KL warm-up does not end inside the run, or epochs or batch_size is below 1.
    """
    guide = DiagonalNormal(model, seed=seed) if guide is None else guide
    if guide.model is not model:
        raise ModelError("the guide was made for another model; make it with this one, as in DiagonalNormal(model)")
    train, held_out = _split(cells, validation, seed) if guide.amortized else (cells, None)
    epochs = default_epochs(train.n_cells) if epochs is None else epochs
    if epochs < 1 or batch_size < 1:
        raise FitError(f"epochs and batch_size must be 1 or more, got {epochs} and {batch_size}")
    _check_options(learning_rate, kl_weight, elbo, autocast, epochs)
    _check_cells(model, cells, held_out)
    if data_start and not model.trained:
        start_from_data(model, train)
    place = resolve_device(device)
    model.to(place, dtype)
    guide.to(place, dtype)
    run = _Run(
        model,
        guide,
        Minibatches(train, place, dtype),
        None if held_out is None else Minibatches(held_out, place, dtype),
        MeanFieldELBO() if elbo is None else elbo,
        autocast,
    )
    with seeded(seed), pyro.get_param_store().scope():
        history = run.train(epochs, batch_size, learning_rate, eps, kl_weight, patience, progress)
    settings = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "n_cells": train.n_cells}
    model.trained = True
    return Fit(model.eval(), guide.eval(), history, cells.schema, settings)


def _check_options(learning_rate: Any, kl_weight: Any, elbo: Any, autocast: Any, epochs: int) -> None:
    if not isinstance(learning_rate, LearningRate):
        raise FitError(f"learning_rate must be a schedule, as in ps.schedules.OneCycle(0.01); got {learning_rate!r}")
    if not isinstance(kl_weight, KLWeight):
        raise FitError(f"kl_weight must be an object, as in ps.schedules.Weight(0.5); got {kl_weight!r}")
    if elbo is not None and not isinstance(elbo, ELBO):
        raise FitError(f"elbo must be a Pyro ELBO, as in pyro.infer.Trace_ELBO(); got {elbo!r}")
    if autocast not in (None, torch.bfloat16):
        raise FitError(f"autocast must be None or torch.bfloat16, got {autocast!r}: other types lose the gradients")
    kl_weight.at(0, epochs)


def _check_cells(model: SCVI, cells: Cells, held_out: Cells | None) -> None:
    if (cells.n_genes, cells.n_covariates) != (model.n_genes, model.n_covariates):
        raise ModelError(
            f"the model is for {model.n_genes} genes and {model.n_covariates} covariates, the cells have "
            f"{cells.n_genes} and {cells.n_covariates}; make it as SCVI(cells.n_genes, n_covariates=cells.n_covariates)"
        )
    if held_out is not None and held_out.schema != cells.schema:
        raise SchemaError("the validation cells have other genes or covariates; make them with schema=cells.schema")


def default_epochs(n_cells: int) -> int:
    """60 epochs up to 2,500 cells, fewer with the square root of more cells, but at least 8."""
    return max(8, min(60, round(60 * math.sqrt(2500 / n_cells))))


def start_from_data(model: SCVI, cells: Cells) -> None:
    """Set the genes' biases to their log mean counts, and the library's law to the log totals' mean and sd."""
    totals = torch.as_tensor(cells.totals, dtype=torch.float32)
    means = torch.as_tensor(cells.counts.mean(0)).float().reshape(-1)
    model.library.start_from(totals, torch.as_tensor(cells.covariates))
    bias = model.decoder.heads["log_mean"]._parameters.get("bias")
    if bias is not None:
        with torch.no_grad():
            bias.copy_((means + 1 / cells.n_cells).log())


@dataclass
class _Run:
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
        # eps is meant for nats per cell; gradients are for all cells, and Adam steps alike when both grow alike.
        eps = eps * self.train_cells.cells.n_cells
        optimiser = torch.optim.Adam(unique_parameters((self.model, self.guide)), eps=eps, fused=True)
        steps = math.ceil(self.train_cells.cells.n_cells / batch_size) * epochs
        schedule = learning_rate(optimiser, steps)
        rows: list[dict[str, float]] = []
        best, lasting = _Best(patience), kl_weight.at(epochs - 1, epochs)
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
        n_cells, total, tempers = self.train_cells.cells.n_cells, 0.0, tempered.weight != 1
        for step, rows in enumerate(self.train_cells.shuffled(batch_size)):
            x, gamma = self.train_cells.rows(rows)
            checked = first and step == 0
            if checked:
                check_sites(self.model, self.guide, x, gamma, index=rows, n_cells=n_cells)
            with pyro.validation_enabled(checked), self._quickly(checked), tempered if tempers else nullcontext():
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

    @contextmanager
    def _quickly(self, checked: bool) -> Iterator[None]:
        """Matrix products as asked for; parameters unregistered, but for Pyro's own ELBOs, which look for them."""
        own = isinstance(self.elbo, MeanFieldELBO) and not checked
        with matrix_products_in(self.autocast), optimised_directly() if own else nullcontext():
            yield

    def evaluate(self, cells: Minibatches, seed: int) -> tuple[float, float]:
        """Negative bound and KL in nats per cell, by one draw for each of 2,048 held-out or 256 training cells."""
        if not self.guide.amortized:
            return math.nan, math.nan
        most = 256 if cells is self.train_cells else 2048
        sums, n = [0.0, 0.0], 0
        with evaluating(self.model, self.guide, seed):
            for rows in torch.arange(min(most, cells.cells.n_cells), device=cells.device).split(512):
                log_weight, gap = bound_terms(self.guide, *cells.rows(rows))
                sums = [sums[0] - float(log_weight.sum()), sums[1] + float(gap.sum())]
                n += len(rows)
        return sums[0] / n, sums[1] / n


def _require_finite(loss: float, when: str, schedule: Any) -> None:
    if not math.isfinite(loss):
        raise FitError(
            f"the loss became {loss} {when}, at learning rate {float(schedule.get_last_lr()[0]):.2g}; "
            "try a smaller learning_rate, or look for extreme counts"
        )


HISTORY = ("train_loss", "held_out_loss", "kl", "learning_rate", "kl_weight", "seconds")


class _Best:
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


def _split(cells: Cells, validation: float | int | Cells, seed: int) -> tuple[Cells, Cells | None]:
    if isinstance(validation, Cells):
        return cells, validation
    return cells.split(held_out=validation, seed=seed) if validation else (cells, None)
