"""Every argument of every public function, given what it cannot be: it works, or the error says so in words."""

import inspect
import warnings
from types import SimpleNamespace

import anndata
import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from matplotlib import pyplot

import pyro_scvi as ps
from pyro_scvi.errors import PyroScviError
from tests.support.simulate import simulated_counts

matplotlib.use("Agg")

N, N_GENES = 12, 6
KIND = ["a", "b"] * (N // 2)
NAMES = [f"cell-{i}" for i in range(N)]
QUIET = {"progress": False}

ODD = {  # what is no word, number or switch; each is made anew
    "array": lambda: np.array(KIND),
    "array without dimensions": lambda: np.array(3),
    "Index": lambda: pd.Index([0.1, 0.9]),
    "Series": lambda: pd.Series([0, 1]),
    "named Series": lambda: pd.Series(KIND, NAMES),
    "frame": lambda: pd.DataFrame({"x": KIND, "y": KIND}),
    "DataArray": lambda: xr.DataArray(np.array(KIND)),
    "dict": lambda: dict(zip(NAMES, KIND, strict=True)),
    "empty dict": dict,
    "set": lambda: {"a", "b"},
    "generator": lambda: (each for each in KIND),
    "tensor": lambda: torch.arange(2),
    "bytes": lambda: b"x",
    "object": object,
    "slice": lambda: slice("a", "b"),
    "AnnData": lambda: made(),
}
NOT_CHECKED = {"checkpoint", "out", "path", "kwargs"}  # places on disk, and arrays that take any form


def made():
    obs = pd.DataFrame({"kind": KIND, "donor": [0, 1] * (N // 2)}, NAMES)
    var = pd.DataFrame(index=[f"GENE{i}" for i in range(N_GENES)])
    return anndata.AnnData(simulated_counts(N, N_GENES).astype(np.float32), obs, var)


@pytest.fixture(scope="module")
def at():
    """A fit, its cells, and tables made of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cells = ps.Cells.from_anndata(made(), batch="donor")
        model = ps.SCVI(N_GENES, 2, cells.n_covariates, n_hidden=4, n_layers=1)
        fit = ps.fit(model, cells, epochs=1, validation=0, device="cpu", **QUIET)
        means = ps.differential.GroupMeans(min_molecules=1)
        tables = ps.differential_expression(fit, cells, groupby="kind", estimand=means)
    two = cells.take([0, 1])
    return SimpleNamespace(cells=cells, two=two, model=model, fit=fit, table=tables, one=tables.loc["a"])


FUNCTIONS = {  # name -> (function, its further arguments)
    "Cells.from_anndata": lambda at: (ps.Cells.from_anndata, {"adata": made()}),
    "Cells.from_counts": lambda at: (ps.Cells.from_counts, {"counts": made().X}),
    "Cells.take": lambda at: (at.cells.take, {"index": [0]}),
    "Cells.split": lambda at: (at.cells.split, {}),
    "Cells.with_batch": lambda at: (at.cells.with_batch, {"name": "0"}),
    "embed": lambda at: (ps.embed, {"fit": at.fit, "cells": at.two}),
    "impute": lambda at: (ps.impute, {"fit": at.fit, "cells": at.two, "samples": 1, "sampler": ps.Amortized()}),
    "technical_zero_probability": lambda at: (
        ps.technical_zero_probability,
        {"fit": at.fit, "cells": at.two, "samples": 1},
    ),
    "normalized_expression": lambda at: (ps.normalized_expression, {"fit": at.fit, "cells": at.two, "samples": 1}),
    "sample_posterior": lambda at: (ps.sample_posterior, {"fit": at.fit, "cells": at.two, "samples": 2, **QUIET}),
    "posterior_predictive": lambda at: (ps.posterior_predictive, {"fit": at.fit, "cells": at.two, "samples": 1}),
    "prior_predictive": lambda at: (ps.prior_predictive, {"model": at.model, "n_cells": 2, "gamma": [[1, 0], [0, 1]]}),
    "differential_abundance": lambda at: (
        ps.differential_abundance,
        {"fit": at.fit, "cells": at.cells, "groupby": "kind", "sample": "kind", "permutations": 1},
    ),
    "differential_expression": lambda at: (
        ps.differential_expression,
        {"fit": at.fit, "cells": at.cells, "groupby": "kind", "group_a": "a"},
    ),
    "GroupMeans": lambda at: (ps.differential.GroupMeans, {}),
    "RandomPairs": lambda at: (ps.differential.RandomPairs, {}),
    "transfer_labels": lambda at: (
        ps.transfer_labels,
        {"fit": at.fit, "reference": at.cells, "query": at.two, "labels": "kind", "neighbors": 2},
    ),
    "add_rank_genes_groups": lambda at: (
        ps.add_rank_genes_groups,
        {"adata": made(), "table": at.table, "groupby": "kind", "overwrite": True},
    ),
    "plots.embedding": lambda at: (ps.plots.embedding, {"latent": np.zeros((N, 2))}),
    "plots.volcano": lambda at: (ps.plots.volcano, {"table": at.one}),
    "log_density": lambda at: (ps.log_density, {"fit": at.fit, "cells": at.two}),
    "loadings": lambda at: (ps.loadings, {"fit": at.fit}),
}


def complaint(function, arguments):
    """What a call ends in, other than a result or an error of the package, or an IndexError that names the cells."""
    try:
        function(**arguments)
    except PyroScviError:
        return None
    except IndexError as error:
        return None if "cells are numbered" in str(error) else error
    except Exception as error:
        return error
    finally:
        pyplot.close("all")
    return None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_of_any_kind_work_or_are_refused_in_words(name, at):
    function, valid = FUNCTIONS[name](at)
    wrong = {}
    for argument in inspect.signature(function).parameters.keys() - NOT_CHECKED:
        for kind, make in ODD.items():
            error = complaint(function, valid | {argument: make()})
            if error is not None:
                wrong[f"{argument}= {kind}"] = f"{type(error).__name__}: {error}"[:120]
    assert not wrong
