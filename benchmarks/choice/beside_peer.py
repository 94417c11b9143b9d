"""The default model beside scvi-tools' SCVI on seven data sets: held-out evidence, neighbours, clusters, mixing.

    python -m benchmarks.choice.beside_peer --seeds 0 1 2 --out peer.jsonl

Needs the extra ``peer``. Both see the same cells, and neither is told their batches: ``benchmarks.choice.integration``
tells both. This package's fit is that of the defaults, with a tenth of the cells set aside; scvi-tools has 400 epochs
on all of them, 20 of these for the warm-up of its KL weight, and otherwise its defaults. The latents of both are
integrated out by one sampler with the same number of draws. Fits of one data set and seed follow each other in one run.
Labels are scored and decide nothing. A line of the file is one fit; fits that are in the file are not made again.
"""

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd

import pyro_scvi as ps
from benchmarks.choice import defaults
from benchmarks.choice.defaults import Question
from benchmarks.systems.our_models import default
from benchmarks.systems.peers import scvi_tools

MODULE = "benchmarks.choice.beside_peer"
OURS, PEER = "pyro-scvi", "scvi-tools"
LATENTS = 10  # the default of both
PEER_EPOCHS = 400  # what scvi-tools chooses for up to 20,000 cells
SPACES = {"z": ps.spaces.Latent(), "expression": ps.spaces.Expression()}


def ours(asked: Question, seed: int, samples: int, epochs: int | None) -> dict[str, Any]:
    """The default without batches: its evidence, and scores of its places."""
    fit, seconds = _fitted(asked, seed, epochs)
    table = ps.evidence(fit, asked.held_out, samples=samples, progress=False)
    found = evidence_of(table.log_evidence.to_numpy(), table.khat.to_numpy())
    return found | scores_of(asked, _places(asked, fit), seconds)


def theirs(asked: Question, seed: int, samples: int, epochs: int | None) -> dict[str, Any]:
    """scvi-tools without batches: its evidence with the library integrated out, and scores in its z."""
    train, held_out = (cells[:][0].numpy() for cells in (asked.train, asked.held_out))
    started = time.process_time()
    fitted = scvi_tools(train, held_out, epochs or PEER_EPOCHS, seed)
    seconds = time.process_time() - started
    integrated = fitted.evidence(samples=samples)
    places = {"z": fitted.model.get_latent_representation()}
    return evidence_of(integrated.log_evidence, integrated.khat) | scores_of(asked, places, seconds)


SYSTEMS: dict[str, Callable[[Question, int, int, int | None], dict[str, Any]]] = {OURS: ours, PEER: theirs}


def _fitted(asked: Question, seed: int, epochs: int | None) -> tuple[ps.Fit, float]:
    started = time.process_time()
    model, options = default(asked.train, seed)
    fit = ps.fit(model, asked.train, **options, epochs=epochs, device="cpu", progress=False)
    return fit, time.process_time() - started


def _places(asked: Question, fit: ps.Fit) -> dict[str, np.ndarray]:
    """In z, and in the space of expression that the docs recommend."""
    return {name: ps.embed(fit, asked.train, space=space) for name, space in SPACES.items()}


def evidence_of(evidence: np.ndarray, khat: np.ndarray) -> dict[str, Any]:
    """What is kept of the evidence and k-hat (cells,) of a fit."""
    return {"evidence": evidence.round(3).tolist(), "khat_share": float((khat > 0.7).mean())}


def scores_of(asked: Question, places: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    """What is kept of the places (training cells, axes) of a fit, and of its time."""
    scores = {name: defaults.scores_at(asked, place) for name, place in places.items()}
    return {"fit_seconds": round(seconds, 2)} | scores


def summary(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Means over seeds and, in brackets, their standard deviations, by data set and system; evidence in nats."""
    means = [float(np.mean(line["evidence"])) if "evidence" in line else np.nan for line in lines]
    flat = pd.json_normalize([line | {"evidence": mean} for line, mean in zip(lines, means, strict=True)])
    groups = flat.groupby(["data", "variant"], sort=False)
    mean, spread = groups.mean(numeric_only=True), groups.std(numeric_only=True)
    columns = [name for name in mean if name != "seed"]
    texts = {name: [_with_spread(*pair) for pair in zip(mean[name], spread[name], strict=True)] for name in columns}
    return pd.DataFrame(texts, index=mean.index).reset_index()


def _with_spread(mean: float, spread: float) -> str:
    digits = 1 if abs(mean) >= 1.5 else 3
    return "" if np.isnan(mean) else f"{mean:.{digits}f} ({spread:.{digits}f})"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = defaults.parser_with(MODULE, __doc__)
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    parser.add_argument("--cells", type=int, default=defaults.HELD_OUT, help="held-out cells, at most")
    parser.add_argument("--samples", type=int, default=1000, help="draws of the evidence sampler")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the fits that are missing, print the tables."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", "k-hat is above")  # its share is kept
    lines = defaults.read(options.out)
    if not options.table:
        complete(lines, options)
    pairs = defaults.paired([line for line in lines if "evidence" in line], against=PEER)
    sys.stdout.write(defaults.markdown(pairs[pairs.variant != PEER]) + "\n" + defaults.markdown(summary(lines)))


def complete(lines: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Make the fits that are asked for and not among ``lines``, which grow; the file grows with them."""
    made = {(line["data"], line["variant"], line["seed"]) for line in lines}
    for seed, name in product(options.seeds, options.data):
        asked = defaults.question(name, options.folder, options.cells, options.trained, told=False)
        for system in [one for one in options.systems if (name, one, seed) not in made]:
            of_fit = SYSTEMS[system](asked, seed, options.samples, options.epochs)
            defaults.keep(lines, {"data": name, "variant": system, "seed": seed} | of_fit, options.out)


if __name__ == "__main__":
    main()
