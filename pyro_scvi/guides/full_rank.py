"""Full-rank normal guide: all latents of a cell are correlated."""

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.guides.amortized import AmortizedGuide, Code
from pyro_scvi.nn.networks import initialise
from pyro_scvi.types import Distribution


class FullRankNormal(AmortizedGuide):
    r"""A normal with all covariances between the latents of a cell; L is lower triangular.

    .. math:: q(z_n, \log l_n | x_n) = Normal(m(x_n), L(x_n) L(x_n)^T)

    For a prior on the simplex the normal is that of the unconstrained coordinates of z.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed
        As in :class:`DiagonalNormal`.

    Raises
    ------
    ModelError
        As in :class:`DiagonalNormal`.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.FullRankNormal(model, n_hidden=16)
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    def build(self) -> None:
        """Heads for the strict lower triangle of L and for the slope of log l on whitened z."""
        n, size = self.coordinates.n_z, self.coordinates.size
        self.lower = nn.Linear(self.encoder.n_hidden, n * (n - 1) // 2 + (size - n) * n)
        initialise(self.lower, 1e-3)

    def scale_tril(self, code: Code) -> tuple[Tensor, Tensor]:
        """L (cells, n_z, n_z) and the slope of log l (cells, n_z)."""
        n = self.coordinates.n_z
        entries, slope = self.lower(code.hidden).split([n * (n - 1) // 2, (self.coordinates.size - n) * n], -1)
        rows, columns = torch.tril_indices(n, n, -1, device=entries.device)
        lower = entries.new_zeros(len(entries), n, n)
        lower[:, rows, columns] = entries
        # The scale multiplies whole rows, so that the entries below the diagonal have no unit and start near zero.
        return code.scale[:, :, None] * (lower + torch.eye(n, dtype=lower.dtype, device=lower.device)), slope

    def z_law(self, code: Code) -> Distribution:
        """Normal with full covariance, on the support of z."""
        tril, _ = self.scale_tril(code)
        base = dist.MultivariateNormal(code.loc[:, None], scale_tril=tril[:, None], validate_args=False)
        return self.coordinates.law(base)

    def l_law(self, code: Code, z: Tensor) -> Distribution:
        """LogNormal whose location is linear in z: the conditional of a joint normal."""
        tril, slope = self.scale_tril(code)
        u = z if self.coordinates.real else self.coordinates.to_z.inv(z)
        gap = (u.squeeze(-2) - code.loc)[..., None]  # (..., cells, n_z, 1)
        white = torch.linalg.solve_triangular(tril, gap, upper=False).squeeze(-1)
        loc = code.l_loc + code.l_scale * (white * slope).sum(-1, keepdim=True)
        return dist.LogNormal(loc, code.l_scale.expand(loc.shape))

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The joint normal's location and marginal scales."""
        code = self.encode(x, gamma, None)
        tril, slope = self.scale_tril(code)
        l_scale = code.l_scale * (1 + slope.square().sum(-1, keepdim=True)).sqrt()
        return self.joined(code._replace(scale=tril.square().sum(-1).sqrt(), l_scale=l_scale))
