"""The population question: does the mean expression of two groups differ, and by how much."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd
from scipy.stats import false_discovery_control

from pyro_scvi.analysis.differential.cautions import Cautions
from pyro_scvi.analysis.differential.designs import Design, Donors, InsideBatches, Pooled
from pyro_scvi.analysis.differential.groups import Group
from pyro_scvi.analysis.differential.labels import batch_of, groups_of
from pyro_scvi.analysis.differential.moments import Moments, posterior_moments
from pyro_scvi.analysis.differential.weighted_means import Strata, strata_of
from pyro_scvi.analysis.differential.welch import scattered, sides, tested, welch
from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import DataError, FitError, ModelError
from pyro_scvi.inference.evaluation import NONFINITE, evaluating
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Sampler, require_sampler
from pyro_scvi.utils.checks import require_at_least, require_number, require_switches

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


@dataclass(frozen=True, kw_only=True)
class GroupMeans:
    r"""Compare the mean expression of two groups by a t test of weighted means per depth.

    .. math:: R_{ng} = x_{ng} / l_n, \qquad weight_{ng} \propto \frac{1}{m_g / l_n + V_g}, \qquad
        \hat m = \sum_n weight_n R_n, \qquad \hat v = \frac{n_{eff}}{n_{eff} - 1} \sum_n weight_n^2 (R_n - \hat m)^2

    .. math:: z = \frac{\hat m_a - \hat m_b}{\sqrt{\hat v_a + \hat v_b}}, \qquad
        lfc = \log_2 \frac{\hat m_a + \epsilon}{\hat m_b + \epsilon}, \qquad \epsilon = 10^{-4}

    l is the total count of a cell, or its size factor where that is known, as a multiple of the median over the cells
    compared: R is in counts of a median cell. m and V are mean and variance of w / l in the group by the model, from
    the exact Gamma conditional of w given x and z, with global latents at the guide's medians. The model lends weights
    only. Whatever the decoder says of a gene, its mean is that of its own counts, so that nothing leaks from other
    genes through z; and whatever the guide says of a cell's size. Each variance is not below that of counting molecules
    at the mean of both groups together, and the model's variance there counts as 30 cells where it is larger than the
    data's. p values are those of a t distribution (Welch 1947; Satterthwaite 1946), q values by Benjamini and Hochberg
    (1995).

    ``lfc_shrunk`` is the posterior mean of the fold change under a unimodal prior around 0 that is learned over the
    genes (Stephens 2017), ``lfsr`` the local false sign rate: the probability that its sign is wrong or that there is
    no change. Rank by size with these. ``lfc`` of a gene that one group hardly shows is large by chance.

    Parameters
    ----------
    replicates
        Column of ``cells.obs`` with replicates such as donors, or one value per cell. A group's mean is then that of
        its donors' means, and its error is that between donors. Cells of one donor are not independent of each other.
        Without replicates a call is a statement on these donors.
    within_batches
        Compare inside the batches that hold cells of both groups, and average these differences.
    min_detected
        A gene is tested if at least this share of the cells of a group has it above zero,
    min_molecules
        and if both groups together hold at least this many molecules of it.
    samples, sampler
        Draws of the latents of every cell, for m and V, as in ``sample_posterior``.

    Raises
    ------
    ModelError
        If a number is out of range, ``sampler`` is none, or both ``replicates`` and ``within_batches`` are given.

    Examples
    --------
    >>> means = ps.differential.GroupMeans(min_molecules=20)
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b", estimand=means)
    >>> table.columns[:4].tolist()
    ['lfc', 'lfc_se', 'lfc_low', 'lfc_high']
    """

    replicates: str | Sequence[Hashable] | np.ndarray | pd.Series | None = None
    within_batches: bool = False
    min_detected: float = 0.02
    min_molecules: float = 10
    samples: int = 2
    sampler: Sampler = Amortized()

    has_direction: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_switches(within_batches=self.within_batches)
        require_sampler(self.sampler)
        require_at_least(1, samples=self.samples)
        require_number(self.min_detected, "min_detected", below=1)
        require_number(self.min_molecules, "min_molecules")
        if self.replicates is not None and self.within_batches:
            raise ModelError(
                "replicates and within_batches exclude each other: replicates takes errors between donors, "
                "within_batches between the cells of a batch. Leave one of them out"
            )

    def comparison(self, fit: Fit, cells: Cells, part: np.ndarray, seed: int) -> ComparisonOfMeans:
        """What is shared by all comparisons of these cells: their depths and the model's moments."""
        batches, design = minibatches(fit, cells), self._design(cells)
        sampler = sampler_for(self.sampler, cells, fit.guide)
        with evaluating(fit.model, fit.guide, seed, theta=True):
            moments = posterior_moments(fit, batches, part, sampler, self.samples, seed)
            if not np.isfinite(moments.first).all():
                raise FitError(NONFINITE)
        return ComparisonOfMeans(self, cells, design, moments)

    def _design(self, cells: Cells) -> Design:
        if self.replicates is not None:
            donors = groups_of(cells, self.replicates, "replicates")
            if pd.isna(donors).any():
                raise DataError(
                    f"replicates has no value for {pd.isna(donors).sum()} of the {len(donors)} cells; leave these out"
                )
            return Donors(pd.factorize(donors)[0])
        if self.within_batches:
            return InsideBatches(batch_of(cells, "within_batches"))
        return Pooled()


class ComparisonOfMeans:
    """Comparisons of group means of one set of cells; the strata of a group are computed once."""

    def __init__(self, estimand: GroupMeans, cells: Cells, design: Design, moments: Moments) -> None:
        self.estimand, self.cells, self.design, self.moments = estimand, cells, design, moments
        self.cautions = Cautions(cells, moments.depth, design.pools_batches)
        self._strata: dict[Group, Strata] = {}

    def table(self, a: Group, b: Group) -> pd.DataFrame:
        """One row per gene, (genes, columns)."""
        self.design.require(a, b)
        self.cautions.note(a, b)
        of_a, of_b = sides(self.design, self._strata_of(a), self._strata_of(b))
        chosen = tested(of_a, of_b, self.estimand.min_detected, self.estimand.min_molecules)
        if min(len(a.rows), len(b.rows)) < 2:
            chosen = np.zeros_like(chosen)
        columns = welch(of_a, of_b, chosen)
        for name, side in (("a", of_a), ("b", of_b)):
            columns |= {f"mean_{name}": side.mean, f"detected_{name}": side.detected}
        return pd.DataFrame(columns | {"tested": chosen}, index=pd.Index(self.cells.gene_names, name="gene"))

    def least(self, tables: dict[Hashable, pd.DataFrame]) -> pd.DataFrame:
        """The comparison nearest to no difference, gene by gene; without a direction where the signs disagree."""
        names = list(tables)
        z = np.stack([table["z"].to_numpy() for table in tables.values()])
        known, place = np.isfinite(z), np.arange(z.shape[1])
        # A gene without counts in one of the other groups as in this one does not differ from that group.
        nearest = np.where(known, np.abs(z), 0).argmin(0)
        table = pd.concat(tables.values(), keys=range(len(names)))
        table = table.iloc[nearest * len(place) + place].droplevel(0)
        one_way = known.all(0) & ((z > 0).all(0) | (z < 0).all(0))
        any_tested = known.any(0)
        table["z"] = np.where(any_tested, np.where(one_way, table["z"], 0.0), np.nan)
        table["p_value"] = np.where(any_tested, np.where(one_way, table["p_value"], 1.0), np.nan)
        lfsr = np.stack([each["lfsr"].to_numpy() for each in tables.values()])
        table["lfsr"] = np.where(any_tested, np.where(one_way, lfsr.max(0), 1.0), np.nan)
        table["q_value"] = scattered(false_discovery_control(table["p_value"].to_numpy()[any_tested]), any_tested)
        table["tested"] = any_tested
        return table.assign(against=[names[i] for i in nearest])

    def warn(self) -> None:
        """Warn of confounded batches, single cells and unequal depths."""
        self.cautions.warn()

    def _strata_of(self, group: Group) -> Strata:
        if group not in self._strata:
            depth, moments = self.moments.depth, self.moments.of(group.rows)
            key = self.design.keys(group.rows)
            self._strata[group] = strata_of(self.cells.counts, group.rows, key, depth, *moments)
        return self._strata[group]
