"""Likelihoods p(x | z): the marginal law of x, the laws of w, y, h behind it, and their exact conditionals given x."""

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.distributions import Law, NegativeBinomial, ZeroInflated
from pyro_scvi.errors import ModelError, brief, require_at_least
from pyro_scvi.parts import Part

__all__ = ["NB", "ZINB", "ZIP", "Likelihood", "PerCellAndGene", "PerGene", "PerGeneAndBatch", "Poisson"]


def __dir__():
    return __all__


Theta = dict[str, Tensor]

_NEVER = -1e3  # a logit whose sigmoid is 0 in every precision, and whose gradient is finite


class PerCellAndGene(Part):
    r"""Inverse dispersion as one more head of the decoder (Lopez et al. 2017, Sec. 1).

    .. math:: r_{ng} = \exp(\eta^r_{ng}), \quad \eta^r_n = f_w(z_n, \gamma_n)

    (samples, cells, genes); counts have the variance mu + mu^2 / r.

    Examples
    --------
    >>> ps.likelihoods.NB(ps.likelihoods.PerCellAndGene()).heads
    ('log_mean', 'log_inverse_dispersion')
    """

    heads = ("log_inverse_dispersion",)

    def __init__(self) -> None:
        super().__init__()

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (..., cells, genes)."""
        return eta["log_inverse_dispersion"]


class PerGene(Part):
    """One inverse dispersion per gene, a parameter (genes,).

    .. math:: r_{ng} = r_g

    starting at 1.

    Parameters
    ----------
    n_genes
        As in the model, which refuses another number.

    Raises
    ------
    ModelError
        If n_genes is no integer of 1 or more.

    Examples
    --------
    >>> law = ps.likelihoods.NB(ps.likelihoods.PerGene(20))
    >>> law.heads, [tuple(parameter.shape) for parameter in law.parameters()]
    (('log_mean',), [(20,)])
    """

    heads = ()

    def __init__(self, n_genes: int) -> None:
        super().__init__()
        require_at_least(1, n_genes=n_genes)
        self.expected_genes = n_genes
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_genes))

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (genes,)."""
        return self.log_inverse_dispersion


class PerGeneAndBatch(Part):
    r"""One inverse dispersion per gene and batch, parameters (batches, genes).

    .. math:: \log r_{ng} = \sum_b \gamma_{nb} \log r_{bg}

    over the first ``n_batches`` columns of gamma, which are the one-hot batch.

    Parameters
    ----------
    n_genes, n_batches
        As in the model, which refuses another number, and ``cells.n_batches``.

    Raises
    ------
    ModelError
        If a number is no integer of 1 or more. When called, if gamma has fewer columns than there are batches.

    Examples
    --------
    >>> law = ps.likelihoods.NB(ps.likelihoods.PerGeneAndBatch(20, n_batches=2))
    >>> ps.SCVI(20, 2, n_covariates=2, likelihood=law).likelihood
    NB(dispersion=PerGeneAndBatch(n_genes=20, n_batches=2))
    """

    heads = ()

    def __init__(self, n_genes: int, n_batches: int) -> None:
        super().__init__()
        require_at_least(1, n_genes=n_genes, n_batches=n_batches)
        self.expected_genes, self.n_batches = n_genes, n_batches
        self.log_inverse_dispersion = nn.Parameter(torch.zeros(n_batches, n_genes))

    def forward(self, eta: Theta, gamma: Tensor) -> Tensor:
        """Log r, (cells, genes)."""
        if gamma.shape[-1] < self.n_batches:
            raise ModelError(
                f"PerGeneAndBatch expects {self.n_batches} batch columns in gamma, got {gamma.shape[-1]} columns; "
                "make the Cells with batch="
            )
        return gamma[..., : self.n_batches] @ self.log_inverse_dispersion


Dispersion = PerCellAndGene | PerGene | PerGeneAndBatch


class Likelihood(Part):
    r"""A law of counts given the decoder's heads (Lopez et al. 2017, Sec. 1).

    .. math:: w_{ng} \sim Gamma(r_{ng}, r_{ng} / \mu_{ng}), \quad y_{ng} \sim Poisson(w_{ng}), \quad
        h_{ng} \sim Bernoulli(\pi_{ng}), \quad x_{ng} = y_{ng} (1 - h_{ng})

    A new likelihood names its ``heads``, ``log_mean`` among them, and returns its ``marginal``; that is enough to fit
    and to compare it. One that is a Poisson law of a fixed or Gamma rate, with or without technical zeros, may set
    ``explicit`` and then has the explicit program above and its exact conditionals too, which read ``log_mean`` (log
    mu), ``log_inverse_dispersion`` (log r) and ``gate_logits`` (logit pi) in theta, each (samples, cells, genes).

    Raises
    ------
    NotImplementedError
        If a new likelihood has no ``heads`` or no ``marginal``.
    ModelError
        Where w, y or h is asked for and ``explicit`` is not set.

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
        """Names of the decoder's heads; ``log_mean`` is the one that the library size scales."""
        raise NotImplementedError

    def theta(self, eta: Theta, gamma: Tensor) -> Theta:
        """The law's parameters from the heads, each broadcastable to (..., cells, genes)."""
        return eta

    def marginal(self, *args: Any, **theta: Any) -> Law:
        """The law of x with w, y and h integrated out, batch shape (..., cells, genes)."""
        raise NotImplementedError

    def rate(self, log_mean: Tensor, **theta: Tensor) -> dist.Gamma | None:
        """The law of w, or None where w = mu exactly."""
        r = theta.get("log_inverse_dispersion")
        return None if r is None else NegativeBinomial(log_mean, r).rate

    def technical_zero_logits(self, log_mean: Tensor, **theta: Tensor) -> Tensor | None:
        """Log odds of h = 1 given x = 0, or None where no zero is technical."""
        gate = theta.get("gate_logits")
        if gate is None:
            return None
        r = theta.get("log_inverse_dispersion")
        counts = dist.Poisson(log_mean.exp()) if r is None else NegativeBinomial(log_mean, r)
        return gate - counts.log_prob(torch.zeros_like(log_mean))

    def generate(self, x: Tensor | None, theta: Theta) -> Tensor:
        """The explicit program: sites w, h (where there is one), y and x.

        w ~ Gamma(r, r / mu), y ~ Poisson(w), h ~ Bernoulli(pi), x = y unless h.

        Raises
        ------
        ModelError
            If the law is not ``explicit``.
        """
        self.require_explicit()
        law, gate = self.rate(**theta), theta.get("gate_logits")
        w = pyro.deterministic("w", theta["log_mean"].exp()) if law is None else pyro.sample("w", law)
        y = pyro.sample("y", dist.Poisson(w))
        seen = y
        if gate is not None:
            h = pyro.sample("h", dist.Bernoulli(logits=gate))
            seen = y * (1 - h)
        return pyro.sample("x", dist.Delta(seen), obs=x)

    def explain(self, x: Tensor, theta: Theta) -> None:
        """Sample the explicit sites from their exact conditional given x and z, as a guide (Gamma-Poisson conjugacy).

        h ~ Bernoulli(rho 1[x = 0]); w ~ Gamma(r + x (1 - h), r / mu + 1 - h); y = x if h = 0, else Poisson(w).

        Raises
        ------
        ModelError
            If the law is not ``explicit``.
        """
        self.require_explicit()
        logits = self.technical_zero_logits(**theta)
        h: Tensor | float = 0.0
        if logits is not None:
            h = pyro.sample("h", dist.Bernoulli(logits=torch.where(x == 0, logits, _NEVER)))
        law = self.rate(**theta)
        w = theta["log_mean"].exp() if law is None else pyro.sample("w", updated_rate(law, x, h))
        y = dist.Delta(x.expand(w.shape))
        if logits is not None:
            y = dist.MaskedMixture(h == 1, y, dist.Poisson(w))
        pyro.sample("y", y)

    @torch.no_grad()
    def explained(self, x: Tensor, theta: Theta) -> Theta:
        """One draw of w, y and h (..., cells, genes) from their exact conditional; w = mu and h = 0 where constant.

        Raises
        ------
        ModelError
            If the law is not ``explicit``.
        """
        nodes: dict[str, Any] = pyro.poutine.trace(self.explain).get_trace(x, theta).nodes
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
            If the law is not ``explicit``.
        """
        self.require_explicit()
        mean, law, logits = theta["log_mean"].exp(), self.rate(**theta), self.technical_zero_logits(**theta)
        seen = mean if law is None else (law.concentration + x) / (law.rate + 1)
        if logits is None:
            return seen
        rho = torch.sigmoid(logits) * (x == 0)
        return rho * mean + (1 - rho) * seen

    def require_explicit(self) -> None:
        """Refuse a law that has no sites w, y and h.

        Raises
        ------
        ModelError
            If ``explicit`` is not set.
        """
        if not self.explicit:
            raise ModelError(
                f"{type(self).__name__} says nothing of w, y and h: only its marginal law of x is known. If it is a "
                "Poisson law of a fixed or Gamma rate, set explicit = True"
            )


def updated_rate(law: dist.Gamma, x: Tensor, h: Tensor | float) -> dist.Gamma:
    """The law of the Gamma rate w given the count and whether it is a technical zero."""
    # 1 - h first: added to 1, a rate below 6e-8 would be lost, and w infinite where h = 1.
    return dist.Gamma(law.concentration + x * (1 - h), law.rate + (1 - h))


class Poisson(Likelihood):
    r"""Poisson counts: w = mu, no technical zeros.

    .. math:: x_{ng} | z_n \sim Poisson(\mu_{ng})

    Examples
    --------
    >>> ps.SCVI(20, 2, likelihood=ps.likelihoods.Poisson()).sites(marginal=True)[-1]
    Site(name='x', law='Poisson', shape='cells x genes')
    """

    explicit = True
    heads = ("log_mean",)

    def marginal(self, log_mean: Tensor) -> Law:
        """Poisson(mu)."""
        return dist.Poisson(log_mean.exp())


class ZIP(Likelihood):
    r"""Poisson counts with technical zeros: w = mu.

    .. math:: p(x_{ng} | z_n) = \pi_{ng} 1[x_{ng} = 0] + (1 - \pi_{ng})\, Poisson(x_{ng}; \mu_{ng})

    Examples
    --------
    >>> ps.SCVI(20, 2, likelihood=ps.likelihoods.ZIP()).sites(marginal=True)[-1]
    Site(name='x', law='ZeroInflated Poisson', shape='cells x genes')
    """

    explicit = True
    heads = ("log_mean", "gate_logits")

    def marginal(self, log_mean: Tensor, gate_logits: Tensor) -> Law:
        """Zero-inflated Poisson(mu)."""
        return ZeroInflated(dist.Poisson(log_mean.exp()), gate_logits)


class GammaPoisson(Likelihood):
    """What NB and ZINB share: w ~ Gamma(r, r / mu), y ~ Poisson(w).

    Parameters
    ----------
    dispersion
        Where the inverse dispersion r lives: :class:`PerCellAndGene` (default), :class:`PerGene`,
        :class:`PerGeneAndBatch`.

    Raises
    ------
    ModelError
        If ``dispersion`` is no such object.
    """

    explicit = True
    zero_heads: tuple[str, ...] = ()

    def __init__(self, dispersion: Dispersion | None = None) -> None:
        super().__init__()
        if dispersion is not None and (isinstance(dispersion, type) or not hasattr(dispersion, "heads")):
            raise ModelError(
                "dispersion must be an object such as ps.likelihoods.PerGene(cells.n_genes); got " + brief(dispersion)
            )
        self.dispersion = PerCellAndGene() if dispersion is None else dispersion

    @property
    def heads(self) -> tuple[str, ...]:
        """log_mean, log_inverse_dispersion where it is a head, gate_logits where zeros may be technical."""
        return ("log_mean", *self.dispersion.heads, *self.zero_heads)

    def theta(self, eta: Theta, gamma: Tensor) -> Theta:
        """The heads and log r."""
        return {**eta, "log_inverse_dispersion": self.dispersion(eta, gamma)}


class NB(GammaPoisson):
    r"""Negative binomial counts without technical zeros, x = y.

    .. math:: p(x_{ng} | z_n) = \frac{\Gamma(x_{ng} + r_{ng})}{\Gamma(r_{ng})\, x_{ng}!}
        \left(\frac{r_{ng}}{r_{ng} + \mu_{ng}}\right)^{r_{ng}} \left(\frac{\mu_{ng}}{r_{ng} + \mu_{ng}}\right)^{x_{ng}}

    with mean mu and variance mu + mu^2 / r, counts.

    Parameters
    ----------
    dispersion
        Where the inverse dispersion r lives: :class:`PerCellAndGene` (default), :class:`PerGene`,
        :class:`PerGeneAndBatch`.

    Raises
    ------
    ModelError
        If ``dispersion`` is no such object.

    Examples
    --------
    >>> ps.SCVI(20, 2, likelihood=ps.likelihoods.NB()).sites(marginal=True)[-1]
    Site(name='x', law='NegativeBinomial', shape='cells x genes')
    """

    def marginal(self, log_mean: Tensor, log_inverse_dispersion: Tensor) -> Law:
        """NegativeBinomial(mu, r)."""
        return NegativeBinomial(log_mean, log_inverse_dispersion)


class ZINB(GammaPoisson):
    r"""The paper's likelihood: negative binomial counts with technical zeros (Lopez et al. 2017, Sec. 1).

    .. math:: p(x_{ng} | z_n) = \pi_{ng} 1[x_{ng} = 0] + (1 - \pi_{ng})\, NB(x_{ng}; \mu_{ng}, r_{ng})

    Parameters
    ----------
    dispersion
        Where the inverse dispersion r lives: :class:`PerCellAndGene` (default), :class:`PerGene`,
        :class:`PerGeneAndBatch`.

    Raises
    ------
    ModelError
        If ``dispersion`` is no such object.

    Examples
    --------
    >>> law = ps.likelihoods.ZINB(ps.likelihoods.PerGene(20))
    >>> ps.SCVI(20, 2, likelihood=law).sites(marginal=True)[-1]
    Site(name='x', law='ZeroInflated NegativeBinomial', shape='cells x genes')
    """

    zero_heads = ("gate_logits",)

    def marginal(self, log_mean: Tensor, log_inverse_dispersion: Tensor, gate_logits: Tensor) -> Law:
        """Zero-inflated NegativeBinomial(mu, r)."""
        return ZeroInflated(NegativeBinomial(log_mean, log_inverse_dispersion), gate_logits)
