"""Our own models as rows of the tables: which configuration, fitted how long, with which seed."""

from collections.abc import Callable
from typing import Any

from pyro_scvi import presets
from pyro_scvi.cells import Cells
from pyro_scvi.fit import Fit, fit
from pyro_scvi.guides import DiagonalNormal
from pyro_scvi.likelihoods import ZINB, PerGene
from pyro_scvi.model import SCVI
from pyro_scvi.presets import Preset

Configure = Callable[..., Preset]


def clusters(cells: Cells, *, seed: int = 0) -> Preset:
    """The default's library and training with a dispersion per gene and dropout 0.1, which separates cells better."""
    model = SCVI(cells.n_genes, 10, cells.n_covariates, likelihood=ZINB(PerGene(cells.n_genes)), dropout=0.1, seed=seed)
    return model, {"guide": DiagonalNormal(model, dropout=0.1, seed=seed), "seed": seed}


MODELS: dict[str, Configure] = {
    "scVI, 2017 preset": presets.seed_2017,
    "scVI, 2018 preset": presets.nature_methods_2018,
    "scVI, default": presets.default,
    "scVI, gene dispersion, dropout 0.1": clusters,
}
"""By the name that the tables give them. What a model is was fixed before any table was made."""


def fitted(name: str, cells: Cells, *, seed: int, epochs: int | None = None, **options: Any) -> Fit:
    """Fit the model ``name`` to all of ``cells``: no cell is held out, no epoch chosen.

    ``epochs`` is the most; ``options`` go to :func:`pyro_scvi.fit`, over those of the preset.
    """
    model, preset = MODELS[name](cells, seed=seed)
    asked: dict[str, Any] = {"validation": 0, "progress": False, "device": "cpu"} | preset | options
    if epochs is not None:
        asked["epochs"] = epochs
    return fit(model, cells, **asked)
