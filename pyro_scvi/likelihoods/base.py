"""Base class of likelihoods p(x | z): distributions of w, y, h and x, and exact conditionals given x."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Distribution, Theta

_LOGIT_OF_ZERO = -1e3  # its sigmoid is 0 in every precision; the gradient of -inf would be NaN


class Likelihood(Component):
    r"""Distribution of counts given the decoder's heads (Lopez et al. 2017, Sec. 1).

    .. math:: w_{ng} \sim Gamma(r_{ng}, r_{ng} / \mu_{ng}), \quad y_{ng} \sim Poisson(w_{ng}), \quad
        h_{ng} \sim Bernoulli(\pi_{ng}), \quad x_{ng} = y_{ng} (1 - h_{ng})

    A new likelihood names its ``heads``, ``log_mean`` among them, and returns its ``marginal``. That is enough to fit
    and to compare it. If its counts are Poisson with a fixed or Gamma rate, with or without technical zeros, it may set
    ``explicit = True``; it then has the explicit program above and its exact conditionals, too. These read ``log_mean``
    (log mu), ``log_inverse_dispersion`` (log r) and ``gate_logits`` (logit pi) in theta, each (samples, cells, genes).

    Raises
    ------
    NotImplementedError
        If a new likelihood has no ``heads`` or no ``marginal``.
    ModelError
        If w, y or h is asked for and ``explicit`` is not set.

    Examples
    --------
    >>> class Geometric(ps.likelihoods.Likelihood):
    ...     heads = ("log_mean",)
    ...     def marginal(self, log_mean):
    ...         return pyro.distributions.Geometric(logits=-log_mean)
    ...
    >>> ps.SCVI(20, 2, likelihood=Geometric()).sites(marginal=True)[-1]
    Site(name='x', law='Geometric', shape='cells x genes')
    """

    explicit = False

    def __init__(self) -> None:
        super().__init__()

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the decoder's heads; the library size scales ``log_mean``."""
        raise NotImplementedError(f'{type(self).__name__} has no heads; give it some, as in heads = ("log_mean",)')

    def theta(self, eta: Theta, gamma: Tensor) -> Theta:
        """The distribution's parameters from the heads, each broadcastable to (..., cells, genes)."""
        return eta

    def marginal(self, *args: Any, **theta: Any) -> Distribution:
        """The distribution of x with w, y and h integrated out, batch shape (..., cells, genes)."""
        raise NotImplementedError(
            f"{type(self).__name__} has no method marginal, which takes its heads {self.heads} and returns the "
            "distribution of x"
        )

    def rate(self, log_mean: Tensor, **theta: Tensor) -> dist.Gamma | None:
        """The distribution of w, or None if w = mu exactly."""
        r = theta.get("log_inverse_dispersion")
        return None if r is None else NegativeBinomial(log_mean, r).rate

    def technical_zero_logits(self, log_mean: Tensor, **theta: Tensor) -> Tensor | None:
        """Log odds of h = 1 given x = 0, or None if no zero is technical."""
        gate = theta.get("gate_logits")
        if gate is None:
            return None
        r = theta.get("log_inverse_dispersion")
        counts = dist.Poisson(log_mean.exp()) if r is None else NegativeBinomial(log_mean, r)
        return gate - counts.log_prob(torch.zeros_like(log_mean))

    def generate(self, x: Tensor | None, theta: Theta) -> Tensor:
        """The explicit program: sites w, y, h (if zeros may be technical) and x.

        w ~ Gamma(r, r / mu), y ~ Poisson(w), h ~ Bernoulli(pi), x = y unless h.

        Raises
        ------
        ModelError
            If the likelihood is not ``explicit``.
        """
        self.require_explicit()
        rate, gate = self.rate(**theta), theta.get("gate_logits")
        w = pyro.deterministic("w", theta["log_mean"].exp()) if rate is None else pyro.sample("w", rate)
        y = pyro.sample("y", dist.Poisson(w))
        seen = y
        if gate is not None:
            h = pyro.sample("h", dist.Bernoulli(logits=gate))
            seen = y * (1 - h)
        return pyro.sample("x", dist.Delta(seen), obs=x)

    def condition(self, x: Tensor, theta: Theta) -> None:
        """Sample the explicit sites from their exact conditional given x and z, as a guide (Gamma-Poisson conjugacy).

        h ~ Bernoulli(rho 1[x = 0]); w ~ Gamma(r + x (1 - h), r / mu + 1 - h); y = x if h = 0, else Poisson(w).

        Raises
        ------
        ModelError
            If the likelihood is not ``explicit``.
        """
        self.require_explicit()
        logits = self.technical_zero_logits(**theta)
        h: Tensor | float = 0.0
        if logits is not None:
            h = pyro.sample("h", dist.Bernoulli(logits=torch.where(x == 0, logits, _LOGIT_OF_ZERO)))
        rate = self.rate(**theta)
        w = theta["log_mean"].exp() if rate is None else pyro.sample("w", updated_rate(rate, x, h))
        y = dist.Delta(x.expand(w.shape))
        if logits is not None:
            # A technical zero says nothing about y, which then keeps its prior given w.
            y = dist.MaskedMixture(h == 1, y, dist.Poisson(w))
        pyro.sample("y", y)

    @torch.no_grad()
    def explained(self, x: Tensor, theta: Theta) -> Theta:
        """One draw of w, y and h (..., cells, genes) from their exact conditional; w = mu and h = 0 where constant.

        Raises
        ------
        ModelError
            If the likelihood is not ``explicit``.
        """
        nodes: dict[str, Any] = pyro.poutine.trace(self.condition).get_trace(x, theta).nodes
        drawn: Theta = {name: nodes[name]["value"] for name in ("w", "y", "h") if name in nodes}
        constant = {"w": theta["log_mean"].exp(), "h": torch.zeros_like(drawn["y"])}
        return constant | drawn

    def expected_rate(self, x: Tensor, theta: Theta) -> Tensor:
        """E[w | x, z], counts (..., cells, genes).

        (r + x) / (r / mu + 1) where x > 0 or no zero is technical; at a zero that is technical with probability rho,
        rho mu + (1 - rho) r mu / (r + mu).

        Raises
        ------
        ModelError
            If the likelihood is not ``explicit``.
        """
        self.require_explicit()
        mean, prior, logits = theta["log_mean"].exp(), self.rate(**theta), self.technical_zero_logits(**theta)
        seen = mean if prior is None else (prior.concentration + x) / (prior.rate + 1)
        if logits is None:
            return seen
        rho = torch.sigmoid(logits) * (x == 0)
        return rho * mean + (1 - rho) * seen

    def require_explicit(self) -> None:
        """Refuse a likelihood that has no sites w, y and h.

        Raises
        ------
        ModelError
            If ``explicit`` is not set.
        """
        if not self.explicit:
            raise ModelError(
                f"{type(self).__name__} has no w, y and h, only a marginal distribution of x. If it is a Poisson "
                "distribution with a fixed or Gamma rate, set explicit = True"
            )


def require_log_mean(likelihood: Likelihood) -> None:
    """Refuse a likelihood whose heads lack ``log_mean``, which the library size scales.

    Raises
    ------
    ModelError
        If they do.
    """
    if "log_mean" not in likelihood.heads:
        raise ModelError(
            f"{type(likelihood).__name__} has the heads {tuple(likelihood.heads)}; one of them must be 'log_mean', the "
            "logarithm of the mean, because the library size is added to it"
        )


def updated_rate(prior: dist.Gamma, x: Tensor, h: Tensor | float) -> dist.Gamma:
    """The Gamma distribution of the rate w given the count and whether it is a technical zero (conjugacy)."""
    # 1 - h first: 1 + rate - h would lose a rate below 6e-8, and w would be infinite where h = 1.
    return dist.Gamma(prior.concentration + x * (1 - h), prior.rate + (1 - h))
