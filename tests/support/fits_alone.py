"""A small fit and what verbs say of it, as bytes; a spawned process imports this module anew."""

import numpy as np
import pandas as pd
import torch

import pyro_scvi as ps
from tests.support.simulate import simulated_counts

CELLS = ps.Cells.from_counts(simulated_counts(40))
DONORS = ps.Cells.from_counts(simulated_counts(40), obs=pd.DataFrame({"donor": ["x", "y"] * 20}), batch="donor")


def pair(**options):
    model = ps.SCVI(20, 2, n_hidden=8, n_layers=1, **options)
    shared = {} if "prior" in options and hasattr(options["prior"], "encoder") else {"n_hidden": 8, "dropout": 0.1}
    return model, ps.guides.DiagonalNormal(model, **shared)


def trained(model, guide, **options):
    return ps.fit(model, CELLS, guide, **{"epochs": 3, "batch_size": 20, "progress": False, "device": "cpu", **options})


def results(fit):
    """Weights, history, embedding, imputed counts and differential expression."""
    states = [value.numpy() for part in (fit.model, fit.guide) for value in part.state_dict().values()]
    groups = np.arange(CELLS.n_cells) % 2
    genes = ps.differential_expression(fit, CELLS, groupby=groups, seed=0).select_dtypes(float)
    tables = (fit.history.drop(columns="seconds"), genes, ps.embed(fit, CELLS), ps.impute(fit, CELLS))
    return b"".join(np.ascontiguousarray(value).tobytes() for value in (*states, *tables))


def alone(seed):
    """The results of a fit of new objects."""
    torch.set_num_threads(1)
    return results(trained(*pair(), seed=seed))


def pair_of_donors():
    model = ps.SCVI(20, 2, DONORS.n_covariates, n_hidden=8, n_layers=1)
    return model, ps.guides.DiagonalNormal(model, n_hidden=8)


def trained_on_donors(model, guide, seed):
    return ps.fit(model, DONORS, guide, epochs=2, batch_size=20, seed=seed, progress=False, device="cpu")


def results_of_a_query(fit):
    """What a fit becomes when it learns a new donor."""
    obs, names = pd.DataFrame({"donor": ["z"] * 12}), DONORS.gene_names
    options = {"schema": fit.schema, "allow_new_batches": True}
    query = ps.Cells.from_counts(simulated_counts(12), gene_names=names, obs=obs, **options)
    mapped = ps.map_query(fit, query, epochs=2, batch_size=6, progress=False)
    states = [value.numpy() for part in (mapped.model, mapped.guide) for value in part.state_dict().values()]
    return b"".join(np.ascontiguousarray(value).tobytes() for value in (*states, ps.embed(fit, DONORS)))


def alone_with_a_query(seed):
    """The results of a query to a fit of new objects."""
    torch.set_num_threads(1)
    return results_of_a_query(trained_on_donors(*pair_of_donors(), seed))
