"""The paper's question: of two random cells, one from each group, which has more (Lopez et al. 2017, Sec. 4)."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pandas as pd

from pyro_scvi.analysis.differential.all_pairs import AllPairs
from pyro_scvi.analysis.differential.contrasts import DepthCorrected, Uncorrected
from pyro_scvi.analysis.differential.groups import Group
from pyro_scvi.analysis.differential.matched_pairs import Groups, MatchedPairs
from pyro_scvi.analysis.differential.summary import raw_counts, summary
from pyro_scvi.analysis.global_averages import at_draws
from pyro_scvi.analysis.inputs import minibatches
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.covariates import Covariates
from pyro_scvi.data.minibatches import Minibatches
from pyro_scvi.data.names import rows_by_name
from pyro_scvi.errors import ModelError
from pyro_scvi.inference.evaluation import evaluating
from pyro_scvi.inference.given import sampler_for
from pyro_scvi.inference.samplers import Amortized, Sampler, require_sampler
from pyro_scvi.utils.checks import require_at_least, require_number, require_switches

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


@dataclass(frozen=True, kw_only=True)
class RandomPairs:
    r"""Compare pairs of random cells, one from each group, over draws of their latents.

    See Lopez et al. (2017), Sec. 4.

    .. math:: P(w_a < w_b | z_a, z_b) = I_{b_a / (b_a + b_b)}(r_a, r_b), \qquad b = r / \mu

    This regularised incomplete beta function is averaged over pairs. The integral over w is exact, so only z and l are
    sampled. By default w is divided by the cell's depth. Without that, a group with several times more molecules per
    cell, such as dendritic cells, has nearly every gene higher.

    Over the same pairs, lfc is the log2 fold change of the mean of w, a over b:

    .. math:: p_{lfc} = \max(P(lfc > \delta), P(lfc < -\delta))

    ``expected_false_share`` is the running mean of 1 - p_lfc, from the largest p_lfc down: among the genes ranked this
    high, the expected share for which this statement is false: *of two random cells, one from each group, that of the
    group called has more than 2^delta times the mean of the other*. It is a share over pairs by the model, and no false
    discovery rate of the data: z carries the differences of other genes into a gene that does not differ. Where the
    truth was known, a share of .05 came with .04 to .09 false calls. To call genes take :class:`GroupMeans`.

    Between equal groups p_lfc is at most 1/2, up to Monte Carlo error, however much their cells vary. A gene that
    differs on average, but by less than it varies within a group, is not called, and few genes are where a group is a
    mixture, as "the rest" is.

    Parameters
    ----------
    contrast
        :class:`DepthCorrected` or :class:`Uncorrected`.
    delta
        Fold changes beyond this, in log2 units, count as changes for ``p_lfc``; 0: any.
    within_batch
        Pair cells of the same batch only.
    largest_se
        Pairs are added until the standard error of every gene's ``p_a_lt_b`` is at most this; 0: until ``most_pairs``.
    most_pairs
        The largest number of pairs, whatever the standard errors.
    pairing
        ``AllPairs(samples=...)`` takes this many draws of each group and uses all their pairs. It replaces the three
        arguments above and needs one dispersion per gene.
    global_draws
        None: global latents are at the guide's medians. A number: pairs take turns at so many of their draws, whose
        spread is in ``se``; not with ``AllPairs``. There is then no more certainty to be had from pairs alone.
    sampler
        Draws the latents of every cell, as in ``sample_posterior``.
    decode_in
        Batch in which all cells are decoded, their latents inferred in their own; None: decoded in their own, too. A
        difference between batches then shows as one between groups that the batches hold unequally.

    Raises
    ------
    ModelError
        For an invalid contrast, pairing, sampler or number; when comparing, for a likelihood without w, AllPairs where
        cells differ in dispersion, or ``global_draws`` where the model has no global latents.
    DataError
        When comparing within batches, if no batch holds cells of both groups.
    SchemaError
        When comparing, if there is no batch ``decode_in``.

    Examples
    --------
    >>> pairs = ps.differential.RandomPairs(largest_se=0.05)
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b", estimand=pairs)
    >>> table.columns[:4].tolist(), len(table)
    (['p_a_lt_b', 'se', 'log_bayes_factor', 'lfc'], 20)
    """

    contrast: DepthCorrected | Uncorrected = DepthCorrected()
    delta: float = 0.5
    within_batch: bool = False
    largest_se: float = 0.005
    most_pairs: int = 20_000
    pairing: AllPairs | None = None
    global_draws: int | None = None
    sampler: Sampler = Amortized()
    decode_in: Hashable | None = None

    has_direction: ClassVar[bool] = False

    def __post_init__(self) -> None:
        require_switches(within_batch=self.within_batch)
        if not isinstance(self.contrast, DepthCorrected | Uncorrected):
            raise ModelError(f"contrast must be DepthCorrected() or Uncorrected(), got {self.contrast!r}")
        require_number(self.delta, "delta")
        require_sampler(self.sampler)
        self._plan()
        self._check_global_draws()

    def comparison(self, fit: Fit, cells: Cells, part: np.ndarray, seed: int) -> ComparisonOfPairs:
        """What is shared by all comparisons of these cells."""
        decoding = None if self.decode_in is None else cells.with_batch(self.decode_in).gamma
        at_medians = fit.guide if self.global_draws is None else None
        told = replace(self, sampler=sampler_for(self.sampler, cells, at_medians))
        turns = () if self.global_draws is None else tuple(at_draws(fit, self.global_draws, seed))
        return ComparisonOfPairs(told, fit, cells, minibatches(fit, cells), decoding, turns, self._plan(), seed)

    def _plan(self) -> AllPairs | MatchedPairs:
        if self.pairing is None:
            return MatchedPairs(self.largest_se, self.most_pairs, self.within_batch)
        if not isinstance(self.pairing, AllPairs):
            raise ModelError(f"pairing must be AllPairs(...), or None for matched pairs, got {self.pairing!r}")
        if self.within_batch:
            raise ModelError("AllPairs pairs cells of all batches: leave out pairing, or leave out within_batch")
        return self.pairing

    def _check_global_draws(self) -> None:
        if self.global_draws is None:
            return
        require_at_least(1, global_draws=self.global_draws)
        if self.pairing is not None:
            raise ModelError(
                "AllPairs needs one distribution for all draws: leave out pairing, or leave out global_draws"
            )
        if self.global_draws > self.most_pairs // 2:
            raise ModelError(
                f"most_pairs must be at least twice global_draws, got {self.most_pairs} and {self.global_draws}"
            )


@dataclass(frozen=True)
class ComparisonOfPairs:
    """Comparisons of random pairs of one set of cells."""

    estimand: RandomPairs
    fit: Fit
    cells: Cells
    batches: Minibatches
    decoding: Covariates | None
    turns: tuple[Fit, ...]
    plan: AllPairs | MatchedPairs
    seed: int

    def table(self, a: Group, b: Group) -> pd.DataFrame:
        """One row per gene, (genes, columns)."""
        fit, cells, options = self.fit, self.cells, self.estimand
        how = (options.contrast, options.sampler, self.decoding, self.turns)
        # Draws go by the order of the rows: by name, so that they are the same in whatever order the cells came.
        rows_a, rows_b = (rows[rows_by_name(cells.cell_names[rows])] for rows in (a.rows, b.rows))
        groups = Groups(fit, cells, self.batches, rows_a, rows_b, *how)
        with evaluating(fit.model, fit.guide, self.seed, theta=True):
            estimate = self.plan.estimate(groups, np.random.default_rng(self.seed), options.delta)
        table = summary(estimate) | raw_counts(cells, a.rows, "a") | raw_counts(cells, b.rows, "b")
        return pd.DataFrame(table, index=pd.Index(cells.gene_names, name="gene"))

    def least(self, tables: dict[Hashable, pd.DataFrame]) -> pd.DataFrame:
        """Refused: pairs of cells have no direction that holds against several groups."""
        raise ModelError("EveryOther() needs estimand=GroupMeans()")

    def warn(self) -> None:
        """Nothing: the statement is on these cells."""
