"""Where neighbours are sought, chosen without labels: by how well they foretell molecules that the fit has not seen.

    python -m benchmarks.choice.spaces --seeds 0 1 2 --out spaces.jsonl

Each molecule of a cell goes into one of two halves. The default is fitted to the first halves, and neighbours are found
from them. Their second halves foretell the cell's own second half x':

    score_n = 1 / (sum_g x'_ng)  sum_g x'_ng log p_ng,   p_n the shares of the genes among the neighbours' molecules

in nats per molecule. A cell of median depth with the shares of all cells is added to the neighbours, so that no p_ng is
zero. Labels are scored as well and decide nothing. A line of the file is one fit; fits that are in the file are not
made again.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
from scipy.special import entr
from sklearn.metrics import pairwise_distances
from torch import Tensor

import pyro_scvi as ps
from benchmarks.choice import defaults
from benchmarks.systems.our_models import as_cells, default
from pyro_scvi.analysis.integration.spaces import fingerprint
from pyro_scvi.guides.base import Guide
from pyro_scvi.inference.evaluation import theta_given

MODULE = "benchmarks.choice.spaces"
NEIGHBOURS = 15
ASKED = 500  # cells whose neighbours are sought, evenly spaced, among all
AGAINST = "expression, 30 components"
Distances = Callable[[ps.Fit, ps.Cells, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class LogInverseDispersion(ps.spaces.Expression):
    """log r of the decoded distributions in the place of the shares."""

    def features(self, guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
        """Log r, (draws, cells, genes)."""
        return theta_given(guide, x, gamma, sites, scores_x=False)["log_inverse_dispersion"].expand(-1, *x.shape)

    def scaled(self, mean: Tensor) -> Tensor:
        """As it is."""
        return mean


def unreduced(space: ps.spaces.Expression, fit: ps.Fit, cells: ps.Cells) -> np.ndarray:
    """What a space decodes before its principal components, (cells, genes)."""
    axes, batches = np.eye(cells.n_genes), tuple(fit.schema.batches)
    fitted = ps.spaces.FittedSpace(space, np.zeros(cells.n_genes), axes, 1.0, batches, fingerprint(fit))
    return ps.embed(fit, cells, space=fitted).astype(np.float64)


def shares(fit: ps.Fit, cells: ps.Cells) -> np.ndarray:
    """Decoded share of each gene in the mean counts, (cells, genes)."""
    return unreduced(ps.spaces.Expression(), fit, cells) ** 2


def in_space(space: ps.spaces.Space) -> Distances:
    """Euclidean distances in a space of ``ps.embed``."""

    def between(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
        place = ps.embed(fit, cells, space=space)
        return pairwise_distances(place[rows], place)

    return between


def standardised(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
    """Euclidean distances in z, each latent divided by its standard deviation over cells."""
    place = ps.embed(fit, cells)
    place = place / place.std(0)
    return pairwise_distances(place[rows], place)


def hellinger(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
    """Between multinomials with the decoded shares: sum_g (sqrt p_g - sqrt q_g)^2, no component left out."""
    roots = np.sqrt(shares(fit, cells))
    return pairwise_distances(roots[rows], roots)


def negative_binomial(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
    r"""Fisher's metric of independent negative binomials with mean d p_g at one depth d, and one r_g for all cells.

    Its coordinates are 2 sqrt(r) arsinh(sqrt(mean / r)); r_g is the median over cells.
    """
    r = np.exp(np.median(unreduced(LogInverseDispersion(), fit, cells), 0))
    mean = np.median(cells.totals) * shares(fit, cells)
    place = 2 * np.sqrt(r) * np.arcsinh(np.sqrt(mean / r))
    return pairwise_distances(place[rows], place)


def jensen_shannon(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
    """Between multinomials with the decoded shares: H((p + q) / 2) - (H(p) + H(q)) / 2."""
    p = shares(fit, cells).astype(np.float32)
    own = entr(p).sum(1)
    return np.stack([entr((p + p[row]) / 2).sum(1) - (own + own[row]) / 2 for row in rows])


def logarithms(fit: ps.Fit, cells: ps.Cells, rows: np.ndarray) -> np.ndarray:
    """Between log(1 + 10,000 p_g), as scanpy's pipelines scale counts."""
    place = np.log1p(1e4 * shares(fit, cells))
    return pairwise_distances(place[rows], place)


METRICS: dict[str, Distances] = {
    "z": in_space(ps.spaces.Latent()),
    "z, standardised": standardised,
    "expression, 10 components": in_space(ps.spaces.Expression(10)),
    AGAINST: in_space(ps.spaces.Expression()),
    "expression, all components (Hellinger)": hellinger,
    "Jensen-Shannon": jensen_shannon,
    "Fisher, negative binomial": negative_binomial,
    "log(1 + 10,000 share)": logarithms,
    "hidden layer, 10 components": in_space(ps.spaces.Hidden()),
}


def halves(data: anndata.AnnData, rows: np.ndarray, seed: int) -> tuple[ps.Cells, np.ndarray]:
    """These cells with half of their molecules, and the other half (cells, genes)."""
    data = data[rows].copy()
    counts = np.asarray(data.X.todense() if hasattr(data.X, "todense") else data.X).astype(np.int64)
    first = np.random.default_rng(seed).binomial(counts, 0.5)
    data.X = first.astype(np.float32)
    return as_cells(data), counts - first


def nearest(distances: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The nearest other cells of each asked one, (asked, neighbours)."""
    others = distances.astype(np.float64)
    others[np.arange(len(rows)), rows] = np.inf
    return np.argsort(others, 1, kind="stable")[:, :NEIGHBOURS]


def foretold(second: np.ndarray, rows: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """Score of each asked cell, (asked,), nats per molecule; NaN where its second half is empty."""
    common = second.sum(0) + 1.0
    pooled = second[neighbours].sum(1) + np.median(second.sum(1)) * common / common.sum()
    scores = (second[rows] * np.log(pooled / pooled.sum(1, keepdims=True))).sum(1)
    totals = second[rows].sum(1)
    return np.where(totals > 0, scores / np.maximum(totals, 1), np.nan)


def line_of(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Fit to the first halves, and score the neighbours of every metric: what is kept of one fit."""
    data = defaults.counts(name, options.folder)
    rows = np.sort(np.random.default_rng(0).permutation(data.n_obs)[: options.trained])
    cells, second = halves(data, rows, seed)
    model, how = default(cells, seed)
    fit = ps.fit(model, cells, **how, epochs=options.epochs, device="cpu", progress=False)
    types = np.asarray(data.obs[label], str)[rows] if (label := _label(name)) in data.obs else None
    asked = np.arange(min(ASKED, len(rows))) * len(rows) // min(ASKED, len(rows))
    found = {metric: scored(between(fit, cells, asked), second, asked, types) for metric, between in METRICS.items()}
    return {"data": name, "seed": seed} | found


def _label(name: str) -> str:
    return defaults.LABELS.get(name, "labels")


def scored(distances: np.ndarray, second: np.ndarray, rows: np.ndarray, types: np.ndarray | None) -> dict[str, Any]:
    """Scores by cell, and the share of cells whose type is the most frequent among their neighbours."""
    neighbours = nearest(distances, rows)
    found: dict[str, Any] = {"score": foretold(second, rows, neighbours).round(5).tolist()}
    if types is None:
        return found
    names, codes = np.unique(types, return_inverse=True)
    votes = np.eye(len(names))[codes[neighbours]].sum(1)
    return found | {"accuracy": float((votes.argmax(1) == codes[rows]).mean())}


def differences(lines: Sequence[dict[str, Any]]) -> pd.DataFrame:
    """Score of each metric minus that of the space the docs recommend, in thousandths of a nat per molecule.

    A mean over seeds and cells, its standard error over cells, and accuracy of the neighbours' types where known.
    """
    rows = []
    for metric in METRICS:
        row = {"neighbours in": metric}
        for data in dict.fromkeys(line["data"] for line in lines):
            of = [line for line in lines if line["data"] == data]
            gaps = 1e3 * np.mean([np.subtract(line[metric]["score"], line[AGAINST]["score"]) for line in of], 0)
            kept = gaps[np.isfinite(gaps)]
            text = f"{kept.mean():+.1f} ({kept.std(ddof=1) / np.sqrt(len(kept)):.1f})"
            if "accuracy" in of[0][metric]:
                text += f" {np.mean([line[metric]['accuracy'] for line in of]):.3f}".replace("0.", ".")
            row[data] = text
        rows.append(row)
    return pd.DataFrame(rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    return defaults.parser_with(MODULE, __doc__).parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the fits that are missing, print the table."""
    options = parse(arguments)
    warnings.filterwarnings("ignore", ".* ha(s|ve) no counts")  # half of a cell of few molecules may be empty
    lines = defaults.read(options.out)
    if not options.table:
        complete(lines, options)
    sys.stdout.write(defaults.markdown(differences(lines)))


def complete(lines: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Make the fits that are asked for and not among ``lines``, which grow; the file grows with them."""
    made = {(line["data"], line["seed"]) for line in lines}
    for name in options.data:
        for seed in [seed for seed in options.seeds if (name, seed) not in made]:
            defaults.keep(lines, line_of(name, seed, options), options.out)


if __name__ == "__main__":
    main()
