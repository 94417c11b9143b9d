"""Variants of the default model: what was tried when the default was chosen, in the order of their simplicity.

Each takes the training cells and a seed, and gives a model and options of its fit. All but the first three have one
hidden layer in both networks and dropout of .1 in the encoder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pyro_scvi as ps
from benchmarks.systems.our_models import Configured, default
from pyro_scvi.nn.component import Component
from pyro_scvi.nn.dropout import Dropout

LOG_R = "log_inverse_dispersion"
DROPOUT = 0.1


class Deviating(Component):
    """Log r = log r_g + scale times a head of the decoder: per gene, and a deviation per cell that learns slowly.

    Adam moves every weight by about the learning rate, so a head that is multiplied by .1 moves a tenth as fast.
    """

    heads = (LOG_R,)

    def __init__(self, n_genes: int, scale: float = 1.0) -> None:
        super().__init__()
        self.expected_genes, self.scale = n_genes, scale
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: dict[str, Tensor], gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return self.log_inverse_dispersion + self.scale * eta[LOG_R]


class OfTheMean(Component):
    """Log r = a_g + b_g times the log mean count: two numbers for a gene, and no head."""

    heads = ()

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        self.expected_genes = n_genes
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))
        self.slope = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: dict[str, Tensor], gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return self.log_inverse_dispersion + self.slope * eta["log_mean"]


@dataclass(frozen=True)
class OwnHead:
    """The default decoder with a head of its own for log r that starts at zero.

    Parameters
    ----------
    rank
        Width of a linear layer between the hidden units and the genes; None for none.
    dropout
        Of the hidden units before this head alone.
    before_all
        Dropout of the hidden units before all heads.
    layers, within
        Hidden layers, and dropout before each.
    """

    rank: int | None = None
    dropout: float = 0.0
    before_all: float = 0.0
    layers: int = 1
    within: float = 0.0

    def __call__(self, n_latent: int, n_genes: int, heads: Sequence[str], n_covariates: int) -> nn.Module:
        """Build the network."""
        network = ps.networks.MLPDecoder(n_layers=self.layers, dropout=self.within)(
            n_latent, n_genes, heads, n_covariates
        )
        n_hidden = network.heads[LOG_R].in_features
        last = nn.Linear(self.rank or n_hidden, n_genes)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        between = [nn.Linear(n_hidden, self.rank, bias=False)] if self.rank else []
        network.heads[LOG_R] = nn.Sequential(Dropout(self.dropout), *between, last)
        network.layers = Dropped(network.layers, self.before_all)
        return network


class Dropped(nn.Module):
    """Hidden layers with dropout behind the last, before the heads."""

    def __init__(self, layers: nn.Module, dropout: float) -> None:
        super().__init__()
        self.layers, self.dropout = layers, Dropout(dropout)

    def forward(self, z: Tensor, gamma: Tensor) -> Tensor:
        """(..., cells, latents) -> (..., cells, n_hidden)."""
        return self.dropout(self.layers(z, gamma))


def _made(
    cells: ps.Cells, seed: int, *, layers: int = 1, in_encoder: int = 0, in_decoder: float = 0.0, **of_model: Any
) -> Configured:
    """A model and a guide with so many layers each, or so many ``in_encoder``, and dropout in the encoder."""
    if "decoder" not in of_model:
        of_model |= {"n_layers": layers, "dropout": in_decoder}
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, seed=seed, **of_model)
    guide = ps.guides.DiagonalNormal(model, n_layers=in_encoder or layers, dropout=DROPOUT, seed=seed)
    return model, {"guide": guide, "seed": seed}


def _per_gene(cells: ps.Cells) -> ps.likelihoods.ZINB:
    return ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes))


def _deviating(cells: ps.Cells, seed: int, head: OwnHead, scale: float = 1.0, **of_model: Any) -> Configured:
    likelihood = ps.likelihoods.ZINB(Deviating(cells.n_genes, scale))
    return _made(cells, seed, likelihood=likelihood, decoder=head, **of_model)


def recipe(cells: ps.Cells, seed: int) -> Configured:
    """A dispersion per gene, dropout in both networks."""
    return _made(cells, seed, layers=2, in_decoder=DROPOUT, likelihood=_per_gene(cells))


def encoder_dropout(cells: ps.Cells, seed: int) -> Configured:
    """The default with dropout in the encoder."""
    return _made(cells, seed, layers=2)


def one_layer(cells: ps.Cells, seed: int) -> Configured:
    """One layer, dropout in the encoder, a dispersion per cell and gene."""
    return _made(cells, seed)


def one_layer_per_gene(cells: ps.Cells, seed: int) -> Configured:
    """The same with a dispersion per gene."""
    return _made(cells, seed, likelihood=_per_gene(cells))


def one_layer_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """A dispersion per cell and gene, dropout in both networks."""
    return _made(cells, seed, in_decoder=DROPOUT)


def of_the_mean(cells: ps.Cells, seed: int) -> Configured:
    """A dispersion that is a power of the mean, by gene."""
    return _made(cells, seed, likelihood=ps.likelihoods.ZINB(OfTheMean(cells.n_genes)))


def shallow_decoder(cells: ps.Cells, seed: int) -> Configured:
    """One layer in the decoder and two in the encoder, with dropout."""
    return _made(cells, seed, in_encoder=2)


def shallow_encoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the decoder and one in the encoder, with dropout."""
    return _made(cells, seed, layers=2, in_encoder=1)


def shallow_encoder_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """The same with dropout in both networks."""
    return _made(cells, seed, layers=2, in_encoder=1, in_decoder=DROPOUT)


def nb(cells: ps.Cells, seed: int) -> Configured:
    """No technical zeros, a dispersion per cell and gene."""
    return _made(cells, seed, likelihood=ps.likelihoods.NB())


def nb_of_the_mean(cells: ps.Cells, seed: int) -> Configured:
    """No technical zeros, a dispersion that is a power of the mean."""
    return _made(cells, seed, likelihood=ps.likelihoods.NB(OfTheMean(cells.n_genes)))


def from_zero(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head that starts at zero."""
    return _deviating(cells, seed, OwnHead())


def slow(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head from zero that learns a tenth as fast."""
    return _deviating(cells, seed, OwnHead(), 0.1)


def head_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head from zero with half of its inputs dropped."""
    return _deviating(cells, seed, OwnHead(dropout=0.5))


def low_rank(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head from zero of rank 5."""
    return _deviating(cells, seed, OwnHead(rank=5))


def hierarchical(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head of rank 5 whose weights are latent, normal with a scale that is learned."""
    shrunk = {f"decoder.heads.{LOG_R}.2.weight": ps.weights.HierarchicalWeights(0.5)}
    return _deviating(cells, seed, OwnHead(rank=5), weight_priors=shrunk)


def before_heads(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head from zero, a tenth of the hidden units dropped before all heads."""
    return _deviating(cells, seed, OwnHead(before_all=DROPOUT))


def low_rank_before_heads(cells: ps.Cells, seed: int) -> Configured:
    """Per gene plus a head from zero of rank 5, a tenth of the hidden units dropped before all heads."""
    return _deviating(cells, seed, OwnHead(rank=5, before_all=DROPOUT))


def low_rank_more_dropout(cells: ps.Cells, seed: int) -> Configured:
    """The same with three tenths dropped."""
    return _deviating(cells, seed, OwnHead(rank=5, before_all=3 * DROPOUT))


def hierarchical_before_heads(cells: ps.Cells, seed: int) -> Configured:
    """The hierarchical head of rank 5, a tenth of the hidden units dropped before all heads."""
    shrunk = {f"decoder.heads.{LOG_R}.2.weight": ps.weights.HierarchicalWeights(0.5)}
    return _deviating(cells, seed, OwnHead(rank=5, before_all=DROPOUT), weight_priors=shrunk)


def two_layers_low_rank(cells: ps.Cells, seed: int) -> Configured:
    """Two layers, dropout of .1 in both networks, per gene plus a head from zero of rank 5."""
    likelihood = ps.likelihoods.ZINB(Deviating(cells.n_genes))
    return _made(cells, seed, layers=2, likelihood=likelihood, decoder=OwnHead(rank=5, layers=2, within=DROPOUT))


def two_layers_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Two layers, dropout of .1 in both networks, a dispersion per cell and gene."""
    return _made(cells, seed, layers=2, in_decoder=DROPOUT)


def _shrunk(configured: Configured, sd: float = 1.0) -> Configured:
    """The same with a prior of the heads' weights."""
    model, options = configured
    return model, options | {"head_sd": sd}


def shrunk_default(cells: ps.Cells, seed: int) -> Configured:
    """The default with a prior of the heads' weights."""
    return _shrunk(default(cells, seed))


def shrunk_shallow_decoder_alone(cells: ps.Cells, seed: int) -> Configured:
    """The default with one layer in the decoder and a prior of the heads' weights: no dropout."""
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, n_layers=1, seed=seed)
    return _shrunk(
        (model, {"guide": ps.guides.DiagonalNormal(model, n_layers=2, dropout=0.0, seed=seed), "seed": seed})
    )


def shrunk_two_layers(cells: ps.Cells, seed: int) -> Configured:
    """With dropout in the encoder and a prior of the heads' weights."""
    return _shrunk(encoder_dropout(cells, seed))


def shrunk_shallow_decoder(cells: ps.Cells, seed: int) -> Configured:
    """The same with one layer in the decoder."""
    return _shrunk(shallow_decoder(cells, seed))


def shrunk_shallow_encoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the decoder, one in the encoder, and a prior of the heads' weights."""
    return _shrunk(shallow_encoder(cells, seed))


def shrunk_one_layer_of_256(cells: ps.Cells, seed: int) -> Configured:
    """One layer of 256 in both, and a prior of the heads' weights."""
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, n_layers=1, n_hidden=256, seed=seed)
    guide = ps.guides.DiagonalNormal(model, n_layers=1, n_hidden=256, dropout=DROPOUT, seed=seed)
    return _shrunk((model, {"guide": guide, "seed": seed}))


def shrunk_one_layer(cells: ps.Cells, seed: int) -> Configured:
    """The same with one layer in both."""
    return _shrunk(one_layer(cells, seed))


def shrunk_one_layer_wide(cells: ps.Cells, seed: int) -> Configured:
    """The same with a prior three times as wide."""
    return _shrunk(one_layer(cells, seed), 3.0)


def shrunk_one_layer_narrow(cells: ps.Cells, seed: int) -> Configured:
    """The same with a prior half as wide."""
    return _shrunk(one_layer(cells, seed), 0.5)


def shrunk_one_layer_per_gene(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, a dispersion per gene, a prior of the heads' weights."""
    return _shrunk(one_layer_per_gene(cells, seed))


def shrunk_recipe(cells: ps.Cells, seed: int) -> Configured:
    """A dispersion per gene, dropout in both networks of two layers, a prior of the heads' weights."""
    return _shrunk(recipe(cells, seed))


VARIANTS: dict[str, Callable[[ps.Cells, int], Configured]] = {
    made.__name__: made
    for made in (
        default,
        encoder_dropout,
        recipe,
        one_layer,
        one_layer_per_gene,
        one_layer_both_dropout,
        shallow_decoder,
        shallow_encoder,
        shallow_encoder_both_dropout,
        of_the_mean,
        nb,
        nb_of_the_mean,
        from_zero,
        slow,
        head_dropout,
        low_rank,
        hierarchical,
        before_heads,
        low_rank_before_heads,
        low_rank_more_dropout,
        hierarchical_before_heads,
        two_layers_low_rank,
        two_layers_both_dropout,
        shrunk_default,
        shrunk_shallow_decoder_alone,
        shrunk_two_layers,
        shrunk_shallow_decoder,
        shrunk_shallow_encoder,
        shrunk_one_layer,
        shrunk_one_layer_of_256,
        shrunk_one_layer_wide,
        shrunk_one_layer_narrow,
        shrunk_one_layer_per_gene,
        shrunk_recipe,
    )
}
