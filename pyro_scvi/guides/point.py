"""Point guide: maximum a posteriori estimates."""

import pyro.distributions as dist
from torch import Tensor

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.amortized import AmortizedGuide, Code
from pyro_scvi.guides.coordinates import LocalSite
from pyro_scvi.types import Distribution


class Point(AmortizedGuide):
    r"""z (and l) at one point per cell, the encoder's output (Lopez et al. 2017, Sec. 3.3).

    .. math:: q(z_n | x_n) = \delta(z_n - m(x_n)), \qquad q(l_n | x_n) = \delta(l_n - e^{a(x_n)})

    With the prior Flat this is the paper's autoencoder, "z_n as an unknown parameter"; with a fixed prior it is the
    MAP.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed, global_guide
        As in :class:`DiagonalNormal`; ``global_guide`` may be AutoDelta, too.

    Raises
    ------
    ModelError
        If the prior's shape is learned: its density at the points would grow without bound. Otherwise as in
        :class:`DiagonalNormal`, except that the prior Flat is allowed.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.Point(model, n_hidden=16)
    >>> guide.amortized, guide.stochastic
    (True, False)
    """

    stochastic = False

    def require_prior(self) -> None:
        """Refuse priors that could collapse onto the points."""
        if getattr(self.model.prior, "learned", False):
            raise ModelError(
                f"{type(self.model.prior).__name__} is learned and would collapse onto the points of a Point guide; "
                "take a guide with a density, or a fixed prior"
            )

    def law(self, site: LocalSite, code: Code, drawn: dict[str, Tensor]) -> Distribution:
        """A point mass."""
        return dist.Delta(site.value(code.loc[site.name]), event_dim=len(site.event_shape))
