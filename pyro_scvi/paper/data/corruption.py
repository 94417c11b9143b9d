"""Corrupted counts, some set to zero, and the error of a system that restores them (Lopez et al. 2017, Table 2)."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from pyro_scvi import baselines
from pyro_scvi.paper.data import files

SHARE = 0.1  # of the non-zero entries, which are candidates
N_LATENTS = 10
CLIP = 1e-6  # of probabilities, so that a cross-entropy is finite: at most 13.8 nats for one entry
RESAMPLES = 100  # of the entries, for the standard error of a median


class Corrupted(NamedTuple):
    """Counts (cells, genes) as the systems see them, and the candidates, all (entries,).

    ``cell`` and ``gene`` are their positions, ``truth`` their counts before, ``zeroed`` whether they are zero now;
    ``left_out`` is how many zeroed entries went with cells and genes that have no count left, ``decay`` ZIFA's lambda.
    """

    counts: np.ndarray
    cell: np.ndarray
    gene: np.ndarray
    truth: np.ndarray
    zeroed: np.ndarray
    left_out: int
    decay: float


def read(file: str, at_most: int | None, by_zifa: bool, seed: int) -> Corrupted:
    """The corrupted counts of a data set. They depend on these arguments only, not on the systems compared.

    Parameters
    ----------
    file, at_most
        Data set, and how many of its cells at most; genes and cells without a count are left out.
    by_zifa
        Whether candidates are zeroed with the probabilities of a ZIFA fitted to the uncorrupted counts, or all of them.
    seed
        Of the candidates and of which are zeroed.
    """
    counts = np.asarray(files.read(file, at_most).X.toarray(), dtype=np.float64)
    counts = counts[counts.any(1)][:, counts.any(0)]
    decay = baselines.ZIFA(N_LATENTS).fit(counts).decay_ if by_zifa else 0.0
    return corrupted(counts, decay, seed)


def corrupted(counts: np.ndarray, decay: float, seed: int) -> Corrupted:
    r"""Draw a tenth of the non-zero counts (cells, genes) without replacement, and zero each of them at random.

    .. math:: P(\text{zeroed} | x) = e^{-\lambda \log(1 + x)^2}

    with :math:`\lambda` = ``decay``; at 0 all of them are zeroed. Reconstructed from the authors' code of 2018.
    """
    rng = np.random.default_rng(seed)
    cells, genes = np.nonzero(counts)
    chosen = rng.choice(len(cells), int(SHARE * len(cells)), replace=False)
    cell, gene = cells[chosen], genes[chosen]
    truth = counts[cell, gene]
    zeroed = np.less(rng.random(len(truth)), np.exp(-decay * np.square(np.log1p(truth))))
    left = counts.copy()
    left[cell[zeroed], gene[zeroed]] = 0
    seen_cells, seen_genes = np.asarray(left.any(1)), np.asarray(left.any(0))
    kept = seen_cells[cell] & seen_genes[gene]
    return Corrupted(
        left[seen_cells][:, seen_genes],
        (seen_cells.cumsum() - 1)[cell[kept]],
        (seen_genes.cumsum() - 1)[gene[kept]],
        truth[kept],
        zeroed[kept],
        int((zeroed & ~kept).sum()),
        decay,
    )


def errors(of: Corrupted, imputed: np.ndarray) -> dict[str, float]:
    """Median and mean over the zeroed entries of abs(imputed - truth), counts, with standard errors over entries.

    ``imputed`` is (cells, genes) or broadcasts to it; the error of the median is by bootstrap.
    """
    values = np.broadcast_to(imputed, of.counts.shape)[of.cell[of.zeroed], of.gene[of.zeroed]]
    missed = np.abs(values - of.truth[of.zeroed])
    rng = np.random.default_rng(0)
    medians = [np.median(rng.choice(missed, len(missed))) for _ in range(RESAMPLES)]
    return {
        "median": float(np.median(missed)),
        "median_se": float(np.std(medians)),
        "mean": float(missed.mean()),
        "mean_se": float(missed.std() / np.sqrt(len(missed))),
    }


def cross_entropy(of: Corrupted, lost: np.ndarray) -> dict[str, float]:
    r"""Mean over the candidates of :math:`-d \log p - (1 - d) \log(1 - p)`, nats, d = 1 where zeroed, with its error.

    ``lost`` holds p, (cells, genes) or broadcasting to it, clipped here. The authors left out terms that were not
    finite, so that a certain but wrong answer cost nothing.
    """
    p = np.broadcast_to(lost, of.counts.shape)[of.cell, of.gene].astype(np.float64).clip(CLIP, 1 - CLIP)
    terms = -np.log(np.where(of.zeroed, p, 1 - p))
    return {"cross_entropy": float(terms.mean()), "cross_entropy_se": float(terms.std() / np.sqrt(len(terms)))}


def area(of: Corrupted, score: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve of a score (cells, genes) that separates zeroed entries from the other zeros.

    Its standard error is that of Hanley and McNeil 1982, as if entries were independent.
    """
    artificial = np.zeros(of.counts.shape, bool)
    artificial[of.cell[of.zeroed], of.gene[of.zeroed]] = True
    observed = of.counts == 0
    auc = float(roc_auc_score(artificial[observed], score[observed]))
    positives, others = int(artificial.sum()), int(observed.sum() - artificial.sum())
    both_positive, both_others = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positives - 1) * (both_positive - auc**2) + (others - 1) * (both_others - auc**2)
    return {"auc": auc, "auc_se": float(np.sqrt(variance / (positives * others)))}


def identification(of: Corrupted, lost: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Cross-entropy of each probability of ``lost`` (cells, genes), and the area under the curve.

    The area is that of p itself, except for ``zero``, P(x = 0 | z), where it is that of 1 - p: a zeroed count is a zero
    that the model did not expect.
    """
    return {name: cross_entropy(of, p) | area(of, 1 - p if name == EXPECTED_ZERO else p) for name, p in lost.items()}


EXPECTED_ZERO = "zero"


def about(of: Corrupted) -> dict[str, Any]:
    """How many entries were zeroed, left out and candidates, the share zeroed, and lambda."""
    return {
        "entries": int(of.zeroed.sum()),
        "left_out": of.left_out,
        "candidates": len(of.zeroed),
        "base_rate": float(of.zeroed.mean()),
        "true_median": float(np.median(of.truth[of.zeroed])),
        "decay": of.decay,
    }
