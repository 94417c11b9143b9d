"""Integration of batches: the default model beside scvi-tools, both told the batches, on two data sets.

    python -m benchmarks.choice.integration --seeds 0 1 2 --out integration.jsonl

Needs the extra ``peer``. scvi-tools is fitted twice: with its defaults, and as its guides recommend for integration (30
latents, two layers, negative binomial). Both fits have 400 epochs. Places are scored by the mixing of batches (entropy
over 50 neighbours) and by known types. Where scib-metrics is installed, its iLISI and kBET are among the scores. Labels
are scored and decide nothing. A line of the file is one fit; fits that are in the file are not made again.
"""

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from sklearn.neighbors import NearestNeighbors

import pyro_scvi as ps
from benchmarks.choice import defaults
from benchmarks.choice.beside_peer import LATENTS, PEER_EPOCHS, SPACES, summary
from benchmarks.choice.defaults import Question
from benchmarks.systems.our_models import default
from pyro_scvi.baselines.scvi_tools import trained

MODULE = "benchmarks.choice.integration"
DATA = "pbmc_3kA", "pbmc_8k4k"
NEIGHBOURS = 90  # of iLISI and kBET, as the benchmark of scib-metrics has them
RECOMMENDED = {"n_layers": 2, "gene_likelihood": "nb"}
RECOMMENDED_LATENTS = 30

Places = dict[str, np.ndarray]


def ours(asked: Question, seed: int, epochs: int | None) -> Places:
    """The default, in z and in the space of expression."""
    model, options = default(asked.train, seed)
    fit = ps.fit(model, asked.train, **options, epochs=epochs, device="cpu", progress=False)
    return {name: ps.embed(fit, asked.train, space=space) for name, space in SPACES.items()}


def theirs(asked: Question, seed: int, epochs: int | None) -> Places:
    """scvi-tools with its defaults, in its z."""
    return _theirs(asked, seed, epochs, LATENTS)


def theirs_recommended(asked: Question, seed: int, epochs: int | None) -> Places:
    """scvi-tools as it is recommended for integration, in its z."""
    return _theirs(asked, seed, epochs, RECOMMENDED_LATENTS, **RECOMMENDED)


def _theirs(asked: Question, seed: int, epochs: int | None, n_latent: int, **settings: Any) -> Places:
    counts = asked.train[:][0].numpy()
    model = trained(counts, epochs or PEER_EPOCHS, seed, n_latent, asked.batches, **settings)
    return {"z": model.get_latent_representation()}


SYSTEMS: dict[str, Callable[[Question, int, int | None], Places]] = {
    "pyro-scvi": ours,
    "scvi-tools": theirs,
    "scvi-tools, recommended": theirs_recommended,
}


def scores(asked: Question, place: np.ndarray) -> dict[str, float]:
    """Mixing of batches and separation of types at places (cells, axes)."""
    found = defaults.scores_at(asked, place)
    return found if importlib.util.find_spec("scib_metrics") is None else found | _by_scib(asked, place)


def _by_scib(asked: Question, place: np.ndarray) -> dict[str, float]:
    """Scores iLISI and kBET of scib-metrics, 0 to 1, from exact neighbours."""
    import scib_metrics
    from scib_metrics.nearest_neighbors import NeighborsResults

    distances, indices = NearestNeighbors(n_neighbors=NEIGHBOURS).fit(place).kneighbors(place)
    near = NeighborsResults(indices=indices, distances=distances)
    batches, types = (pd.factorize(np.asarray(of))[0] for of in (asked.batches, asked.types))
    ilisi, kbet = scib_metrics.ilisi_knn(near, batches), scib_metrics.kbet_per_label(near, batches, types)
    return {"ilisi": float(ilisi), "kbet": float(kbet)}


def line_of(asked: Question, name: str, system: str, seed: int, epochs: int | None) -> dict[str, Any]:
    """What is kept of one fit."""
    started = time.process_time()
    places = SYSTEMS[system](asked, seed, epochs)
    seconds = round(time.process_time() - started, 2)
    found = {space: scores(asked, place) for space, place in places.items()}
    return {"data": name, "variant": system, "seed": seed, "seconds": seconds} | found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = defaults.parser_with(MODULE, __doc__)
    parser.set_defaults(data=list(DATA))
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), default=list(SYSTEMS))
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the fits that are missing, print their means and standard deviations over seeds."""
    options = parse(arguments)
    lines = defaults.read(options.out)
    made = {(line["data"], line["variant"], line["seed"]) for line in lines}
    for seed, name in () if options.table else product(options.seeds, options.data):
        asked = defaults.question(name, options.folder, 1, options.trained)
        for system in [one for one in options.systems if (name, one, seed) not in made]:
            defaults.keep(lines, line_of(asked, name, system, seed, options.epochs), options.out)
    sys.stdout.write(defaults.markdown(summary(lines)))


if __name__ == "__main__":
    main()
