"""Checkpoints: the training state at the end of an epoch, written to disk and resumed from there."""

import dataclasses
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import CheckpointError
from pyro_scvi.persistence import archive
from pyro_scvi.persistence.serialization import FIT_FACTS, check_finite, history_of, with_new_names
from pyro_scvi.schedules import CheckpointInterval
from pyro_scvi.training.resuming.progress import Course
from pyro_scvi.training.resuming.run_identity import with_digest
from pyro_scvi.training.state import HISTORY, Snapshot, TrainingState, under

_log = logging.getLogger(__name__)

CHECKPOINT_FACTS = FIT_FACTS | {"run", "progress"}
_KINDS = {"checkpoint": CHECKPOINT_FACTS}
_IDENTITY = ("model", "guide", "schema", "dtype", "run")  # facts that a resumed run must share


@dataclasses.dataclass
class Checkpoints:
    """The checkpoint of one run in the directory ``folder``; from ``begin`` to ``end`` no other run writes there.

    ``facts`` turns a history into everything about the fit except its weights. ``run`` holds the cells and options that
    identify the run, and ``cells`` are the cells by their name there. ``epoch`` and ``written`` are the epoch and the
    time, by the monotonic clock, of the last checkpoint that was written or read.
    """

    folder: Path
    every: CheckpointInterval
    resume: bool
    facts: Callable[[pd.DataFrame], dict[str, Any]]
    run: dict[str, Any]
    cells: dict[str, Cells]
    epoch: int = dataclasses.field(default=0, init=False)
    written: float = dataclasses.field(default=-math.inf, init=False)
    _held: ExitStack = dataclasses.field(default_factory=ExitStack, init=False)

    def begin(self, state: TrainingState, course: Course) -> None:
        """Resume from the checkpoint that is there, or write the first one.

        Raises
        ------
        CheckpointError
            If another run writes there. If the directory holds something else, or a checkpoint that is corrupt, of
            another run, or not to be resumed. Nothing is overwritten then.
        """
        self._held.enter_context(archive.alone(self.folder))  # two runs would both end, and one be lost
        archive.check_replaceable(self.folder, "checkpoint")
        config = next((c for c in (archive.CONFIG, archive.PREVIOUS) if (self.folder / c).exists()), None)
        if config is None:
            if self.resume:
                _log.info("there is no checkpoint in %s: training starts from the beginning", self.folder)
            self._write(state)
        else:
            self._go_on(state, course, config)
        archive.remove_orphans(self.folder)

    def end(self) -> None:
        """Let other runs write there."""
        self._held.close()

    def note(self, state: TrainingState, *, last: bool = False) -> None:
        """Write a checkpoint if one is due after the epoch that ended, or if it is the ``last``."""
        epochs, seconds = len(state.rows) - self.epoch, time.monotonic() - self.written
        if epochs and (last or (epochs >= self.every.epochs and seconds >= self.every.seconds)):
            self._write(state)

    def _write(self, state: TrainingState) -> None:
        facts = self.facts(state.history) | {"run": self.run, "progress": state.good.facts}
        archive.write(self.folder, archive.Content("checkpoint", facts, state.good.tensors), keep_previous=True)
        self.epoch, self.written = len(state.rows), time.monotonic()

    def _go_on(self, state: TrainingState, course: Course, config: str) -> None:
        content, start = self._read(config), state.good
        if not self.resume:
            raise CheckpointError(
                f"{self.folder} holds a checkpoint after epoch {_epochs(content)}; pass resume=True to continue, "
                "or another directory"
            )
        ours = self.facts(state.history) | {"run": self.run}
        then = {key: with_new_names(content.facts[key]) for key in _IDENTITY}
        if isinstance(then["run"], dict):
            then["run"] |= {name: with_digest(then["run"].get(name), cells) for name, cells in self.cells.items()}
        self._require_same(then, {key: ours[key] for key in _IDENTITY})
        check_finite(content.tensors)  # training would go on with NaN, to the first step that notices
        try:
            history = history_of(content.facts["history"])
            rows: Any = history[list(HISTORY)].to_dict("records")
            state.restore(read := Snapshot(content.facts["progress"], rows, content.tensors))
            course.require(history.index.tolist(), read)
        except Exception as error:  # what pandas and torch raise for a state that this version does not write
            state.restore(start)
            raise CheckpointError(f"{self.folder / config} is inconsistent: {error}") from error
        self.epoch, self.written = len(rows), time.monotonic()
        _log.info("going on from %s, after epoch %d", self.folder / config, self.epoch)

    def _read(self, config: str) -> archive.Content:
        try:
            return archive.read(self.folder, _KINDS, config=config)
        except CheckpointError as error:
            if config == archive.PREVIOUS:
                raise
            epoch = _epochs(archive.read(self.folder, _KINDS, config=archive.PREVIOUS))
            text = f"{error}; the one before it, after epoch {epoch}, is intact: delete {config} to continue from there"
            raise CheckpointError(text) from error

    def _require_same(self, then: dict[str, Any], now: dict[str, Any]) -> None:
        differences = list(_differences(then, json.loads(json.dumps(now))))
        if differences:
            more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
            raise CheckpointError(
                f"{self.folder} holds the checkpoint of another run: {'; '.join(differences[:3])}{more}. "
                "Pass the same model, cells and options as then, or another directory"
            )


def best_states(content: archive.Content) -> dict[str, Tensor]:
    """The states of model and guide that ``fit`` would return if it ended at this checkpoint."""
    if not _epochs(content):
        raise CheckpointError("its run has not finished an epoch yet, so there is no fit to load")
    return under("best", content.tensors) or under("now", content.tensors)


def _epochs(content: archive.Content) -> int:
    try:
        return len(content.facts["history"]["epoch"])
    except (KeyError, TypeError) as error:
        raise CheckpointError("it has no history of epochs") from error


def _differences(then: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[str]:
    """What differs between two values as JSON has them, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in then | now:
            yield from _differences(then.get(key), now.get(key), (*path, key))
    elif then != now:
        name = ".".join(step for step in path if step not in ("run", "arguments"))
        yield f"{name} was {_brief(then)}, is {_brief(now)}"


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
