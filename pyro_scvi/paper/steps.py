"""Steps of an experiment, cached: each is computed once and kept under the hash of its configuration."""

import hashlib
import inspect
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from pyro_scvi.errors import FitError
from pyro_scvi.paper.data import files
from pyro_scvi.utils.progress_bars import each, progress_bar
from pyro_scvi.version import __version__

_log = logging.getLogger(__name__)

_ABSENT = "not installed"
_RAISED = "pyro_scvi.errors.FitError: "
_CPU_TIME_IS_UP = 24  # SIGXCPU


@dataclass(frozen=True)
class Step:
    """A function at the top of a module, and its settings; both and the result are JSON.

    ``needs`` are the data files that it reads: their content is part of the configuration.
    """

    function: Callable[..., Any]
    settings: dict[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The function's address, module:name."""
        return f"{self.function.__module__}:{self.function.__qualname__}"

    @property
    def key(self) -> str:
        """Hash of the function and its own source, its settings, and the files and versions that it is computed with.

        Functions called by the function are not hashed: after a change there that moves numbers, start in an empty
        folder.
        """
        source = inspect.getsource(self.function)
        parts = [self.name, source, self.settings, [files.digest(file) for file in self.needs], _versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:20]

    def __call__(self) -> Any:
        """Compute it here."""
        return self.function(**self.settings)


@dataclass(frozen=True)
class Outcome:
    """Outcome of a step: its ``result`` (None if ``reason`` says why there is none), CPU seconds and peak memory."""

    result: Any
    seconds: float
    peak_mb: float
    reason: str = ""


class Results:
    """The outcomes of steps, in memory and as files in ``folder``.

    Parameters
    ----------
    folder
        One JSON file for each step; None keeps nothing.
    isolated
        Whether steps run in processes of their own with one thread, at most ``jobs`` at a time.
    limit
        CPU seconds for a step that runs in a process of its own.
    """

    def __init__(
        self, folder: Path | None, *, isolated: bool, limit: int, jobs: int = 1, progress: bool = True
    ) -> None:
        self.folder, self.isolated, self.limit, self.jobs, self.progress = folder, isolated, limit, jobs, progress
        self._known: dict[str, Outcome] = {}

    def compute(self, steps: Iterable[Step]) -> None:
        """Compute the missing steps."""
        todo = list({step.key: step for step in steps if self._found(step.key) is None}.values())
        if not self.isolated:  # a fit belongs into the main thread, where it can be interrupted
            for step in each(todo, "step", self.progress):
                self._computed(step)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            done = pool.map(self._computed, todo)
            with progress_bar(len(todo), "step", self.progress) as bar:
                for _ in done:
                    bar.update()

    def of(self, step: Step) -> Outcome:
        """The outcome of a step, computed now if it is not known."""
        return self._found(step.key) or self._computed(step)

    def _computed(self, step: Step) -> Outcome:
        outcome = _in_a_process(step, self.limit) if self.isolated else _here(step)
        self._known[step.key] = outcome
        if outcome.reason:
            _log.warning("%s %s: %s", step.name, step.settings, outcome.reason)
        if self.folder is not None and not outcome.reason.startswith(_ABSENT):  # it may be installed next time
            _write(self.folder / f"{step.key}.json", {"step": step.name, "settings": step.settings, **vars(outcome)})
        return outcome

    def _found(self, key: str) -> Outcome | None:
        if key not in self._known and self.folder is not None:
            path = self.folder / f"{key}.json"
            if path.is_file():
                kept = json.loads(path.read_text())
                self._known[key] = Outcome(**{name: kept[name] for name in Outcome.__dataclass_fields__})
        return self._known.get(key)


def _here(step: Step) -> Outcome:
    started = time.process_time()
    try:
        result = step()
    except ImportError as error:
        return Outcome(None, 0.0, 0.0, f"{_ABSENT}: {error}")
    except Exception as error:
        said = " ".join(str(error).split())
        raise FitError(f"{step.name} {step.settings} failed: {type(error).__name__}: {said}") from error
    return Outcome(result, time.process_time() - started, _peak_mb())


def _in_a_process(step: Step, limit: int) -> Outcome:
    with tempfile.TemporaryDirectory() as folder:
        asked, answer = Path(folder) / "asked.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps({"name": step.name, "settings": step.settings, "limit": limit}))
        command = [sys.executable, "-m", "pyro_scvi.paper.steps", str(asked), str(answer)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True)
        if answer.is_file():
            return Outcome(**json.loads(answer.read_text()))
        if ended.returncode == -_CPU_TIME_IS_UP:
            return Outcome(None, float(limit), 0.0, f"not finished in {limit:,} CPU seconds")
        _log.error("%s", ended.stderr)
        *_, said = ["", *ended.stderr.splitlines()]
        if said.startswith(_RAISED):
            raise FitError(said.removeprefix(_RAISED))
        raise FitError(f"{step.name} {step.settings} failed with exit status {ended.returncode}: {said}")


def main(asked: str, answer: str) -> None:
    """In a process of its own: compute what the file ``asked`` names, and write the file ``answer``."""
    order = json.loads(Path(asked).read_text())
    resource.setrlimit(resource.RLIMIT_CPU, (order["limit"], order["limit"] + 30))
    torch.set_num_threads(1)
    module, _, name = order["name"].partition(":")
    _write(Path(answer), vars(_here(Step(getattr(import_module(module), name), order["settings"]))))


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.unfinished")
    unfinished.write_text(json.dumps(content))
    unfinished.replace(path)


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@cache
def _versions() -> dict[str, str]:
    return {"pyro-scvi": __version__, **{name: metadata.version(name) for name in ("torch", "pyro-ppl")}}


if __name__ == "__main__":
    main(*sys.argv[1:])
