"""Priors p(z): each is a callable without arguments that returns a Pyro distribution with event shape (latents,).

Any other callable of that kind serves as well; a module may hold parameters, which are then learned with the model.
"""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints, transforms
from pyro.nn import AutoRegressiveNN
from torch import Tensor, nn

from pyro_scvi.distributions import Law
from pyro_scvi.errors import ModelError, brief, require_at_least, require_positive
from pyro_scvi.networks import Encoder, LayerNorm
from pyro_scvi.parts import Part
from pyro_scvi.seeding import seeded

__all__ = [
    "ARDNormal",
    "Dirichlet",
    "Flat",
    "Flow",
    "GaussianMixture",
    "Laplace",
    "LogisticNormal",
    "StandardNormal",
    "StudentT",
    "VampPrior",
]


def __dir__():
    return __all__


class Prior(Part):
    """A prior on ``n_latent`` latents; ``learned`` says that its own shape is fitted to the data."""

    learned = False
    zeros: Tensor

    def __init__(self, n_latent: int) -> None:
        super().__init__()
        require_at_least(1, n_latent=n_latent)
        self.n_latent = n_latent
        self.register_buffer("zeros", torch.zeros(n_latent), persistent=False)  # carries device and dtype

    def forward(self) -> Law:
        """The distribution of z, event shape (latents,)."""
        raise NotImplementedError


class StandardNormal(Prior):
    r"""The paper's prior, independent standard normals (Lopez et al. 2017, Sec. 1).

    .. math:: z_n \sim Normal(0, I)

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1.

    Examples
    --------
    >>> ps.priors.StandardNormal(2)().event_shape
    torch.Size([2])
    >>> ps.SCVI(20, 2, prior=ps.priors.StandardNormal(2)).sites()[0]
    Site(name='z', law='Normal', shape='cells x 2')
    """

    def forward(self) -> Law:
        """Normal(0, 1) on every latent."""
        return dist.Normal(self.zeros, 1.0).to_event(1)


class ARDNormal(Prior):
    r"""Normal with a learned scale per latent: those that are not needed shrink (automatic relevance, Neal 1996).

    .. math:: z_{nk} \sim Normal(0, s_k^2)

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.ARDNormal(2)).prior
    ARDNormal(n_latent=2)
    """

    learned = True

    def __init__(self, n_latent: int) -> None:
        super().__init__(n_latent)
        self.log_scale = nn.Parameter(torch.zeros(n_latent))

    def forward(self) -> Law:
        """Normal(0, s_k) on latent k."""
        return dist.Normal(self.zeros, self.log_scale.exp()).to_event(1)


class StudentT(Prior):
    r"""Heavier tails than the normal: outlying cells are not pulled in.

    .. math:: z_{nk} \sim StudentT(df, 0, 1)

    Parameters
    ----------
    n_latent
        Number of latents.
    df
        Degrees of freedom, above 0.

    Raises
    ------
    ModelError
        If n_latent is below 1, or df is not above 0.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.StudentT(2, df=3.0)).sites()[0]
    Site(name='z', law='StudentT', shape='cells x 2')
    """

    def __init__(self, n_latent: int, df: float = 4.0) -> None:
        super().__init__(n_latent)
        require_positive(df, "df")
        self.df = df

    def forward(self) -> Law:
        """StudentT(df, 0, 1) on every latent."""
        return dist.StudentT(self.zeros + self.df, self.zeros, 1.0).to_event(1)


class Laplace(Prior):
    r"""Mass at zero and heavy tails, sparse codes.

    .. math:: z_{nk} \sim Laplace(0, 1), \qquad p(z_{nk}) = \tfrac12 e^{-|z_{nk}|}

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.Laplace(2)).sites()[0]
    Site(name='z', law='Laplace', shape='cells x 2')
    """

    def forward(self) -> Law:
        """Laplace(0, 1) on every latent."""
        return dist.Laplace(self.zeros, 1.0).to_event(1)


class GaussianMixture(Prior):
    r"""A mixture of diagonal normals with learned weights, means and scales.

    .. math:: z_n \sim \sum_c \pi_c\, Normal(m_c, diag(s_c^2))

    Parameters
    ----------
    n_latent
        Number of latents.
    components
        Number of normals.
    seed
        Of the initial means, standard normal; weights start equal and scales at 1.

    Raises
    ------
    ModelError
        If n_latent or components is below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> ps.SCVI(20, 2, prior=ps.priors.GaussianMixture(2, components=4)).sites()[0]
    Site(name='z', law='mixture of 4 Normal', shape='cells x 2')
    """

    learned = True

    def __init__(self, n_latent: int, components: int = 8, *, seed: int = 0) -> None:
        super().__init__(n_latent)
        require_at_least(1, components=components)
        with seeded(seed):
            self.loc = nn.Parameter(torch.randn(components, n_latent))
        self.log_scale = nn.Parameter(torch.zeros(components, n_latent))
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> Law:
        """A mixture of diagonal normals."""
        return _mixture(self.logits, self.loc, self.log_scale)


class VampPrior(Prior):
    r"""The aggregate posterior at learned pseudo-cells u_c, with learned weights (Tomczak and Welling 2018).

    .. math:: z_n \sim \sum_c \pi_c\, q(z | u_c)

    The guide shares this prior's ``encoder``, so that q(z | u_c) is the guide's own law. Layer normalisation, because
    pseudo-cells passing through batch statistics would make training and evaluation differ.

    Parameters
    ----------
    n_genes, n_latent
        As in the model, which refuses other numbers.
    components
        Number of pseudo-cells.
    pseudo_cells
        Start of u, counts (components, genes), for example some training cells; by default small random counts.
    n_hidden, n_layers, seed
        Hidden layers of the encoder; seed of its weights and of the default pseudo-cells.

    Raises
    ------
    ModelError
        If ``pseudo_cells`` is no matrix of that shape, a size is below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> x, gamma = cells[:6]
    >>> prior = ps.priors.VampPrior(20, 2, components=6, pseudo_cells=x)
    >>> model = ps.SCVI(20, 2, prior=prior)
    >>> ps.guides.DiagonalNormal(model).encoder is prior.encoder
    True
    """

    learned = True

    def __init__(
        self,
        n_genes: int,
        n_latent: int,
        components: int = 50,
        *,
        pseudo_cells: Tensor | None = None,
        n_hidden: int = 128,
        n_layers: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(n_latent)
        require_at_least(1, n_genes=n_genes, components=components)
        self.expected_genes = n_genes
        with seeded(seed):
            self.encoder = Encoder(n_genes, n_latent, n_hidden=n_hidden, n_layers=n_layers, norm=LayerNorm())
            start = torch.rand(components, n_genes) if pseudo_cells is None else _counts(pseudo_cells)
        if start.shape != (components, n_genes):
            raise ModelError(f"pseudo_cells must have shape {(components, n_genes)}, got {tuple(start.shape)}")
        self.log_counts = nn.Parameter(start.clamp(min=0.01).log())
        self.logits = nn.Parameter(torch.zeros(components))

    def forward(self) -> Law:
        """A mixture of the guide's normals at the pseudo-cells."""
        encoded = self.encoder(self.log_counts.exp(), self.log_counts.new_zeros(len(self.log_counts), 0))
        return _mixture(self.logits, encoded.loc, encoded.log_scale)


class Flow(Prior):
    r"""A standard normal through learned masked autoregressive layers T (Papamakarios et al. 2017, Sec. 3).

    .. math:: z_n = T(e_n), \quad e_n \sim Normal(0, I), \qquad
        \log p(z) = \log Normal(T^{-1}(z); 0, I) + \log |\det \partial T^{-1} / \partial z|

    The density of a given z costs one pass; drawing z costs one pass per latent.

    Parameters
    ----------
    n_latent
        Number of latents, 2 or more.
    layers, n_hidden
        Autoregressive layers, the latents in reverse order after each, and hidden units of each.
    seed
        Of the initial weights.

    Raises
    ------
    ModelError
        If n_latent is below 2, another size below 1, or the seed is no integer of 0 or more.

    Examples
    --------
    >>> prior = ps.priors.Flow(2, layers=1, n_hidden=4)
    >>> prior().log_prob(torch.zeros(5, 2)).shape
    torch.Size([5])
    """

    learned = True

    def __init__(self, n_latent: int, layers: int = 2, n_hidden: int = 32, *, seed: int = 0) -> None:
        super().__init__(n_latent)
        require_at_least(1, layers=layers, n_hidden=n_hidden)
        if n_latent < 2:
            raise ModelError("Flow needs n_latent >= 2; take GaussianMixture for one latent")
        with seeded(seed):
            self.layers = nn.ModuleList(
                transforms.AffineAutoregressive(AutoRegressiveNN(n_latent, [n_hidden]), stable=True)
                for _ in range(layers)
            )

    def forward(self) -> Law:
        """The pushed-forward normal."""
        order = torch.arange(self.n_latent - 1, -1, -1, device=self.zeros.device)
        steps: list[Any] = []
        for layer in self.layers:
            steps += [layer.inv, transforms.Permute(order)]
        return dist.TransformedDistribution(dist.Normal(self.zeros, 1.0).to_event(1), steps)


class LogisticNormal(Prior):
    r"""Proportions, such as of topics: a normal of n_latent - 1 dimensions through stick breaking; K is n_latent.

    .. math:: e_{nk} \sim Normal(0, scale^2), \quad v_{nk} = logistic(e_{nk} - \log(K - k)), \quad
        z_{nk} = v_{nk} \prod_{j < k} (1 - v_{nj}), \quad z_{nK} = \prod_{j < K} (1 - v_{nj})

    Parameters
    ----------
    n_latent
        Number of proportions, 2 or more.
    scale
        Standard deviation of e, above 0.

    Raises
    ------
    ModelError
        If n_latent is below 2, or scale is not above 0.

    Examples
    --------
    >>> z = ps.priors.LogisticNormal(3)().sample((5,))
    >>> z.shape, bool(torch.allclose(z.sum(-1), torch.ones(5)))
    (torch.Size([5, 3]), True)
    """

    def __init__(self, n_latent: int, scale: float = 1.0) -> None:
        super().__init__(n_latent)
        if n_latent < 2:
            raise ModelError("LogisticNormal needs n_latent >= 2: one proportion is always 1")
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self) -> Law:
        """LogisticNormal(0, scale) with n_latent proportions."""
        base = dist.Normal(self.zeros[1:], self.scale).to_event(1)
        return dist.TransformedDistribution(base, [transforms.StickBreakingTransform()])


class Dirichlet(Prior):
    r"""Proportions that sum to one, under the symmetric Dirichlet law.

    .. math:: p(z_n) \propto \prod_k z_{nk}^{a - 1}

    Parameters
    ----------
    n_latent
        Number of proportions, 2 or more.
    concentration
        a, above 0; below 1 favours the corners of the simplex.

    Raises
    ------
    ModelError
        If n_latent is below 2, or concentration is not above 0.

    Examples
    --------
    >>> z = ps.priors.Dirichlet(3, concentration=0.5)().sample((5,))
    >>> z.shape, bool(torch.allclose(z.sum(-1), torch.ones(5)))
    (torch.Size([5, 3]), True)
    """

    def __init__(self, n_latent: int, concentration: float = 1.0) -> None:
        super().__init__(n_latent)
        if n_latent < 2:
            raise ModelError("Dirichlet needs n_latent >= 2: one proportion is always 1")
        require_positive(concentration, "concentration")
        self.concentration = concentration

    def forward(self) -> Law:
        """The symmetric Dirichlet."""
        return dist.Dirichlet(self.zeros + self.concentration)


class Flat(Prior):
    r"""No prior: z is a parameter of the cell (Lopez et al. 2017, Sec. 3.3); only with the guide Point.

    .. math:: p(z_n) \propto 1

    Parameters
    ----------
    n_latent
        Number of latents.

    Raises
    ------
    ModelError
        If n_latent is below 1. Guides with a density, samplers other than Amortized, ``evidence`` and whatever else
        needs a proper prior refuse this one by the same error.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, prior=ps.priors.Flat(2))
    >>> points = ps.fit(model, cells, ps.guides.Point(model), epochs=1, progress=False)
    >>> ps.embed(points, cells).shape
    (60, 2)
    """

    def forward(self) -> Law:
        """A density of 1 everywhere, which cannot be sampled."""
        return dist.ImproperUniform(constraints.real_vector, (), self.zeros.shape)


def require_proper(prior: Callable[[], Law], what: str) -> None:
    """Refuse a prior whose density does not integrate to one; ``what`` there is not under it goes into the message.

    Raises
    ------
    ModelError
        For ``Flat``, and for any law that is improper or masked.
    """
    with seeded(0), pyro.get_param_store().scope(), pyro.poutine.block():
        law: Any = prior()
    improper = dist.ImproperUniform | dist.MaskedDistribution
    while not isinstance(law, improper) and hasattr(law, "base_dist"):
        law = law.base_dist
    if isinstance(law, improper):
        name = getattr(prior, "__name__", type(prior).__name__)
        raise ModelError(f"the prior {name} has no density: {what}; fit with a proper prior")


def _mixture(logits: Tensor, loc: Tensor, log_scale: Tensor) -> Law:
    components = dist.Normal(loc, log_scale.exp()).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(logits=logits), components)


def _counts(pseudo_cells: Any) -> Tensor:
    try:
        return torch.as_tensor(pseudo_cells).float()
    except (TypeError, ValueError, RuntimeError) as error:  # whatever torch says of words, objects and ragged lists
        raise ModelError(f"pseudo_cells must be numbers, as in cells[:50][0]; got {brief(pseudo_cells)}") from error
