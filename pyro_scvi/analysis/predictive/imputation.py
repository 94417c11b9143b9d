"""Imputation: expected expression where a count is zero, and which zeros are technical (Sec. 3.2)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.global_averages import at_draws, shares
from pyro_scvi.analysis.inputs import batches_in_streams, listed_batches, listed_quantiles, require_inputs
from pyro_scvi.analysis.new_batches import in_known_batches
from pyro_scvi.analysis.outputs import result_array
from pyro_scvi.analysis.posterior_samples import decoded
from pyro_scvi.analysis.predictive.rate_quantiles import AtDraws, rate_is_mean, rate_quantiles
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.evaluation import evaluating, theta_given, with_enumerated
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.importance import KHAT_LIMIT
from pyro_scvi.inference.samplers import Amortized, Draws, Importance, Refined, Sampler
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.priors.base import has_density
from pyro_scvi.types import Theta
from pyro_scvi.utils.checks import brief, require_at_least, warn

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

DRAWS, DRAWS_OF_QUANTILES, DRAWS_OF_MEANS = 25, 100, 400
"""Draws of the latents, by default; for quantiles; and where the quantiles of w are those of the draws."""
LIMITS = {"khat": KHAT_LIMIT, "rhat": 1.05}
NAMES = {"khat": "k-hat", "rhat": "R-hat"}

__all__ = ["expression", "impute", "mean_given_no_dropout", "technical_zero_probability"]


def __dir__() -> list[str]:
    return __all__


Quantity = Callable[[Likelihood, Tensor, Theta], Tensor]


def expression(likelihood: Likelihood, x: Tensor, theta: Theta) -> Tensor:
    r"""E[w | x, z], in counts: the expected rate given the observed count, for :func:`impute`.

    .. math:: E[w | x, z] = \rho \mu + (1 - \rho) \frac{r + x}{r / \mu + 1}

    rho is the probability that a zero is technical, 0 where x > 0. The result is mu where w = mu (Lopez et al. 2017,
    Sec. 3.2).

    Parameters
    ----------
    likelihood
        Of the model.
    x
        Counts (cells, genes).
    theta
        The likelihood's parameters at draws of the latents, (samples, cells, genes).

    Returns
    -------
    Tensor
        (samples, cells, genes), counts.

    Raises
    ------
    ModelError
        If the likelihood says nothing of w.

    Examples
    --------
    >>> mean = ps.impute(fit, test, quantity=ps.imputation.expression)  # the default
    >>> mean.shape, bool((mean > 0).all())
    ((12, 20), True)
    """
    return likelihood.expected_rate(x, theta)


def mean_given_no_dropout(likelihood: Likelihood, x: Tensor, theta: Theta) -> Tensor:
    r"""mu, in counts: the mean of y given z alone, as the paper's authors use it.

    For :func:`impute`.

    .. math:: E[y_{ng} | z_n] = \mu_{ng}

    Parameters
    ----------
    likelihood
        Of the model.
    x
        Counts (cells, genes).
    theta
        The likelihood's parameters at draws of the latents, (samples, cells, genes).

    Returns
    -------
    Tensor
        (samples, cells, genes), counts.

    Examples
    --------
    >>> by_donor = ps.Cells.from_anndata(adata, batch="donor")
    >>> made = ps.fit(ps.SCVI(20, 2, n_covariates=2), by_donor, epochs=1, progress=False)
    >>> ps.impute(made, by_donor, quantity=ps.imputation.mean_given_no_dropout, batches=["x", "y"]).shape
    (60, 20)
    """
    return theta["log_mean"].exp().expand(torch.broadcast_shapes(x.shape, theta["log_mean"].shape))


def impute(
    fit: Fit,
    cells: Cells,
    *,
    quantity: Quantity = expression,
    quantiles: Sequence[float] = (),
    batches: Sequence[str] = (),
    samples: int | None = None,
    global_draws: int | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    batch_size: int = 64,
    out: Any = None,
) -> np.ndarray:
    r"""Posterior mean of the expression of every gene in every cell, or its posterior quantiles.

    .. math:: \hat w_{ng} = E_{z, l | x_n} E[w_{ng} | x_n, z, l]

    ``quantity`` can replace the inner mean (Lopez et al. 2017, Sec. 3.2).

    Parameters
    ----------
    fit, cells
        The fit and any cells of its schema. For cells of a batch that it does not know, read with
        ``allow_new_batches=True``, the mean over each known batch as their own; quantiles are refused.
    quantity
        ``imputation.expression`` (default) or ``imputation.mean_given_no_dropout``; averaged over draws of z and l.
    quantiles
        Instead of the mean, these quantiles of w given x: those of its exact distribution given the latents, averaged
        over the draws of these.
    batches
        Batches to correct for: z is inferred in the cell's own batch, decoded in each of these, and the results are
        averaged. Counts in another batch were not observed, so ``quantity`` must then be ``mean_given_no_dropout``.
    samples
        Draws of the latents of every cell. None: 25, 100 for quantiles, and 400 for quantiles where w is the mean
        itself, as for Poisson counts: its distribution is then that of the draws alone.
    seed, batch_size
        As in ``sample_posterior``.
    global_draws
        None: global latents are at the guide's medians. A number: the samples are shared among so many of their draws.
    sampler
        As there. None: ``ps.Amortized()`` for means, ``ps.Refined()`` for quantiles, or ``ps.Importance()`` where w is
        the mean itself, because intervals from the guide itself are too narrow; it draws them where the prior has no
        density.
    out
        Array to write the result into, row by row; it is returned. A dataset of h5py or zarr, a NumPy array,
        memory-mapped or not, or a tensor, of the result's shape and float32 or float64. Memory then does not grow with
        the number of cells.

    Returns
    -------
    ndarray, or out
        (cells, genes), or (quantiles, cells, genes); counts.

    Raises
    ------
    ModelError
        If batches are given with another quantity or with quantiles, the likelihood does not define w, a number is out
        of range, an argument has the wrong type, a batch is named twice, or ``out`` has another shape or type.
    SchemaError
        If the cells' genes or covariates are not those of the fit, or there is no such batch.

    Warns
    -----
    UserWarning
        If the draws for quantiles do not follow the posterior of more than a tenth of the cells (k-hat above 0.7, or
        R-hat above 1.05); draws of ``ps.Amortized()`` are not checked.

    Examples
    --------
    >>> ps.impute(fit, test).shape
    (12, 20)
    >>> low, high = ps.impute(fit, test, quantiles=(0.05, 0.95), sampler=ps.Importance())
    >>> bool((low <= high).all())
    True
    """
    require_inputs(fit, cells)
    _check_quantity(quantity)
    quantiles, batches = listed_quantiles(quantiles), listed_batches(batches)
    refines = len(quantiles) and has_density(fit.model)  # under Flat there is no posterior to refine towards
    of_draws = bool(len(quantiles)) and rate_is_mean(fit.model)
    default = (Importance() if of_draws else Refined()) if refines else Amortized()
    at_medians = fit.guide if global_draws is None else None
    sampler = sampler_for(default if sampler is None else sampler, cells, at_medians)
    if samples is None:
        samples = DRAWS_OF_MEANS if of_draws else DRAWS_OF_QUANTILES if len(quantiles) else DRAWS
    require_at_least(1, samples=samples, batch_size=batch_size)
    if batches and (len(quantiles) or quantity is not mean_given_no_dropout):
        raise ModelError(
            "E[w | x] uses the counts of the cell, and nothing was observed in another batch: pass "
            "quantity=imputation.mean_given_no_dropout"
        )
    # Decoding in another batch only changes gamma; z stays as inferred in the cell's own batch (batch correction).
    swapped = [cells.with_batch(name).gamma for name in batches]
    lead = (len(quantiles),) if len(quantiles) else ()
    imputed, done = result_array(fit, (*lead, cells.n_cells, cells.n_genes), out), 0
    fits = at_draws(fit, global_draws, seed)
    parts = list(zip(fits, shares(samples, len(fits)), strict=True))
    judged = list[dict[str, Tensor]]()
    with evaluating(fit.model, fit.guide, seed, theta=True):
        for x, gamma in batches_in_streams(fit, cells, batch_size, seed, new_batches=not lead):
            rows, means = slice(done, done := done + len(x)), []
            for own in in_known_batches(fit.schema, gamma):
                drawn = [(one, _with_discrete(one, x, own, sampler.draw(one.guide, x, own, n))) for one, n in parts]
                if lead:
                    if not isinstance(sampler, Amortized):  # whose diagnosis costs more than the draws
                        judged += [draws.diagnose() for _, draws in drawn]
                    imputed[:, rows] = rate_quantiles(drawn, x, own, quantiles).cpu().numpy()
                else:
                    constants = [torch.from_numpy(other[rows]).to(gamma) for other in swapped] or [own]
                    means += [_mean(drawn, x, constant, quantity) for constant in constants]
            if means:
                imputed[rows] = torch.stack(means).mean(0).cpu().numpy()
    _warn_of(judged)
    return imputed if out is None else out


def technical_zero_probability(
    fit: Fit,
    cells: Cells,
    *,
    samples: int = 25,
    sampler: Sampler = Amortized(),
    seed: int = 0,
    batch_size: int = 64,
    out: Any = None,
) -> np.ndarray:
    r"""Posterior probability that a zero is technical: P(h = 1 | x), and 0 where x > 0.

    It is averaged over draws of z.

    .. math:: P(h = 1 | x = 0, z) = \frac{\pi}{\pi + (1 - \pi)\, p(y = 0 | z)}

    (Lopez et al. 2017, Sec. 3.2).

    Parameters
    ----------
    fit, cells
        The fit and any cells of its schema.
    samples, sampler, seed, batch_size, out
        As in :func:`impute`.

    Returns
    -------
    ndarray (cells, genes), or ``out``, as in :func:`impute`

    Raises
    ------
    ModelError
        If the likelihood has no technical zeros, a number is below 1, an argument has the wrong type, or ``out`` has
        another shape or type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> technical = ps.technical_zero_probability(fit, test)
    >>> technical.shape, bool((technical[test.counts > 0] == 0).all())
    ((12, 20), True)
    """
    require_inputs(fit, cells)
    sampler = sampler_for(sampler, cells, fit.guide)
    require_at_least(1, samples=samples, batch_size=batch_size)
    fit.model.likelihood.require_explicit()
    probability, done = result_array(fit, (cells.n_cells, cells.n_genes), out), 0
    with evaluating(fit.model, fit.guide, seed, theta=True):
        for x, gamma in batches_in_streams(fit, cells, batch_size, seed):
            rows = slice(done, done := done + len(x))
            logits = fit.model.likelihood.technical_zero_logits(
                **decoded(fit, x, gamma, sampler.draw(fit.guide, x, gamma, samples))
            )
            if logits is None:
                raise ModelError(f"under {fit.model.likelihood!r} no zero is technical; take ZINB or ZIP")
            # A count above zero was not lost, so its probability is 0.
            probability[rows] = (torch.sigmoid(logits).mean(0) * (x == 0)).cpu().numpy()
    return probability if out is None else out


def _check_quantity(quantity: Any) -> None:
    if not callable(quantity):
        raise ModelError(
            f"quantity must be imputation.expression or another function of its kind, got {brief(quantity)}"
        )


def _warn_of(judged: list[dict[str, Tensor]]) -> None:
    """Warn of quantiles whose draws do not follow the posterior, by the sampler's diagnostics of batches of cells."""
    for name, limit in LIMITS.items():
        values = [part[name] for part in judged if name in part]
        bad = ~(torch.cat(values) <= limit) if values else torch.zeros(1)
        if bad.double().mean() > 0.1:
            warn(
                f"{NAMES[name]} is above {limit} for {int(bad.sum())} of {len(bad)} cells: their draws do not follow "
                "the posterior, so quantiles may be too close together. In Python, take ps.Importance() or ps.HMC()"
            )


def _with_discrete(fit: Fit, x: Tensor, gamma: Tensor, draws: Draws) -> Draws:
    """The draws with discrete latents beside them: given x in the cell's own batch, whatever it is decoded in."""
    return draws._replace(sites=with_enumerated(fit.guide, x, gamma, draws.sites))


def _mean(drawn: AtDraws, x: Tensor, gamma: Tensor, quantity: Quantity) -> Tensor:
    values = [quantity(fit.model.likelihood, x, theta_given(fit.guide, x, gamma, draws.sites)) for fit, draws in drawn]
    return (values[0] if len(values) == 1 else torch.cat(values)).mean(0)
