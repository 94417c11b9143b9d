"""Contrasts: the scale on which the expression of two cells is compared."""

from dataclasses import dataclass

from torch import Tensor

from pyro_scvi.types import Theta


@dataclass(frozen=True)
class DepthCorrected:
    r"""Compare w divided by the cell's depth, so that unequal depths do not matter.

    The depth is the sum of the cell's means.

    .. math:: w_{ng} / \textstyle\sum_{g'} \mu_{ng'}

    Examples
    --------
    >>> pairs = ps.differential.RandomPairs(contrast=ps.differential.DepthCorrected(), largest_se=0.05)
    >>> options = {"groupby": "kind", "group_a": "a", "group_b": "b", "estimand": pairs}
    >>> corrected = ps.differential_expression(fit, cells, **options)
    >>> bool(corrected.p_a_lt_b.between(0, 1).all())
    True
    """

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu minus the log of its sum over the genes."""
        return theta["log_mean"] - theta["log_mean"].logsumexp(-1, keepdim=True)


@dataclass(frozen=True)
class Uncorrected:
    r"""Compare w itself, in counts: a deeper cell then has more of every gene.

    This is what Lopez et al. (2017, Sec. 4) do.

    .. math:: w_{ng} \sim Gamma(r_{ng}, r_{ng} / \mu_{ng})

    Examples
    --------
    >>> pairs = ps.differential.RandomPairs(contrast=ps.differential.Uncorrected(), largest_se=0.05)
    >>> options = {"groupby": "kind", "group_a": "a", "group_b": "b", "estimand": pairs}
    >>> uncorrected = ps.differential_expression(fit, cells, **options)
    >>> bool(uncorrected.p_a_lt_b.between(0, 1).all())
    True
    """

    def log_mean(self, theta: Theta) -> Tensor:
        """Log mu."""
        return theta["log_mean"]
