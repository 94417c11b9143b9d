"""Saves of honest fits load, whatever their sizes: they stay far below the limit that stops hostile ones."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi.training import loading
from pyro_scvi.utils.allocation_limit import AllocationLimit

MOST = 0.25  # of a limit

SMALL, WIDE = (20, 3), (300, 24)  # genes, batches


def of_batches(n_batches):
    return slice(0, n_batches)


MODELS = {
    "default": lambda genes, batches: ps.SCVI(genes, 10, batches),
    "small network": lambda genes, batches: ps.SCVI(genes, 2, batches, n_hidden=4),
    "many latents": lambda genes, batches: ps.SCVI(genes, 100, batches),
    "pseudo-cells": lambda genes, batches: ps.SCVI(
        genes, 10, batches, prior=ps.priors.VampPrior(genes, 10, components=50)
    ),
    "flow": lambda genes, batches: ps.SCVI(genes, 10, batches, prior=ps.priors.Flow(10)),
    "labels": lambda genes, batches: ps.SCVI(genes, 10, batches, prior=ps.priors.ByLabel(10, of_batches(batches))),
    "sparse loadings": lambda genes, batches: ps.SCVI(
        genes,
        10,
        batches,
        decoder=ps.networks.LinearDecoder(),
        weight_priors={"decoder.*": ps.weights.HorseshoeWeights()},
    ),
    "all weights": lambda genes, batches: ps.SCVI(
        genes, 10, batches, weight_priors={"decoder.*": ps.weights.NormalWeights()}
    ),
    "dispersions of batches": lambda genes, batches: ps.SCVI(
        genes, 10, batches, likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGeneAndBatch(genes, batches))
    ),
}


def fitted(make, guide, genes, batches):
    names = [f"b{i % batches}" for i in range(3 * batches)]
    counts = np.random.default_rng(0).poisson(2.0, (len(names), genes))
    cells = ps.Cells.from_counts(counts, obs=pd.DataFrame({"batch": names}), batch="batch")
    model = make(genes, batches)
    return ps.Fit(model, guide(model), pd.DataFrame(), cells.schema)


@pytest.fixture
def used(monkeypatch):
    """Shares of the limits that loading used."""
    limits = []

    def noted(tensors, limited_by=loading.limited_by):
        limit = limited_by(tensors)
        limits.append((limit, limit.elements, limit.calls))
        return limit

    monkeypatch.setattr(loading, "limited_by", noted)
    return lambda: [(1 - limit.elements / elements, 1 - limit.calls / calls) for limit, elements, calls in limits]


@pytest.mark.parametrize("sizes", [SMALL, WIDE], ids=["small", "wide"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_save_of_every_kind_loads(kind, sizes, used, tmp_path):
    fit = fitted(MODELS[kind], ps.guides.DiagonalNormal, *sizes)
    fit.save(tmp_path / "fit")
    again = ps.load(tmp_path / "fit")
    for name, value in fit.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name
    assert np.max(used()) < MOST


@pytest.mark.parametrize("guide", [ps.guides.FullRankNormal, ps.guides.InverseAutoregressiveFlow])
def test_a_save_of_every_guide_loads(guide, used, tmp_path):
    fitted(MODELS["many latents"], guide, *SMALL).save(tmp_path / "fit")
    ps.load(tmp_path / "fit")
    assert np.max(used()) < MOST


NUMBERS = {
    "degrees of freedom": lambda: {"prior": ps.priors.StudentT(3, df=1000)},
    "weight of labels": lambda: {"prior": ps.priors.ByLabel(3, of_batches(2), label_weight=500)},
    "concentration": lambda: {"prior": ps.priors.Dirichlet(3, 1000)},
    "scale of weights": lambda: {"weight_priors": {"decoder.*": ps.weights.NormalWeights(1000)}},
    "library": lambda: {"library": ps.libraries.LatentLibrary(1000, 100)},
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_whole_numbers_that_are_no_sizes_may_be_large(kind, tmp_path):
    fit = fitted(lambda genes, batches: ps.SCVI(genes, 3, batches, n_hidden=8, **NUMBERS[kind]()), small_guide, 20, 2)
    fit.save(tmp_path / "fit")
    assert repr(ps.load(tmp_path / "fit").model) == repr(fit.model)


def small_guide(model):
    return ps.guides.DiagonalNormal(model, n_hidden=8, seed=10**9)


@pytest.mark.parametrize(
    "make",
    [
        lambda like, short: like.new_full((2, 5000), 1.0),
        lambda like, short: like.new_zeros(2, 5000),
        lambda like, short: short.to(like),
        lambda like, short: short.reshape(5000, 2),
    ],
)
def test_tensors_made_like_others_count_by_their_own_size(make):
    like, short = torch.zeros(10**3, 10), torch.zeros(2, 5000)
    with AllocationLimit(10**4, 10**4, 1_000) as limit:
        make(like, short)
    assert limit.elements == 0
