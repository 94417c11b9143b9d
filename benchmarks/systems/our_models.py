"""Models of this package that are compared, with options of their training; cells as this package reads them."""

import warnings
from collections.abc import Callable
from typing import Any

import anndata
import torch

import pyro_scvi as ps
from pyro_scvi.nn.networks import Encoder, Layers
from pyro_scvi.nn.normalization import BatchNorm
from pyro_scvi.utils.random_state import seeded

Configured = tuple[ps.SCVI, dict[str, Any]]  # a model, and options of fit
PEER_OPTIMISER = {"learning_rate": ps.schedules.Constant(1e-3), "eps": 0.01}
HALF = {"autocast": torch.bfloat16}


def as_cells(data: anndata.AnnData) -> ps.Cells:
    """The cells as this package reads them, with batches where there are any."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* ha(s|ve) no counts")  # a few simulated cells of a quick run
        return ps.Cells.from_anndata(data, **_batched(data))


def _batched(data: anndata.AnnData) -> dict[str, Any]:
    return {"batch": "batch"} if "batch" in data.obs else {}


class DropoutLast(Layers):
    """A hidden layer with dropout behind it, where scvi-tools has it, and not in front as this package has it."""

    def forward(self, hidden: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
        """(cells, genes) -> (cells, n_hidden)."""
        (linear,), (norm,) = self.linear, self.norm
        return self.dropout(torch.relu(norm(linear(hidden))))


def matched_encoder(n_genes: int, seed: int) -> Encoder:
    """The encoder that scvi-tools has by default: one layer of 128, dropout of 0.1 behind it."""
    with seeded(seed):
        encoder = Encoder(n_genes, 10, n_layers=1)
        encoder.layers = DropoutLast(n_genes, 0, 128, 1, 0.1, BatchNorm())
    return encoder


def matched(cells: ps.Cells, seed: int) -> Configured:
    """The model that scvi-tools has by default: dispersion per gene, observed library, one layer, encoder dropout."""
    model = ps.SCVI(
        cells.n_genes,
        n_covariates=cells.n_covariates,
        likelihood=ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes)),
        library=ps.libraries.ObservedLibrary(),
        n_layers=1,
        head_sd=None,
        seed=seed,
    )
    encoder = matched_encoder(cells.n_genes, seed)
    return model, {"guide": ps.guides.DiagonalNormal(model, encoder=encoder, seed=seed), "seed": seed}


def matched_constant(cells: ps.Cells, seed: int) -> Configured:
    """The same, trained with scvi-tools' optimiser: Adam at 1e-3 with epsilon 0.01."""
    model, options = matched(cells, seed)
    return model, options | PEER_OPTIMISER


def default(cells: ps.Cells, seed: int) -> Configured:
    """The package's default model and training."""
    return ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, seed=seed), {"seed": seed}


def default_bfloat16(cells: ps.Cells, seed: int) -> Configured:
    """The package's default model, its matrix products in bfloat16 during training."""
    model, options = default(cells, seed)
    return model, options | HALF


def seed_2017(cells: ps.Cells, seed: int) -> Configured:
    """The preset of the paper."""
    return ps.presets.seed_2017(cells, seed=seed)


CONFIGURATIONS: dict[str, Callable[[ps.Cells, int], Configured]] = {
    made.__name__: made for made in (matched, matched_constant, default, seed_2017)
}
