"""Columns of the table by gene: Bayes factors, fold changes, expected false shares and raw counts."""

import numpy as np

from pyro_scvi.analysis.differential.matched_pairs import Estimate
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import cells_by_gene, row_blocks

RESOLUTION = 0.001  # of p_lfc at the least: a share of a thousand pairs or more


def summary(estimate: Estimate) -> dict[str, np.ndarray]:
    """Columns by gene, from averages over pairs: p, its log odds, fold changes, expected share of false calls."""
    # p of 0 or 1 would give infinite log odds: half a pair bounds what n pairs can tell.
    clipped = np.clip(estimate.p, 0.5 / estimate.n, 1 - 0.5 / estimate.n)
    return {
        "p_a_lt_b": estimate.p,
        "se": estimate.se,
        "log_bayes_factor": np.log(clipped) - np.log1p(-clipped),
        # An estimate is of b over a, as P(w_a < w_b) is; tables give a over b, as the field does.
        "lfc": -estimate.lfc_mean,
        "lfc_sd": estimate.lfc_sd,
        "lfc_low": -estimate.lfc_high,
        "lfc_high": -estimate.lfc_low,
        "p_lfc": estimate.p_lfc,
        "expected_false_share": expected_false_share(estimate.p_lfc),
    }


def expected_false_share(probability: np.ndarray) -> np.ndarray:
    """Expected share of false calls, if each gene and all genes with a larger ``probability`` are called.

    ``probability`` is that of the call being true; shape (genes,), as is the result.
    """
    order = np.argsort(-probability, kind="stable")
    rates = np.empty_like(probability)
    rates[order] = np.cumsum(1 - probability[order]) / np.arange(1, len(order) + 1)
    return rates


def half_step(p: np.ndarray) -> float:
    """Half the smallest distance of a share of pairs from 0 or 1, leaving out 0 and 1 themselves; at most 0.0005."""
    inner = p[(p > 0) & (p < 1)]
    return 0.5 * min([RESOLUTION, *inner, *(1 - inner)])


def raw_counts(cells: Cells, rows: np.ndarray, side: str) -> dict[str, np.ndarray]:
    """Mean raw count and share of cells above zero, by gene, over ``rows``; ``side`` is a or b."""
    sums, detected = np.zeros(cells.n_genes), np.zeros(cells.n_genes)
    for _, block in row_blocks(cells.counts, rows):
        sums += np.asarray(block.sum(0, dtype=np.float64))
        detected += cells_by_gene(block)
    return {f"mean_{side}": sums / len(rows), f"detected_{side}": detected / len(rows)}
