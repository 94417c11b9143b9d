"""The hierarchy of errors: public, documented, and each also the built-in that a caller would catch."""

import numpy as np
import pytest
import torch

import pyro_scvi as ps
from pyro_scvi import errors
from pyro_scvi.errors import DataError, PyroScviError
from pyro_scvi.likelihoods.dispersion import PerGene, PerGeneAndBatch

BUILT_IN = {
    "DataError": ValueError,
    "SchemaError": KeyError,
    "ModelError": ValueError,
    "FitError": RuntimeError,
    "CheckpointError": OSError,
    "StoreError": OSError,
}


def defined():
    found = {name: value for name, value in vars(errors).items() if isinstance(value, type)}
    return {name: value for name, value in found.items() if issubclass(value, PyroScviError)}


def test_the_hierarchy_is_public_and_documented():
    kinds = defined()
    kinds.pop("PyroScviError")
    assert kinds.keys() == BUILT_IN.keys()
    for name, kind in kinds.items():
        assert kind.__bases__ == (PyroScviError, BUILT_IN[name])
        assert kind.__doc__
        assert getattr(ps.errors, name) is kind


def test_a_caller_may_catch_the_built_in_or_the_root():
    for kind in (DataError, ValueError, PyroScviError):
        with pytest.raises(kind, match="finite"):
            ps.Cells.from_counts(np.full((2, 2), np.nan))
    assert issubclass(DataError, ValueError)
    for kind in (errors.SchemaError, KeyError, PyroScviError):
        with pytest.raises(kind, match="there is no batch"):
            ps.Cells.from_counts(np.ones((2, 2))).with_batch("a")


def test_messages_are_shown_as_they_are():
    """A KeyError shows the repr of its message, with quotes and escapes."""
    assert str(errors.SchemaError("column 'a'\nis not there")) == "column 'a'\nis not there"
    assert str(errors.SchemaError()) == ""


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, "1", None, True])
@pytest.mark.parametrize("call", ["split", "SCVI", "embed", "fit", "prior_predictive", "differential_expression"])
def test_seeds_that_cannot_be(cells, call, seed):
    model = ps.SCVI(cells.n_genes, 2, n_hidden=4, n_layers=1)
    calls = {
        "split": lambda: cells.split(seed=seed),
        "SCVI": lambda: ps.SCVI(cells.n_genes, 2, seed=seed),
        "prior_predictive": lambda: ps.prior_predictive(model, 2, seed=seed),
        "fit": lambda: ps.fit(model, cells, seed=seed),
        "embed": lambda: ps.embed(fitted(cells), cells, seed=seed),
        "differential_expression": lambda: ps.differential_expression(
            fitted(cells), cells, groupby=[0, 1] * 30, group_a=0, seed=seed
        ),
    }
    with pytest.raises(errors.ModelError, match="seed must be an integer from 0"):
        calls[call]()


FITS = {}


def fitted(cells):
    if not FITS:
        model = ps.SCVI(cells.n_genes, 2, n_hidden=4, n_layers=1)
        FITS["fit"] = ps.fit(model, cells, epochs=1, progress=False, device="cpu")
    return FITS["fit"]


WRONG = {
    "a sampler's class": (lambda fit, cells: ps.impute(fit, cells, sampler=ps.HMC), "sampler must be .*the class HMC"),
    "a sampler's name": (lambda fit, cells: ps.posterior_predictive(fit, cells, sampler="hmc"), "sampler must .*'hmc'"),
    "no sampler": (lambda fit, cells: ps.to_datatree(fit, cells, sampler=None), "sampler must .*got None"),
    "an AnnData": (lambda fit, cells: ps.embed(fit, None), "expected Cells, got NoneType; make them with"),
    "a model for a fit": (lambda fit, cells: ps.evidence(fit.model, cells), "expected the Fit .*got SCVI"),
    "a matrix to fit": (lambda fit, cells: ps.fit(fit.model, cells.counts), "cells must be .*got ndarray"),
    "a guide's class": (lambda fit, cells: ps.fit(fit.model, cells, ps.guides.Point), "guide must .*the class Point"),
    "a prior's class": (lambda fit, cells: ps.SCVI(3, 2, prior=ps.priors.Flow), "prior must .*the class Flow"),
    "a likelihood's name": (lambda fit, cells: ps.SCVI(3, 2, likelihood="nb"), "likelihood must .*got 'nb'"),
    "a library's class": (lambda fit, cells: ps.SCVI(3, 2, library=ps.libraries.NoLibrary), "library must"),
    "a norm's class": (lambda fit, cells: ps.SCVI(3, 2, norm=ps.networks.LayerNorm), "norm must be None or"),
    "no genes": (lambda fit, cells: ps.SCVI(0), "n_genes must be an integer of 1 or more"),
    "no layers": (lambda fit, cells: ps.SCVI(3, 2, n_layers=0), "n_layers must be"),
    "dropout of all": (lambda fit, cells: ps.SCVI(3, 2, dropout=1.0), "dropout must be .*from 0 to below 1, got 1.0"),
    "a rate of NaN": (lambda fit, cells: ps.schedules.Constant(float("nan")), "rate must be a finite number"),
    "a batch as a word": (lambda fit, cells: ps.impute(fit, cells, batches="a"), r"batches must be .*\['a'\]"),
    "one quantile": (lambda fit, cells: ps.impute(fit, cells, quantiles=0.5), "quantiles must be numbers in a list"),
    "half a cell": (lambda fit, cells: ps.calibrate(fit, 2.5), "n_cells must be an integer"),
    "a word for a source": (lambda fit, cells: ps.calibrate(fit, 5, source="prior"), "source must be"),
    "a fit for a tree": (lambda fit, cells: ps.prior_sensitivity(fit), "tree must be .*got Fit"),
    "a list of priors": (lambda fit, cells: ps.SCVI(3, 2, weight_priors=["decoder"]), "weight_priors must be"),
    "too few genes": (
        lambda fit, cells: ps.SCVI(20, 2, likelihood=ps.likelihoods.NB(PerGene(6))),
        r"PerGene\(n_genes=6\) is for 6 genes, the model has n_genes=20",
    ),
    "too many genes": (
        lambda fit, cells: ps.SCVI(20, 2, 2, likelihood=ps.likelihoods.ZINB(PerGeneAndBatch(21, 2))),
        r"PerGeneAndBatch\(n_genes=21, n_batches=2\) is for 21 genes",
    ),
    "pseudo-cells of other genes": (
        lambda fit, cells: ps.SCVI(20, 2, prior=ps.priors.VampPrior(19, 2, components=3)),
        "is for 19 genes, the model has n_genes=20",
    ),
    "a dispersion's class": (lambda fit, cells: ps.likelihoods.NB(PerGene), "dispersion must .*the class PerGene"),
    "a dispersion's name": (lambda fit, cells: ps.likelihoods.ZINB("gene"), "dispersion must .*got 'gene'"),
    "below no genes": (lambda fit, cells: PerGene(-1), "n_genes must be an integer of 1 or more, got -1"),
    "half a gene": (lambda fit, cells: PerGeneAndBatch(2.5, 2), "n_genes must .*got 2.5"),
    "no batches": (lambda fit, cells: PerGeneAndBatch(20, 0), "n_batches must .*got 0"),
    "half a latent": (lambda fit, cells: ps.priors.StandardNormal(2.5), "n_latent must .*got 2.5"),
    "no latents": (lambda fit, cells: ps.priors.Laplace(0), "n_latent must .*got 0"),
    "no layers of a flow": (lambda fit, cells: ps.priors.Flow(2, layers=0), "layers must .*got 0"),
    "no units of a flow": (lambda fit, cells: ps.priors.Flow(2, n_hidden=0), "n_hidden must .*got 0"),
    "no components": (lambda fit, cells: ps.priors.GaussianMixture(2, components=0), "components must .*got 0"),
    "half a pseudo-cell": (lambda fit, cells: ps.priors.VampPrior(20, 2, components=1.5), "components must .*got 1.5"),
    "no genes of pseudo-cells": (lambda fit, cells: ps.priors.VampPrior(0, 2), "n_genes must .*got 0"),
    "words for pseudo-cells": (
        lambda fit, cells: ps.priors.VampPrior(20, 2, pseudo_cells="train"),
        "pseudo_cells must be numbers.*got 'train'",
    ),
    "a negative scale": (lambda fit, cells: ps.priors.LogisticNormal(3, scale=-1), "scale must .*above 0, got -1"),
    "no freedom": (lambda fit, cells: ps.priors.StudentT(2, df=0), "df must be a finite number above 0, got 0"),
    "freedom in words": (lambda fit, cells: ps.priors.StudentT(2, df="4"), "df must .*got '4'"),
    "no concentration": (lambda fit, cells: ps.priors.Dirichlet(2, float("nan")), "concentration must .*got nan"),
    "a momentum above 1": (lambda fit, cells: ps.networks.BatchNorm(5), "momentum must .*above 0, up to 1, got 5"),
    "no momentum": (lambda fit, cells: ps.networks.BatchNorm(0.0), "momentum must .*got 0.0"),
    "no variance added": (lambda fit, cells: ps.networks.BatchNorm(eps=0.0), "eps must be a finite number above 0"),
    "a negative eps": (lambda fit, cells: ps.networks.LayerNorm(-1e-5), "eps must be a finite number above 0"),
    "a negative sd of l": (
        lambda fit, cells: ps.libraries.LatentLibrary(1.0, -1.0),
        r"scale must be above 0.*\[-1.0\]",
    ),
    "one sd of none": (
        lambda fit, cells: ps.libraries.ObservedLibrary([1.0, 2.0], [1.0, 0.0]),
        "scale must be above 0",
    ),
    "a mean of NaN": (lambda fit, cells: ps.libraries.LatentLibrary(float("nan"), 1.0), "loc must hold finite"),
    "no means": (lambda fit, cells: ps.libraries.LatentLibrary([], 1.0), "loc must hold finite numbers, one"),
    "a mean in words": (lambda fit, cells: ps.libraries.LatentLibrary("log", 1.0), "loc must be a number, .*got 'log'"),
    "a preset of nothing": (lambda fit, cells: ps.presets.default(None), "cells must .*got None"),
    "a preset of counts": (lambda fit, cells: ps.presets.seed_2017(cells.counts), "cells must .*got ndarray"),
    "a preset of a size": (lambda fit, cells: ps.presets.nature_methods_2018(20), "cells must .*got 20"),
    "the loss of a model": (lambda fit, cells: ps.plots.loss(fit.model), "expected the Fit .*got SCVI"),
    "the program of a fit": (lambda fit, cells: ps.plots.program(fit), "model must .*such as fit.model; got Fit"),
    "the program of no cells": (lambda fit, cells: ps.plots.program(fit.model, n_cells=0), "n_cells must .*got 0"),
    "a word for axes": (lambda fit, cells: ps.plots.loss(fit, "left"), "ax must .*figure.subplots.*got 'left'"),
    "a word for a seed": (lambda fit, cells: ps.plots.embedding(np.eye(2), seed="a"), "seed must .*got 'a'"),
    "gamma of other cells": (lambda fit, cells: ps.prior_predictive(fit.model, 2, gamma=np.eye(3)), r"got \(3, 3\)"),
}


WRONG |= {
    f"no scale of {prior.__name__}": (lambda fit, cells, prior=prior: prior(-1), "scale must .*above 0, got -1")
    for prior in (getattr(ps.weights, name) for name in ps.weights.__all__)
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_the_wrong_kind_are_named(cells, name):
    call, says = WRONG[name]
    with pytest.raises(errors.ModelError, match=says):
        call(fitted(cells), cells)


def test_numbers_at_the_edge_are_taken():
    assert ps.networks.BatchNorm(momentum=1).momentum == 1
    assert ps.networks.BatchNorm(np.float32(0.5), eps=1e-8).momentum == 0.5
    assert ps.priors.StudentT(np.int64(1), df=np.float64(1e-3)).df == 1e-3
    assert ps.libraries.LatentLibrary(np.array([-1.0, 2.0]), torch.tensor([0.1, 1e3])).loc.tolist() == [-1.0, 2.0]
    with pytest.raises(errors.ModelError, match="momentum must"):
        ps.networks.BatchNorm(momentum=True)


def plain(**values):
    counts = np.full((3, 2), 4.0)
    for name, value in values.items():
        counts[{"cell": (1, slice(None)), "gene": (slice(None), 1), "entry": (1, 0)}[name]] = value
    return counts


WARNINGS = {
    "an empty cell": (
        lambda: ps.Cells.from_counts(plain(cell=0)),
        r"1 cell has no counts: 'cell_1'\. Results .*prior.*sc\.pp\.filter_cells\(adata, min_counts=1\)",
    ),
    "two empty cells": (
        lambda: ps.Cells.from_counts(np.vstack([plain(), np.zeros((2, 2))])),
        r"2 cells have no counts: 'cell_3', 'cell_4'\. ",
    ),
    "an empty gene": (
        lambda: ps.Cells.from_counts(plain(gene=0)),
        r"1 gene has no counts: 'gene_1'\. A fit learns .*sc\.pp\.filter_genes\(adata, min_counts=1\)",
    ),
    "a large count": (
        lambda: ps.Cells.from_counts(plain(entry=1e7)),
        r"implausibly large count: cell 'cell_1', gene 'gene_0' holds 1e\+07\. It is used as it is .*drop that cell",
    ),
    "a name twice": (
        lambda: ps.Cells.from_counts(plain(), cell_names=["a", "b", "a"]),
        r"more than once: 'a'\. Tables .*adata\.obs_names_make_unique\(\)",
    ),
}


DEEP = {  # few draws: k-hat is infinite
    "evidence": (lambda fit, cells: ps.evidence(fit, cells, samples=2), "k-hat is above"),
    "compare": (lambda fit, cells: ps.compare({"one": fit}, cells, samples=2), "k-hat is above"),
    "leave_one_out": (
        lambda fit, cells: ps.leave_one_out(fit, cells, samples=20, sampler=ps.Amortized()),
        "sampler_khat is above",
    ),
}


def places(caught):
    return {(warning.filename, warning.lineno) for warning in caught}


@pytest.mark.parametrize("name", WARNINGS)
def test_warnings_say_what_follows_and_what_to_do_at_the_line_of_the_caller(name):
    call, says = WARNINGS[name]
    with pytest.warns(UserWarning, match=says) as caught:
        call()
    assert places(caught) == {(__file__, call.__code__.co_firstlineno)}


@pytest.mark.parametrize("name", DEEP)
def test_warnings_name_the_line_of_the_caller_however_deep_they_are(cells, name):
    call, says = DEEP[name]
    with pytest.warns(UserWarning, match=says) as caught:
        call(fitted(cells), cells.take(range(4)))
    assert places(caught) == {(__file__, call.__code__.co_firstlineno)}
