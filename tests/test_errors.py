"""The hierarchy of errors: public, documented, and each also the built-in that a caller would catch."""

import numpy as np
import pytest

import pyro_scvi as ps
from pyro_scvi import errors
from pyro_scvi.errors import PyroScviError

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
    for kind in (DataError := errors.DataError, ValueError, PyroScviError):
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
    "gamma of other cells": (lambda fit, cells: ps.prior_predictive(fit.model, 2, gamma=np.eye(3)), r"got \(3, 3\)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_of_the_wrong_kind_are_named(cells, name):
    call, says = WRONG[name]
    with pytest.raises(errors.ModelError, match=says):
        call(fitted(cells), cells)
