"""Worker process: ``python -m benchmarks.harness.worker THREADS``, told by lines of JSON what to measure.

A request has one key: ``prepare`` (a name, a task ``module:function`` and its options), ``measure`` (a name),
``clear``. Every request is answered by one line: the measurement, nothing, or an error. Replies have a channel of their
own, because libraries may print; their output goes to stderr.
"""

import gc
import json
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Any, TextIO

from benchmarks.harness.stopwatch import Sample

Prepared = Callable[[], Sample]


class Tasks:
    """Prepared tasks by name."""

    def __init__(self) -> None:
        self.prepared: dict[str, Prepared] = {}

    def prepare(self, name: str, task: str, options: dict[str, Any]) -> dict[str, Any]:
        """Look the task up and let it prepare, outside every timed section."""
        self.prepared[name] = pkgutil.resolve_name(task)(**options)
        return {}

    def measure(self, name: str) -> dict[str, Any]:
        """One measurement of a prepared task, garbage of the others collected before."""
        gc.collect()
        return self.prepared[name]()._asdict()

    def clear(self) -> dict[str, Any]:
        """Forget all tasks and what they hold."""
        self.prepared.clear()
        return {}


def serve(requests: Iterable[str], replies: TextIO) -> None:
    """Answer every line of ``requests``."""
    tasks = Tasks()
    verbs: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": tasks.prepare,
        "measure": tasks.measure,
        "clear": tasks.clear,
    }
    for line in requests:
        (verb, arguments), *_ = json.loads(line).items()
        try:
            reply = verbs[verb](*arguments)
        except Exception:  # whatever went wrong in a task is the parent's to report
            reply = {"error": traceback.format_exc()}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def main() -> None:
    """Set the threads, keep the replies apart from what others print, and serve."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(int(sys.argv[1]))
    serve(sys.stdin, replies)


if __name__ == "__main__":
    main()
