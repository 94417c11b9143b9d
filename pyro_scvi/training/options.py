"""Options of training: one record of all of them, and their checks."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from pyro.infer import ELBO

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.minibatches import require_precision, resolve_device
from pyro_scvi.data.obs_columns import label_of, quoted
from pyro_scvi.errors import ModelError, SchemaError
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.elbo import MeanFieldELBO
from pyro_scvi.inference.importance_weighted import ImportanceWeighted
from pyro_scvi.likelihoods.library_size import SizeFactor
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import lasting_repr
from pyro_scvi.schedules import CheckpointInterval, KLWeight, LearningRate
from pyro_scvi.training.checks import check_run
from pyro_scvi.training.distributed import Processes, SingleProcess
from pyro_scvi.training.landmarks import evenly_spaced
from pyro_scvi.training.same_columns import require_same_columns
from pyro_scvi.utils.checks import brief, warn

COMPARED = 64
"""Cells whose counts ranks compare gene by gene."""

# Where a run is written and shown. These may differ between ranks, and between a run and its continuation.
_OUTSIDE_THE_RUN = ("checkpoint", "checkpoint_every", "resume", "ranks", "progress", "callbacks")


@dataclass(frozen=True)
class TrainingOptions:
    """The options of :func:`fit`, with the names and in the order of its arguments, which have the defaults.

    First they are as the user gave them. ``checked`` and ``for_cells`` replace "auto" and None by objects and numbers;
    the types below are those afterwards.
    """

    epochs: int
    batch_size: int
    seed: int
    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None
    compiled: bool
    validation: float | int | Cells
    patience: int | None
    learning_rate: LearningRate
    eps: float
    kl_weight: KLWeight
    elbo: ELBO
    data_start: bool
    checkpoint: str | Path | None
    checkpoint_every: CheckpointInterval
    resume: bool
    ranks: Processes
    progress: bool
    callbacks: Sequence[Callable[..., None]]

    @classmethod
    def among(cls, arguments: Mapping[str, Any]) -> "TrainingOptions":
        """Pick the options among a function's arguments."""
        return cls(**{option.name: arguments[option.name] for option in fields(cls)})

    def checked(self, model: SCVI, cells: Cells) -> "TrainingOptions":
        """The same with "auto" replaced by a device, after the checks that every rank can make for itself.

        Raises
        ------
        ModelError, SchemaError
            If model, cells and validation cells do not fit together, the device cannot be used, or an option has a
            value that is wrong on any rank.
        """
        options = replace(self, device=resolve_device(self.device))
        _check_validation(self.validation)
        _check_cells(model, cells, self.validation)
        _check_precision(self.dtype, self.autocast)
        require_precision(options.device, self.dtype)
        if not isinstance(self.ranks, Processes):
            raise ModelError(f"ranks must be what ps.distributed.joined() yields, got {brief(self.ranks)}")
        _check_compiled(self.compiled, self.elbo)
        _check_callbacks(self.callbacks)
        return options

    def for_cells(self, n_cells: int) -> "TrainingOptions":
        """The same with the defaults for a run on ``n_cells`` training cells.

        Raises
        ------
        ModelError
            If an option is out of range or of the wrong kind.
        """
        epochs = default_epochs(n_cells) if self.epochs is None else self.epochs
        check_run(epochs, self.batch_size, self.patience, self.eps)
        _check_options(self.learning_rate, self.kl_weight, self.elbo, int(epochs))
        _check_checkpoint(self.checkpoint, self.checkpoint_every, self.resume)
        return replace(
            self,
            epochs=int(epochs),  # torch and JSON take no integers of NumPy
            batch_size=int(self.batch_size),
            seed=int(self.seed),
            elbo=MeanFieldELBO() if self.elbo is None else self.elbo,
        )

    @property
    def replays(self) -> bool:
        """Whether a step's recording can take its place: with gradients of this process alone, on a CPU."""
        alone = isinstance(self.ranks, SingleProcess) and self.device.type == "cpu"
        return alone and type(self.elbo) is MeanFieldELBO

    def of_run(self) -> dict[str, Any]:
        """By name, the options that affect what is learned."""
        options = {name: value for name, value in vars(self).items() if name not in _OUTSIDE_THE_RUN}
        return options | {"device": self.device.type}

    def for_ranks(self, model: SCVI, guide: Guide, cells: Cells) -> dict[str, Any]:
        """What must be the same on all ranks, in a form that they can send and compare."""
        return self.of_run() | {
            "learning_rate": lasting_repr(self.learning_rate),
            "kl_weight": lasting_repr(self.kl_weight),
            "elbo": _told(self.elbo),
            "cells": _brief(cells),
            "validation": _brief(self.validation),
            "model": lasting_repr(model),
            "guide": lasting_repr(guide),
            "trained before": model.trained,
        }

    def for_checkpoint(self) -> dict[str, Any]:
        """What a run and its continuation must share, beside the facts of the fit."""
        options = self.of_run()
        options.pop("dtype")  # is among the facts of the fit
        if not self.compiled:
            options.pop("compiled")  # earlier checkpoints do not have it, nor the next
        return options


def default_epochs(n_cells: int) -> int:
    """60 epochs up to 2,500 cells; for more, in proportion to 1 / sqrt(n_cells), but at least 8."""
    return max(8, min(60, round(60 * math.sqrt(2500 / n_cells))))


def _check_cells(model: SCVI, cells: Cells, held_out: Any) -> None:
    if model.trained_on is not None:
        require_same_columns(model.trained_on, cells.schema)
    if (cells.n_genes, cells.n_covariates) != (model.n_genes, model.n_covariates):
        raise ModelError(
            f"the model is for {model.n_genes} genes and {model.n_covariates} covariates, the cells have "
            f"{cells.n_genes} and {cells.n_covariates}; make it as SCVI(cells.n_genes, n_covariates=cells.n_covariates)"
        )
    _check_size_factors(model, cells)
    for columns in model.weights.ordered_columns(model):
        for name, place in cells.columns.items():
            if place == columns and name not in cells.schema.ordered:
                raise SchemaError(
                    f"a prior uses the categories of {name!r} as steps in time, and they are words without an "
                    f"order: make obs[{name!r}] numbers, or an ordered Categorical, and read the cells again"
                )
            if place == columns:
                _warn_of_absent_levels(cells, name)
    if isinstance(held_out, Cells) and held_out.schema != cells.schema:
        raise SchemaError("the validation cells have other genes or covariates; make them with schema=cells.schema")


def _warn_of_absent_levels(cells: Cells, name: str) -> None:
    """Warn of levels without cells, which are no rows of a walk."""
    column = cells.obs.get(name)
    known = next((words for _, each, words in cells.schema.words() if each == name), ())
    if column is None or not isinstance(column.dtype, pd.CategoricalDtype):
        return
    if absent := [label for level in column.cat.categories if (label := label_of(level)) not in known]:
        warn(
            f"the levels {quoted(absent)} of {name!r} have no cells, and a prior takes the levels as steps in time: "
            "the step over them counts as one step, from the level before to the level after"
        )


def _check_validation(validation: Any) -> None:
    """Refuse what is neither cells nor a share or number of them."""
    is_number = isinstance(validation, Real) and not isinstance(validation, bool)
    whole = isinstance(validation, Integral)
    if not isinstance(validation, Cells) and not (is_number and validation >= 0 and (whole or validation < 1)):
        raise ModelError(
            f"validation must be a share from 0 to below 1, an int number of cells, or Cells; got {brief(validation)}"
        )


def _check_size_factors(model: SCVI, cells: Cells) -> None:
    name = cells.schema.size_factor
    if name is not None and getattr(model.library, "columns", None) != cells.columns[name]:
        raise ModelError(
            f"the cells have size factors, {name!r}, and the model does not scale its means by them: make it with "
            f"library=ps.libraries.SizeFactor(cells.columns[{name!r}])"
        )
    if isinstance(model.library, SizeFactor) and name is None:
        raise ModelError("the model takes size factors, and the cells have none: read them with size_factor=")


def _check_precision(dtype: Any, autocast: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in (torch.float32, torch.float64):
        raise ModelError(
            f"dtype must be torch.float32 or torch.float64, got {_shown(dtype)}; autocast=torch.bfloat16 is faster"
        )
    if autocast is not None and dtype != torch.float32:
        raise ModelError(f"autocast is for parameters in torch.float32, got dtype={dtype!r}")
    if autocast is not None and autocast is not torch.bfloat16:
        raise ModelError(
            f"autocast must be None or torch.bfloat16, got {_shown(autocast)}: gradients are not accurate "
            "enough in other types"
        )


def _check_compiled(compiled: Any, elbo: Any) -> None:
    if compiled and elbo is not None:
        raise ModelError(f"compiled=True is for elbo=None, got elbo={elbo!r}")


def _check_callbacks(callbacks: Any) -> None:
    listed = isinstance(callbacks, list | tuple)
    if not listed or not all(callable(one) and not isinstance(one, type) for one in callbacks):
        got = [brief(one) for one in callbacks] if listed else brief(callbacks)
        raise ModelError(f"callbacks must be functions of (epoch, row, fit) in a list, got {got}")


def _check_options(learning_rate: Any, kl_weight: Any, elbo: Any, epochs: int) -> None:
    if not isinstance(learning_rate, LearningRate):
        raise ModelError(f"learning_rate must be a schedule, as in ps.schedules.OneCycle(0.01); got {learning_rate!r}")
    if not isinstance(kl_weight, KLWeight):
        raise ModelError(f"kl_weight must be an object, as in ps.schedules.ConstantKL(0.5); got {kl_weight!r}")
    if elbo is not None and not isinstance(elbo, ELBO):
        raise ModelError(f"elbo must be a Pyro ELBO, as in pyro.infer.Trace_ELBO(); got {elbo!r}")
    kl_weight.at(0, epochs)


def _check_checkpoint(checkpoint: Any, every: Any, resume: bool) -> None:
    if resume and checkpoint is None:
        raise ModelError("resume needs the directory to continue from: pass checkpoint=")
    if not isinstance(every, CheckpointInterval):
        raise ModelError(
            f"checkpoint_every must be an object, as in ps.schedules.CheckpointInterval(epochs=5); got {every!r}"
        )


def _brief(cells: Any) -> str:
    """Summary of cells that is cheap to compare; anything else, such as a share of cells, by its repr."""
    if not isinstance(cells, Cells):
        return repr(cells)
    names = _digest([json.dumps(cells.schema.to_dict()).encode()])
    # Whole rows: the totals of cells do not tell the order of the genes.
    some, _ = cells[evenly_spaced(COMPARED, cells.n_cells).numpy()]
    values = _digest([cells.totals.tobytes(), some.numpy().tobytes(), *cells.gamma.blocks()])
    return f"{cells.n_cells} x {cells.n_genes} with digest {names} of names, {values} of values"


def _digest(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()[:8]


def _told(elbo: Any) -> str:
    """The kind of a bound, and its draws, if it has a number of these."""
    return repr(elbo) if isinstance(elbo, ImportanceWeighted) else type(elbo).__name__


def _shown(dtype: Any) -> str:
    return str(dtype) if isinstance(dtype, torch.dtype) else brief(dtype)
