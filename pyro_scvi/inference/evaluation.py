"""Evaluation of a model and guide: evaluation mode, and bound terms of draws from the guide."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_scvi.distributions.supports import share_at_bounds, spread_of_scales, unwrapped
from pyro_scvi.errors import FitError, PyroScviError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.log_joint import EnumeratedValues, cell_terms, enumerated_values, scored
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.program_runs import Observed, masked_entries, observed_at, prior_draws
from pyro_scvi.guides.supported import require_theta, theta_of
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import evaluation_mode
from pyro_scvi.types import Distribution, Theta
from pyro_scvi.utils.allocator import keep_freed_memory
from pyro_scvi.utils.cell_streams import per_cell
from pyro_scvi.utils.checks import warn
from pyro_scvi.utils.random_state import seeded

LOST_AT_BOUNDS = 0.01
"""Share of a latent's mass that may lie next to a bound without a warning."""

CELLS_FOR_SCALES, WIDE_SCALES = 256, 1.4
"""Cells whose scales of latents are compared, and the standard deviation of their logarithms that is told.

A half-Cauchy scale has 1.6, and the evidence of a cell without counts is then off by .2 nats; at 1 it is right.
"""

USUAL = 64
"""Cells of a batch, unless the caller says otherwise."""

NONFINITE = (
    "this fit gives values that are NaN or infinite for some of these cells, by its weights or by counts far beyond "
    "those of its training. Do not use their results; leave out such cells, fit again with a smaller learning rate, "
    "or load another save"
)


class _Watch:
    """The sum of everything computed: NaN or infinite if a part of it is. One number, which stays on its device."""

    def __init__(self) -> None:
        self.total: Tensor | None = None

    def add(self, values: Tensor) -> None:
        of_values = values.detach().sum()
        self.total = of_values if self.total is None else self.total + of_values.to(self.total)

    @property
    def lost(self) -> bool:
        return self.total is not None and not bool(self.total < torch.inf)  # log 0 may be meant


_watch: ContextVar[_Watch | None] = ContextVar("pyro_scvi_watch", default=None)


def watched(values: Tensor) -> Tensor:
    """The values themselves; a verb that computes them says at its end whether some were NaN or infinite."""
    watch = _watch.get()
    if watch is not None:
        watch.add(values)
    return values


@contextmanager
def _nonfinite_told() -> Iterator[None]:
    """Warn after the block of values that were NaN or infinite; an error that they led to says so."""
    before, watch = _watch.get(), _Watch()
    _watch.set(watch)
    try:
        yield
    except Exception as error:
        if watch.lost and not isinstance(error, PyroScviError):
            raise FitError(NONFINITE) from error
        raise
    finally:
        _watch.set(before)
    if watch.lost:
        warn(NONFINITE)


@contextmanager
def evaluating(model: SCVI, guide: Guide, seed: int, *, theta: bool = False) -> Iterator[None]:
    """What every verb enters: a check of the program's sites, then :func:`undisturbed`.

    ``theta`` says that the likelihood's parameters will be asked for at draws of the latents.

    Raises
    ------
    ModelError
        Naming a site, if the program has one that densities and draws would not do right by.

    Warns
    -----
    UserWarning
        If the law of a latent has more than a hundredth of its mass where numbers cannot tell it from a bound, if its
        scale is drawn for each cell over orders of magnitude, or after the block, if what was :func:`watched` was NaN
        or infinite.
    """
    guide.require_supported()
    _warn_of_bounds(guide)
    _warn_of_drawn_scales(guide)
    if theta:
        require_theta(model)
    with undisturbed(seed, model, guide), _nonfinite_told():
        yield


def _warn_of_bounds(guide: Guide) -> None:
    """Warn of latents with mass next to a bound, which coordinates in R^n do not reach, and k-hat does not see."""
    known = guide.coordinates
    bounded = {name for name, site in known.local.items() if not site.real and site is not known.library}
    if not bounded:
        return
    with seeded(0):
        shares = {
            site.name: share_at_bounds(site.law, 1000) for site in guide.model.discovered() if site.name in bounded
        }
    for name, share in shares.items():
        if share > LOST_AT_BOUNDS:
            warn(
                f"{share:.0%} of the distribution of {name!r} lies so near to a bound that numbers of this precision "
                "cannot represent it. Results leave it out, so evidence is too low, and k-hat and errors do not show "
                "it. Fit with dtype=torch.float64, or take a distribution with less mass there, such as a Beta or "
                "Dirichlet with concentrations of 0.5 or more"
            )


def _warn_of_drawn_scales(guide: Guide) -> None:
    """Warn of latents whose scale is drawn for each cell over orders of magnitude: no proposal fits all of these."""
    known = guide.coordinates
    if len(known.local) < 2 or is_packaged(guide.model):
        return
    with seeded(0):
        laws = {site.name: unwrapped(site.law) for site in guide.model.discovered(few=CELLS_FOR_SCALES)}
    for name in known.local:
        spread = spread_of_scales(laws[name]) if name in laws else 0.0
        if spread > WIDE_SCALES:
            warn(
                f"the scale of {name!r} is drawn for each cell, over orders of magnitude. In cells with few counts the "
                "evidence can be too low by half a nat and draws too narrow, and neither k-hat nor the errors show it. "
                f"Draw it with scale 1 and multiply, as in {name} = scale * pyro.sample({name!r}, dist.Normal(0.0, "
                "1.0)), which is the same model"
            )


@contextmanager
def undisturbed(seed: int, *programs: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, with a separate seed and parameter store; all is restored afterwards."""
    keep_freed_memory()
    with (
        evaluation_mode(*programs),
        seeded(seed),
        pyro.get_param_store().scope(),
        pyro.validation_enabled(False),
        torch.inference_mode(False),  # a caller's own would forbid the gradients that refinement and HMC take
        torch.no_grad(),
    ):
        yield


def theta_given(
    guide: Guide, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor], *, scores_x: bool = True
) -> Theta:
    """The likelihood's parameters (..., cells, genes) at draws of all local latents, global ones at their medians.

    ``scores_x`` says that what is computed with them conditions on all counts.

    Raises
    ------
    ModelError
        If the program does not say what its theta is, or with ``scores_x``, if it leaves counts out of its density.
    """
    observed, draws = observed_given(guide, x, gamma, sites, scores_x=scores_x), _draws_of(guide, sites)
    theta = theta_of(guide.model, observed.told)
    for value in theta.values():
        watched(value)
    if draws and max(value.dim() for value in theta.values()) < 3:  # no latent of the cells is in it
        return {name: value.expand(draws, *value.shape) if value.dim() == 2 else value for name, value in theta.items()}
    return theta


def law_given(
    guide: Guide, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor], *, scores_x: bool = True
) -> Distribution:
    """The distribution of x (..., cells, genes) at draws of all local latents, global ones at their medians.

    ``scores_x`` says that counts are scored by it.

    Raises
    ------
    ModelError
        With ``scores_x``, if the program leaves counts out of its density.
    """
    observed = observed_given(guide, x, gamma, sites, scores_x=scores_x)
    for value in observed.told.get("theta", {}).values():
        watched(value)
    law: Any = observed.law
    draws = _draws_of(guide, sites)
    return law.expand((draws, *law.batch_shape)) if draws and len(law.batch_shape) < 3 else law


def observed_given(
    guide: Guide, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor], *, scores_x: bool
) -> Observed:
    """What x is observed from at draws of all local latents, global ones at their medians; as :func:`law_given`."""
    observed = observed_at(guide.model, x, gamma, {**guide.weights.medians(), **sites})
    if scores_x and not observed.kept.all():
        raise masked_entries(guide.model)
    return observed


def _draws_of(guide: Guide, sites: dict[str, Tensor]) -> int:
    """The number of draws in the latents of the cells; 0 for one value of each, without a dimension of draws."""
    for name, site in guide.coordinates.local.items():
        if name in sites and sites[name].dim() - len(site.event_shape) > 2:
            return len(sites[name])
    return 0


def sampled_counts(guide: Guide, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor]) -> Tensor:
    """One draw of counts (samples, cells, genes) at every draw (samples, cells, ...) of all latents of cells."""
    samples, shape = len(next(iter(sites.values()))), (len(gamma), guide.model.n_genes)
    # Some draws at a time: samples x cells x genes would not fit the cache. How many must not depend on the cells.
    drawn, size = list[Tensor](), draws_at_once(gamma.new_empty(USUAL, guide.model.n_genes))
    for start in range(0, samples, size):
        part = {name: value[start : start + size] for name, value in sites.items()}
        law: Any = law_given(guide, x, gamma, part, scores_x=False)
        with per_cell():
            drawn.append(law.expand((min(size, samples - start), *shape)).sample().to(gamma))
    return torch.cat(drawn)


def with_enumerated(guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> dict[str, Tensor]:
    """Draws (samples, cells, 1) and, beside them, draws of the discrete latents from their conditional given these.

    Where ``sites`` have them already, they stay as they are.
    """
    if all(name in sites for name in guide.coordinates.enumerated):
        return sites
    with per_cell():
        return sites | _enumerated(guide, x, gamma, sites, with_x=True).drawn()


def _enumerated(guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor], *, with_x: bool) -> EnumeratedValues:
    fixed, known = guide.weights.medians(), guide.coordinates
    return enumerated_values(guide.model, x, gamma, fixed, sites, known, draws_at_once(x), with_x=with_x)


def entries_given_others(guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    r"""Log p(x_ng | latents, the cell's other counts), and whether a count drawn from it is smaller than x_ng.

    Each (samples, cells, genes). Discrete latents are summed out, and the second is then the probability of it, for one
    count drawn at each value:

    .. math:: \log p(x_{ng} | z_n, x_{n,-g}) = \log \sum_c p(z_n, c)\, p(x_n | z_n, c)
        - \log \sum_c p(z_n, c)\, p(x_{n,-g} | z_n, c)
    """
    known = guide.coordinates
    if not known.enumerated:
        return _scored_entries(guide, x, gamma, sites)
    local = {name: sites[name] for name in known.local}
    whole, others, smaller = [], [], []
    for values, log_latents in _enumerated(guide, x, gamma, local, with_x=False).each():
        log_p, below = _scored_entries(guide, x, gamma, local | values)
        whole.append(log_latents + log_p.sum(-1))
        others.append(log_latents[..., None] + _sum_of_others(log_p))
        smaller.append(below)
    without = torch.stack(others)
    log_p = torch.stack(whole).logsumexp(0)[..., None] - without.logsumexp(0)
    return log_p, (without.softmax(0) * torch.stack(smaller)).sum(0)


def _scored_entries(guide: Guide, x: Tensor, gamma: Tensor, sites: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log p of the counts at draws of all latents, and whether one replica for each draw is smaller."""
    law: Any = law_given(guide, x, gamma, sites)
    log_p: Tensor = law.log_prob(x)
    with per_cell():
        return log_p, law.expand(log_p.shape).sample() < x


def _sum_of_others(log_p: Tensor) -> Tensor:
    """For each gene the sum over the other genes of log p (..., genes), of which some may be -inf."""
    impossible = log_p == -torch.inf
    finite = log_p.masked_fill(impossible, 0.0)
    left = impossible.sum(-1, keepdim=True) - impossible.int()
    return (finite.sum(-1, keepdim=True) - finite).masked_fill(left > 0, -torch.inf)


def drawn_from_prior(guide: Guide, gamma: Tensor, n: int, *, enumerated: bool = False) -> dict[str, Tensor]:
    """Draws (n, cells, 1) of the latents of cells from their prior, global latents at their medians.

    ``enumerated`` says whether discrete latents are among them. Raises NotImplementedError for an improper prior.
    """
    local, discrete = list(guide.coordinates.local), list(guide.coordinates.enumerated)
    with per_cell():
        drawn = prior_draws(guide.model, gamma, guide.weights.medians(), n, [*local, *discrete])
    return {name: drawn[name] for name in (*local, *(discrete if enumerated else ()))}


def bound_terms(guide: Guide, x: Tensor, gamma: Tensor, samples: int = 1) -> tuple[Tensor, Tensor]:
    """Log weights log p(x, latents) - log q(latents | x) of draws from the guide, and the part log q - log p of these.

    Each (samples, cells), nats; the mean of the first is the ELBO, of the second the KL divergence.
    """
    with per_cell():
        sites, log_q = guide.draw(x, gamma, samples)
    return weigh(guide, x, gamma, sites, log_q)


def weigh(
    guide: Guide,
    x: Tensor,
    gamma: Tensor,
    sites: dict[str, Tensor],
    log_q: Tensor,
    global_latents: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Log p(x, latents) - log q of given draws (samples, cells, ...), and the part log q - log p of the latents.

    ``global_latents`` are their values; None: their medians.
    """
    fixed = guide.weights.medians() if global_latents is None else global_latents
    size, terms = draws_at_once(x), []
    for start in range(0, len(log_q), size):
        part = {name: value[start : start + size] for name, value in sites.items()}
        trace = scored(guide.model, x, gamma, {**fixed, **part}, guide.coordinates)
        terms.append(torch.stack(cell_terms(trace, *sites)))
    of_latents, of_x = torch.cat(terms, 1)
    return of_x + of_latents - log_q, log_q - of_latents


def draws_at_once(x: Tensor, megabytes: int = 5) -> int:
    """Number of draws for which a tensor (draws, cells, genes) has a few megabytes, and so stays in the cache."""
    return max(1, megabytes * 2**20 // (x.numel() * x.element_size()))
