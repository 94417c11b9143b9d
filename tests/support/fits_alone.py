"""A small fit and what verbs say of it, as bytes; a spawned process imports this module anew."""

import numpy as np
import torch

import pyro_scvi as ps
from tests.support.simulate import simulated_counts

CELLS = ps.Cells.from_counts(simulated_counts(40))


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
