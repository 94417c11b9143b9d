"""Systems that score genes for differential expression: rank and t tests, scvi-tools, and this package."""

import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import anndata
import numpy as np
import pandas as pd
from scipy import stats

import pyro_scvi as ps
from pyro_scvi.paper.data.blood import Blood

WILCOXON = "Wilcoxon rank-sum", "-log p"
MEANS = {"|z|": "z", "|shrunken lfc|": "lfc_shrunk"}
Scores = dict[str, np.ndarray]  # by name of the score, (genes,) each


class System(NamedTuple):
    """Something that scores genes; ``seeded`` if another seed gives other scores."""

    name: str
    score: Callable[[Blood, int], Scores]
    seeded: bool = True


def score_tests(data: Blood, seed: int, *, test: Callable[..., Any], statistic: bool) -> Scores:
    """Score by a test of the log counts per 10,000; a gene that is constant in both groups scores 0."""
    x = data.dense()
    y = np.log1p(x / x.sum(1, keepdims=True) * 1e4)
    a, b = (y[(data.adata.obs["labels"] == group).to_numpy()] for group in data.groups)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = test(a, b)
    scores = {"-log p": -np.log(result.pvalue)} | ({"|t|": np.abs(result.statistic)} if statistic else {})
    return {name: np.nan_to_num(score, nan=0.0) for name, score in scores.items()}


def abundance(data: Blood) -> np.ndarray:
    """Mean share of the counts of a cell, over the cells of both groups with equal weight, (genes,)."""
    a, b = _shares(data)
    return (a.mean(0) + b.mean(0)) / 2


def _shares(data: Blood) -> list[np.ndarray]:
    x = data.dense()
    return [part / part.sum(1, keepdims=True) for part in (x[_of(data, group)] for group in data.groups)]


def _of(data: Blood, group: str) -> np.ndarray:
    return (data.adata.obs["labels"] == group).to_numpy()


def score_abundance(data: Blood, seed: int) -> Scores:
    """Score by abundance alone, which knows nothing of the groups."""
    return {"mean share": abundance(data)}


def score_linear(data: Blood, seed: int) -> Scores:
    """Score by Welch's t of the shares of a cell's counts, without a logarithm."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.ttest_ind(*_shares(data), equal_var=False)
    return {"|t|": np.nan_to_num(np.abs(result.statistic), nan=0.0)}


def score_thinned(data: Blood, seed: int) -> Scores:
    """Score by Welch's t of log CP10k, once the deeper group is thinned to the median depth of the other."""
    generator, x = np.random.default_rng(seed), data.dense()
    parts = [x[_of(data, group)] for group in data.groups]
    depths = [np.median(part.sum(1)) for part in parts]
    thinned = [
        generator.binomial(part.astype(np.int64), min(1.0, min(depths) / depth))
        for part, depth in zip(parts, depths, strict=True)
    ]
    a, b = (np.log1p(part / np.maximum(part.sum(1, keepdims=True), 1) * 1e4) for part in thinned)
    with np.errstate(divide="ignore", invalid="ignore"):
        result = stats.ttest_ind(a, b, equal_var=False)
    return {"|t|": np.nan_to_num(np.abs(result.statistic), nan=0.0)}


@cache
def fitted(data: Blood, seed: int, *, gene_dispersion: bool) -> tuple[ps.Fit, ps.Cells]:
    """Fit with default settings: the default model, or a dispersion per gene with dropout 0.1."""
    cells = ps.Cells.from_anndata(data.adata, batch=data.batch)
    likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes)) if gene_dispersion else None
    dropout = 0.1 if gene_dispersion else 0.0
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, likelihood=likelihood, dropout=dropout, seed=seed)
    guide = ps.guides.DiagonalNormal(model, dropout=dropout, seed=seed)
    return ps.fit(model, cells, guide, seed=seed, device="cpu", progress=False), cells


def score_ours(data: Blood, seed: int, *, gene_dispersion: bool) -> Scores:
    """Score by group means, and by P(w_a < w_b) and P(fold change), depth taken out and as the paper has it."""
    fit, cells = fitted(data, seed, gene_dispersion=gene_dispersion)
    contrasts = {"depth-corrected": ps.differential.DepthCorrected(), "depth-laden": ps.differential.Uncorrected()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "depths differ|groups and batches|all cells are from one batch")
        # The other tests rank all genes, too.
        every = ps.differential.GroupMeans(min_detected=0, min_molecules=0)
        means = compared(fit, cells, "labels", data.groups, seed=seed, estimand=every)
    scores = {f"{name}, group means": means[column].abs().fillna(0).to_numpy() for name, column in MEANS.items()}
    for name, contrast in contrasts.items():
        pairs = ps.differential.RandomPairs(contrast=contrast)
        table = compared(fit, cells, "labels", data.groups, estimand=pairs, seed=seed)
        scores[f"|log BF|, {name}"] = table["log_bayes_factor"].abs().to_numpy()
        scores[f"P(change > .5 one way), {name}"] = table["p_lfc"].to_numpy()
    return scores


def compared(
    fit: ps.Fit, cells: ps.Cells, groupby: str | np.ndarray, groups: tuple[str, str], **options: Any
) -> pd.DataFrame:
    """Differential expression between two groups of cells by a fit."""
    group_a, group_b = groups
    return ps.differential_expression(fit, cells, groupby=groupby, group_a=group_a, group_b=group_b, **options)


def score_scvi_tools(data: Blood, seed: int) -> Scores:
    """Score by the Bayes factors of scvi-tools, both modes, after its default training."""
    import scvi

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scvi.settings.verbosity, scvi.settings.seed = logging.ERROR, seed
    adata = anndata.AnnData(data.adata.X.astype(np.float32), data.adata.obs.copy(), data.adata.var[[]].copy())
    scvi.model.SCVI.setup_anndata(adata, batch_key=data.batch)
    model = scvi.model.SCVI(adata)
    model.train(
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    a, b = data.groups
    scores = {}
    for mode in ("vanilla", "change"):
        table = model.differential_expression(groupby="labels", group1=a, group2=b, mode=mode, silent=True)
        scores[f"|log BF|, {mode}"] = table["bayes_factor"].abs().loc[adata.var_names].to_numpy()
    scores["|median lfc|, change"] = table["lfc_median"].abs().loc[adata.var_names].to_numpy()
    return scores


SYSTEMS = {
    "wilcoxon": System(
        WILCOXON[0],
        partial(score_tests, test=partial(stats.mannwhitneyu, method="asymptotic"), statistic=False),
        seeded=False,
    ),
    "welch": System(
        "Welch t", partial(score_tests, test=partial(stats.ttest_ind, equal_var=False), statistic=True), seeded=False
    ),
    "welch-linear": System("Welch t of shares", score_linear, seeded=False),
    "welch-thinned": System("Welch t, depths matched by thinning", score_thinned),
    "abundance": System("abundance alone", score_abundance, seeded=False),
    "default": System("pyro-scvi, default", partial(score_ours, gene_dispersion=False)),
    "gene": System("pyro-scvi, dispersion per gene, dropout .1", partial(score_ours, gene_dispersion=True)),
    "scvi-tools": System("scvi-tools, default training", score_scvi_tools),
}
