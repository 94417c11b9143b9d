"""fit: stochastic variational inference on minibatches, and the Fit that it returns."""

import hashlib
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyro
import torch
from pyro.infer import ELBO

from pyro_scvi import archive
from pyro_scvi.cells import Cells
from pyro_scvi.checkpoint import Checkpoints, identity
from pyro_scvi.descriptions import facts_of
from pyro_scvi.display import curves, table
from pyro_scvi.distributed import Alone
from pyro_scvi.elbo import MeanFieldELBO
from pyro_scvi.errors import CheckpointError, FitError, ModelError, SchemaError, brief
from pyro_scvi.guards import check_kinds, check_run
from pyro_scvi.guides import DiagonalNormal, Guide
from pyro_scvi.interrupts import noted_interrupts
from pyro_scvi.minibatches import Minibatches, resolve_device
from pyro_scvi.model import SCVI
from pyro_scvi.parts import lasting_repr
from pyro_scvi.schedules import Every, KLWeight, LearningRate, OneCycle, Weight
from pyro_scvi.schema import Schema
from pyro_scvi.seeding import seeded
from pyro_scvi.training import Run, spread

WATCHED = 2048  # held-out cells at most, after every epoch


@dataclass(eq=False)
class Fit:
    """A trained model, as :func:`fit` and :func:`load` return it.

    Attributes
    ----------
    model, guide
        The law, and q.
    history
        By epoch: ``train_loss`` and ``held_out_loss`` (negative evidence bound, untempered), ``kl``, all in nats per
        cell, ``learning_rate``, ``kl_weight`` and ``seconds``.
    schema
        Of its cells: what further cells are read by.
    settings
        How the fit was made.

    Examples
    --------
    >>> fit.settings
    {'epochs': 5, 'batch_size': 128, 'seed': 0, 'n_cells': 43}
    >>> len(fit.history), fit.schema == train.schema
    (5, True)
    >>> fit.save(folder / "fit")
    >>> bool((ps.embed(ps.load(folder / "fit"), test) == ps.embed(fit, test)).all())
    True
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
        """Write weights (safetensors) and configuration (JSON) into the directory ``path``; see :func:`load`.

        Raises
        ------
        CheckpointError
            If the directory holds something else than a save, or cannot be written; what was there is intact then.
        """
        from pyro_scvi.store import save  # the store builds Fits, so it imports this module

        save(self, path)

    def __repr__(self) -> str:
        return "Fit\n" + "\n".join(f"  {name}: {fact}" for name, fact in self._facts().items())

    def _repr_html_(self) -> str:
        lines = {"training": self.history.train_loss.tolist(), "held out": self.history.held_out_loss.tolist()}
        return table("Fit", self._facts(), curves(lines))

    def _facts(self) -> dict[str, str]:
        epochs, last = len(self.history), self.history.iloc[-1]
        n_epochs = f"{epochs} epoch{'s' * (epochs != 1)}"
        # As it was judged in training: without the prior of z where its weight ends at 0.
        weight = self.history.kl_weight
        lasting = weight.iloc[0] if weight.nunique() == 1 else 1.0
        judged = self.history.held_out_loss - (1 - lasting) * self.history.kl
        watched = bool(judged.notna().any())
        kept = self.history.iloc[int(np.nanargmin(judged))] if watched else last
        held_out = f"{kept.held_out_loss:.2f} nats per cell in epoch {kept.name}, the best, which was kept"
        return {
            "model": repr(self.model),
            "guide": type(self.guide).__name__,
            "training": f"{n_epochs} of {self.settings['n_cells']} cells, {self.history.seconds.sum():.1f} s",
            "device": str(self.device),
            "training loss": f"{kept.train_loss:.2f} nats per cell in epoch {kept.name}",
            "held-out loss": held_out if watched else "no cells held out; the last epoch was kept",
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
    compiled: bool = False,
    validation: float | int | Cells = 0.1,
    patience: int | None = None,
    learning_rate: LearningRate = OneCycle(),
    eps: float = 1e-8,
    kl_weight: KLWeight = Weight(),
    elbo: ELBO | None = None,
    data_start: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: Every = Every(),
    resume: bool = False,
    ranks: Alone = Alone(),
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
        Passes through the cells; None: 60 up to 2,500 cells, fewer for more,
        with the square root of their number, but at least 8.
    batch_size
        Cells per step, over all ranks.
    seed
        Of shuffling, dropout and reparameterised noise; the global random state is left alone.
    device
        "auto" takes CUDA, else MPS, else the CPU.
    dtype
        Precision of parameters and likelihood.
    autocast
        torch.bfloat16: the networks multiply matrices in that precision during training, which processors that have
        it do about twice as fast. What is lost in held-out evidence is in the documentation, under performance.
    compiled
        Whether steps are recorded once and compiled: seconds to a minute at the start, then about two thirds of the
        time a step. For the ``elbo`` None, with a C++ compiler (on CUDA: Triton); steps with another KL weight than 1
        are not. The results are those without, but for rounding. A condition on values in a prior or network of your
        own is refused; other state that its Python changes between steps stays as it was recorded.
    validation
        Cells held out to watch the bound (at most 2,048, spread over them): a share or number of ``cells``, or Cells
        of their own; 0 for none. The state of the epoch with the best held-out bound (under the last ``kl_weight``)
        is what the fit returns, so judge it on yet other cells. A guide that is not amortized trains on all cells and
        watches none.
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
    checkpoint, checkpoint_every
        Directory that holds the state of training at the end of an epoch, and how often it is written. What is there
        stays readable until the next is complete. :func:`load` gives the fit that it amounts to.
    resume
        Whether to go on from the checkpoint, with the same model, cells and options as before; on one thread of a CPU
        the result is that of a run that was never stopped, bit for bit. Without a checkpoint training starts from the
        beginning.
    ranks
        Which processes train together, as ``ps.distributed.joined()`` finds them. Each must call ``fit`` with the same
        arguments; each then has the whole fit. The first writes checkpoints and shows progress.
    progress
        Whether to show a progress bar.

    Returns
    -------
    Fit
        Model and guide, in evaluation mode, with the history of the run and the cells' schema.

    Raises
    ------
    ModelError
        If model, guide and cells do not fit together, one of them is of the wrong kind, a parameter takes no part in
        the loss, or the seed is no integer of 0 or more.
    SchemaError
        If validation cells have another schema.
    DataError
        If no cell would be left to train on, or none held out.
    FitError
        If the loss is no number even after the learning rate was halved 12 times, a KL warm-up does not end inside the
        run, an option is out of range or of the wrong kind, the device cannot be used, ranks were given different
        arguments or too few cells, or another rank was lost. Its ``fit`` is the Fit of the last good epoch, if there
        was one.
    CheckpointError
        If the checkpoint cannot be written, is corrupt or of another run, or is there without ``resume``; ``fit`` as
        before. Nothing that was there is lost.
    KeyboardInterrupt
        If SIGINT or SIGTERM comes a second time, or before the first epoch has ended; model and guide are then in the
        state of the best epoch so far.

    Warns
    -----
    UserWarning
        If the learning rate had to be halved because the loss was no number (``settings["halvings"]``), or if SIGINT or
        SIGTERM ended the run early (``settings["interrupted"]``): the Fit is then that of the epochs that had ended.

    Notes
    -----
    Fits in several threads take turns: torch's generator and Pyro's handlers belong to the process, and other threads
    should leave both alone meanwhile. Signals are noted in the main thread only; a handler of your own is called, too.
    Only one run at a time may write a checkpoint. A resumed run is told apart by its options, its counts (those on disk
    by their sums) and how model and guide were made; parts of your own by their class and repr only.

    Examples
    --------
    >>> model = ps.SCVI(cells.n_genes, n_latent=2)
    >>> fit = ps.fit(model, cells, epochs=20, seed=0, progress=False)
    >>> fit.history.columns.tolist()
    ['train_loss', 'held_out_loss', 'kl', 'learning_rate', 'kl_weight', 'seconds']
    >>> bool(fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0])
    True
    """
    check_kinds(model, cells, guide)
    guide = DiagonalNormal(model, seed=seed) if guide is None else guide
    if guide.model is not model:
        raise ModelError("the guide was made for another model; make it with this one, as in DiagonalNormal(model)")
    place = resolve_device(device)
    _check_cells(model, cells, validation)
    _check_precision(dtype, autocast)
    if not isinstance(ranks, Alone):
        raise FitError(f"ranks must be what ps.distributed.joined() yields, got {brief(ranks)}")
    _check_compiled(compiled, elbo)
    ranks.require_alike(
        lambda: (
            {"epochs": epochs, "batch_size": batch_size, "seed": seed, "patience": patience, "eps": eps}
            | {"learning_rate": lasting_repr(learning_rate), "kl_weight": lasting_repr(kl_weight)}
            | {"elbo": type(elbo).__name__, "dtype": dtype, "autocast": autocast, "device": place.type}
            | {"compiled": compiled, "data_start": data_start, "cells": _brief(cells), "validation": _brief(validation)}
            | {"model": lasting_repr(model), "guide": lasting_repr(guide), "trained before": model.trained}
        )
    )
    train_rows, held_out = _held_out(cells, validation if guide.amortized else 0, seed)
    n_cells = len(train_rows)
    epochs = default_epochs(n_cells) if epochs is None else epochs
    check_run(epochs, batch_size, patience, eps)
    epochs, batch_size, seed = int(epochs), int(batch_size), int(seed)  # NumPy's integers are none to torch and JSON
    _check_options(learning_rate, kl_weight, elbo, epochs)
    _check_checkpoint(checkpoint, checkpoint_every, resume)
    sizes = ranks.batch_sizes(n_cells, batch_size)
    train = Minibatches(cells, place, dtype, ranks.shard(train_rows))
    watched = None if held_out is None else Minibatches(held_out[0], place, dtype, ranks.shard(held_out[1]))
    if data_start and not model.trained:
        start_from_data(model, train, ranks)
    model.to(place, dtype)
    guide.to(place, dtype)
    settings = {"epochs": epochs, "batch_size": batch_size, "seed": seed, "n_cells": n_cells}
    elbo = MeanFieldELBO() if elbo is None else elbo
    run = Run(model, guide, train, watched, n_cells, elbo, autocast, compiled, seed, ranks)
    if checkpoint is not None and ranks.first:
        options: dict[str, Any] = {
            "patience": patience,
            "learning_rate": learning_rate,
            "eps": eps,
            "kl_weight": kl_weight,
        }
        options |= {"elbo": run.elbo, "autocast": autocast, "device": place.type, "data_start": data_start}
        options |= {"compiled": compiled} if compiled else {}  # earlier checkpoints do not say
        run.checkpoints = Checkpoints(
            archive.folder(checkpoint),
            checkpoint_every,
            resume,
            lambda history: facts_of(model, guide, history, cells.schema, settings),
            identity(model, cells, validation, settings | options),
        )
    try:
        with seeded(seed), pyro.get_param_store().scope(), noted_interrupts() as run.interrupts:
            run.train(epochs, sizes, learning_rate, eps, kl_weight, patience, progress)
    except (FitError, CheckpointError) as error:
        error.fit = _made(run, cells.schema, settings) if run.done and run.done.rows else None
        raise
    made = _made(run, cells.schema, settings)
    _warn(made)
    return made


def _made(run: Run, schema: Schema, settings: dict[str, Any]) -> Fit:
    """The Fit of the epochs that have ended."""
    done: Any = run.done
    notes: dict[str, Any] = {"halvings": done.halvings} if done.halvings else {}
    if run.interrupts.received and len(done.rows) < settings["epochs"] and not done.best.waited_out:
        notes["interrupted"] = f"{run.interrupts.received} after epoch {len(done.rows)} of {settings['epochs']}"
    run.model.trained = True
    return Fit(run.model.eval(), run.guide.eval(), done.history, schema, settings | notes)


def _warn(made: Fit) -> None:
    if halvings := made.settings.get("halvings"):
        text = f"the loss was no number; the learning rate was halved {halvings} times: start with a smaller one"
        warnings.warn(text, UserWarning, stacklevel=3)
    if interrupted := made.settings.get("interrupted"):
        text = f"training was interrupted by {interrupted}; this is the fit of the epochs that had ended"
        warnings.warn(text, UserWarning, stacklevel=3)


def _check_options(learning_rate: Any, kl_weight: Any, elbo: Any, epochs: int) -> None:
    if not isinstance(learning_rate, LearningRate):
        raise FitError(f"learning_rate must be a schedule, as in ps.schedules.OneCycle(0.01); got {learning_rate!r}")
    if not isinstance(kl_weight, KLWeight):
        raise FitError(f"kl_weight must be an object, as in ps.schedules.Weight(0.5); got {kl_weight!r}")
    if elbo is not None and not isinstance(elbo, ELBO):
        raise FitError(f"elbo must be a Pyro ELBO, as in pyro.infer.Trace_ELBO(); got {elbo!r}")
    kl_weight.at(0, epochs)


def _check_precision(dtype: Any, autocast: Any) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise FitError(
            f"dtype must be torch.float32 or torch.float64, got {dtype!r}; autocast=torch.bfloat16 is faster"
        )
    if autocast is not None and dtype != torch.float32:
        raise FitError(f"autocast is for parameters in torch.float32, got dtype={dtype!r}")
    if autocast not in (None, torch.bfloat16):
        raise FitError(f"autocast must be None or torch.bfloat16, got {autocast!r}: other types lose the gradients")


def _check_compiled(compiled: Any, elbo: Any) -> None:
    if not isinstance(compiled, bool):
        raise FitError(f"compiled must be True or False, got {brief(compiled)}")
    if compiled and elbo is not None:
        raise FitError(f"compiled=True is for elbo=None, got elbo={elbo!r}")


def _check_checkpoint(checkpoint: Any, every: Any, resume: bool) -> None:
    if resume and checkpoint is None:
        raise FitError("resume needs the directory to go on from: pass checkpoint=")
    if not isinstance(every, Every):
        raise FitError(f"checkpoint_every must be an object, as in ps.schedules.Every(epochs=5); got {every!r}")


def _brief(cells: Any) -> str:
    """Cells by what is cheap to compare; what is none, such as a share of them, as it is."""
    if not isinstance(cells, Cells):
        return repr(cells)
    digest = hashlib.sha256(cells.totals.tobytes() + cells.covariates.tobytes()).hexdigest()[:8]
    return f"{cells.n_cells} x {cells.n_genes} with digest {digest} of totals and covariates"


def _check_cells(model: SCVI, cells: Cells, held_out: Any) -> None:
    if (cells.n_genes, cells.n_covariates) != (model.n_genes, model.n_covariates):
        raise ModelError(
            f"the model is for {model.n_genes} genes and {model.n_covariates} covariates, the cells have "
            f"{cells.n_genes} and {cells.n_covariates}; make it as SCVI(cells.n_genes, n_covariates=cells.n_covariates)"
        )
    if isinstance(held_out, Cells) and held_out.schema != cells.schema:
        raise SchemaError("the validation cells have other genes or covariates; make them with schema=cells.schema")


def default_epochs(n_cells: int) -> int:
    """60 epochs up to 2,500 cells, fewer with the square root of more cells, but at least 8."""
    return max(8, min(60, round(60 * math.sqrt(2500 / n_cells))))


def start_from_data(model: SCVI, cells: Minibatches, ranks: Alone = Alone()) -> None:
    """Set the genes' biases to their log mean counts, and the library's law to the log totals' mean and sd."""
    totals, gamma = ranks.gather(cells.totals()), ranks.gather(cells.gamma.cpu().numpy())
    means = torch.as_tensor(ranks.gather(cells.gene_totals()[None]).sum(0) / len(totals)).float()
    model.library.start_from(torch.as_tensor(totals).float(), torch.as_tensor(gamma))
    bias = model.decoder.heads["log_mean"]._parameters.get("bias")
    if bias is not None:
        with torch.no_grad():
            bias.copy_((means + 1 / len(totals)).log())


def _held_out(
    cells: Cells, validation: float | int | Cells, seed: int
) -> tuple[np.ndarray, tuple[Cells, np.ndarray] | None]:
    """Rows of the training cells, and the cells to watch with their rows; of the same matrix no copy is made."""
    if isinstance(validation, Cells):
        return np.arange(cells.n_cells), (validation, spread(WATCHED, validation.n_cells).numpy())
    if not validation:
        return np.arange(cells.n_cells), None
    train, held_out = cells.split_rows(held_out=validation, seed=seed)
    return train, (cells, held_out[spread(WATCHED, len(held_out)).numpy()])
