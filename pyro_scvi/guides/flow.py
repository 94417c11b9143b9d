"""Inverse autoregressive flow guide."""

from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.amortized import AmortizedGuide, Code
from pyro_scvi.types import Distribution
from pyro_scvi.utils.random_state import seeded


class InverseAutoregressiveFlow(AmortizedGuide):
    r"""A diagonal normal transformed by autoregressive layers conditioned on the cell (Kingma et al. 2016, Sec. 4).

    .. math:: u^0 \sim Normal(m(x_n), diag(s(x_n)^2)), \quad
        u^t = \sigma^t u^{t-1} + (1 - \sigma^t) \mu^t, \quad (\mu^t, \sigma^t) = f_t(u^{t-1}, x_n), \quad z_n = u^T

    with f_t autoregressive, the latents in reverse order after each of the ``n_flows`` layers; q(l | x) as in
    :class:`DiagonalNormal`. For a prior on the simplex u^T are the unconstrained coordinates of z.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed
        As in :class:`DiagonalNormal`.

    Raises
    ------
    ModelError
        As in :class:`DiagonalNormal`, and for fewer than two unconstrained latents.

    Examples
    --------
    >>> model = ps.SCVI(20, 2)
    >>> guide = ps.guides.InverseAutoregressiveFlow(model, n_hidden=16)
    >>> ps.embed(ps.fit(model, cells, guide, epochs=1, progress=False), cells).shape
    (60, 2)
    """

    n_flows = 2

    def build(self) -> None:
        """Masked autoregressive networks conditioned on the encoder's hidden units."""
        n = self.coordinates.n_z
        if n < 2:
            raise ModelError("InverseAutoregressiveFlow needs two or more latents; take DiagonalNormal for one")
        # A bias of 4 starts every sigma at 0.98: the flow starts close to the identity.
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(n, self.encoder.n_hidden, [4 * n]), stable=True, sigmoid_bias=4.0
            )
            for _ in range(self.n_flows)
        )

    def z_law(self, code: Code) -> Distribution:
        """The transformed normal, on the support of z."""
        order = torch.arange(self.coordinates.n_z - 1, -1, -1, device=code.loc.device)
        steps: list[Any] = []
        flows: Any = self.flows
        for flow in flows:
            steps += [flow.condition(code.hidden[:, None]), transforms.Permute(order)]
        return self.coordinates.law(dist.Normal(code.loc[:, None], code.scale[:, None]).to_event(1), *steps)

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of draws, under a fixed seed."""
        code = self.encode(x, gamma, None)
        with seeded(0):
            z = self.z_law(code).sample((128,)).squeeze(-2)
        u = z if self.coordinates.real else self.coordinates.to_z.inv(z)
        return self.joined(code._replace(loc=u.mean(0), scale=u.std(0)))
