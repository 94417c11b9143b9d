"""Worker processes, one per side of a comparison, and their measurements by turns; never two at once."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from benchmarks.harness.paths import DATA, ROOT
from benchmarks.harness.stopwatch import Sample

EXTRAS = {"scvi": "pip install 'pyro-scvi[peer]'", "mpmath": "pip install 'pyro-scvi[test]'"}


class TaskError(RuntimeError):
    """A task failed in its worker; the message is the worker's traceback."""


class Unavailable(RuntimeError):
    """A requirement of a row is missing; the message says which, and how to get it."""


@dataclass(frozen=True)
class System:
    """One thing to measure.

    Parameters
    ----------
    side
        Side it belongs to: every side has one process, which stays alive from row to row.
    task
        ``module:function``, see :mod:`benchmarks.harness.worker`.
    options
        Keyword arguments of the task, plain numbers and names.
    """

    side: str
    task: str
    options: Mapping[str, Any] = field(default_factory=dict)


class Worker:
    """A child process that prepares and measures tasks of one side."""

    def __init__(self, threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        command = [sys.executable, "-m", "benchmarks.harness.worker", str(threads)]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        # Popen's pipes are None only where none were asked for.
        self.requests, self.replies = cast(IO[str], self.process.stdin), cast(IO[str], self.process.stdout)

    def ask(self, **request: list[Any]) -> dict[str, Any]:
        """Send one request and wait for its reply.

        Raises
        ------
        TaskError
            If the task failed or the process ended.
        """
        self.requests.write(json.dumps(request) + "\n")
        self.requests.flush()
        line = self.replies.readline()
        if not line:
            raise TaskError(f"the worker ended with status {self.process.wait()} in {next(iter(request))}")
        reply = json.loads(line)
        if "error" in reply:
            raise TaskError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process and wait for it."""
        self.requests.close()
        self.process.wait()
        self.replies.close()


@dataclass
class Bench:
    """How a run measures: its options, and the workers of the sides; use it as a context.

    Parameters
    ----------
    rounds
        Measurements of every system of a row, by turns.
    seeds
        Of fits whose quality is judged, one run each.
    threads
        Of every worker.
    data
        Folder with the real data.
    quick
        Whether to use tiny sizes: everything runs, but the figures mean nothing.
    whole_curves
        Whether to run every budget of a time to quality, for a picture, and not only those until the target.
    """

    rounds: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    threads: int = 1
    data: Path = DATA
    quick: bool = False
    whole_curves: bool = False
    workers: dict[str, Worker] = field(default_factory=dict)

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def interleaved(self, systems: Mapping[str, System]) -> dict[str, list[Sample]]:
        """Measure the systems by turns, ``rounds`` times each."""
        return self.by_turns(systems, self.rounds)

    def by_turns(self, systems: Mapping[str, System], rounds: int) -> dict[str, list[Sample]]:
        """Prepare all systems, then measure A, B, A, B, ..."""
        for name, system in systems.items():
            self.worker(system.side).ask(prepare=[name, system.task, dict(system.options)])
        samples: dict[str, list[Sample]] = {name: [] for name in systems}
        for _ in range(rounds):
            for name, system in systems.items():
                samples[name].append(Sample(**self.worker(system.side).ask(measure=[name])))
        for side in {system.side for system in systems.values()}:
            self.worker(side).ask(clear=[])
        return samples

    def each_alone(self, systems: Mapping[str, System]) -> dict[str, list[Sample]]:
        """Measure the systems by turns, every time in a new process: what a first call costs."""
        samples: dict[str, list[Sample]] = {name: [] for name in systems}
        for _ in range(self.rounds):
            for name, system in systems.items():
                samples[name].append(self.alone(system))
        return samples

    def once(self, system: System) -> Sample:
        """One measurement of one system."""
        return self.by_turns({"only": system}, 1)["only"][0]

    def alone(self, system: System) -> Sample:
        """One measurement in a new process, which a peak of memory needs."""
        with Bench(threads=self.threads) as fresh:
            return fresh.once(system)

    def worker(self, side: str) -> Worker:
        """The process of a side, started when first asked for or if it has ended."""
        if side not in self.workers or self.workers[side].process.poll() is not None:
            self.workers[side] = Worker(self.threads)
        return self.workers[side]

    def file(self, name: str) -> Path:
        """Path of a real data file.

        Raises
        ------
        Unavailable
            If it is not there.
        """
        path = self.data / name
        if not path.is_file():
            raise Unavailable(f"{name} is not in {self.data}; pass --data or set PYRO_SCVI_DATA to the folder with it")
        return path


def require_packages(names: Iterable[str]) -> None:
    """Raise if a package cannot be imported, without importing it.

    Raises
    ------
    Unavailable
        If one is missing; the message names the extra that installs it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise Unavailable(f"{name} is not installed: {EXTRAS[name]}")
