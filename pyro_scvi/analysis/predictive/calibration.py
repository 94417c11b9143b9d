"""Simulation-based calibration of samplers, on simulated cells whose latents are known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import minibatches, require_fit
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.names import rows_by_name
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.inference.evaluation import drawn_from_prior, evaluating, law_given, with_enumerated
from pyro_scvi.inference.samplers import HMC, Refined, Sampler, require_sampler
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.cell_streams import alone, cell_streams, narrowed
from pyro_scvi.utils.checks import brief, require_at_least, switches_checked
from pyro_scvi.utils.html_repr import table
from pyro_scvi.utils.progress_bars import progress_bar

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

__all__ = ["AggregatePosterior", "Prior", "calibrate"]


def __dir__() -> list[str]:
    return __all__


Sites = dict[str, Tensor]
LEVELS = (0.5, 0.9)


class Source(Protocol):
    """Distribution that the latents of simulated cells are drawn from."""

    def draw(self, fit: Fit, n_cells: int) -> tuple[Sites, Tensor]:
        """Sites z (cells, 1, latents) and l (cells, 1), and covariates (cells, covariates)."""
        ...


@dataclass(frozen=True)
class Prior:
    r"""z and l from their prior: a correct sampler then has uniform ranks.

    Covariates are from random rows of ``cells``.

    .. math:: z^* \sim p(z), \qquad l^* \sim p(l)

    Parameters
    ----------
    cells
        Cells of the fit's schema, which a model with covariates needs.

    Raises
    ------
    ModelError
        When it draws, if the model has covariates and there are no ``cells``.
    SchemaError
        When it draws, if the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> options = {"sampler": ps.Amortized(), "draws": 19, "thin": 1, "progress": False}
    >>> made = ps.calibrate(fit, 4, source=ps.calibration.Prior(), **options)
    >>> len(made.ranks)
    4
    """

    cells: Cells | None = None

    def draw(self, fit: Fit, n_cells: int) -> tuple[Sites, Tensor]:
        """One draw for each of ``n_cells`` rows of covariates."""
        if self.cells is not None:
            _, gamma = minibatches(fit, self.cells).rows(_random_rows(self.cells, n_cells, fit.device))
        elif fit.model.n_covariates:
            raise ModelError(
                f"the model has {fit.model.n_covariates} covariates: pass source=calibration.Prior(cells) to take them "
                "from cells"
            )
        else:
            gamma = torch.zeros(n_cells, 0, device=fit.device, dtype=fit.dtype)
        sites = drawn_from_prior(fit.guide, gamma, 1, enumerated=True)
        return {name: value[0] for name, value in sites.items()}, gamma


@dataclass(frozen=True)
class AggregatePosterior:
    r"""z and l from the posterior of random ``cells``, that is, where real cells lie.

    .. math:: z^*, l^* \sim \frac1N \sum_n p(z, l | x_n)

    Ranks are then uniform only as far as the aggregate posterior equals the prior. They show how well the sampler works
    on cells like these.

    Parameters
    ----------
    cells
        Cells of the fit's schema.
    sampler
        What draws from their posterior, as in ``sample_posterior``.

    Raises
    ------
    SchemaError
        When it draws, if the cells' genes or covariates are not those of the fit.
    ModelError
        When it draws, what the sampler refuses.

    Examples
    --------
    >>> source = ps.calibration.AggregatePosterior(train, sampler=ps.Amortized())
    >>> options = {"sampler": ps.Amortized(), "draws": 19, "thin": 1, "progress": False}
    >>> made = ps.calibrate(fit, 4, source=source, **options)
    >>> len(made.ranks)
    4
    """

    cells: Cells
    _: KW_ONLY
    sampler: Sampler = Refined()

    def draw(self, fit: Fit, n_cells: int) -> tuple[Sites, Tensor]:
        """One draw for each of ``n_cells`` random rows of the cells."""
        batches, rows = minibatches(fit, self.cells), _random_rows(self.cells, n_cells, fit.device)
        drawn, covariates = list[Sites](), list[Tensor]()
        for part in torch.arange(n_cells, device=rows.device).split(64):
            x, gamma = batches.rows(rows[part])
            with narrowed(part):
                draws = self.sampler.draw(fit.guide, x, gamma, 4)  # chains cannot be shorter
                sites = with_enumerated(fit.guide, x, gamma, draws.sites)
            drawn.append({name: value[-1] for name, value in sites.items()})
            covariates.append(gamma)
        return {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}, torch.cat(covariates)


class Calibration(NamedTuple):
    """Ranks of the true latents among posterior draws, with a summary.

    ``ranks`` (simulated cells x quantities) counts the draws below the true value, 0 to ``draws``. ``summary`` has one
    row per quantity, see :func:`calibrate`.
    """

    ranks: pd.DataFrame
    summary: pd.DataFrame
    draws: int

    def __repr__(self) -> str:
        return "Calibration\n" + "\n".join(f"  {name}: {fact}" for name, fact in self._facts().items())

    def _repr_html_(self) -> str:
        return table("Calibration", self._facts(), self.summary.to_html(float_format="{:.3f}".format))

    def _facts(self) -> dict[str, str]:
        n, p = len(self.ranks), self.summary.rank_p
        facts = {f"{self.ranks.index.name}s": f"{n}, each truth ranked among {self.draws} draws"}
        if p.notna().any():
            facts["uniform ranks"] = f"smallest p {p.min():.2g}, {p.idxmin()}, of {len(p)} quantities"
        for level in LEVELS:
            shares, ses = (self.summary[f"{what}_{level:.0%}".rstrip("%")] for what in ("coverage", "se"))
            facts[f"{level:.0%} intervals"] = (
                f"hold {shares.min():.0%} to {shares.max():.0%} of the truths (se {ses.iloc[0]:.1%})"
            )
        return facts


@switches_checked
def calibrate(
    fit: Fit,
    n_cells: int = 200,
    *,
    source: Source = Prior(),
    sampler: Sampler = HMC(),
    draws: int = 99,
    thin: int = 10,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> Calibration:
    r"""Simulate cells from the fitted model and test whether the sampler recovers their latents.

    .. math:: z^*, l^* \sim source, \quad x \sim p(x | z^*, l^*), \quad z^1, \ldots, z^L \sim sampler(x), \quad
        rank = \#\{z^s < z^*\}

    If latents come from the prior and draws from the posterior, ranks are uniform on 0 to L for every quantity (Talts,
    Betancourt, Simpson, Vehtari and Gelman 2018). The quantities are every continuous latent of a cell, and the log
    likelihood of x, which reveals errors that no single latent shows (Modrak et al. 2023). Numbers of an array that are
    the same in all its values, as the upper triangle of a Cholesky factor, are left out. Global latents are held at
    the guide's medians; :func:`pyro_scvi.calibrate_globals` ranks them. With an observed library size, the total that
    the simulation drew is not the total of x, so even a correct sampler's ranks are not uniform.

    Parameters
    ----------
    fit
        The fit whose model simulates.
    n_cells
        Simulated cells.
    source
        ``calibration.Prior()`` or ``calibration.AggregatePosterior(cells)``.
    sampler
        As in ``sample_posterior``.
    draws, thin
        L, and the number of draws made for each draw kept: ranks need nearly independent draws. L + 1 must be a
        multiple of 20.
    seed, batch_size
        As in ``sample_posterior``.
    progress
        Whether to show how many cells are done.

    Returns
    -------
    Calibration
        ``summary`` by quantity: ``rank_p``, the p-value of a chi-square test that ranks are uniform (NaN below 20
        cells), ``coverage_50`` and ``coverage_90``, the shares of cells whose truth lies in the central interval,
        with the standard errors ``se_50`` and ``se_90`` they have under calibration.

    Raises
    ------
    ModelError
        If the prior has no density, covariates are missing, L + 1 is no multiple of 20, a number is below 1, two
        quantities would have one name, or an argument has the wrong type.
    SchemaError
        If the genes or covariates of the source's cells are not those of the fit.

    Examples
    --------
    >>> result = ps.calibrate(fit, 20, sampler=ps.Refined(steps=20), draws=19, thin=1, progress=False)
    >>> result.summary.index.tolist()
    ['z_0', 'z_1', 'l', 'log_likelihood']
    >>> result.summary.columns.tolist()
    ['rank_p', 'coverage_50', 'se_50', 'coverage_90', 'se_90']
    """
    require_fit(fit)
    require_sampler(sampler)
    require_proper(fit.model, "nothing can be drawn from it")
    require_at_least(1, n_cells=n_cells, thin=thin, batch_size=batch_size)
    require_ranks(draws)
    if isinstance(source, type) or not hasattr(source, "draw"):
        raise ModelError(
            f"source must be calibration.Prior() or calibration.AggregatePosterior(cells), got {brief(source)}"
        )
    parts, quantities = [], _quantities(fit)
    streams = cell_streams(seed, map(str, range(n_cells)))  # truth and draws go on in one stream for each cell
    with evaluating(fit.model, fit.guide, seed), progress_bar(n_cells, "cell", progress) as bar, streams:
        truth, gamma = source.draw(fit, n_cells)
        for part in _ranks(fit, truth, gamma, sampler, draws, thin, batch_size):
            parts.append(part)
            bar.update(len(part))
    ranks = pd.DataFrame(np.concatenate(parts), columns=quantities)
    ranks.index.name = "simulated cell"
    return Calibration(ranks, summary_of(ranks, draws), draws)


def require_ranks(draws: int) -> None:
    """Refuse a number of draws whose ranks do not fall into 20 bins of one size.

    Raises
    ------
    ModelError
        If draws + 1 is no multiple of 20.
    """
    require_at_least(1, draws=draws)
    if (draws + 1) % 20:
        raise ModelError(f"draws + 1 must be a multiple of 20 (draws of 19, 39, 99 ...), got draws={draws}")


def _ranks(
    fit: Fit, truth: Sites, gamma: Tensor, sampler: Sampler, draws: int, thin: int, batch_size: int
) -> Iterator[np.ndarray]:
    for start in range(0, len(gamma), batch_size):
        rows = torch.arange(start, min(start + batch_size, len(gamma)), device=gamma.device)
        true, constants = {name: value[rows] for name, value in truth.items()}, gamma[rows]
        x = torch.cat([_simulated(fit, truth, gamma, one) for one in range(start, start + len(rows))])
        with narrowed(rows):
            posterior = sampler.draw(fit.guide, x, constants, draws * thin)
            kept = {name: _thinned(value, posterior.chains, draws) for name, value in posterior.sites.items()}
            kept = with_enumerated(fit.guide, x, constants, kept)
        distribution = _distribution_of_x(fit, x, constants)
        below = _values(fit, kept, distribution, x) < _values(fit, true, distribution, x)
        yield below.sum(0).cpu().numpy()


def _simulated(fit: Fit, truth: Sites, gamma: Tensor, one: int) -> Tensor:
    """Counts (1, genes) of one cell."""
    rows = slice(one, one + 1)
    own = {name: value[rows] for name, value in truth.items()}
    with alone(one):
        return _distribution_of_x(fit, None, gamma[rows])(own).sample().to(gamma)


def _thinned(value: Tensor, chains: int, draws: int) -> Tensor:
    """``draws`` of the draws (samples, ...), evenly spaced within each chain."""
    length = len(value) // chains
    by_chain = value[: length * chains].unflatten(0, (length, chains))
    kept = torch.linspace(0, length - 1, -(-draws // chains)).round().long()
    return by_chain[kept.to(value.device)].flatten(0, 1)[:draws]


def _distribution_of_x(
    fit: Fit, x: Tensor | None, gamma: Tensor
) -> Callable[[Sites], torch.distributions.Distribution]:
    """The distribution of x at latents; ``x`` for an observed library size."""

    def distribution(sites: Sites) -> torch.distributions.Distribution:
        law: Any = law_given(fit.guide, x, gamma, sites)
        return law

    return distribution


def _values(
    fit: Fit, sites: Sites, distribution: Callable[[Sites], torch.distributions.Distribution], x: Tensor
) -> Tensor:
    """Every quantity that is ranked, (..., cells, quantities)."""
    known = fit.guide.coordinates.local.values()
    latents = [sites[site.name].reshape(*sites[site.name].shape[: _lead(site)], -1) for site in known]
    ranked = [value[..., site.varying.to(value.device)] for site, value in zip(known, latents, strict=True)]
    return torch.cat([*ranked, distribution(sites).log_prob(x).sum(-1, keepdim=True)], -1)


def _lead(site: LocalSite) -> int | None:
    """Where the dimension of a site's values behind those of the cells, (cells, 1) and an event, begins."""
    return -1 - len(site.event_shape)


def _quantities(fit: Fit) -> list[str]:
    names = []
    for site in fit.guide.coordinates.local.values():
        places = site.varying.nonzero().flatten().tolist()
        names += [f"{site.name}_{i}" for i in places] if site.event_shape else [site.name]
    return require_distinct([*names, "log_likelihood"])


def require_distinct(quantities: list[str]) -> list[str]:
    """Names of quantities, if each has one of its own.

    Raises
    ------
    ModelError
        Naming the first that two have.
    """
    twice = [name for i, name in enumerate(quantities) if name in quantities[:i]]
    if twice:
        raise ModelError(
            f"two quantities of the table would be called {twice[0]!r}: a site has the name of an element of another "
            "site, or of the log likelihood. Rename the site"
        )
    return quantities


def summary_of(ranks: pd.DataFrame, draws: int) -> pd.DataFrame:
    """One row for each quantity, a column of ``ranks``: see :func:`rank_summary`."""
    rows = {name: rank_summary(values.to_numpy(), draws) for name, values in ranks.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("quantity")


def rank_summary(ranks: np.ndarray, draws: int) -> dict[str, float]:
    """How uniform the ranks (cells,) of one quantity among so many draws are, and how often intervals cover it."""
    from scipy.stats import chisquare  # 45 MB, which no training needs

    bins = max(size for size in (1, 2, 4, 5, 10, 20) if size <= max(1, len(ranks) // 10))  # 10 cells or more in each
    counts = np.bincount(ranks * bins // (draws + 1), minlength=bins)
    row = {"rank_p": float(chisquare(counts).pvalue) if bins > 1 else np.nan}
    for level in LEVELS:
        low = round((draws + 1) * (1 - level) / 2)
        inside = (ranks >= low) & (ranks < draws + 1 - low)
        row[f"coverage_{level:.0%}".rstrip("%")] = float(inside.mean())
        row[f"se_{level:.0%}".rstrip("%")] = float(np.sqrt(level * (1 - level) / len(ranks)))
    return row


def _random_rows(cells: Cells, n: int, device: torch.device) -> Tensor:
    """Rows of random cells, the same cells in whatever order they come: the random numbers count them by name."""
    by_name = torch.from_numpy(rows_by_name(cells.cell_names))
    return by_name[torch.randint(cells.n_cells, (n,))].to(device)
