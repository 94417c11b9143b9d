"""``kill -9`` at random moments of checkpointed training: ``python kill_checkpoints.py MOMENTS FOLDER SEED``.

Children are forked from a process that has imported everything and never trains itself, because torch refuses gradients
in a child whose parent has computed some. Prints counts as JSON.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch._dynamo  # what optimisers import when they are made: once here, not in every child

import pyro_scvi as ps
from pyro_scvi.errors import CheckpointError

torch.set_num_threads(1)
CELLS = ps.Cells.from_counts(np.random.default_rng(0).poisson(2.0, size=(60, 12)) + 1)
EPOCHS = 8


def train(folder, out):
    """Train, or go on, and write the final state as bytes."""
    model = ps.SCVI(CELLS.n_genes, 2, n_hidden=8, n_layers=1)
    guide = ps.guides.DiagonalNormal(model, n_hidden=8, n_layers=1)
    options = {"checkpoint": folder, "resume": True} if folder else {}
    fit = ps.fit(model, CELLS, guide, epochs=EPOCHS, batch_size=16, progress=False, device="cpu", **options)
    state = [value.numpy().tobytes() for part in (fit.model, fit.guide) for value in part.state_dict().values()]
    table = fit.history.drop(columns="seconds").to_csv().encode()
    out.write_bytes(b"".join([*state, table]))


def forked(*arguments):
    child = os.fork()
    if not child:
        try:
            train(*arguments)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def finished(*arguments):
    started = time.monotonic()
    _, status = os.waitpid(forked(*arguments), 0)
    if status:
        raise RuntimeError(f"training ended with status {status}")
    return time.monotonic() - started


def wait(child, seconds):
    """Seconds until a child ended by itself; None if it goes on for longer than asked."""
    started = time.monotonic()
    while (passed := time.monotonic() - started) < seconds:
        if os.waitpid(child, os.WNOHANG)[0]:
            return passed
        time.sleep(min(0.002, seconds - passed))
    return None


def loads(folder):
    """Whether the directory holds a fit, or a run without an epoch as yet, or nothing at all."""
    if not folder.exists() or not (folder / "config.json").exists():
        return True
    try:
        return len(ps.load(folder).history) > 0
    except CheckpointError as error:
        return "not finished an epoch" in str(error)


def main(moments, folder, seed):
    rng, whole, out = np.random.default_rng(seed), folder / "whole", folder / "out"
    finished(None, whole)
    lasts = finished(folder / "timed", out)
    counts = {"killed": 0, "loaded": 0, "equal": 0, "while writing": 0, "seconds of one run": round(lasts, 3)}
    while counts["killed"] < moments:
        run = folder / "run"
        child = forked(run, out)
        ended = wait(child, rng.uniform(0, lasts))
        if ended is not None:
            lasts = ended  # the machine has become faster
            shutil.rmtree(run)
            continue
        os.kill(child, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            counts["killed"] += 1
            counts["while writing"] += any(run.glob(".*.part")) if run.exists() else 0
            counts["loaded"] += loads(run)
            lasts = max(lasts, finished(run, out))
            counts["equal"] += out.read_bytes() == whole.read_bytes()
        shutil.rmtree(run, ignore_errors=True)
    sys.stdout.write(json.dumps(counts))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
