"""scVI's generative model: Section 1 of Lopez, Regier, Cole, Jordan and Yosef (2017) as a Pyro program."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral
from typing import Any, ClassVar

import pyro
import torch
from torch import BoolTensor, Tensor, nn

from pyro_scvi.discovery import like
from pyro_scvi.distributions.supports import require_coordinates
from pyro_scvi.errors import ModelError
from pyro_scvi.likelihoods.base import Likelihood, require_log_mean
from pyro_scvi.likelihoods.library_size import LatentLibrary, Library
from pyro_scvi.likelihoods.negative_binomial import ZINB
from pyro_scvi.nn.closures import require_owned
from pyro_scvi.nn.decoders import DecoderPart, MLPDecoder, require_decoder, require_heads
from pyro_scvi.nn.normalization import BatchNorm, Norm
from pyro_scvi.priors.base import law_of, require_columns, require_prior, takes_gamma
from pyro_scvi.priors.normal import StandardNormal
from pyro_scvi.priors.weights import RandomWeights, WeightPrior
from pyro_scvi.program import Program, cells_plate, check_inputs, register
from pyro_scvi.types import Distribution, Theta
from pyro_scvi.utils.checks import brief, require_at_least, require_kind
from pyro_scvi.utils.random_state import seeded

OF_MLP = ("n_hidden", "n_layers", "dropout", "norm", "initial_sd", "head_sd")
"""Arguments that are for the default decoder."""


class SCVI(Program):
    r"""The scVI model: counts x (cells, genes) given covariates gamma (cells, covariates).

    See Lopez et al. (2017), Sec. 1.

    .. math::

        z_n \sim p(z), \quad w_{ng} \sim Gamma(r_{ng}, r_{ng} / \mu_{ng}), \quad y_{ng} \sim Poisson(w_{ng}), \quad
        h_{ng} \sim Bernoulli(\pi_{ng}), \quad x_{ng} = y_{ng} (1 - h_{ng})

    with (mu, r) = f_w(z_n, gamma_n) and logit pi = f_h(z_n, gamma_n), mu in counts.

    Parameters
    ----------
    n_genes, n_latent, n_covariates
        Sizes of x, z and gamma.
    prior
        p(z): a callable that returns a distribution with event shape (latents,); None: StandardNormal. One that takes
        an argument is given gamma (cells, 1, covariates); its distribution then has batch shape (cells, 1).
    likelihood
        p(x | z); None: ZINB with an inverse dispersion per cell and gene.
    library
        Library size; None: LatentLibrary. NoLibrary is the paper's.
    decoder
        What makes the network that maps z and gamma to the likelihood's parameters, such as
        ``ps.networks.LinearDecoder()``; None: ``MLPDecoder`` with the settings below. One of your own is called with
        n_latent, n_genes, the names of the heads, and the number of covariates, and returns a module that maps z
        (..., cells, latents) and gamma (cells, covariates) to a dict of heads, each (..., cells, genes).
    decoder_columns
        Which columns of gamma enter the decoder, slices such as ``cells.columns["donor"]``; None: all but those that
        the prior (Conditional, ByLabel) or the library (SizeFactor) is given.
    n_hidden, n_layers, dropout, norm, initial_sd, head_sd, seed
        The decoder's hidden layers, the prior of its heads' weights that ``ps.fit`` uses, as in
        :class:`pyro_scvi.networks.MLPDecoder`, and the seed of the initial weights.
    weight_priors
        Parameter name pattern -> prior on it, see :mod:`pyro_scvi.priors.weights`: of the decoder, the likelihood, the
        library or the prior. Any callable will do that takes the parameter's name and a tensor like it, samples at
        least one site, and returns a tensor of that shape.

    Raises
    ------
    ModelError
        If the prior's event shape is not (n_latent,), columns are not those of gamma, a part is for another number of
        genes, a weight prior names no parameter, or an argument is of the wrong kind; if z is discrete, on a circle or
        otherwise without coordinates in R^n, or the code of a part reaches parameters that no part has as its own.

    Examples
    --------
    >>> [site.name for site in ps.SCVI(20, n_latent=2).sites()]
    ['z', 'l', 'w', 'y', 'h', 'x']

    A program of one's own overrides ``forward`` and nothing else; every verb follows it.

    >>> import pyro.distributions as dist
    >>> from pyro_scvi.program import cells_plate, check_inputs, register
    >>> class Shifted(ps.SCVI):
    ...     def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None):
    ...         register(self)
    ...         gamma = check_inputs(self, x, gamma)
    ...         with self.weights.drawn_into(self), cells_plate(gamma, index, n_cells):
    ...             z = pyro.sample("z", self.prior_of(gamma))
    ...             e = pyro.sample("e", dist.Normal(0.0, 1.0))  # a latent more: (cells, 1)
    ...             theta = self.decode(z, self.library(x, gamma), gamma)
    ...             theta["log_mean"] = theta["log_mean"] + e
    ...             return self.observe(x, theta, marginal=marginal, mask=mask)
    >>> [site.name for site in Shifted(20, n_latent=2).sites(marginal=True)]
    ['z', 'e', 'l', 'x']
    """

    kinds: ClassVar = {
        "n_genes": Integral,
        "n_latent": Integral,
        "n_covariates": Integral,
        "prior": Callable,
        "likelihood": Likelihood,
        "library": Library,
        "decoder": nn.Module,
        "weights": RandomWeights,
    }
    decoder_columns: Tensor | None
    trained_on: Any = None
    """Schema of the fit that trained this model: its genes and covariates, in their order. None if no fit did."""

    def __init__(
        self,
        n_genes: int,
        n_latent: int = 10,
        n_covariates: int = 0,
        *,
        prior: Callable[..., Distribution] | None = None,
        likelihood: Likelihood | None = None,
        library: Library | None = None,
        decoder: DecoderPart | None = None,
        decoder_columns: Sequence[slice] | None = None,
        n_hidden: int = 128,
        n_layers: int = 2,
        dropout: float = 0.0,
        norm: Norm | None = BatchNorm(),
        initial_sd: float | None = None,
        head_sd: float | None = 1.0,
        weight_priors: dict[str, WeightPrior] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, n_genes=n_genes, n_latent=n_latent)
        require_at_least(0, n_covariates=n_covariates)
        self.n_genes, self.n_latent, self.n_covariates = n_genes, n_latent, n_covariates
        self.prior = StandardNormal(n_latent) if prior is None else prior
        self.likelihood = ZINB() if likelihood is None else likelihood
        self.library = LatentLibrary() if library is None else library
        require_kind(self.likelihood, Likelihood, "likelihood", "ps.likelihoods.NB()")
        require_kind(self.library, Library, "library", "ps.libraries.NoLibrary()")
        require_log_mean(self.likelihood)
        require_prior(self.prior, n_latent)
        self._take_columns(decoder_columns)
        decoder = self._decoder_part(decoder, MLPDecoder(n_hidden, n_layers, dropout, norm, initial_sd, head_sd))
        with seeded(seed):
            self.decoder = self._built(decoder)
        self.require_genes()
        # After all parts exist: it takes parameters out of them.
        self.weights = RandomWeights(self, weight_priors or {})
        with _undone(seed):
            self.weights.require_sampled()
        self._require_prior(seed)
        for name in ("prior", "likelihood", "library", "decoder", "weights"):
            require_owned(getattr(self, name), name, self)

    def forward(
        self,
        x: Tensor | None,
        gamma: Tensor | None = None,
        *,
        marginal: bool = True,
        mask: BoolTensor | bool = True,
        index: Tensor | None = None,
        n_cells: int | None = None,
    ) -> Tensor:
        """Sample or score cells and return x: sites z, x and, where latent, l; with ``marginal=False`` also w, y and h.

        What is sampled here is what every verb uses. Latents of the cells belong in the plate over cells, with batch
        shape (cells, 1) and any dimensions to the left of it. What is sampled outside is shared by all cells. Discrete
        latents of the cells with ``infer={"enumerate": "parallel"}`` are summed out.

        Parameters
        ----------
        x
            Counts (cells, genes), or None to draw them.
        gamma
            Covariates (cells, covariates); may be left out if the model has none and x is given.
        marginal
            Whether w, y and h are integrated out (Sec. 2).
        mask
            Which entries (cells, genes) count in the likelihood. A program of your own may leave out more; verbs that
            condition on all counts, such as ``impute``, then refuse.
        index, n_cells
            Rows of this minibatch among all cells, and the number of all cells. Terms of a cell are then scaled by
            n_cells / len(index). A program of your own passes both to ``cells_plate`` and to nothing else.

        Raises
        ------
        ModelError
            If genes, covariates or rows do not agree, or ``marginal=False`` and the likelihood has no w, y and h.
        """
        register(self)
        gamma = check_inputs(self, x, gamma)
        with self.weights.drawn_into(self), cells_plate(gamma, index, n_cells):
            z = pyro.sample("z", self.prior_of(gamma))  # (cells, 1, latents)
            theta = self.decode(z, self.library(x, gamma), gamma)  # (cells, genes) each
            return self.observe(x, theta, marginal=marginal, mask=mask)

    @property
    def trained(self) -> bool:
        """Whether this model is that of a fit."""
        return self.trained_on is not None

    def prior_of(self, gamma: Tensor) -> Distribution:
        """p(z) of cells with covariates gamma (cells, covariates): what ``prior`` returns, given gamma or not."""
        return law_of(self.prior, gamma)

    def decode(self, z: Tensor, log_library: Tensor | None, gamma: Tensor) -> Theta:
        """f_w and f_h: the likelihood's parameters (..., cells, genes) at z (..., cells, 1, latents)."""
        seen = gamma if self.decoder_columns is None else gamma.index_select(-1, self.decoder_columns)
        eta = self.decoder(z.squeeze(-2), seen)
        return self.likelihood.theta({**eta, "log_mean": self.library.log_mean(eta["log_mean"], log_library)}, gamma)

    def observe(
        self, x: Tensor | None, theta: Theta, *, marginal: bool = True, mask: BoolTensor | bool = True
    ) -> Tensor:
        """Sample x, or w, y, h and x, at theta, the likelihood's parameters (..., cells, genes): a program's last line.

        What is computed from theta, such as imputed values, is computed from the theta that comes here.
        """
        told: Any = {"theta": theta}  # Pyro hands on what a site says of its inference
        with pyro.plate("genes", self.n_genes, dim=-1), pyro.poutine.mask(mask=mask):
            if marginal:
                return pyro.sample("x", self.likelihood.marginal(**theta), obs=x, infer=told)
            return self.likelihood.generate(x, theta)

    def _decoder_part(self, given: DecoderPart | None, default: DecoderPart) -> DecoderPart:
        """What makes the decoder; refuses settings of the default's beside another."""
        if given is None:
            return default
        require_decoder(given)
        if beside := sorted(self.arguments.keys() & set(OF_MLP)):
            raise ModelError(f"{beside} are for the default decoder: give them to the decoder that you pass instead")
        return given

    def _built(self, part: DecoderPart) -> Any:
        """The decoder, for the likelihood's heads and the columns of gamma that it sees."""
        n_seen = self.n_covariates if self.decoder_columns is None else len(self.decoder_columns)
        sizes = (self.n_latent, self.n_genes, self.likelihood.heads, n_seen)
        network = part(*sizes)
        require_heads(network, *sizes)
        return network

    def shown(self) -> dict[str, Any]:
        """Arguments to show, also defaults; not those of the default decoder if another one was given."""
        dropped = () if self.arguments.get("decoder") is None else OF_MLP
        return {name: value for name, value in super().shown().items() if name not in dropped}

    def _take_columns(self, given: Sequence[slice] | None) -> None:
        """Keep which columns of gamma enter the decoder; None for all of them."""
        taken = getattr(self.prior, "columns", None) if takes_gamma(self.prior) else None
        if isinstance(taken, slice):
            require_columns(taken, "columns of the prior", self.n_covariates)
        if given is not None and not isinstance(given, list | tuple):
            raise ModelError(f'decoder_columns must be a list, as [cells.columns["donor"]], got {brief(given)}')
        if isinstance(sizes := getattr(self.library, "columns", None), slice):
            require_columns(sizes, "columns of the library", self.n_covariates)
        for one in given or ():
            require_columns(one, "decoder_columns", self.n_covariates)
        everything = list(range(self.n_covariates))
        left = everything if given is None else [place for one in given for place in range(one.start, one.stop)]
        for own in (taken, sizes):
            if given is None and isinstance(own, slice):
                left = [place for place in left if not own.start <= place < own.stop]
        if len(set(left)) < len(left):
            raise ModelError(f"decoder_columns name a column of gamma twice: {given}")
        kept = None if left == everything else torch.tensor(left, dtype=torch.long)
        self.register_buffer("decoder_columns", kept, persistent=False)

    def example_law(self, seed: int = 0) -> Distribution:
        """p(z) of two cells whose gamma is zero, with global latents drawn, to find its kind and shape."""
        gamma = like(self).new_zeros(2, self.n_covariates)
        with _undone(seed), self.weights.drawn_into(self):
            return self.prior_of(gamma)

    def _require_prior(self, seed: int) -> None:
        """Refuse a prior whose distribution is of another shape, or that no coordinates reach."""
        law: Any = self.example_law(seed)
        if (shape := tuple(law.event_shape)) != (self.n_latent,):
            hint = f"make it for {self.n_latent} latents" if shape else "is to_event(1) missing?"
            raise ModelError(f"the prior must have event shape ({self.n_latent},), got {shape}; {hint}")
        require_coordinates(law, "the prior of z")
        if takes_gamma(self.prior) and tuple(law.batch_shape) not in ((), (1,), (1, 1), (2, 1)):
            raise ModelError(
                "a prior that is given gamma (cells, 1, covariates) must have batch shape (cells, 1), got "
                f"{tuple(law.batch_shape)} for two cells: index from the right, as in gamma[..., :1]"
            )


@contextmanager
def _undone(seed: int) -> Iterator[None]:
    """A prior of the user's own may draw, register parameters or add sites: nothing of that is left behind."""
    with seeded(seed), pyro.get_param_store().scope(), pyro.poutine.block(), pyro.validation_enabled(False):
        yield
