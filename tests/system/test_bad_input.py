"""What bad input and misuse must get: a case, or several, for every row of the specification's table.

An id is a row of that table and a name. Cases go through the public functions and, where a file can hold what is
wrong, through the command line. ``PYRO_SCVI_SPEC`` names the folder of the table; the default is ``../shared/spec``.
"""

import json
import logging
import os
import pickle
import re
import signal
import warnings
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from anndata import AnnData
from scipy import sparse

import pyro_scvi as ps
from pyro_scvi.cli.wording import on_the_command_line
from pyro_scvi.errors import CheckpointError, DataError, FitError, ModelError, SchemaError
from tests.support.cli_runs import one_line, run, succeed
from tests.support.paths import SPEC, TESTS
from tests.support.simulate import simulated_counts
from tests.system.test_reproducibility import global_state

CASES = []
PAIRS, FEW_PAIRS = ps.differential.RandomPairs(), ps.differential.RandomPairs(most_pairs=100)
"""Parameters of the one test: check, value, id."""


def row(text, **values):
    """Register a check as the cases of a row: one for every named value, or one without a value."""

    def register(check):
        for name, value in (values or {check.__name__: None}).items():
            CASES.append(pytest.param(check, value, id=f"{text}: {name}"))
        return check

    return register


# --- what the cases share ---


def make_adata(counts=None, genes=None, **columns):
    """Cells c0, c1, ... of two batches and three kinds with an age; genes g0, g1, ..."""
    counts = simulated_counts(30, 8) if counts is None else counts
    n, n_genes = counts.shape
    obs = {
        "batch": np.where(np.arange(n) % 2, "b", "a"),
        "age": np.linspace(20.0, 50.0, n),
        "kind": np.array(["B", "T", "NK"])[np.arange(n) % 3],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubled names
        return AnnData(
            counts,
            obs=pd.DataFrame(obs | columns, index=[f"c{i}" for i in range(n)]),
            var=pd.DataFrame(index=genes or [f"g{i}" for i in range(n_genes)]),
        )


def with_entry(value, place=(17, 5), dtype=np.float32):
    counts = simulated_counts(30, 8).astype(dtype)
    counts[place] = value
    return counts


def quick_model(cells, **options):
    return ps.SCVI(cells.n_genes, 2, cells.n_covariates, n_hidden=8, n_layers=1, **options)


def quick_fit(cells, model=None, **options):
    model = quick_model(cells) if model is None else model
    return ps.fit(model, cells, **{"epochs": 2, "progress": False, "device": "cpu"} | options)


@cache
def fitted():
    """A fit of the batch and the age of ``make_adata``, and its cells."""
    cells = ps.Cells.from_anndata(make_adata(), batch="batch", covariates=["age"])
    return quick_fit(cells), cells


def write(adata, folder, name="cells.h5ad"):
    path = folder / name
    with anndata.settings.override(allow_write_nullable_strings=True):
        adata.write_h5ad(path)
    return path


def saved(folder):
    fitted()[0].save(folder / "fitted")
    return folder / "fitted"


def refused(says, adata, folder, *arguments, error=DataError, **options):
    """The function and the command ``fit`` both refuse, each in its words, and the command leaves nothing behind."""
    with pytest.raises(error, match=says) as caught:
        ps.Cells.from_anndata(adata, **options)
    text = one_line(run("fit", write(adata, folder), "--out", folder / "out", "--no-progress", *arguments))
    assert text == on_the_command_line(str(caught.value))
    assert not (folder / "out").exists()


def query_refused(says, adata, folder, *arguments, error=SchemaError, **options):
    """The function and the command ``embed`` both refuse cells for a fit."""
    with pytest.raises(error, match=says) as caught:
        ps.Cells.from_anndata(adata, schema=fitted()[0].schema, **options)
    out = folder / "out.h5ad"
    text = one_line(run("embed", saved(folder), write(adata, folder), "--out", out, *arguments))
    assert text == on_the_command_line(str(caught.value))
    assert not out.exists()


def warned(says, adata, folder, *arguments, **options):
    """The function warns and the command notes it; returns the cells."""
    with pytest.warns(UserWarning, match=says):
        cells = ps.Cells.from_anndata(adata, **options)
    result = succeed("embed", saved(folder), write(adata, folder), "--out", folder / "out.h5ad", *arguments)
    assert re.search(says, result.stderr), result.stderr
    assert np.isfinite(anndata.read_h5ad(folder / "out.h5ad").obsm["X_pyro_scvi"]).all()
    return cells


def answers(fit, cells, seed=0):
    """What every verb says of cells, as arrays by name."""
    few = {"samples": 30, "seed": seed}
    draws = ps.sample_posterior(fit, cells, sites=("z", "l", "w", "y", "h"), **few)
    evidence = ps.evidence(fit, cells, steps=5, rounds=1, **few)
    table = ps.differential_expression(
        fit, cells, groupby="kind", group_a="B", group_b="T", estimand=FEW_PAIRS, seed=seed
    )
    checks = ps.check_predictions(fit, cells, **few)
    found = {
        "embed": ps.embed(fit, cells, seed=seed),
        "evidence": evidence[["log_evidence", "se", "ess", "amortized_bound"]],
        "impute": ps.impute(fit, cells, **few),
        "technical": ps.technical_zero_probability(fit, cells, **few),
        "differential": table,
        "posterior_predictive": ps.posterior_predictive(fit, cells, **few),
        "checks": checks.genes.drop(columns="dispersion", level=0),
        "checks of cells": checks.cells,
        "prior_predictive": ps.prior_predictive(fit.model, 3, gamma=cells[:3][1], seed=seed),
    }
    return {name: np.asarray(value) for name, value in (found | {str(k): draws[k] for k in "zlwyh"}).items()}


def check_finite(fit, cells):
    for name, value in answers(fit, cells).items():
        assert np.isfinite(value).all(), name
    assert np.isfinite(fit.history[["train_loss", "kl"]]).all(axis=None)


@contextmanager
def khat_ignored():
    """Few draws: what k-hat says of them is of no interest here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="k-hat is above")
        yield


# --- counts ---

FORMS = {"dense": np.asarray, "csr": sparse.csr_matrix, "csc": sparse.csc_matrix}
ENTRIES = {"NaN": np.nan, "infinity": np.inf, "minus infinity": -np.inf, "negative": -1.0}
PLACES = {"first": (0, 0), "last": (29, 7), "middle": (17, 5)}


@row(
    "NaN, inf or negative count (one entry anywhere)",
    **{f"{e}, {p}, {f}": (ENTRIES[e], PLACES[p], FORMS[f]) for e in ENTRIES for p in PLACES for f in FORMS},
)
def one_bad_entry(value, folder):
    entry, (cell, gene), form = value
    adata = make_adata(form(with_entry(entry, (cell, gene))))
    says = rf"X must hold .*cell 'c{cell}', gene 'g{gene}' holds {entry:g}\. .*Pass layer= with raw counts"
    with pytest.raises(DataError, match=says):
        ps.Cells.from_anndata(adata)
    if (cell, gene) == PLACES["middle"]:
        refused(says, adata, folder)


def z_scored(counts):
    return (counts - counts.mean(0)) / counts.std(0)


@row(
    "log-normalised or z-scored values",
    logarithms=(
        np.log1p,
        r"cell 'c\d+', gene 'g\d' .*normalised or logarithms\? Pass layer=.*'raw'.*allow_non_integer",
    ),
    halves=(lambda counts: counts / 2, r"raw integer counts; cell 'c\d+', gene 'g\d'.*Pass layer=.*'raw'"),
    z_scores=(z_scored, r"0 or more; cell 'c\d+', gene 'g\d'.*Are the values scaled\? Pass layer=.*'raw'"),
)
def normalised(value, folder):
    transform, says = value
    adata = make_adata(transform(simulated_counts(30, 8).astype(float)))
    adata.layers["raw"] = simulated_counts(30, 8)
    refused(says, adata, folder)
    np.testing.assert_array_equal(ps.Cells.from_anndata(adata, layer="raw")[:][0], simulated_counts(30, 8))


@row("log-normalised or z-scored values")
def declared_as_no_integers(value, folder):
    cells = ps.Cells.from_anndata(make_adata(np.log1p(simulated_counts(30, 8))), allow_non_integer=True)
    assert np.isfinite(quick_fit(cells).history.train_loss).all()


@row("all-zero cells", **FORMS)
def empty_cells(form, folder):
    counts = simulated_counts(30, 8)
    counts[[3, 8]] = 0
    cells = warned("2 cells have no counts: 'c3', 'c8'", make_adata(form(counts)), folder)
    check_finite(quick_fit(cells), cells)


@row("all-zero genes", **FORMS)
def empty_genes(form, folder):
    counts = simulated_counts(30, 8)
    counts[:, [2, 5]] = 0
    with pytest.warns(UserWarning, match="2 genes have no counts: 'g2', 'g5'"):
        cells = ps.Cells.from_anndata(make_adata(form(counts)))
    check_finite(quick_fit(cells), cells)
    result = succeed("fit", write(make_adata(form(counts)), folder), *quickly(folder))
    assert "2 genes have no counts: 'g2', 'g5'" in result.stderr


def quickly(folder):
    return ("--out", folder / "out", "--epochs", 1, "--no-progress", "--n-latent", 2)


@row("0 cells; 0 genes", no_cells=(0, 8), no_genes=(30, 0), neither=(0, 0))
def nothing(shape, folder):
    says = rf"at least 1 cell and 1 gene; its shape is \({shape[0]}, {shape[1]}\)"
    for form in FORMS.values():
        with pytest.raises(DataError, match=says):
            ps.Cells.from_anndata(make_adata(form(np.zeros(shape))))
    refused(says, make_adata(np.zeros(shape)), folder)


@row("1 or 2 cells", one=1, two=2)
def few_cells(n, folder):
    cells = ps.Cells.from_anndata(make_adata(simulated_counts(n, 8)))
    fit = quick_fit(cells, validation=0)
    assert fit.settings["n_cells"] == n
    assert np.isfinite(ps.embed(fit, cells)).all()
    assert np.isfinite(ps.impute(fit, cells)).all()
    if n == 1:
        with pytest.raises(ModelError, match="cannot hold out 1 of 1 cells.*validation=0"):
            quick_fit(cells)
    says = "cannot hold out 1 of 1 cells"  # the command holds cells out twice, to judge and to choose the epoch
    assert says in one_line(run("fit", write(make_adata(simulated_counts(n, 8)), folder), *quickly(folder)))


@row("1 or 2 cells")
def three_cells_on_the_command_line(value, folder):
    succeed("fit", write(make_adata(simulated_counts(3, 8)), folder), *quickly(folder), "--labels", "kind")


@row("n = 129 with batch 128; batch_size = 1", remainder=(129, 128), single=(30, 1), single_of_few=(3, 1))
def every_cell_trains(value, folder):
    n, batch_size = value
    adata = make_adata(simulated_counts(n, 8))
    cells = ps.Cells.from_anndata(adata)
    fit = quick_fit(cells, epochs=1, batch_size=batch_size, validation=0)
    assert fit.settings["n_cells"] == n
    assert np.isfinite(fit.history.train_loss).all()
    assert np.isfinite(ps.embed(fit, cells)).all()
    succeed("fit", write(adata, folder), *quickly(folder), "--batch-size", batch_size)


@row("duplicate gene names / duplicate cell names")
def genes_named_twice(value, folder):
    adata = make_adata(genes=["g0", "g0", "g2", "g2", "g4", "g5", "g6", "g7"])
    refused(r"gene names must be unique; 'g0', 'g2' occur .*var_names_make_unique\(\)", adata, folder)


@row("duplicate gene names / duplicate cell names")
def cells_named_twice(value, folder):
    adata = make_adata()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adata.obs_names = ["c1", *adata.obs_names[1:]]
    cells = ps.Cells.from_anndata(make_adata())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Observation names are not unique")  # anndata's own, of the file
        doubled = warned("cell names occur more than once: 'c1'", adata, folder)
    np.testing.assert_array_equal(ps.embed(quick_fit(doubled), doubled), ps.embed(quick_fit(cells), cells))


# --- annotations ---


@row("unseen batch or category in a query")
def unseen_batch(value, folder):
    adata = make_adata(batch=["a", "new", "b"] * 10)
    query_refused("column 'batch' holds 'new', .*its batches are 'a', 'b'.*allow_new_batches=True", adata, folder)
    fit, _cells = fitted()
    query = ps.Cells.from_anndata(adata, schema=fit.schema, allow_new_batches=True)
    assert np.isfinite(ps.embed(fit, query)).all()
    for verb in (ps.evidence, ps.sample_posterior, ps.technical_zero_probability):
        with pytest.raises(SchemaError, match="10 cells are of batches that the fit does not know, 'new'.*map_query"):
            verb(fit, query)
    with pytest.raises(SchemaError, match="10 cells are of batches"):
        ps.fit(fit.model, query, epochs=1)
    with pytest.raises(SchemaError, match="no batch 'new'; its batches are 'a', 'b'"):
        query.with_batch("new")
    with pytest.raises(SchemaError, match="no batch 'new'; its batches are 'a', 'b'"):
        ps.impute(fit, query, batches=["new"], quantity=ps.imputation.mean_given_no_dropout)
    path = write(make_adata(), folder, "known.h5ad")
    asked = ("impute", folder / "fitted", path, "--out", folder / "x.h5ad", "--no-dropout", "--batch-as", "new")
    assert "no batch 'new'; its batches are 'a', 'b'" in one_line(run(*asked))


@row(
    "NaN in the batch column; missing column; float column with hundreds of levels",
    strings=["a", None, "b"] * 10,
    floats=[1.0, np.nan, 2.0] * 10,
    categories=pd.Categorical(["a", None, "b"] * 10),
    all_missing=[np.nan] * 30,
)
def missing_batch(values, folder):
    n = int(pd.isna(pd.Series(values)).sum())
    says = f"batch column 'batch' has no value for {n} cells, such as 'c{1 if n == 10 else 0}'; fill or drop"
    refused(says, make_adata(batch=values), folder, "--batch", "batch", batch="batch")
    if n == 10:
        query_refused(says, make_adata(batch=values), folder, error=DataError)


@row("NaN in the batch column; missing column; float column with hundreds of levels", batch="batch", age="covariates")
def missing_column(option, folder):
    says = r"no column 'lane'; its columns are \['age', 'batch', 'kind'\]"
    refused(says, make_adata(), folder, f"--{option}", "lane", error=SchemaError, **{option: "lane"})
    column = "batch" if option == "batch" else "age"
    adata = make_adata()
    del adata.obs[column]
    query_refused(f"no column '{column}'; its columns are", adata, folder)


@row("NaN in the batch column; missing column; float column with hundreds of levels")
def continuous_batch(value, folder):
    says = r"'depth' holds floats with 300 levels\. If it is continuous, pass covariates=\['depth'\]"
    adata = make_adata(simulated_counts(300, 8), depth=np.linspace(0.1, 1.0, 300))
    refused(says, adata, folder, "--batch", "depth", batch="depth")
    assert ps.Cells.from_anndata(adata, covariates=["depth"]).n_covariates == 1


@row(
    "constant or NaN continuous covariate",
    constant=(0.5, r"covariate column 'age' is constant \(0\.5\); leave it out"),
    NaN=([np.nan] + [1.0, 2.0, 3.0] * 9 + [1.0, 2.0], "'age' must be finite; 1 cells, such as 'c0'"),
    infinite=([1.0, np.inf] * 15, "'age' must be finite; 15 cells, such as 'c1'"),
    words=(pd.Categorical(["x", "y"] * 15), "'age' must be numeric.*Pass categories as batch="),
)
def bad_covariate(value, folder):
    values, says = value
    refused(says, make_adata(age=values), folder, "--covariates", "age", covariates=["age"])


# --- queries ---


@row("query genes reordered", reversed=slice(None, None, -1), shuffled=[3, 0, 7, 1, 5, 2, 6, 4])
def reordered(order, folder):
    fit, cells = fitted()
    adata = make_adata()[:, order].copy()
    query = ps.Cells.from_anndata(adata, schema=fit.schema)
    expected, found = answers(fit, cells), answers(fit, query)
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], name)
    succeed("embed", saved(folder), write(adata, folder), "--out", folder / "out.h5ad")
    np.testing.assert_allclose(anndata.read_h5ad(folder / "out.h5ad").obsm["X_pyro_scvi"], expected["embed"], atol=1e-6)
    with pytest.raises(SchemaError, match="differ from those of the fit, or are in another order.* and 8 are in both"):
        ps.embed(fit, ps.Cells.from_anndata(adata, batch="batch", covariates=["age"]))


@row("query genes all different")
def other_genes(value, folder):
    adata = make_adata(genes=[f"ENSG{i}" for i in range(8)])
    says = "0 of the 8 genes of the schema are in the query: it expects names like 'g0', .*the query's are 'ENSG0'"
    query_refused(says, adata, folder)
    query_refused(says, adata, folder, "--fill-missing-genes", fill_missing_genes=True)


@row("query genes partly missing / extra")
def missing_genes(value, folder):
    adata = make_adata()[:, [7, 1, 2, 3, 5]].copy()
    query_refused("5 of the 8 genes .*3 are missing: 'g0', 'g4', 'g6'.*fill_missing_genes=True", adata, folder)
    with (
        pytest.warns(UserWarning, match="3 are filled with zeros: 'g0', 'g4', 'g6'"),
        pytest.warns(UserWarning, match="1 cell has no counts: 'c6'"),  # all of its counts are of those genes
    ):
        query = ps.Cells.from_anndata(adata, schema=fitted()[0].schema, fill_missing_genes=True)
    expected = simulated_counts(30, 8)
    expected[:, [0, 4, 6]] = 0
    np.testing.assert_array_equal(query[:][0], expected)
    asked = ("embed", folder / "fitted", folder / "cells.h5ad", "--out", folder / "out.h5ad", "--fill-missing-genes")
    assert "3 are filled with zeros: 'g0', 'g4', 'g6'" in succeed(*asked).stderr


@row("query genes partly missing / extra")
def extra_genes(value, folder):
    """Left out, which changes no result, and logged: most fits are of some genes of a file."""
    fit, cells = fitted()
    more = np.hstack([simulated_counts(30, 8), np.ones((30, 2), dtype=int)])
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("pyro_scvi.data.schema")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    try:
        query = ps.Cells.from_anndata(make_adata(more), schema=fit.schema)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
    assert records == ["2 genes of the query are not in the schema and are left out: 'g8', 'g9'."]
    np.testing.assert_array_equal(ps.embed(fit, query), ps.embed(fit, cells))


# --- kinds of matrix ---


def backed(counts, folder):
    return anndata.read_h5ad(write(make_adata(counts), folder, "backed.h5ad"), backed="r")


def in_layer(counts, folder):
    adata = make_adata(np.log1p(simulated_counts(30, 8)))
    adata.layers["raw"] = counts
    return adata


def as_view(counts, folder):
    stacked = sparse.vstack([counts, counts]).tocsr() if sparse.issparse(counts) else np.vstack([counts, counts])
    return make_adata(stacked, age=np.tile(np.linspace(20.0, 50.0, 30), 2))[:30]


def with_mixed_indices(counts):
    matrix = sparse.csr_matrix(counts)
    matrix.indptr = matrix.indptr.astype(np.int64)
    return matrix


MATRICES = {
    "CSR": sparse.csr_matrix,
    "CSC": sparse.csc_matrix,
    "csr_array": sparse.csr_array,
    "csc_array": sparse.csc_array,
    "dense": np.asarray,
    "mixed index types": with_mixed_indices,
    **{dtype: lambda x, dtype=dtype: x.astype(dtype) for dtype in ("uint16", "int64", "float64", "float32", "float16")},
    **{f"sparse {d}": lambda x, d=d: sparse.csr_matrix(x.astype(d)) for d in ("uint16", "int64", "float64")},
}
HOLDERS = {"X": lambda counts, folder: make_adata(counts), "layer": in_layer, "view": as_view, "backed": backed}


@row(
    "CSR, CSC, csr_array, dense, backed, view, layer, uint16, int64, float64, float16",
    **{f"{m} in {h}": (MATRICES[m], HOLDERS[h]) for m in MATRICES for h in HOLDERS},
)
def kinds_of_matrix(value, folder):
    make, hold = value
    fit, cells = fitted()
    adata = hold(make(simulated_counts(30, 8)), folder)
    layer = "raw" if "raw" in adata.layers else None
    query = ps.Cells.from_anndata(adata, schema=fit.schema, layer=layer)
    np.testing.assert_array_equal(query[:][0], cells[:][0])
    np.testing.assert_array_equal(ps.embed(fit, query), ps.embed(fit, cells))
    np.testing.assert_array_equal(ps.impute(fit, query), ps.impute(fit, cells))
    if sparse.issparse(query.counts):  # SciPy converts mixed types at every row selection, 100 times slower
        assert query.counts.indices.dtype == query.counts.indptr.dtype == np.int32
    if adata.isbacked:
        adata.file.close()


@row(
    "CSR, CSC, csr_array, dense, backed, view, layer, uint16, int64, float64, float16",
    **{
        f"{name} in a file": MATRICES[name]
        for name in ("CSR", "CSC", "csr_array", "dense", "uint16", "int64", "float16")
    },
)
def kinds_of_matrix_in_files(make, folder):
    path = write(make_adata(make(simulated_counts(30, 8))), folder)
    succeed("embed", saved(folder), path, "--out", folder / "out.h5ad")
    found = anndata.read_h5ad(folder / "out.h5ad").obsm["X_pyro_scvi"]
    np.testing.assert_array_equal(found, ps.embed(*fitted()))


@row("bool; X = None; layer missing")
def no_counts(value, folder):
    refused(
        "X must hold counts; its values are of type bool. Pass integer counts",
        make_adata(simulated_counts() > 0),
        folder,
    )
    adata = make_adata()
    adata.layers["raw"] = adata.X
    adata.X = None
    refused(r"X is None: there are no counts to read\. Pass layer= with raw counts \(layers: 'raw'\)", adata, folder)
    says = "there is no layer 'nope'; the layers are: 'raw'"
    refused(says, adata, folder, "--layer", "nope", error=SchemaError, layer="nope")


@row("count of 1e7 in one entry or one gene", entry=(17, 5), gene=(slice(None), 5))
def large_counts(place, folder):
    adata = make_adata(with_entry(1e7, place, np.float64))
    cell = 17 if isinstance(place[0], int) else 0
    cells = warned(rf"implausibly large count: cell 'c{cell}', gene 'g5' holds 1e\+07", adata, folder)
    fit = quick_fit(cells)
    model, guide = fit.model, fit.guide
    loss = pyro.infer.TraceMeanField_ELBO().differentiable_loss(model, guide, *cells[:])
    gradients = torch.autograd.grad(loss, [*model.parameters(), *guide.parameters()])
    assert bool(loss.isfinite())
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    with warnings.catch_warnings():  # the library size of such a cell may be infinite
        warnings.filterwarnings("ignore", "this fit gives values that are NaN or infinite", UserWarning)
        check_finite(fit, cells)


# --- a user's own parts, several models ---


@row("a user prior whose latent is missing from the guide")
def latent_that_the_guide_lacks(value, folder):
    def prior():
        tau = pyro.sample("tau", dist.Gamma(1.0, 1.0))
        return dist.Normal(torch.zeros(2), tau[..., None]).to_event(1)

    cells = ps.Cells.from_anndata(make_adata())
    model = quick_model(cells, prior=lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1))
    guide = ps.guides.DiagonalNormal(model)
    model.prior = prior
    with pytest.raises(ModelError, match=r"the model samples \['tau'\], which the guide does not"):
        quick_fit(cells, model, guide=guide)


@row("a user prior with pyro.param")
def prior_with_a_param(value, folder):
    def prior():
        return dist.Normal(pyro.param("loc", torch.zeros(2)), 1.0).to_event(1)

    cells = ps.Cells.from_anndata(make_adata())
    with pytest.raises(
        ModelError, match="'loc' is a pyro.param, which fit would never train.*make it an nn.Parameter of a module"
    ):
        quick_fit(cells, quick_model(cells, prior=prior))
    assert not pyro.get_param_store().keys()


@row("two models fitted in one session, in any order", first_then_second=(0, 1), second_then_first=(1, 0))
def two_models(order, folder):
    cells = ps.Cells.from_anndata(make_adata())
    priors = [ps.priors.StandardNormal(2), ps.priors.StudentT(2)]

    def trained(i):
        model = quick_model(cells, prior=priors[i])
        fit = quick_fit(cells, model)
        assert not any(torch.equal(a, b) for a, b in zip(fit.model.parameters(), model.parameters(), strict=True))
        return ps.embed(fit, cells)

    alone = [trained(i) for i in (0, 1)]  # in separate processes: system/test_reproducibility.py
    models = [quick_model(cells, prior=prior) for prior in priors]  # both before either is fitted
    fits = {i: quick_fit(cells, models[i]) for i in order}
    for i in (0, 1):
        np.testing.assert_array_equal(ps.embed(fits[i], cells), alone[i])


# --- faults of training and of saves; the tests of training have the rest ---


@row("learning rate 50 (divergence)")
def diverging(value, folder):
    cells = ps.Cells.from_anndata(make_adata())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*halved")
            fit = quick_fit(cells, learning_rate=ps.schedules.Constant(50.0), epochs=3)
    except FitError as error:
        fit, text = error.fit, str(error)
        assert "learning" in text
    assert fit is None or np.isfinite(ps.embed(fit, cells)).all()


@row("interrupt (Ctrl-C, SIGTERM) in training", SIGINT=signal.SIGINT, SIGTERM=signal.SIGTERM)
def interrupted(number, folder):
    def end(x):
        if len(seen) == 2 * 4:  # the third epoch of four steps
            os.kill(os.getpid(), number)
        seen.append(x)

    seen, cells = [], ps.Cells.from_anndata(make_adata())
    model = quick_model(cells)
    model.decoder.register_forward_pre_hook(lambda module, given: end(given) if module.training else None)
    before = signal.signal(number, signal.default_int_handler)  # a process in the background ignores SIGINT
    try:
        with pytest.warns(UserWarning, match=f"interrupted by {number.name}"):
            fit = quick_fit(cells, model, epochs=50, batch_size=7)
    finally:
        signal.signal(number, before)
    assert 1 <= len(fit.history) < 50
    assert np.isfinite(ps.embed(fit, cells)).all()
    fit.save(folder / "fit")
    np.testing.assert_array_equal(ps.embed(ps.load(folder / "fit"), cells), ps.embed(fit, cells))


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def payload(raw, canary):
    return pickle.dumps(Payload(canary))


DAMAGES = {
    "truncated": lambda raw, canary: raw[: len(raw) // 2],
    "empty": lambda raw, canary: b"",
    "bit-flipped": lambda raw, canary: raw[:-9] + bytes([raw[-9] ^ 1]) + raw[-8:],
}


@row("truncated, empty or bit-flipped checkpoint", **DAMAGES)
@row("checkpoint carrying a pickle payload", payload=payload)
def damaged(damage, folder):
    place, canary = saved(folder), folder / "canary"
    for path in sorted(place.iterdir()):
        raw = path.read_bytes()
        path.write_bytes(damage(raw, canary))
        with pytest.raises(CheckpointError, match=f"{path.name}.*corrupt"):
            ps.load(place)
        asked = ("embed", place, write(make_adata(), folder), "--out", folder / "out.h5ad")
        assert re.search(f"{path.name}.*corrupt", one_line(run(*asked)))
        path.write_bytes(raw)
    ps.load(place)
    assert not canary.exists()
    assert not (folder / "out.h5ad").exists()


@row("checkpoint of another version or with unknown keys")
def another_version(value, folder):
    place = saved(folder)
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(CheckpointError, match="format"):
        ps.load(place)
    asked = ("embed", place, write(make_adata(), folder), "--out", folder / "out.h5ad")
    assert "format" in one_line(run(*asked))


@row("disk full or unwritable while saving")
def unwritable(value, folder):
    fit, _ = fitted()
    (folder / "file").write_text("mine")
    for place in (folder / "file", folder / "file" / "fit"):
        with pytest.raises(CheckpointError, match="file"):
            fit.save(place)
    assert (folder / "file").read_text() == "mine"
    says = one_line(run("fit", write(make_adata(), folder), "--out", folder / "file" / "out", "--no-progress"))
    assert "file" in says
    assert (folder / "file").read_text() == "mine"


# --- groups and seeds ---


def compare(folder, *arguments):
    path = write(make_adata(), folder)
    return run("de", saved(folder), path, "--groupby", "kind", "--out", folder / "de.csv", *arguments)


@row("DE: unknown, empty, identical or one-cell groups")
def unknown_group(value, folder):
    fit, cells = fitted()
    says = r"no cell is in group 'CD8'; the groups are \['B', 'NK', 'T'\]"
    for groups in ({"group_a": "CD8"}, {"group_a": "B", "group_b": "CD8"}):
        with pytest.raises(DataError, match=says):
            ps.differential_expression(fit, cells, groupby="kind", **groups)
    assert re.search(says, one_line(compare(folder, "--group-a", "CD8")))
    with pytest.raises(DataError, match=r"no column 'nope'; its columns are \['batch', 'age', 'kind'\]"):
        ps.differential_expression(fit, cells, groupby="nope")


@row("DE: unknown, empty, identical or one-cell groups")
def empty_group(value, folder):
    fit, cells = fitted()
    kinds = pd.Categorical(cells.obs["kind"], categories=["B", "T", "NK", "CD8"])  # a category of no cell
    with pytest.raises(DataError, match=r"no cell is in group 'CD8'; the groups are \['B', 'NK', 'T'\]"):
        ps.differential_expression(fit, cells, groupby=kinds, group_a="B", group_b="CD8")
    with pytest.raises(DataError, match="every cell is in group 'x': there is no other cell"):
        ps.differential_expression(fit, cells, groupby=["x"] * 30, group_a="x")
    with pytest.raises(DataError, match="no cell has a label"):
        ps.differential_expression(fit, cells, groupby=[None] * 30)


@row("DE: unknown, empty, identical or one-cell groups")
def identical_groups(value, folder):
    fit, cells = fitted()
    with pytest.raises(DataError, match=r"both groups are 'B'; name two of \['B', 'NK', 'T'\]"):
        ps.differential_expression(fit, cells, groupby="kind", group_a="B", group_b="B")
    assert "both groups are 'B'; name two of" in one_line(compare(folder, "--group-a", "B", "--group-b", "B"))


@row("DE: unknown, empty, identical or one-cell groups", against_rest=None, against_one="w")
def one_cell_group(group_b, folder):
    fit, cells = fitted()
    table = ps.differential_expression(
        fit, cells, groupby=["u", "w"] + ["v"] * 28, group_a="u", group_b=group_b, estimand=PAIRS
    )
    assert np.isfinite(table.to_numpy()).all()
    np.testing.assert_array_equal(table.mean_a, cells[[0]][0][0])
    path = write(make_adata(kind=["u", "w"] + ["v"] * 28), folder)
    groups = ("--group-a", "u", *(("--group-b", group_b) if group_b else ()))
    succeed("de", saved(folder), path, "--groupby", "kind", "--out", folder / "de.csv", "--pairs", *groups)
    assert np.isfinite(pd.read_csv(folder / "de.csv", index_col="gene").to_numpy()).all()


@row("DE or any verb called twice with one seed")
def one_seed(value, folder):
    before = global_state()
    first, second, other = answers(*fitted()), answers(*fitted()), answers(*fitted(), seed=1)
    assert global_state() == before
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], name)
        if name != "embed":  # exact, so without a draw
            assert not np.array_equal(first[name], other[name]), name
    for out in ("a.csv", "b.csv"):
        asked = ("--groupby", "kind", "--group-a", "B", "--seed", 3, "--out", folder / out)
        succeed("de", saved(folder), write(make_adata(), folder), *asked)
    assert (folder / "a.csv").read_bytes() == (folder / "b.csv").read_bytes()


@row("data changed after the Fit (other matrix, same shape)")
def changed_data(value, folder):
    """Nothing of the training data is in a Fit: each verb answers for the cells that it is given."""
    adata = make_adata(simulated_counts(30, 8).astype(np.float32))
    cells = ps.Cells.from_anndata(adata)
    fit = quick_fit(cells)
    before = ps.embed(fit, ps.Cells.from_anndata(make_adata()))
    adata.X[:] = simulated_counts(30, 8, seed=5)
    other = ps.Cells.from_anndata(make_adata(simulated_counts(30, 8, seed=5)))
    np.testing.assert_array_equal(ps.embed(fit, ps.Cells.from_anndata(adata)), ps.embed(fit, other))
    np.testing.assert_array_equal(ps.embed(fit, ps.Cells.from_anndata(make_adata())), before)
    assert not np.array_equal(ps.embed(fit, other), before)


# --- the test, and that no row is left out ---


@pytest.mark.parametrize(("check", "value"), CASES)
def test_row(check, value, tmp_path):
    with khat_ignored():
        check(value, tmp_path)


ELSEWHERE = {"kill -9 at any moment while checkpointing": "training/test_checkpoint.py"}
"""Rows whose cases are other modules of this folder."""


def test_every_row_of_the_table_has_a_case():
    path = SPEC / "bad_input.md"
    if not path.is_file():
        pytest.skip(f"no table at {path}; set PYRO_SCVI_SPEC to the folder that holds bad_input.md")
    table = [line.split("|")[1].strip() for line in path.read_text(encoding="utf-8").splitlines() if line[:1] == "|"]
    rows, covered = set(table[2:]), {case.id.rsplit(": ", 1)[0] for case in CASES}
    assert len(rows) >= 30
    assert all((TESTS / module).is_file() for module in ELSEWHERE.values())
    assert covered | set(ELSEWHERE) == rows
