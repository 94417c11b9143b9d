"""Fits on some cells and log probabilities of others: the steps that Tables 1 and 3 share.

A *case* is the arguments of :func:`split`. No fit sees a test cell: they are set aside by row number before anything
is computed, and which genes and cells are kept depends on the training cells and on each cell by itself.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score, silhouette_score
from sklearn.model_selection import train_test_split

from pyro_scvi import baselines
from pyro_scvi.analysis.evidence.evidence import evidence
from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.analysis.integration.embedding import embed
from pyro_scvi.data.cells import Cells
from pyro_scvi.inference.evaluation import bound_terms, evaluating
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.paper import systems
from pyro_scvi.paper.data import files
from pyro_scvi.paper.tables.independent_genes import IndependentGenes
from pyro_scvi.schedules import Constant, ConstantKL
from pyro_scvi.training.fitted import Fit

Result = dict[str, Any]

HELD_OUT = {files.CORTEX: 0.25, files.BRAIN: 0.1}  # the authors' shares, drawn with their random state 0
VALIDATION = 0.1  # of the training cells, by which fit() chooses the epoch: its default, for every model of ours
N_LATENTS = 10
DRAWS = 100  # of the guide, for the bound and the conditional
REFIT_RATE, REFIT_EPS, REFIT_BATCH = 1e-3, 0.1, 100  # the authors' optimiser of the encoder on test cells


class Split(NamedTuple):
    """Cells to fit and to score, and all of them with their known labels, where the file has labels.

    ``left_out`` says how many genes and cells of the file were dropped: genes without a count in the training cells
    that decide on them, and then cells without a count.
    """

    train: Cells
    test: Cells
    everything: Cells
    left_out: dict[str, int]


def split(file: str, n: int | None, least: int | None, test_cells: int, at_most: int | None = None) -> Split:
    """The first ``n`` training and ``test_cells`` test cells of a data set in the authors' random order.

    Parameters
    ----------
    file
        Name of the data set.
    n
        Training cells; None: all.
    least
        The smallest training set in the comparison. Genes need a count there, so that the same counts are scored at
        every size.
    test_cells
        Most test cells.
    at_most
        Most cells to read from the file.
    """
    adata = files.read(file, at_most)
    train, test = train_test_split(np.arange(adata.n_obs), test_size=HELD_OUT[file], random_state=0)
    train, test = train[:n], test[:test_cells]
    seen = np.asarray(adata.X[train[:least]].sum(0)).ravel() > 0
    counted = np.asarray(adata.X[:, seen].sum(1)).ravel() > 0
    left_out = {
        "genes": int((~seen).sum()),
        "train_cells": int((~counted[train]).sum()),
        "test_cells": int((~counted[test]).sum()),
    }
    position = counted.cumsum() - 1
    everything = Cells.from_anndata(adata[counted][:, seen].copy())
    train, test = (everything.take(position[rows[counted[rows]]]) for rows in (train, test))
    return Split(train, test, everything, left_out)


def ours(
    case: Result, name: str, seed: int, epochs: int | None, rate: float | None, kl: float, samples: int, refit: int
) -> Result:
    """A model of ours: every score of the test cells, and of all cells by their known types.

    ``rate`` is a constant learning rate in place of the configuration's own, ``kl`` the weight of the KL divergence in
    training, ``refit`` how often the encoder passes over the test cells to be refitted to them.
    """
    of = split(**case)
    options: Result = {"kl_weight": ConstantKL(kl)} | ({} if rate is None else {"learning_rate": Constant(rate)})
    started = time.process_time()
    fit = systems.fitted(name, of.train, seed=seed, epochs=epochs, validation=VALIDATION, **options)
    seconds = time.process_time() - started
    with reported_otherwise():
        table = evidence(fit, of.test, samples=samples)
    return _about(of, seconds) | {
        "epochs": len(fit.history),
        "log_p": table.log_evidence.tolist(),
        "khat_above": float((~(table.khat <= KHAT_LIMIT)).mean()),
        "bound": table.amortized_bound.tolist(),
        "conditional": conditional(fit, of.test).tolist(),
        "refitted": conditional(encoder_refitted(fit, of.test, refit), of.test).tolist(),
        **clustering(lambda: embed(fit, of.everything), of.everything),
    }


def factor_analysis(case: Result, samples: int) -> Result:
    """Factor analysis: probability of counts, and the paper's density."""
    return _with_density(case, baselines.FactorAnalysis(N_LATENTS), samples)


def zifa(case: Result, samples: int) -> Result:
    """ZIFA: probability of counts, exact density, and the paper's expected complete-data score."""
    of, method = split(**case), baselines.ZIFA(N_LATENTS)
    result = _with_density(case, method, samples)
    return result | {"expected": method.expected_complete_log_likelihood(of.test.counts).tolist()}


def _with_density(case: Result, method: Any, samples: int) -> Result:
    of = split(**case)
    started = time.process_time()
    with reported_otherwise():
        method.fit(of.train.counts)
    seconds = time.process_time() - started
    return (
        _about(of, seconds)
        | _integrated(method, of, samples)
        | {
            "density": method.score_samples(of.test.counts).tolist(),
            **clustering(lambda: method.transform(of.everything.counts), of.everything),
        }
    )


def zinb_wave(case: Result, tol: float, max_iter: int) -> Result:
    """ZINB-WaVE: log likelihood of the test cells given the W and gamma that were refitted to them."""
    of, method = split(**case), baselines.ZINBWaVE(N_LATENTS, tol=tol, max_iter=max_iter)
    started = time.process_time()
    with reported_otherwise():
        method.fit(of.train.counts)
        seconds = time.process_time() - started
        scores = method.score_samples(of.test.counts).tolist()
        types = clustering(lambda: method.transform(of.everything.counts), of.everything)
    result = {"refitted": scores, "converged": method.converged_, "iterations": method.n_iter_}
    return _about(of, seconds) | result | types


def scvi_tools(case: Result, seed: int, epochs: int, samples: int) -> Result:
    """scvi-tools with its defaults: probability of counts, its library integrated out."""
    of, method = split(**case), baselines.SCVITools(N_LATENTS, epochs=epochs, seed=seed)
    started = time.process_time()
    method.fit(of.train.counts)
    seconds = time.process_time() - started
    types = clustering(lambda: method.transform(of.everything.counts), of.everything)
    return _about(of, seconds) | {"epochs": epochs} | _integrated(method, of, samples) | types


def independent_genes(case: Result) -> Result:
    """The floor: log probability of counts of independent genes."""
    of, started = split(**case), time.process_time()
    method = IndependentGenes().fit(of.train.counts)
    seconds = time.process_time() - started
    return _about(of, seconds) | {"log_p": method.score_samples(of.test.counts).tolist()}


def conditional(fit: Fit, cells: Cells) -> np.ndarray:
    """E_q log p(x | z, l) under the guide, nats per cell (cells,): the bound without its KL divergence."""
    with evaluating(fit.model, fit.guide, 0):
        parts = [torch.stack(bound_terms(fit.guide, x, gamma, DRAWS)) for x, gamma in _batches(fit, cells)]
    return torch.cat([part.sum(0).mean(0) for part in parts]).double().cpu().numpy()


def encoder_refitted(fit: Fit, cells: Cells, epochs: int) -> Fit:
    """A copy whose guide is trained further on ``cells`` themselves, with the generative model fixed.

    As the authors do at test time: Adam at 0.001 with epsilon 0.1, batches of 100, batch normalisation and dropout as
    in evaluation.
    """
    fit = copy.deepcopy(fit)
    optimiser = torch.optim.Adam(fit.guide.parameters(), lr=REFIT_RATE, eps=REFIT_EPS)
    with evaluating(fit.model, fit.guide, 0), torch.enable_grad():
        batches = minibatches(fit, cells)
        for _ in range(epochs):
            for rows in batches.shuffled(REFIT_BATCH):
                optimiser.zero_grad()
                log_weight, _ = bound_terms(fit.guide, *batches.rows(rows))
                (-log_weight.mean()).backward()
                optimiser.step()
    return fit


def clustering(embedded: Callable[[], np.ndarray], cells: Cells) -> dict[str, float]:
    """How well the ``embedded`` latents (cells, latents) separate the known types; empty where none are known.

    Silhouette (Euclidean), and adjusted Rand index and normalised mutual information of k-means with as many clusters.
    """
    if "labels" not in cells.obs:
        return {}
    latents, labels = embedded(), cells.obs["labels"].astype(str).to_numpy()
    clusters = KMeans(len(np.unique(labels)), n_init=10, random_state=0).fit_predict(latents)
    return {
        "silhouette": float(silhouette_score(latents, labels)),
        "ari": float(adjusted_rand_score(labels, clusters)),
        "nmi": float(normalized_mutual_info_score(labels, clusters)),
    }


@contextmanager
def reported_otherwise() -> Iterator[None]:
    """Silence warnings that the rows report themselves: large k-hat in too many cells, fits that did not converge."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _integrated(method: Any, of: Split, samples: int) -> Result:
    table = method.evidence(of.test.counts, samples=samples)
    return {"log_p": table.log_evidence.tolist(), "khat_above": float((~(table.khat <= KHAT_LIMIT)).mean())}


def _about(of: Split, seconds: float) -> Result:
    return {"n": of.train.n_cells, "genes": of.train.n_genes, "left_out": of.left_out, "seconds": seconds}


def _batches(fit: Fit, cells: Cells) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return minibatches(fit, cells).in_order(64)
