"""A fit as bytes, for threads and processes of their own: those that are spawned import this module anew."""

import numpy as np
import torch

import pyro_scvi as ps


def fitted(seed):
    """Fit a small model; parameters, history and embedding as bytes."""
    torch.set_num_threads(1)
    cells = ps.Cells.from_counts(np.random.default_rng(0).poisson(3.0, size=(60, 8)) + 1)
    model = ps.SCVI(8, 2, prior=ps.priors.GaussianMixture(2, seed=seed), n_hidden=8, dropout=0.1, seed=seed)
    fit = ps.fit(model, cells, epochs=4, batch_size=16, seed=seed, progress=False, device="cpu")
    values = [value.numpy() for part in (fit.model, fit.guide) for value in part.state_dict().values()]
    table = fit.history.drop(columns="seconds").to_numpy()
    return b"".join(value.tobytes() for value in (*values, table, ps.embed(fit, cells)))
