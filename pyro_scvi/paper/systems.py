"""Our own models in the tables: their configurations, and how long and with which seed they are fitted."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pyro_scvi import presets
from pyro_scvi.data.cells import Cells
from pyro_scvi.guides.amortized import DiagonalNormal
from pyro_scvi.guides.point import Point
from pyro_scvi.likelihoods.dispersion import PerGene
from pyro_scvi.likelihoods.negative_binomial import ZINB
from pyro_scvi.model import SCVI
from pyro_scvi.presets import Preset
from pyro_scvi.priors.base import Prior
from pyro_scvi.priors.flat import Flat
from pyro_scvi.priors.mixture import GaussianMixture, VampPrior
from pyro_scvi.training.fit import fit
from pyro_scvi.training.fitted import Fit

Configure = Callable[..., Preset]


def clusters(cells: Cells, *, seed: int = 0) -> Preset:
    """The default's library and training with a dispersion per gene and dropout 0.1, which separates cells better."""
    return _with_dropout(_clustering_model(cells, seed), seed)


def _clustering_model(cells: Cells, seed: int, n_latent: int = 10, prior: Prior | None = None) -> SCVI:
    likelihood = ZINB(PerGene(cells.n_genes))
    sizes = cells.n_genes, n_latent, cells.n_covariates
    return SCVI(*sizes, prior=prior, likelihood=likelihood, dropout=0.1, seed=seed)


def _with_dropout(model: SCVI, seed: int) -> Preset:
    return model, {"guide": DiagonalNormal(model, dropout=0.1, seed=seed), "seed": seed}


MODELS: dict[str, Configure] = {
    "scVI, 2017 preset": presets.seed_2017,
    "scVI, 2018 preset": presets.nature_methods_2018,
    "scVI, default": presets.default,
    "scVI, gene dispersion, dropout 0.1": clusters,
}
"""By the name that the tables give them. What a model is was fixed before any table was made."""


def with_mixture(cells: Cells, *, seed: int = 0) -> Preset:
    """:func:`clusters` with a mixture of 16 normals as the prior of z."""
    return _with_dropout(_clustering_model(cells, seed, prior=GaussianMixture(10, 16, seed=seed)), seed)


def with_vamp_prior(cells: Cells, *, seed: int = 0) -> Preset:
    """:func:`clusters` with the aggregate posterior at 50 learned pseudo-cells as the prior of z."""
    rows = np.random.default_rng(seed).permutation(cells.n_cells)[:50]
    pseudo_cells, _ = cells[rows]
    prior = VampPrior(cells.n_genes, 10, len(rows), pseudo_cells=pseudo_cells, seed=seed)
    model = _clustering_model(cells, seed, prior=prior)
    return model, {"guide": DiagonalNormal(model, seed=seed), "seed": seed}  # the prior's encoder, without dropout


def with_few_latents(cells: Cells, *, seed: int = 0) -> Preset:
    """:func:`clusters` with 5 latents."""
    return _with_dropout(_clustering_model(cells, seed, n_latent=5), seed)


def default_with_mixture(cells: Cells, *, seed: int = 0) -> Preset:
    """The default with a mixture of 16 normals as the prior of z."""
    model, options = presets.default(cells, seed=seed)
    return rebuilt(model, GaussianMixture(model.n_latent, 16, seed=seed)), options


CANDIDATES: dict[str, Configure] = {
    "scVI, default": presets.default,
    "scVI, default, mixture of 16": default_with_mixture,
    "scVI, gene dispersion, dropout 0.1": clusters,
    "scVI, gene dispersion, dropout 0.1, mixture of 16": with_mixture,
    "scVI, gene dispersion, dropout 0.1, VampPrior of 50": with_vamp_prior,
    "scVI, gene dispersion, dropout 0.1, 5 latents": with_few_latents,
}
"""Among which held-out evidence may choose, all under the default's training."""


def as_parameter(configure: Configure) -> Configure:
    """The same with each z_n as an unknown parameter (Lopez et al. 2017, Sec. 3.3): the encoder's output, no prior.

    z has neither noise nor a density that counts, as in the authors' code of that week; a latent library size keeps
    its law and is at its most probable point.
    """

    def configured(cells: Cells, *, seed: int = 0) -> Preset:
        model, options = configure(cells, seed=seed)
        made: dict[str, Any] = options["guide"].arguments if "guide" in options else {"seed": seed}
        flat = rebuilt(model, Flat(model.n_latent))
        return flat, options | {"guide": Point(flat, **{name: made[name] for name in made if name != "model"})}

    return configured


def rebuilt(model: SCVI, prior: Prior) -> SCVI:
    """A model made of the same arguments, and so with the same initial weights, under another prior of z."""
    return SCVI(**(model.config() | {"prior": prior}))


def fitted(name: str, cells: Cells, *, seed: int, epochs: int | None = None, **options: Any) -> Fit:
    """Fit the model ``name`` to all of ``cells``: no cell is held out, no epoch chosen.

    ``epochs`` is the most; ``options`` go to :func:`pyro_scvi.training.fit`, over those of the preset.
    """
    return fitted_as((MODELS | CANDIDATES)[name], cells, seed=seed, epochs=epochs, **options)


def fitted_as(configure: Configure, cells: Cells, *, seed: int, epochs: int | None = None, **options: Any) -> Fit:
    """:func:`fitted` of a configuration of one's own."""
    model, preset = configure(cells, seed=seed)
    asked: dict[str, Any] = {"validation": 0, "progress": False, "device": "cpu"} | preset | options
    if epochs is not None:
        asked["epochs"] = epochs
    return fit(model, cells, **asked)
