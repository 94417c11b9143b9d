"""fit: stochastic variational inference on minibatches."""

import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro.infer import ELBO

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.indexing import split_at_random
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.errors import CheckpointError, FitError, ModelError
from pyro_scvi.guides.amortized import DiagonalNormal
from pyro_scvi.guides.base import Guide
from pyro_scvi.model import SCVI
from pyro_scvi.persistence import archive
from pyro_scvi.persistence.serialization import facts_of
from pyro_scvi.priors.weights import is_taken_out
from pyro_scvi.schedules import CheckpointInterval, ConstantKL, KLWeight, LearningRate, OneCycle
from pyro_scvi.training.checkpoint import Checkpoints
from pyro_scvi.training.checks import check_cells_of, check_elbo, check_kinds, note_cells, warn_if_trained_on
from pyro_scvi.training.copying import copied
from pyro_scvi.training.distributed import Processes, SingleProcess
from pyro_scvi.training.fitted import Fit
from pyro_scvi.training.landmarks import evenly_spaced
from pyro_scvi.training.loop import Trainer, TrainingData
from pyro_scvi.training.options import TrainingOptions
from pyro_scvi.training.resuming.run_identity import identity
from pyro_scvi.training.signals import noted_interrupts
from pyro_scvi.utils.checks import switches_checked, warn
from pyro_scvi.utils.out_of_memory import memory_errors_told
from pyro_scvi.utils.random_state import seeded

BIAS = "decoder.heads.log_mean.bias"
WATCHED = 2048  # held-out cells at most that are evaluated after every epoch
_LESS_MEMORY = "lower batch_size=, make a model of fewer or narrower layers, or pass fewer cells or genes"


@switches_checked
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
    kl_weight: KLWeight = ConstantKL(),
    elbo: ELBO | None = None,
    data_start: bool = True,
    checkpoint: str | Path | None = None,
    checkpoint_every: CheckpointInterval = CheckpointInterval(),
    resume: bool = False,
    ranks: Processes = SingleProcess(),
    progress: bool = True,
    callbacks: Sequence[Callable[[int, dict[str, float], Fit], None]] = (),
) -> Fit:
    r"""Train a copy of model and guide by stochastic gradient steps on the evidence bound (ELBO).

    .. math:: L(n) = E_{q(z | x_n)} \log p(x_n | z) - KL(q(z | x_n) \| p(z))

    (Lopez et al. 2017, Eq. 1), with the KL divergence in closed form if there is one.

    ``fit.model`` and ``fit.guide`` are the trained copies, made together, so that ``fit.guide.model is fit.model``.
    What was given stays as it is, so every fit of one model object has the same start. To go on from a fit, pass its
    copies: ``ps.fit(fit.model, cells, guide=fit.guide)``, with cells that were read with ``schema=fit.schema``.

    Parameters
    ----------
    model, cells
        The model and the training cells. Neither is changed.
    guide
        q(z | x), of this model; None: DiagonalNormal(model, seed=seed). It is not changed.
    epochs
        Passes through the cells. None: 60 up to 2,500 cells; for more cells fewer, in proportion to
        1 / sqrt(number of cells), but at least 8.
    batch_size
        Cells per step, over all ranks.
    seed
        Of shuffling, dropout and reparameterised noise; the global random state is not changed.
    device
        "auto" takes CUDA, else MPS, else the CPU.
    dtype
        Precision of parameters and likelihood.
    autocast
        torch.bfloat16: the networks multiply matrices in that precision during training, about twice as fast on
        processors that support it. The documentation gives the loss in held-out evidence, under performance.
    compiled
        Whether steps are recorded once and compiled. This takes seconds to a minute at the start; a step then takes
        about two thirds of the time. It needs ``elbo=None`` and a C++ compiler (on CUDA: Triton). Steps with a KL
        weight other than 1 are not compiled. Results are the same up to rounding. With dropout the compiler may draw
        the random numbers of a step in another order, and results are then as of another seed. If a prior or network of
        your own branches on values of tensors, this raises an error; other state that its Python changes between steps
        stays as it was recorded. Without it, long runs on a CPU replay recorded steps where these give the same bits.
    validation
        Cells held out to watch the bound: a share or number of ``cells``, or separate Cells; 0 for none. At most 2,048
        of them, evenly spaced, are evaluated. The fit returns the state of the epoch with the best held-out bound
        (under the last ``kl_weight``), so evaluate it on a separate test set. A guide that is not amortized trains on
        all cells and watches none.
    patience
        Number of epochs without improvement of the held-out bound after which training stops; None: never.
    learning_rate, eps
        Schedule and epsilon of the Adam optimiser.
    kl_weight
        Weight of the KL divergence of the latents of the cells but the library size. The history always reports the
        untempered bound.
    elbo
        Any Pyro ELBO; None: the fastest, with the value of TraceMeanField_ELBO.
    data_start
        Start the genes' means and the library size's distribution at those of the data, unless the model is of a fit.
        A bias that is frozen by ``requires_grad_(False)`` stays as it is. Of a bias with a prior, the guide's median
        starts there.
    checkpoint, checkpoint_every
        Directory for the state of training at the end of an epoch, and how often it is written. An earlier checkpoint
        stays readable until the next is complete. :func:`load` returns the fit up to the checkpoint.
    resume
        Whether to resume from the checkpoint, with the same model, cells and options as before. On one thread of a CPU
        the result equals that of an uninterrupted run bit for bit. Without a checkpoint training starts from the
        beginning.
    ranks
        The processes that train together, as ``ps.distributed.joined()`` yields them. Each must call ``fit`` with the
        same arguments, and each gets the whole fit. The first writes checkpoints and shows progress.
    progress
        Whether to show a progress bar.
    callbacks
        Functions that are called after each epoch, on the first rank alone, with its number, its row of the history and
        a copy of the fit so far, such as loggers. They may draw and change what they like: training goes on as without
        them. An error in one ends training.

    Returns
    -------
    Fit
        Trained model and guide, in evaluation mode, with the history of the run and the cells' schema.

    Raises
    ------
    ModelError
        If model, guide and cells do not match, one of them is of the wrong kind, the program has a site that guide or
        verbs do not know, a parameter does not affect the loss, an option is out of range or of the wrong kind, a KL
        warm-up does not end inside the run, the device cannot be used, or there are fewer cells than ranks. Also,
        naming it, if a part of model or guide has no copy: a parameter that shares memory with another tensor, an
        object that Python cannot copy, or a function that reaches a part of the given model.
    SchemaError
        If validation cells have another schema, or the model is of a fit to other genes or covariates, or to these in
        another order or scale.
    DataError
        If no cell would be left to train on, or none held out.
    FitError
        If the loss is not finite even after the learning rate was halved 12 times, a step cannot be compiled, ranks
        were given different arguments, or another rank failed. The error's ``fit`` is the Fit of the last good epoch,
        if there was one.
    CheckpointError
        If the checkpoint cannot be written, is corrupt or of another run, or exists although ``resume`` is False;
        ``fit`` as in FitError. Files that were there are kept.
    MemoryError
        If there is not enough memory; says what to lower.
    KeyboardInterrupt
        If SIGINT or SIGTERM comes a second time, or before the first epoch has ended; ``fit`` as in FitError.

    Warns
    -----
    UserWarning
        If the learning rate was halved because the loss was not finite (``settings["halvings"]``), or if SIGINT or
        SIGTERM ended the run early (``settings["interrupted"]``); the Fit is then that of the epochs that had ended.
        If a bias with a prior cannot start at the data's means, because of ``global_guide=`` or a prior such as the
        horseshoe. If a batch, category or label of the cells' schema has no training cell, or if cells of
        ``validation`` are among the training cells. If a random walk is over levels some of which have no cells.

    Notes
    -----
    Fits in several threads take turns, because torch's generator and Pyro's handlers belong to the process; other
    threads should use neither meanwhile. Signals are handled in the main thread only; a handler of your own is called,
    too. Only one run at a time may write a checkpoint. A run is identified by its options, its counts and
    covariates, in whatever form they are stored, and how model and guide were constructed. Components of your own are
    compared by class, repr and the arguments of their constructors; code that changed is not noticed.

    Examples
    --------
    >>> model = ps.SCVI(cells.n_genes, n_latent=2)
    >>> fit = ps.fit(model, cells, epochs=20, seed=0, progress=False)
    >>> fit.history.columns.tolist()
    ['train_loss', 'held_out_loss', 'kl', 'learning_rate', 'kl_weight', 'seconds']
    >>> bool(fit.history.train_loss.iloc[-1] < fit.history.train_loss.iloc[0])
    True

    A callback that keeps an embedding of each epoch:

    >>> kept = {}
    >>> def keep(epoch, row, fit_so_far):
    ...     kept[epoch] = ps.embed(fit_so_far, test)
    >>> made = ps.fit(model, cells, epochs=3, callbacks=[keep], progress=False)
    >>> list(kept)
    [1, 2, 3]
    """
    options = TrainingOptions.among(locals())  # first, while locals() holds the arguments and nothing else
    check_kinds(model, cells, guide)
    if guide is not None and guide.model is not model:
        raise ModelError("the guide was made for another model; make it with this one, as in DiagonalNormal(model)")
    # With gradients, also inside a caller's torch.no_grad() or inference_mode().
    with torch.inference_mode(False), memory_errors_told(_LESS_MEMORY):
        own_model, own_guide = copied(model, guide)
        own_guide = DiagonalNormal(own_model, seed=seed) if own_guide is None else own_guide
        made = _trained_on(cells, own_model, own_guide, options)
    _warn(made)
    return made


def _trained_on(cells: Cells, model: SCVI, guide: Guide, options: TrainingOptions) -> Fit:
    """Check the options, put cells, model and guide on the device, and train."""
    options = options.checked(model, cells)
    check_cells_of(guide, cells)
    options.ranks.require_alike(lambda: options.for_ranks(model, guide, cells))
    options.ranks.require_own_gpus(options.device)
    train_rows, held_out = _held_out(cells, options.validation if guide.amortized else 0, options.seed)
    if isinstance(options.validation, Cells):
        warn_if_trained_on(options.validation, cells)
    if not model.trained:  # a model that was may know them
        cells.warn_of_untrained(train_rows)
    options = options.for_cells(len(train_rows))
    check_elbo(guide, options.elbo, options.kl_weight, options.epochs)
    data = _on_device(cells, train_rows, held_out, options)
    if options.data_start and not model.trained:
        start_from_data(model, data.train, options.ranks, guide)
    model.to(options.device, options.dtype)
    guide.to(options.device, options.dtype)
    return _trained(model, guide, cells, data, options)


def _held_out(
    cells: Cells, validation: float | int | Cells, seed: int
) -> tuple[np.ndarray, tuple[Cells, np.ndarray] | None]:
    """Rows of the training cells, and the cells to watch with their rows; the matrix is not copied."""
    if isinstance(validation, Cells):
        return np.arange(cells.n_cells), (validation, evenly_spaced(WATCHED, validation.n_cells).numpy())
    if not validation:
        return np.arange(cells.n_cells), None
    train, held_out = split_at_random(cells.n_cells, validation, seed)
    return train, (cells, held_out[evenly_spaced(WATCHED, len(held_out)).numpy()])


def _on_device(
    cells: Cells, train_rows: np.ndarray, held_out: tuple[Cells, np.ndarray] | None, options: TrainingOptions
) -> TrainingData:
    """The share of this process in the training cells and in the cells to watch."""
    place, dtype, ranks = options.device, options.dtype, options.ranks
    made_of: Any = {"n_cells": len(train_rows), "batch_size": options.batch_size, "equal": place.type != "cpu"}
    train = Minibatches(cells, place, dtype, ranks.shard(train_rows))
    watched = None if held_out is None else Minibatches(held_out[0], place, dtype, ranks.shard(held_out[1]))
    return TrainingData(train, watched, len(train_rows), ranks.batch_sizes(**made_of), ranks.own_batch_sizes(**made_of))


def start_from_data(
    model: SCVI, cells: Minibatches, ranks: Processes = SingleProcess(), guide: Guide | None = None
) -> None:
    """Set the genes' biases to their log mean counts, and the library size to the mean and sd of the log totals.

    The guide's median of the biases is set where these are latent.
    """
    totals, gamma = ranks.gather(cells.totals()), cells.covariates().gathered(ranks.gather)
    means = torch.as_tensor(ranks.gather(cells.gene_totals()[None]).sum(0) / len(totals)).float()
    model.library.start_from(torch.as_tensor(totals).float(), gamma)
    heads = getattr(model.decoder, "heads", None)  # a decoder of one's own may have others
    head = heads["log_mean"] if isinstance(heads, torch.nn.ModuleDict) and "log_mean" in heads else None
    start = (means + 1 / len(totals)).log()  # one more count each: a gene may have none
    bias = None if head is None else head._parameters.get("bias")  # None if it is latent
    if bias is not None and bias.requires_grad:  # one that is frozen has the values that its owner gave it
        with torch.no_grad():
            bias.copy_(start)
    if guide is not None and is_taken_out(head, "bias") and not guide.weights.start_at(BIAS, start):
        warn(
            f"{BIAS!r} is latent and its guide does not start at the data's means, because of the guide of global "
            "latents or of the prior: training may need more epochs"
        )


def _trained(model: SCVI, guide: Guide, cells: Cells, data: TrainingData, options: TrainingOptions) -> Fit:
    """Train, and return the Fit; an error carries the Fit of the epochs that had ended, if there are any."""
    settings: dict[str, Any] = {"epochs": options.epochs, "batch_size": options.batch_size, "seed": options.seed}
    settings |= {"n_cells": data.n_cells}
    checkpoints = _checkpoints(model, guide, cells, options, settings)

    def told(trainer: Trainer) -> None:
        if options.callbacks and options.ranks.first:
            _tell(trainer, cells, settings)

    with seeded(options.seed), pyro.get_param_store().scope(), noted_interrupts() as interrupts:
        trainer = Trainer.at_start(model, guide, data, options, checkpoints, interrupts, told)
        try:
            trainer.train()
        except (FitError, CheckpointError, KeyboardInterrupt) as error:
            carrier: Any = error  # Python's own has no such attribute
            carrier.fit = _made(trainer, cells, settings) if trainer.state.rows else None
            raise
        if not math.isnan(loss := trainer.kept_loss()):
            settings["held_out_loss"] = loss
    return _made(trainer, cells, settings)


def _checkpoints(
    model: SCVI, guide: Guide, cells: Cells, options: TrainingOptions, settings: dict[str, Any]
) -> Checkpoints | None:
    """The run's checkpoint; None if none was asked for or another process writes it."""
    if options.checkpoint is None or not options.ranks.first:
        return None
    validation = options.validation
    return Checkpoints(
        archive.folder(options.checkpoint),
        options.checkpoint_every,
        options.resume,
        lambda history: facts_of(model, guide, history, cells.schema, settings),
        identity(model, cells, settings | options.for_checkpoint()),
        {"cells": cells} | ({"validation": validation} if isinstance(validation, Cells) else {}),
    )


def _made(trainer: Trainer, cells: Cells, settings: dict[str, Any]) -> Fit:
    """The Fit of the epochs that have ended."""
    state, received = trainer.state, trainer.interrupts.received
    notes: dict[str, Any] = {"halvings": state.halvings} if state.halvings else {}
    if received and len(state.rows) < settings["epochs"] and not state.best.waited_out:
        notes["interrupted"] = f"{received} after epoch {len(state.rows)} of {settings['epochs']}"
    trainer.model.trained_on = cells.schema
    note_cells(trainer.guide, cells)
    return Fit(trainer.model.eval(), trainer.guide.eval(), state.history, cells.schema, settings | notes)


def _tell(trainer: Trainer, cells: Cells, settings: dict[str, Any]) -> None:
    """Call the callbacks with copies, under a seed of their own: what they do does not change what is learned."""
    rows = trainer.state.rows
    for callback in trainer.options.callbacks:
        model, guide = copied(trainer.model, trainer.guide)
        model.trained_on = cells.schema
        note_cells(guide, cells)
        so_far = Fit(model.eval(), guide.eval(), trainer.state.history, cells.schema, dict(settings))
        with seeded(trainer.options.seed), pyro.get_param_store().scope():
            callback(len(rows), dict(rows[-1]), so_far)


def _warn(made: Fit) -> None:
    if halvings := made.settings.get("halvings"):
        text = f"the loss was NaN or infinite; the learning rate was halved {halvings} times: start with a smaller one"
        warnings.warn(text, UserWarning, stacklevel=3)
    if interrupted := made.settings.get("interrupted"):
        text = f"training was interrupted by {interrupted}; this is the fit of the epochs that had ended"
        warnings.warn(text, UserWarning, stacklevel=3)
