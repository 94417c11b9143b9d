"""Negative binomial and zero-inflated negative binomial likelihoods."""

from torch import Tensor

from pyro_scvi.distributions.negative_binomial import NegativeBinomial
from pyro_scvi.distributions.zero_inflated import ZeroInflated
from pyro_scvi.errors import ModelError
from pyro_scvi.likelihoods.base import Likelihood
from pyro_scvi.likelihoods.dispersion import Dispersion, PerCellAndGene
from pyro_scvi.types import Distribution, Theta
from pyro_scvi.utils.checks import brief


class GammaPoisson(Likelihood):
    """Base class of NB and ZINB: w ~ Gamma(r, r / mu), y ~ Poisson(w).

    Parameters
    ----------
    dispersion
        What the inverse dispersion r depends on: :class:`PerCellAndGene` (default), :class:`PerGene`,
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
        """log_mean, log_inverse_dispersion if it is a head, gate_logits if zeros may be technical."""
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
        What the inverse dispersion r depends on: :class:`PerCellAndGene` (default), :class:`PerGene`,
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

    def marginal(self, log_mean: Tensor, log_inverse_dispersion: Tensor) -> Distribution:
        """NegativeBinomial(mu, r)."""
        return NegativeBinomial(log_mean, log_inverse_dispersion)


class ZINB(GammaPoisson):
    r"""The paper's likelihood: negative binomial counts with technical zeros.

    See Lopez et al. (2017), Sec. 1.

    .. math:: p(x_{ng} | z_n) = \pi_{ng} 1[x_{ng} = 0] + (1 - \pi_{ng})\, NB(x_{ng}; \mu_{ng}, r_{ng})

    Parameters
    ----------
    dispersion
        What the inverse dispersion r depends on: :class:`PerCellAndGene` (default), :class:`PerGene`,
        :class:`PerGeneAndBatch`.

    Raises
    ------
    ModelError
        If ``dispersion`` is no such object.

    Examples
    --------
    >>> likelihood = ps.likelihoods.ZINB(ps.likelihoods.PerGene(20))
    >>> ps.SCVI(20, 2, likelihood=likelihood).sites(marginal=True)[-1]
    Site(name='x', law='ZeroInflated NegativeBinomial', shape='cells x genes')
    """

    zero_heads = ("gate_logits",)

    def marginal(self, log_mean: Tensor, log_inverse_dispersion: Tensor, gate_logits: Tensor) -> Distribution:
        """Zero-inflated NegativeBinomial(mu, r)."""
        return ZeroInflated(NegativeBinomial(log_mean, log_inverse_dispersion), gate_logits)
