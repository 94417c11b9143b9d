"""Variants of the default model: what was tried when the default was chosen.

Each takes the training cells and a seed, and gives a model and options of its fit. Unless a name or a docstring says
otherwise, a variant has one hidden layer in both networks, dropout of .1 in the encoder and no prior of weights.
"""

from collections.abc import Callable
from typing import Any

import pyro_scvi as ps
from benchmarks.systems.default_variants.parts import LOG_R, Deviating, OfTheMean, OwnHead
from benchmarks.systems.our_models import Configured

DROPOUT = 0.1


def _made(
    cells: ps.Cells,
    seed: int,
    *,
    layers: int = 1,
    in_encoder: int = 0,
    in_decoder: float = 0.0,
    dropout: float = DROPOUT,
    head_sd: float | None = None,
    **of_model: Any,
) -> Configured:
    """A model and a guide with so many layers each, or so many ``in_encoder``, and dropout in the encoder."""
    if "decoder" not in of_model:
        of_model |= {"n_layers": layers, "dropout": in_decoder, "head_sd": head_sd}
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, seed=seed, **of_model)
    guide = ps.guides.DiagonalNormal(model, n_layers=in_encoder or layers, dropout=dropout, seed=seed)
    return model, {"guide": guide, "seed": seed}


def _per_gene(cells: ps.Cells) -> ps.likelihoods.ZINB:
    return ps.likelihoods.ZINB(ps.likelihoods.PerGene(cells.n_genes))


def _deviating(cells: ps.Cells, seed: int, head: OwnHead, scale: float = 1.0, **of_model: Any) -> Configured:
    likelihood = ps.likelihoods.ZINB(Deviating(cells.n_genes, scale))
    return _made(cells, seed, likelihood=likelihood, decoder=head, **of_model)


def default(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, no dropout, r per cell and gene: the earlier default."""
    return _made(cells, seed, layers=2, dropout=0.0)


def recipe(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, dropout of .1 in the decoder, r per gene."""
    return _made(cells, seed, layers=2, in_decoder=DROPOUT, likelihood=_per_gene(cells))


def encoder_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both."""
    return _made(cells, seed, layers=2)


def one_layer(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, r per cell and gene."""
    return _made(cells, seed)


def one_layer_per_gene(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, r per gene."""
    return _made(cells, seed, likelihood=_per_gene(cells))


def one_layer_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Dropout of .1 in the decoder, before its layer."""
    return _made(cells, seed, in_decoder=DROPOUT)


def of_the_mean(cells: ps.Cells, seed: int) -> Configured:
    """Log r = a_g + b_g log mean: a power of the mean."""
    return _made(cells, seed, likelihood=ps.likelihoods.ZINB(OfTheMean(cells.n_genes)))


def shallow_decoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the encoder."""
    return _made(cells, seed, in_encoder=2)


def shallow_encoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the decoder."""
    return _made(cells, seed, layers=2, in_encoder=1)


def shallow_encoder_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the decoder, with dropout of .1 there."""
    return _made(cells, seed, layers=2, in_encoder=1, in_decoder=DROPOUT)


def nb(cells: ps.Cells, seed: int) -> Configured:
    """No technical zeros."""
    return _made(cells, seed, likelihood=ps.likelihoods.NB())


def nb_of_the_mean(cells: ps.Cells, seed: int) -> Configured:
    """No technical zeros, r a power of the mean."""
    return _made(cells, seed, likelihood=ps.likelihoods.NB(OfTheMean(cells.n_genes)))


def from_zero(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head that starts at zero."""
    return _deviating(cells, seed, OwnHead())


def slow(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a tenth of a head from zero, so that it learns slowly."""
    return _deviating(cells, seed, OwnHead(), 0.1)


def head_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head from zero, half of its inputs dropped."""
    return _deviating(cells, seed, OwnHead(dropout=0.5))


def low_rank(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head from zero of rank 5."""
    return _deviating(cells, seed, OwnHead(rank=5))


def hierarchical(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head of rank 5 with latent weights, whose scale is learned."""
    shrunk = {f"decoder.heads.{LOG_R}.2.weight": ps.weights.HierarchicalWeights(0.5)}
    return _deviating(cells, seed, OwnHead(rank=5), weight_priors=shrunk)


def before_heads(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head from zero; dropout of .1 before all heads."""
    return _deviating(cells, seed, OwnHead(before_all=DROPOUT))


def low_rank_before_heads(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head from zero of rank 5; dropout of .1 before all heads."""
    return _deviating(cells, seed, OwnHead(rank=5, before_all=DROPOUT))


def low_rank_more_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + a head from zero of rank 5; dropout of .3 before all heads."""
    return _deviating(cells, seed, OwnHead(rank=5, before_all=3 * DROPOUT))


def hierarchical_before_heads(cells: ps.Cells, seed: int) -> Configured:
    """Log r = log r_g + the hierarchical head; dropout of .1 before all heads."""
    shrunk = {f"decoder.heads.{LOG_R}.2.weight": ps.weights.HierarchicalWeights(0.5)}
    return _deviating(cells, seed, OwnHead(rank=5, before_all=DROPOUT), weight_priors=shrunk)


def two_layers_low_rank(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, dropout of .1 in both, log r = log r_g + a head from zero of rank 5."""
    likelihood = ps.likelihoods.ZINB(Deviating(cells.n_genes))
    return _made(cells, seed, layers=2, likelihood=likelihood, decoder=OwnHead(rank=5, layers=2, within=DROPOUT))


def two_layers_both_dropout(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, dropout of .1 in both."""
    return _made(cells, seed, layers=2, in_decoder=DROPOUT)


def shrunk_default(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, no dropout, a prior of the heads' weights: the default now."""
    return _made(cells, seed, layers=2, dropout=0.0, head_sd=1.0)


def shrunk_shallow_decoder_alone(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the encoder, no dropout, a prior of the heads' weights."""
    return _made(cells, seed, in_encoder=2, dropout=0.0, head_sd=1.0)


def shrunk_two_layers(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in both, a prior of the heads' weights."""
    return _made(cells, seed, layers=2, head_sd=1.0)


def shrunk_shallow_decoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the encoder, a prior of the heads' weights."""
    return _made(cells, seed, in_encoder=2, head_sd=1.0)


def shrunk_shallow_encoder(cells: ps.Cells, seed: int) -> Configured:
    """Two layers in the decoder, a prior of the heads' weights."""
    return _made(cells, seed, layers=2, in_encoder=1, head_sd=1.0)


def shrunk_one_layer_of_256(cells: ps.Cells, seed: int) -> Configured:
    """One layer of 256 in both, a prior of the heads' weights."""
    model = ps.SCVI(cells.n_genes, n_covariates=cells.n_covariates, n_layers=1, n_hidden=256, head_sd=1.0, seed=seed)
    guide = ps.guides.DiagonalNormal(model, n_layers=1, n_hidden=256, dropout=DROPOUT, seed=seed)
    return model, {"guide": guide, "seed": seed}


def shrunk_one_layer(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, a prior of the heads' weights."""
    return _made(cells, seed, head_sd=1.0)


def shrunk_one_layer_wide(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, a prior three times as wide."""
    return _made(cells, seed, head_sd=3.0)


def shrunk_one_layer_narrow(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, a prior half as wide."""
    return _made(cells, seed, head_sd=0.5)


def shrunk_one_layer_per_gene(cells: ps.Cells, seed: int) -> Configured:
    """One layer in both, r per gene, a prior of the heads' weights."""
    return _made(cells, seed, likelihood=_per_gene(cells), head_sd=1.0)


def shrunk_recipe(cells: ps.Cells, seed: int) -> Configured:
    """The recipe, and a prior of the heads' weights."""
    return _made(cells, seed, layers=2, in_decoder=DROPOUT, likelihood=_per_gene(cells), head_sd=1.0)


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
