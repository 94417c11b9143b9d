"""Systems that call genes: group means and pairs of this package, t and rank tests, DESeq2 and scvi-tools."""

import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import stats

import pyro_scvi as ps
from benchmarks.harness.exchanged import Drawn

FIRST, SECOND = "first", "second"
DELTA = 0.5  # of scvi-tools' change mode and of pairs here
Test = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Case(NamedTuple):
    """Simulated cells and a fit to them; ``tested`` (genes,) have counts enough, and all systems test these."""

    drawn: Drawn
    fit: ps.Fit
    cells: ps.Cells
    tested: np.ndarray
    seed: int


class Calls(NamedTuple):
    """By gene: the stated false discovery rate at which it is called, and a score that is larger the surer it is."""

    q: np.ndarray
    score: np.ndarray


class Caller(NamedTuple):
    """A system, its answer for a case, and whether it needs donors."""

    name: str
    calls: Callable[[Case], Calls]
    needs_donors: bool = False


def compared(fit: ps.Fit, cells: ps.Cells, drawn: Drawn, estimand: object, seed: int) -> pd.DataFrame:
    """Differential expression, first over second group."""
    groups = {"groupby": np.where(drawn.second, SECOND, FIRST), "group_a": FIRST, "group_b": SECOND}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depths differ")
        return ps.differential_expression(fit, cells, **groups, estimand=estimand, seed=seed)


def by_means(case: Case) -> Calls:
    """Group means of this package."""
    return _by_table(compared(case.fit, case.cells, case.drawn, ps.differential.GroupMeans(), case.seed))


def by_donors(case: Case) -> Calls:
    """Group means with donors as replicates."""
    means = ps.differential.GroupMeans(replicates=case.drawn.donor)
    return _by_table(compared(case.fit, case.cells, case.drawn, means, case.seed))


def _by_table(table: pd.DataFrame) -> Calls:
    return Calls(table["q_value"].fillna(1).to_numpy(), table["z"].abs().fillna(0).to_numpy())


def by_pairs(case: Case) -> Calls:
    """Pairs of cells: the expected share of false statements, taken for a false discovery rate."""
    pairs = ps.differential.RandomPairs(delta=DELTA, largest_se=0.03)
    table = compared(case.fit, case.cells, case.drawn, pairs, case.seed)
    shares = np.full(len(table), 1.0)
    of_tested = table["p_lfc"].to_numpy()[case.tested]
    shares[case.tested] = ps.differential.expected_false_share(of_tested)
    return Calls(shares, np.where(case.tested, table["p_lfc"], 0))


def by_decoded(case: Case) -> Calls:
    """Welch's test of E[w | x] over its sum, which looks at decoded expression."""
    w = ps.impute(case.fit, case.cells, seed=case.seed).astype(np.float64)
    return _by_test(case, w / w.sum(1, keepdims=True), _welch)


def by_linear_welch(case: Case) -> Calls:
    """Welch's test of shares of a cell's counts."""
    return _by_test(case, _shares(case.drawn.counts), _welch)


def by_log_welch(case: Case) -> Calls:
    """Welch's test of log counts per 10,000."""
    return _by_test(case, _logs(case.drawn.counts), _welch)


def by_thinned_welch(case: Case) -> Calls:
    """The same, once the deeper group is thinned to the median depth of the other."""
    generator, drawn = np.random.default_rng(case.seed), case.drawn
    totals = drawn.counts.sum(1)
    depths = np.array([np.median(totals[drawn.second == side]) for side in (False, True)])
    kept = (depths.min() / depths)[drawn.second.astype(int)]
    thinned = generator.binomial(drawn.counts.astype(np.int64), kept[:, None])
    return _by_test(case, _logs(thinned), _welch)


def by_wilcoxon(case: Case) -> Calls:
    """Wilcoxon's rank sum of log counts per 10,000."""
    return _by_test(case, _logs(case.drawn.counts), lambda a, b: stats.mannwhitneyu(a, b, method="asymptotic").pvalue)


def by_deseq2(case: Case) -> Calls:
    """DESeq2 of the donors' sums."""
    drawn = case.drawn
    donors = np.unique(drawn.donor)
    sums = np.stack([drawn.counts[drawn.donor == donor].sum(0) for donor in donors])
    second = np.array([drawn.second[drawn.donor == donor][0] for donor in donors])
    found = np.full(len(case.tested), np.nan)
    found[case.tested] = ps.baselines.DESeq2().test(sums[:, case.tested], second)["p_value"]
    return _adjusted(case, found)


def by_scvi_tools(case: Case) -> Calls:
    """scvi-tools' change mode after its default training."""
    import scvi

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, case.seed
    adata = anndata.AnnData(case.drawn.counts, pd.DataFrame({"group": np.where(case.drawn.second, SECOND, FIRST)}))
    scvi.model.SCVI.setup_anndata(adata)
    model = scvi.model.SCVI(adata)
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    model.train(accelerator="cpu", logger=False, **quiet)
    groups = {"groupby": "group", "group1": FIRST, "group2": SECOND}
    table = model.differential_expression(**groups, mode="change", delta=DELTA, silent=True).loc[adata.var_names]
    probability = table["proba_de"].to_numpy()
    shares = np.full(len(probability), 1.0)
    shares[case.tested] = ps.differential.expected_false_share(probability[case.tested])
    return Calls(shares, np.where(case.tested, probability, 0))


def _by_test(case: Case, values: np.ndarray, test: Test) -> Calls:
    second = case.drawn.second
    with np.errstate(divide="ignore", invalid="ignore"):
        return _adjusted(case, test(values[~second], values[second]))


def _adjusted(case: Case, p: np.ndarray) -> Calls:
    """Benjamini and Hochberg over the tested genes; a gene without a p value is not called."""
    known, q = np.nan_to_num(np.asarray(p, dtype=np.float64), nan=1.0), np.ones(len(p))
    q[case.tested] = stats.false_discovery_control(known[case.tested])
    return Calls(q, np.where(case.tested, -np.log(np.maximum(known, 1e-300)), 0))


def _welch(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def _logs(counts: np.ndarray) -> np.ndarray:
    return np.log1p(_shares(counts) * 1e4)


CALLERS = {
    "means": Caller("GroupMeans", by_means),
    "donors": Caller("GroupMeans(replicates=)", by_donors, needs_donors=True),
    "pairs": Caller("RandomPairs, expected_false_share", by_pairs),
    "decoded": Caller("Welch t of E[w | x]", by_decoded),
    "linear": Caller("Welch t of shares", by_linear_welch),
    "thinned": Caller("Welch t of log CP10k, depths matched by thinning", by_thinned_welch),
    "log": Caller("Welch t of log CP10k", by_log_welch),
    "wilcoxon": Caller("Wilcoxon of log CP10k", by_wilcoxon),
    "deseq2": Caller("DESeq2 of donors' sums", by_deseq2, needs_donors=True),
    "scvi-tools": Caller("scvi-tools, change mode", by_scvi_tools),
}
