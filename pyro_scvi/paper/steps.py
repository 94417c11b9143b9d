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
import threading
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
_UNFINISHED = ".unfinished"
_END = "\n"  # of an answer that is complete
_LOOK_EVERY = 1.0  # seconds between two looks at whether the parent is there


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
        One JSON file for each step; None keeps nothing. No other process may write there.
    isolated
        Whether steps run in processes of their own with one thread, at most ``jobs`` at a time. A signal ends them, and
        so does the end of this process.
    limit
        CPU seconds for a step that runs in a process of its own.
    """

    def __init__(
        self, folder: Path | None, *, isolated: bool, limit: int, jobs: int = 1, progress: bool = True
    ) -> None:
        self.folder, self.isolated, self.limit, self.jobs, self.progress = folder, isolated, limit, jobs, progress
        self._known: dict[str, Outcome] = {}
        self._running = _Processes()

    def compute(self, steps: Iterable[Step]) -> None:
        """Compute the missing steps."""
        _remove_unfinished(self.folder)
        todo = list({step.key: step for step in steps if self._found(step.key) is None}.values())
        if not self.isolated:  # a fit belongs into the main thread, where it can be interrupted
            for step in each(todo, "step", self.progress):
                self._computed(step)
            return
        with ThreadPoolExecutor(self.jobs) as pool:
            done = pool.map(self._computed, todo)
            try:
                with progress_bar(len(todo), "step", self.progress) as bar:
                    for _ in done:
                        bar.update()
            except (KeyboardInterrupt, SystemExit):  # or the pool would wait until the steps have ended by themselves
                pool.shutdown(wait=False, cancel_futures=True)
                self._running.end()
                raise

    def of(self, step: Step) -> Outcome:
        """The outcome of a step, computed now if it is not known."""
        return self._found(step.key) or self._computed(step)

    def _computed(self, step: Step) -> Outcome:
        outcome = _in_a_process(step, self.limit, self._running) if self.isolated else _here(step)
        self._known[step.key] = outcome
        if outcome.reason:
            _log.warning("%s %s: %s", step.name, step.settings, outcome.reason)
        if self.folder is not None and not outcome.reason.startswith(_ABSENT):  # it may be installed next time
            _write(self.folder / f"{step.key}.json", {"step": step.name, "settings": step.settings, **vars(outcome)})
        return outcome

    def _found(self, key: str) -> Outcome | None:
        if key not in self._known and self.folder is not None:
            path = self.folder / f"{key}.json"
            if path.is_file() and (kept := _kept(path)) is not None:
                self._known[key] = kept
        return self._known.get(key)


class _Processes:
    """The processes of the steps that run now."""

    def __init__(self) -> None:
        self._processes: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()
        self._ended = False

    def run(self, command: list[str], **options: Any) -> tuple[int, str]:
        """Run a command to its end: its exit status, and what it wrote to stderr."""
        with self._lock:
            if self._ended:
                raise FitError("the run was interrupted")
            process = subprocess.Popen(command, text=True, stderr=subprocess.PIPE, **options)
            self._processes.add(process)
        said = process.communicate()[1]
        with self._lock:
            self._processes.discard(process)
            if self._ended:  # what it said is no fault of the step
                raise FitError("the run was interrupted")
        return process.returncode, said

    def end(self) -> None:
        """End all, and start no others."""
        with self._lock:
            self._ended = True
            for process in self._processes:
                process.kill()


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


def _in_a_process(step: Step, limit: int, running: _Processes) -> Outcome:
    order = {"name": step.name, "settings": step.settings, "limit": limit, "parent": os.getpid()}
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as answer:  # without a name: nothing is left of it if this process is killed
        descriptor = answer.fileno()
        command = [sys.executable, "-m", "pyro_scvi.paper.steps", json.dumps(order), str(descriptor)]
        # In a session of its own Ctrl-C reaches this process alone, which ends the step.
        apart = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "start_new_session": True}
        status, said = running.run(command, env=environment, pass_fds=(descriptor,), **apart)
        answer.seek(0)
        if (text := answer.read()).endswith(_END):
            return Outcome(**json.loads(text))
    if status == -_CPU_TIME_IS_UP:
        return Outcome(None, float(limit), 0.0, f"not finished in {limit:,} CPU seconds")
    _log.error("%s", said)
    *_, last = ["", *said.splitlines()]
    if last.startswith(_RAISED):
        raise FitError(last.removeprefix(_RAISED))
    raise FitError(f"{step.name} {step.settings} failed with exit status {status}: {last}")


def main(asked: str, descriptor: str) -> None:
    """In a process of its own: compute the step that is asked for, and write the outcome to an open file."""
    order = json.loads(asked)
    threading.Thread(target=_end_with, args=(order["parent"],), daemon=True).start()
    resource.setrlimit(resource.RLIMIT_CPU, (order["limit"], order["limit"] + 30))
    torch.set_num_threads(1)
    module, _, name = order["name"].partition(":")
    outcome = _here(Step(getattr(import_module(module), name), order["settings"]))
    with open(int(descriptor), "w") as answer:
        answer.write(json.dumps(vars(outcome)) + _END)


def _end_with(parent: int) -> None:
    """End this process once its parent has ended: nobody would read the answer."""
    while os.getppid() == parent:
        time.sleep(_LOOK_EVERY)
    os._exit(1)


def _kept(path: Path) -> Outcome | None:
    """The outcome in a file; None, and a warning, if it is damaged."""
    try:
        kept = json.loads(path.read_text())
        return Outcome(**{name: kept[name] for name in Outcome.__dataclass_fields__})
    except (ValueError, KeyError, TypeError, RecursionError):
        _log.warning("%s is damaged; the step is computed again", path)
        return None


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}{_UNFINISHED}")
    try:
        unfinished.write_text(json.dumps(content))
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _remove_unfinished(folder: Path | None) -> None:
    """Delete what killed processes have left."""
    for path in [] if folder is None else folder.glob(f"*{_UNFINISHED}"):
        path.unlink()


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@cache
def _versions() -> dict[str, str]:
    return {"pyro-scvi": __version__, **{name: metadata.version(name) for name in ("torch", "pyro-ppl")}}


if __name__ == "__main__":
    main(*sys.argv[1:])
