"""map_query: columns of gamma for batches that a fit does not know, learned without moving the reference."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.analysis.label_effects import dependence
from pyro_scvi.analysis.new_batches import reads_gamma
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.covariates import Words
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.data.names import rows_by_name
from pyro_scvi.data.obs_columns import categories, quoted
from pyro_scvi.data.schema import Schema
from pyro_scvi.errors import FitError, ModelError
from pyro_scvi.guides.log_joint import cell_terms, scored
from pyro_scvi.inference.evaluation import bound_terms, undisturbed
from pyro_scvi.model import SCVI
from pyro_scvi.nn.decoders import LinearDecoder
from pyro_scvi.nn.networks import Decoder
from pyro_scvi.priors.base import ConditionalPrior, takes_gamma
from pyro_scvi.training.copying import copied
from pyro_scvi.training.fitted import Fit as MadeFit
from pyro_scvi.utils.checks import require_at_least, require_positive, switches_checked
from pyro_scvi.utils.progress_bars import progress_bar

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

EPOCHS, LEAST_STEPS = 30, 300
"""Passes through the query by default; more if there would be fewer steps than that."""

PROBED = 8  # cells at which the law of the reference is compared before and after


@dataclass(frozen=True)
class _Widened:
    """A parameter (n, columns) of the decoder that got columns for new batches, from ``start`` to ``stop``."""

    parameter: nn.Parameter
    start: int
    stop: int

    def leave_the_others(self) -> None:
        """Set the gradient of the reference's columns to zero."""
        if self.parameter.grad is not None:
            self.parameter.grad[:, : self.start] = 0.0
            self.parameter.grad[:, self.stop :] = 0.0

    def put_back_the_others(self, kept: Tensor) -> None:
        """The reference's columns as they were: an optimiser may move what has no gradient."""
        with torch.no_grad():
            self.parameter[:, : self.start] = kept[:, : self.start]
            self.parameter[:, self.stop :] = kept[:, self.stop :]


@switches_checked
def map_query(
    fit: Fit,
    cells: Cells,
    *,
    epochs: int | None = None,
    batch_size: int = 128,
    learning_rate: float = 0.02,
    seed: int = 0,
    progress: bool = True,
) -> Fit:
    r"""Learn the batches of a query that the fit does not know, leaving everything else as it is.

    .. math:: \max_{C'} \sum_n E_{q(z | x_n)} \log p(x_n | z, \gamma_n; C, C')

    C' are the decoder's weights on the new batches, one column for each in every layer that reads gamma. They start at
    the mean of those of the known batches, C, and nothing but them is trained (Lotfollahi et al. 2022). The embedding
    of every cell, and all that is decoded in a known batch, stays the same to the bit.

    Parameters
    ----------
    fit
        The reference. It is not changed.
    cells
        The query, read with ``schema=fit.schema`` and ``allow_new_batches=True``. Cells of known batches among it are
        left out.
    epochs, batch_size, learning_rate
        Passes through the query, by default 30 or as many as make 300 steps; cells of each step; and the first step
        size of Adam, which falls to zero.
    seed
        Of shuffling and draws.
    progress
        Whether to show how many epochs are done.

    Returns
    -------
    Fit
        With the new batches after the known ones in its schema. Read cells with it:
        ``ps.Cells.from_anndata(adata, schema=mapped.schema)``.

    Raises
    ------
    ModelError
        If no batch is new, the encoder reads the batch, or the batch acts on anything else than the weights of the
        default or the linear decoder, such as a dispersion, a library size or a prior for each batch; if an argument is
        of the wrong kind.
    SchemaError
        If the cells' genes or covariates are not those of the fit.
    FitError
        If the loss is not finite.

    Examples
    --------
    >>> known, new = adata[adata.obs["donor"] == "x"].copy(), adata.copy()
    >>> new.obs["donor"] = np.repeat(["x", "y", "z"], 20)
    >>> donors = ps.Cells.from_anndata(adata, batch="donor")
    >>> reference = ps.fit(ps.SCVI(20, 2, donors.n_covariates), donors, epochs=1, progress=False)
    >>> query = ps.Cells.from_anndata(new, schema=reference.schema, allow_new_batches=True)
    >>> mapped = ps.map_query(reference, query, epochs=2, progress=False)
    >>> mapped.schema.batches
    ('x', 'y', 'z')
    """
    require_inputs(fit, cells)
    require_at_least(1, batch_size=batch_size, **({} if epochs is None else {"epochs": epochs}))
    require_positive(learning_rate, "learning_rate")
    minibatches(fit, cells.take([0]), new_batches=True)  # refuses other schemas
    if not cells.new_batches:
        raise ModelError(
            f"no cell is of a new batch; the fit knows {quoted(fit.schema.batches)}. Read the query with "
            "Cells.from_anndata(query, schema=fit.schema, allow_new_batches=True)"
        )
    if takes_gamma(fit.model.prior) and not isinstance(fit.model.prior, ConditionalPrior):
        raise ModelError(
            "new batches would shift the columns of gamma that the prior of this model reads. Fit the query "
            "together with the other cells"
        )
    with torch.inference_mode(False):  # gradients, also inside a caller's torch.no_grad() or inference_mode()
        return _mapped(fit, cells, epochs, batch_size, learning_rate, seed, progress)


def _mapped(
    fit: Fit,
    cells: Cells,
    epochs: int | None,
    batch_size: int,
    learning_rate: float,
    seed: int,
    progress: bool,
) -> Fit:
    new = cells.new_batches
    made, widened = _widened(fit, cells, len(new))
    schema = replace(fit.schema, batches=(*fit.schema.batches, *new))
    query = _in_schema(cells, schema)
    data = Minibatches(query, fit.device, fit.dtype)
    steps = math.ceil(data.n_cells / batch_size)
    epochs = max(EPOCHS, math.ceil(LEAST_STEPS / steps)) if epochs is None else int(epochs)
    with undisturbed(seed, made.model, made.guide), torch.enable_grad(), _only(made, widened):
        history = _train(made, data, widened, epochs, batch_size, learning_rate, progress)
    made.model.trained_on = schema
    settings = {"epochs": epochs, "batch_size": int(batch_size), "seed": int(seed), "n_cells": data.n_cells}
    return MadeFit(made.model, made.guide, history, schema, fit.settings | settings | {"mapped_batches": list(new)})


def _in_schema(cells: Cells, schema: Schema) -> Cells:
    """The cells of new batches, with columns for these in gamma."""
    if schema.batch is None:
        raise ModelError("the fit has no batches")
    by_name = rows_by_name(cells.cell_names)  # so that minibatches are of the same cells, in whatever order these come
    some = cells.take(by_name[cells.of_unknown_batch[by_name]])
    found, codes = categories(some.obs, schema.batch)
    batches = Words.of(np.array([schema.batches.index(word) for word in found])[codes], schema.n_batches)
    return replace(some, gamma=some.gamma.replaced(schema.batch, batches), schema=schema)


def _widened(fit: Fit, cells: Cells, n_new: int) -> tuple[Fit, list[_Widened]]:
    """A copy of the fit whose decoder has columns for new batches, at the mean of those of the known ones."""
    n_known = fit.schema.n_batches
    if reads_gamma(fit.guide):
        raise ModelError(
            f"q(z | x) of {type(fit.guide).__name__} depends on the batch, so new batches cannot be added without "
            "training the guide. Fit with a guide whose encoder does not read gamma, which is the default"
        )
    _require_decoder_sees_batches(fit, cells)
    _require_batch_in_decoder_alone(fit, cells)
    model, guide = copied(fit.model, fit.guide)
    widened = [_with_columns(*place, n_known, n_new) for place in _places(model, n_known)]
    _shift(model, n_known, n_new)
    made = MadeFit(model.eval(), guide.eval(), fit.history, fit.schema, {})
    _require_same_law(fit, made, cells, n_new)
    return made, widened


def _seen(model: SCVI) -> list[int]:
    """The columns of gamma that the decoder reads; the batches are the first of gamma."""
    return list(range(model.n_covariates)) if model.decoder_columns is None else model.decoder_columns.tolist()


def _require_decoder_sees_batches(fit: Fit, cells: Cells) -> None:
    """Refuse a decoder that does not read the batches, and say what of the program does."""
    n_known, seen = fit.schema.n_batches, _seen(fit.model)
    if any(seen[at : at + n_known] == list(range(n_known)) for at in range(len(seen))):
        return
    known = cells.with_batch(fit.schema.batches[0])
    if sites := dependence(fit, known, slice(0, n_known)).sites:
        raise ModelError(
            f"the decoder does not see the batches, and {type(fit.model).__name__} uses them otherwise, in the "
            f"distribution of {list(sites)}, which is unknown for new batches. Fit reference and query together"
        )
    raise ModelError(
        "the decoder does not see the batches, so there is nothing to learn about new ones. Embed the query as it is"
    )


def _places(model: SCVI, n_known: int) -> list[tuple[nn.Module, str, int]]:
    """Modules of the decoder with a parameter on gamma, its name, and where the known batches are in it."""
    seen = _seen(model)
    at = seen.index(0)
    decoder: Any = model.decoder
    if isinstance(decoder, Decoder):
        linear: Any = decoder.layers.linear
        places = [(layer, "weight", layer.in_features - len(seen) + at) for layer in linear]
    elif type(decoder).__module__ == LinearDecoder.__module__:
        places = [(head, "covariates", at) for head in decoder.heads.values()]
    else:
        raise ModelError(
            f"map_query does not know how your decoder {type(decoder).__name__} reads gamma. It works with the "
            "default and the linear decoder"
        )
    if any(module._parameters.get(name) is None for module, name, _ in places):
        raise ModelError(
            "the weights of the batches have a prior from weight_priors, and weights of new batches "
            "would have none. Fit reference and query together"
        )
    return places


def _with_columns(module: Any, name: str, at: int, n_known: int, n_new: int) -> _Widened:
    old = getattr(module, name).detach()
    stop = at + n_known
    new = old[:, at:stop].mean(1, keepdim=True).expand(-1, n_new)
    parameter = nn.Parameter(torch.cat([old[:, :stop], new, old[:, stop:]], 1))
    setattr(module, name, parameter)
    if isinstance(module, nn.Linear) and name == "weight":
        module.in_features += n_new
    return _Widened(parameter, stop, stop + n_new)


def _shift(model: SCVI, n_known: int, n_new: int) -> None:
    """Move the columns behind the batches, wherever a part keeps their places."""
    model.n_covariates += n_new
    model.arguments["n_covariates"] = model.n_covariates

    def moved(columns: slice) -> slice:
        if columns.start < n_known:
            return slice(columns.start, columns.stop + n_new) if columns.stop >= n_known else columns
        return slice(columns.start + n_new, columns.stop + n_new)

    for part in (model.prior, model.library):
        held: Any = part
        if isinstance(getattr(held, "columns", None), slice):
            held.columns = held.arguments["columns"] = moved(held.columns)
    if model.decoder_columns is not None:
        places = model.decoder_columns.tolist()
        after = places.index(n_known - 1) + 1
        shifted = [place + n_new * (place >= n_known) for place in places]
        shifted[after:after] = range(n_known, n_known + n_new)
        model.decoder_columns = torch.tensor(shifted, device=model.decoder_columns.device)
        given = model.arguments.get("decoder_columns")
        if given is not None:
            model.arguments["decoder_columns"] = [moved(columns) for columns in given]


def _require_batch_in_decoder_alone(fit: Fit, cells: Cells) -> None:
    """Refuse a model in which anything but the decoder's weights depends on the batch.

    The decoder's weights on the batches are set to zero in a copy: what depends on the batch then, does so elsewhere.
    """
    n_known = fit.schema.n_batches
    model, guide = copied(fit.model, fit.guide)
    with torch.no_grad():
        for module, name, at in _places(model, n_known):
            getattr(module, name)[:, at : at + n_known] = 0.0
    blind = MadeFit(model.eval(), guide.eval(), fit.history, fit.schema, {})
    known = cells.with_batch(fit.schema.batches[0])
    if sites := dependence(blind, known, slice(0, n_known)).sites:
        raise ModelError(
            f"the batch acts on {list(sites)} of this model not only through the decoder, but also through a "
            "dispersion, a library size or a prior of each batch. These are unknown for new batches. Fit the "
            "reference without them, or fit reference and query together"
        )


def _require_same_law(fit: Fit, made: Fit, cells: Cells, n_new: int) -> None:
    """Refuse a program of one's own that finds other columns of gamma now: the law of known batches must stay."""
    few, n_known = cells.take(range(min(PROBED, cells.n_cells))), fit.schema.n_batches
    with undisturbed(0, fit.model, fit.guide, made.model, made.guide):
        x, gamma = next(iter(minibatches(fit, few, new_batches=True).in_order(PROBED)))
        gamma = gamma + torch.rand_like(gamma)  # so that every column has another value
        wide = torch.cat([gamma[:, :n_known], gamma.new_zeros(len(gamma), n_new), gamma[:, n_known:]], 1)
        sites = fit.guide.weights.medians() | fit.guide.coordinates.sites(fit.guide.start(x, gamma)[0][None])
        before, after = _log_p(fit, x, gamma, sites), _log_p(made, x, wide, sites)
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(before, after, strict=True)):
        raise ModelError(
            f"{type(fit.model).__name__} reads columns of gamma by their number, and new batches change the "
            "numbers. Let only the decoder, the prior or the library read gamma"
        )


def _log_p(fit: Fit, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    coordinates = fit.guide.coordinates
    return cell_terms(scored(fit.model, x, gamma, sites, coordinates), *coordinates.local)


@contextmanager
def _only(made: Fit, widened: list[_Widened]) -> Iterator[None]:
    """Nothing but the widened parameters takes a gradient; afterwards each parameter is as before."""
    own = {id(one.parameter) for one in widened}
    parameters = [*made.model.parameters(), *made.guide.parameters()]
    before = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(id(parameter) in own)
    try:
        yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            parameter.grad = None


def _train(
    made: Fit,
    data: Minibatches,
    widened: list[_Widened],
    epochs: int,
    batch_size: int,
    learning_rate: float,
    progress: bool,
) -> pd.DataFrame:
    """Adam on the bound of the query, in evaluation mode: statistics of normalisation stay those of the reference."""
    optimiser = torch.optim.Adam([one.parameter for one in widened], lr=learning_rate)
    rows: list[dict[str, float]] = []
    with progress_bar(epochs, "epoch", progress) as bar:
        for epoch in range(epochs):
            started, rate = time.perf_counter(), learning_rate * (1 - epoch / epochs)
            optimiser.param_groups[0]["lr"] = rate
            loss, kl = _epoch(made, data, widened, optimiser, batch_size)
            if not math.isfinite(loss):
                raise FitError(f"the loss became {loss} in epoch {epoch + 1}: take a smaller learning_rate")
            row = {"train_loss": loss, "held_out_loss": math.nan, "kl": kl, "learning_rate": rate, "kl_weight": 1.0}
            rows.append(row | {"seconds": time.perf_counter() - started})
            bar.update()
    return pd.DataFrame(rows, index=pd.RangeIndex(1, epochs + 1, name="epoch"))


def _epoch(
    made: Fit, data: Minibatches, widened: list[_Widened], optimiser: torch.optim.Optimizer, batch_size: int
) -> list[float]:
    """One pass through the query; returns loss and KL divergence in nats per cell."""
    kept, sums = [one.parameter.detach().clone() for one in widened], torch.zeros(2)
    for cells in data.shuffled(batch_size):
        log_weights, gaps = bound_terms(made.guide, *data.rows(cells))
        optimiser.zero_grad()
        (-log_weights.mean()).backward()
        for one in widened:
            one.leave_the_others()
        optimiser.step()
        sums += torch.stack([-log_weights.detach().sum(), gaps.detach().sum()]).cpu()
    for one, values in zip(widened, kept, strict=True):
        one.put_back_the_others(values)
    return (sums / data.n_cells).tolist()
