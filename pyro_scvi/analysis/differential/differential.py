"""Differential expression: which genes differ between groups of cells."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from pyro_scvi.analysis.differential.group_means import GroupMeans
from pyro_scvi.analysis.differential.groups import EveryOther, Group, TheRest
from pyro_scvi.analysis.differential.labels import groups_of, members
from pyro_scvi.analysis.differential.random_pairs import RandomPairs
from pyro_scvi.analysis.inputs import require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.data.obs_columns import as_written
from pyro_scvi.errors import DataError, ModelError
from pyro_scvi.utils.checks import require_kind, require_seed

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit


def differential_expression(
    fit: Fit,
    cells: Cells,
    *,
    groupby: str | Sequence[Hashable] | np.ndarray | pd.Series,
    group_a: Hashable | None = None,
    group_b: Hashable | None = None,
    against: TheRest | EveryOther = TheRest(),
    estimand: GroupMeans | RandomPairs = GroupMeans(),
    seed: int = 0,
) -> pd.DataFrame:
    r"""Compare the expression of two groups of cells, gene by gene.

    .. math:: H_0: \; E[w_{ng} / l_n \,|\, n \in a] = E[w_{ng} / l_n \,|\, n \in b]

    ``estimand`` says what is compared. By default these are the groups' means (:class:`GroupMeans`): a q value of .05
    is a false discovery rate of the genes called, and more cells or donors find more genes. :class:`RandomPairs` is the
    question of Lopez et al. (2017, Sec. 4) on two random cells. Every log2 fold change is a over b.

    Parameters
    ----------
    fit
        The fit.
    cells
        Any cells with the fit's schema.
    groupby
        A column of ``cells.obs``, a Series matched by the names of the cells, or one value per cell.
    group_a
        A value of ``groupby``; None, with ``group_b`` None: each value in turn.
    group_b
        Another value of ``groupby``; None: what ``against`` says.
    against
        What a group is compared with if ``group_b`` is None: :class:`TheRest`, all other cells, or :class:`EveryOther`
        group, of which the weakest comparison is kept.
    estimand
        :class:`GroupMeans` or :class:`RandomPairs`, with their options.
    seed
        Of all draws.

    Returns
    -------
    DataFrame by gene (and group, when each is compared in turn)
        Of GroupMeans: ``lfc`` with standard error ``lfc_se`` and 95 % interval ``lfc_low`` to ``lfc_high``; ``z``,
        ``p_value``, ``q_value``; ``lfc_shrunk``, ``lfc_shrunk_sd`` and ``lfsr``, posterior mean and sd of the fold
        change and the local false sign rate; ``mean_a``, ``mean_b``, molecules per cell of median depth;
        ``detected_a``, ``detected_b``, share of cells above zero; ``tested``. Genes that are not tested have NaN.
        Against every other group also ``against``, the group of the weakest comparison.
        ``.attrs`` of a single comparison names ``group_a`` and ``group_b``.

        Of RandomPairs: ``p_a_lt_b``, its Monte Carlo standard error ``se``, ``log_bayes_factor`` (natural log odds of
        w_a < w_b, p clipped to [1 / 2M, 1 - 1 / 2M] for M pairs that share no draw, so that it is finite), ``lfc``,
        ``lfc_sd``, ``lfc_low``, ``lfc_high`` (mean, sd and 95 % interval over pairs), ``p_lfc`` (share of pairs with a
        change beyond delta in the likelier direction), ``expected_false_share`` (among this gene and all with larger
        p_lfc), ``mean_a``, ``mean_b`` (raw counts), ``detected_a``, ``detected_b``.

    Raises
    ------
    DataError
        For an unknown, empty or doubly named group, a group with one replicate, or no batch in common.
    ModelError
        For an argument of the wrong type, or a likelihood without w; for a program that samples x by itself.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Warns
    -----
    UserWarning
        With GroupMeans, for groups that are confounded with batches, come from one batch, hold a single cell, or
        differ in depth more than twofold.

    Examples
    --------
    >>> table = ps.differential_expression(fit, cells, groupby="kind", group_a="a", group_b="b")
    >>> table.columns[4:7].tolist(), len(table)
    (['z', 'p_value', 'q_value'], 20)
    >>> every = ps.differential_expression(fit, cells, groupby="kind")
    >>> every.index.names
    FrozenList(['group', 'gene'])
    """
    require_inputs(fit, cells)
    require_seed(seed)
    _require_question(against, estimand)
    fit.model.likelihood.require_explicit()  # w is a site of such laws only
    labels = groups_of(cells, groupby)
    group_a, group_b = (as_written(labels, group) for group in (group_a, group_b))
    if group_b is not None:
        return _of_two(fit, cells, labels, (group_a, group_b), estimand, seed)
    names = [group_a] if group_a is not None else list(pd.unique(labels[~pd.isna(labels)]))
    if not names:
        raise DataError("no cell has a label: there is nothing to compare")
    for name in names:
        members(labels, name, None)  # refuses an unknown group, or one of all cells, before anything is drawn
    comparison = estimand.comparison(fit, cells, against.parts(labels), seed)
    tables = dict(zip(names, against.tables(comparison, labels, names), strict=True))
    comparison.warn()
    if group_a is None:
        return pd.concat(tables, names=["group"])
    return _named(tables[group_a], group_a, against.name)


def _named(table: pd.DataFrame, group_a: Hashable, group_b: Hashable) -> pd.DataFrame:
    """The table with the names of its groups, as text: a Parquet file keeps attributes only if JSON can."""
    table.attrs = {"group_a": str(group_a), "group_b": str(group_b)}
    return table


def _of_two(
    fit: Fit,
    cells: Cells,
    labels: np.ndarray,
    names: tuple[Hashable | None, Hashable],
    estimand: GroupMeans | RandomPairs,
    seed: int,
) -> pd.DataFrame:
    if names[0] is None:
        raise DataError("group_b without group_a: name group_a, or leave both out to compare each in turn")
    rows = members(labels, *names)
    part = np.full(cells.n_cells, -1)
    part[rows[0]], part[rows[1]] = 0, 1
    comparison = estimand.comparison(fit, cells, part, seed)
    table = comparison.table(*map(Group, names, rows))
    comparison.warn()
    return _named(table, names[0], names[1])


def _require_question(against: Any, estimand: Any) -> None:
    require_kind(estimand, GroupMeans | RandomPairs, "estimand", "ps.differential.GroupMeans()")
    require_kind(against, TheRest | EveryOther, "against", "ps.differential.TheRest()")
    if isinstance(against, EveryOther) and not estimand.has_direction:
        raise ModelError(
            "EveryOther() needs estimand=GroupMeans(): it takes a difference with one sign for each gene, which random "
            "pairs do not give. With RandomPairs, compare with one group after the other"
        )
