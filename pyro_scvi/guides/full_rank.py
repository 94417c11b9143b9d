"""Full-rank normal guide: all latents of a cell are correlated."""

import warnings

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.guides.amortized import AmortizedGuide, Code
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.nn.networks import initialise
from pyro_scvi.types import Distribution


class FullRankNormal(AmortizedGuide):
    r"""A normal with all covariances between the latents of a cell; L is lower triangular.

    .. math:: q(u_n | x_n) = Normal(m(x_n), L(x_n) L(x_n)^T), \qquad u_n = (z_n, \log l_n, \ldots)

    u are the unconstrained coordinates of all latents. Each latent is drawn given those before it.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed, global_guide
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

    factorised = False

    def build(self) -> None:
        """A head for the strict lower triangle of L."""
        n = self.coordinates.size
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Initializing zero-element")  # there are no entries beside one latent
            self.lower = nn.Linear(self.encoder.n_hidden, n * (n - 1) // 2)
        initialise(self.lower, 1e-3)

    def scale_tril(self, code: Code) -> Tensor:
        """L (cells, size, size)."""
        n, entries = self.coordinates.size, self.lower(code.hidden)
        rows, columns = torch.tril_indices(n, n, -1, device=entries.device)
        lower = entries.new_zeros(len(entries), n, n)
        lower[:, rows, columns] = entries
        # The scale multiplies whole rows, so that the entries below the diagonal have no unit and start near zero.
        scale = self.coordinates.joined(code.scale)[:, :, None]
        return scale * (lower + torch.eye(n, dtype=lower.dtype, device=lower.device))

    def law(self, site: LocalSite, code: Code, drawn: dict[str, Tensor]) -> Distribution:
        """The conditional of the joint normal given the latents before this one."""
        tril, place = self.scale_tril(code), site.place
        loc, own = code.loc[site.name], tril[:, place, place]
        if place.start:
            white = self._whitened(tril[:, : place.start, : place.start], code, drawn)
            loc = loc + (tril[:, place, : place.start] @ white[..., None]).squeeze(-1)
        if site.size == 1:
            return site.normal(loc, own.squeeze(-1).expand(loc.shape))
        base = dist.MultivariateNormal(loc[..., None, :], scale_tril=own[:, None], validate_args=False)
        return site.from_flat(base)

    def _whitened(self, tril: Tensor, code: Code, drawn: dict[str, Tensor]) -> Tensor:
        """The standard normals (..., cells, n) that the first n coordinates were made of."""
        before = [s for s in self.coordinates.local.values() if s.place.stop <= tril.shape[-1]]
        gaps = [s.coordinates(drawn[s.name]) - code.loc[s.name] for s in before]
        return torch.linalg.solve_triangular(tril, torch.cat(gaps, -1)[..., None], upper=False).squeeze(-1)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """The joint normal's location and marginal scales."""
        code = self.encode(x, gamma, None)
        return self.coordinates.joined(code.loc), self.scale_tril(code).square().sum(-1).sqrt()
