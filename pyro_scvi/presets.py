"""Presets: named configurations, each a model and the options of its fit."""

from typing import Any

import numpy as np

from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.amortized import DiagonalNormal
from pyro_scvi.guides.base import Guide
from pyro_scvi.likelihoods.dispersion import PerGene
from pyro_scvi.likelihoods.library_size import LatentLibrary, NoLibrary
from pyro_scvi.likelihoods.negative_binomial import ZINB
from pyro_scvi.model import SCVI
from pyro_scvi.nn.normalization import BatchNorm
from pyro_scvi.schedules import Constant, ConstantKL
from pyro_scvi.utils.checks import require_kind

__all__ = ["default", "nature_methods_2018", "seed_2017"]


def __dir__() -> list[str]:
    return __all__


Preset = tuple[SCVI, dict[str, Any]]


def default(cells: Cells, *, seed: int = 0) -> Preset:
    """The default model and training.

    A latent library size, ZINB with a dispersion for each cell and gene, a prior of the heads' weights, no dropout.

    Chosen by held-out evidence; DiagonalNormal guide, up to 60 epochs of batches of 128 with a one-cycle learning
    rate, best held-out epoch kept.

    Parameters
    ----------
    cells
        The cells that ``fit`` will be given.
    seed
        Of the initial weights and of the fit.

    Returns
    -------
    (SCVI, dict)
        The model, and the options for ``ps.fit(model, cells, **options)``.

    Raises
    ------
    ModelError
        If ``cells`` are no Cells, or the seed is no integer from 0 to 2**63 - 1.

    Examples
    --------
    >>> model, options = ps.presets.default(cells)
    >>> model.library, model.likelihood
    (LatentLibrary(), ZINB(dispersion=PerCellAndGene()))
    >>> options["epochs"] = 1
    >>> ps.fit(model, cells, **options, progress=False).settings["epochs"]
    1
    """
    _require_cells(cells)
    return SCVI(cells.n_genes, 10, cells.n_covariates, seed=seed), {"seed": seed}


def seed_2017(cells: Cells, *, seed: int = 0) -> Preset:
    """The model and training of Lopez et al. (2017).

    That is Secs. 1 and 2, as in their code of that week.

    No library size, mean exp(head), inverse dispersion per cell and gene, raw counts into the encoder, two hidden
    layers of 128, dropout 0.1, batch normalisation momentum 0.01, truncated normal weights of sd 0.01, Adam at 0.005
    with epsilon 0.01, 150 epochs of batches of 128, no KL warm-up.

    Parameters
    ----------
    cells
        The cells that ``fit`` will be given.
    seed
        Of the initial weights and of the fit.

    Returns
    -------
    (SCVI, dict)
        The model, and the options for ``ps.fit(model, cells, **options)``.

    Raises
    ------
    ModelError
        If ``cells`` are no Cells, or the seed is no integer from 0 to 2**63 - 1.

    Examples
    --------
    >>> model, options = ps.presets.seed_2017(cells)
    >>> model.library, options["epochs"], options["learning_rate"]
    (NoLibrary(), 150, Constant(rate=0.005))
    """
    _require_cells(cells)
    hidden: dict[str, Any] = {
        "n_hidden": 128,
        "n_layers": 2,
        "dropout": 0.1,
        "norm": BatchNorm(0.01),
        "initial_sd": 0.01,
        "seed": seed,
    }
    parts: dict[str, Any] = {"likelihood": ZINB(), "library": NoLibrary(), "head_sd": None}
    model = SCVI(cells.n_genes, 10, cells.n_covariates, **parts, **hidden)
    guide = DiagonalNormal(model, log_input=False, **hidden)
    return model, _options(guide, epochs=150, learning_rate=Constant(0.005), seed=seed)


def nature_methods_2018(cells: Cells, *, seed: int = 0) -> Preset:
    """The configuration of Lopez et al. (2018, Methods) for the cortex data.

    It has their KL weight of 0, for clustering.

    Latent library size with mean and sd of the log totals, mean l softmax(head), inverse dispersion per gene, log
    counts into the encoder, one hidden layer of 128, dropout 0.1 in the encoder alone, Adam at 0.0004 with epsilon
    0.01, 250 epochs.

    Parameters
    ----------
    cells
        The cells that ``fit`` will be given.
    seed
        Of the initial weights and of the fit.

    Returns
    -------
    (SCVI, dict)
        The model, and the options for ``ps.fit(model, cells, **options)``.

    Raises
    ------
    ModelError
        If ``cells`` are no Cells, or the seed is no integer from 0 to 2**63 - 1.

    Examples
    --------
    >>> model, options = ps.presets.nature_methods_2018(cells)
    >>> options["epochs"], options["kl_weight"]
    (250, ConstantKL(value=0.0))
    """
    _require_cells(cells)
    hidden: dict[str, Any] = {
        "n_hidden": 128,
        "n_layers": 1,
        "norm": BatchNorm(0.01),
        "initial_sd": 0.01,
        "seed": seed,
    }
    library = LatentLibrary(*_log_total_moments(cells))
    parts: dict[str, Any] = {"likelihood": ZINB(PerGene(cells.n_genes)), "library": library, "head_sd": None}
    model = SCVI(cells.n_genes, 10, cells.n_covariates, **parts, **hidden)
    guide = DiagonalNormal(model, dropout=0.1, **hidden)
    return model, _options(guide, epochs=250, learning_rate=Constant(4e-4), seed=seed) | {"kl_weight": ConstantKL(0.0)}


def _require_cells(cells: Any) -> None:
    require_kind(cells, Cells, "cells", "ps.Cells.from_anndata(adata)")


def _log_total_moments(cells: Cells) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the log totals, per batch."""
    log_totals = np.log(np.maximum(cells.totals, 1))
    if cells.schema.batch is None:
        groups = [log_totals]
    else:
        own = [log_totals[cells.gamma.codes(cells.schema.batch) == place] for place in range(cells.n_batches)]
        groups = [group if len(group) else log_totals for group in own]  # all cells for an absent batch
    # The floor keeps the LogNormal proper where all cells of a batch have one total.
    return [float(group.mean()) for group in groups], [max(float(group.std()), 0.05) for group in groups]


def _options(guide: Guide, *, epochs: int, learning_rate: Constant, seed: int) -> dict[str, Any]:
    return {
        "guide": guide,
        "epochs": epochs,
        "batch_size": 128,
        "learning_rate": learning_rate,
        "eps": 0.01,
        "seed": seed,
        "data_start": False,  # the published code starts from random weights alone
        "validation": 0,  # and trains on every cell it is given
    }
