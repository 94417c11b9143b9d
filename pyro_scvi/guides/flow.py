"""Inverse autoregressive flow guide."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.guides.amortized import AmortizedGuide, Code
from pyro_scvi.guides.coordinates import LocalSite, transform_distribution
from pyro_scvi.types import Distribution
from pyro_scvi.utils.random_state import seeded

AUXILIARY = "_flow"
"""Site of the guide alone, of which several latents are parts."""


class InverseAutoregressiveFlow(AmortizedGuide):
    r"""A diagonal normal transformed by autoregressive layers conditioned on the cell.

    See Kingma et al. (2016), Sec. 4.

    .. math:: u^0 \sim Normal(m(x_n), diag(s(x_n)^2)), \quad
        u^t = \sigma^t u^{t-1} + (1 - \sigma^t) \mu^t, \quad (\mu^t, \sigma^t) = f_t(u^{t-1}, x_n), \quad z_n = u^T

    with f_t autoregressive, the latents in reverse order after each of the ``n_flows`` layers; q(l | x) as in
    :class:`DiagonalNormal`. u^T are the unconstrained coordinates of z, and of other latents than l if there are any.

    Parameters
    ----------
    model, encoder, encode_covariates, log_input, n_hidden, n_layers, dropout, norm, initial_sd, seed, global_guide
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

    @property
    def auxiliary(self) -> bool:
        """Whether latents are functions of a draw of an auxiliary site, which the model does not have."""
        return len(self.joint) > 1 or super().auxiliary

    def build(self) -> None:
        """Masked autoregressive networks conditioned on the encoder's hidden units."""
        self.joint = [site for site in self.coordinates.local.values() if site is not self.coordinates.library]
        n = sum(site.size for site in self.joint)
        if n < 2:
            raise ModelError("InverseAutoregressiveFlow needs two or more latents; take DiagonalNormal for one")
        # A bias of 4 starts every sigma at 0.98: the flow starts close to the identity.
        self.flows = nn.ModuleList(
            transforms.ConditionalAffineAutoregressive(
                ConditionalAutoRegressiveNN(n, self.encoder.n_hidden, [4 * n]), stable=True, sigmoid_bias=4.0
            )
            for _ in range(self.n_flows)
        )

    def law(self, site: LocalSite, code: Code, drawn: dict[str, Tensor]) -> Distribution:
        """The transformed normal on the support of the only latent beside l; l has a normal of its own.

        Raises
        ------
        ModelError
            If the flow is of several latents together: none of them has a distribution in closed form then.
        """
        if site is self.coordinates.library:
            return super().law(site, code, drawn)
        if len(self.joint) > 1:
            raise ModelError(f"{[one.name for one in self.joint]} have one joint distribution: use sample or draw")
        return site.from_flat(*self._flow(code))

    def sample(self, code: Code) -> dict[str, Tensor]:
        """Sample the latents; several are parts of one auxiliary draw of the flow."""
        if len(self.joint) == 1:
            return super().sample(code)
        u = pyro.sample(AUXILIARY, transform_distribution(*self._joint(code)), infer={"is_auxiliary": True})
        drawn = dict[str, Tensor]()
        for site, part in self._split(u):
            # The density of the site's own coordinates is that of the auxiliary draw, less the change of volume.
            change = -site.log_abs_det(part)[..., None]
            law = dist.Delta(site.value(part), log_density=change, event_dim=len(site.event_shape))
            drawn[site.name] = pyro.sample(site.name, law)
        if self.coordinates.library:
            drawn["l"] = pyro.sample("l", super().law(self.coordinates.library, code, drawn))
        return drawn

    def draw(self, x: Tensor, gamma: Tensor, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws of the latents and log q of them."""
        if len(self.joint) == 1:
            return super().draw(x, gamma, samples)
        code = self.encode(x, gamma, None)
        joint: Any = transform_distribution(*self._joint(code))
        u = joint.rsample((samples,))
        log_q = joint.log_prob(u).squeeze(-1)
        drawn = dict[str, Tensor]()
        for site, part in self._split(u):
            drawn[site.name] = site.value(part)
            log_q = log_q - site.log_abs_det(part)
        if self.coordinates.library:
            law: Any = super().law(self.coordinates.library, code, drawn)
            drawn["l"] = law.rsample((samples,))
            log_q = log_q + law.log_prob(drawn["l"]).squeeze(-1)
        return drawn, log_q

    def mean(self, site: LocalSite, x: Tensor, gamma: Tensor) -> Tensor:
        """Mean of one latent, from 200 draws."""
        if len(self.joint) == 1:
            return super().mean(site, x, gamma)
        return self.draw(x, gamma, 200)[0][site.name].mean(0)

    def _flow(self, code: Code) -> tuple[Any, ...]:
        """A diagonal normal (cells, 1) with event (n,), and the steps that transform it."""
        loc, scale = (torch.cat([of[s.name] for s in self.joint], -1)[:, None] for of in (code.loc, code.scale))
        order = torch.arange(loc.shape[-1] - 1, -1, -1, device=loc.device)
        steps: list[Any] = []
        flows: Any = self.flows
        for flow in flows:
            steps += [flow.condition(code.hidden[:, None]), transforms.Permute(order)]
        return dist.Normal(loc, scale).to_event(1), *steps

    def _joint(self, code: Code) -> tuple[Any, ...]:
        base, *steps = self._flow(code)
        return base, constraints.real_vector, *steps

    def _split(self, u: Tensor) -> list[tuple[LocalSite, Tensor]]:
        """Every latent of the flow with its coordinates (..., cells, size), of u (..., cells, 1, n)."""
        parts = u.squeeze(-2).split([site.size for site in self.joint], -1)
        return list(zip(self.joint, parts, strict=True))

    def start(self, x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of draws, under a fixed seed."""
        code = self.encode(x, gamma, None)
        with seeded(0):
            u = transform_distribution(*self._joint(code)).sample((128,))
        for site, part in self._split(u):
            code.loc[site.name], code.scale[site.name] = part.mean(0), part.std(0)
        return self.joined(code)
