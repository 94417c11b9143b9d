"""Normalisation layers: batch and layer normalisation for tensors with any leading dimensions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from pyro_scvi.utils.checks import require_positive


@dataclass(frozen=True)
class BatchNorm:
    r"""Batch normalisation of hidden units by their mean and variance over cells.

    See Ioffe and Szegedy (2015), Alg. 1.

    .. math:: \hat u_{nj} = a_j \frac{u_{nj} - m_j}{\sqrt{v_j + eps}} + b_j

    In training m and v are those of the minibatch; in evaluation they are running averages.

    Parameters
    ----------
    momentum
        Weight of each minibatch in the running m and v, above 0 and up to 1, as in torch. The authors' code has 0.01;
        shorter runs need 0.05 to 0.1.
    eps
        Added to the variance, above 0.

    Raises
    ------
    ModelError
        If a number is out of range.

    Examples
    --------
    >>> ps.SCVI(20, 2, norm=ps.networks.BatchNorm(momentum=0.01))
    SCVI(n_genes=20, n_latent=2, ..., norm=BatchNorm(momentum=0.01, eps=0.001), head_sd=1.0, seed=0)
    """

    momentum: float = 0.1
    eps: float = 1e-3

    def __post_init__(self) -> None:
        require_positive(self.momentum, "momentum", most=1.0)
        require_positive(self.eps, "eps")

    def __call__(self, width: int) -> nn.Module:
        """Build a layer for ``width`` units."""
        return _RowBatchNorm(width, momentum=self.momentum, eps=self.eps)


@dataclass(frozen=True)
class LayerNorm:
    r"""Layer normalisation of hidden units by mean and variance over a cell's units.

    See Ba, Kiros and Hinton (2016).

    .. math:: \hat u_{nj} = a_j \frac{u_{nj} - m_n}{\sqrt{v_n + eps}} + b_j

    It has no state, is the same in training and evaluation, and works for any batch size.

    Parameters
    ----------
    eps
        Added to the variance, above 0.

    Raises
    ------
    ModelError
        If eps is no finite number above 0.

    Examples
    --------
    >>> ps.SCVI(20, 2, norm=ps.networks.LayerNorm())
    SCVI(n_genes=20, n_latent=2, ..., norm=LayerNorm(eps=1e-05), head_sd=1.0, seed=0)
    """

    eps: float = 1e-5

    def __post_init__(self) -> None:
        require_positive(self.eps, "eps")

    def __call__(self, width: int) -> nn.Module:
        """Build a layer for ``width`` units."""
        return nn.LayerNorm(width, eps=self.eps)


Norm = Callable[[int], nn.Module]


class _RowBatchNorm(nn.BatchNorm1d):
    """BatchNorm1d over all leading dimensions; a single row in training uses the running statistics."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        if self.training and len(rows) == 1:  # torch refuses to take the variance of one row
            rows = nn.functional.batch_norm(
                rows, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        else:
            rows = super().forward(rows)
        return rows.reshape(input.shape)


def running_statistics(*parts: nn.Module) -> Iterator[Tensor]:
    """The running means and variances of every batch normalisation in ``parts``."""
    for part in parts:
        for module in part.modules():
            if (
                isinstance(module, nn.BatchNorm1d)
                and module.running_mean is not None
                and module.running_var is not None
            ):
                yield from (module.running_mean, module.running_var)
