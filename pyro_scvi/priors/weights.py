"""Priors on weights and dispersions: a model's parameters, chosen by name, become global latent variables."""

from collections.abc import Callable, Container, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor, nn
from torch.distributions.transforms import Transform

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.closures import require_owned
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import brief, require_kind, require_positive

__all__ = [
    "ARDWeights",
    "HierarchicalWeights",
    "HorseshoeWeights",
    "LaplaceWeights",
    "NormalWeights",
    "RandomWalkWeights",
]


def __dir__() -> list[str]:
    return __all__


class NormalWeights(Component):
    r"""Independent normals.

    .. math:: W_{ij} \sim Normal(0, scale^2)

    Site: the parameter's own name, with its shape.

    Parameters
    ----------
    scale
        Standard deviation, above 0.

    Raises
    ------
    ModelError
        If scale is no finite number above 0.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, weight_priors={"decoder.heads.log_mean.weight": ps.weights.NormalWeights(0.1)})
    >>> model.sites()[0]
    Site(name='decoder.heads.log_mean.weight', law='Normal', shape='20 x 128')
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample site ``name`` with the shape, device and dtype of ``like``."""
        return pyro.sample(name, _centred(like, torch.full_like(like, self.scale)))


class LaplaceWeights(Component):
    r"""Independent Laplace distributions: most weights small, some large.

    For example, the loadings of few genes on a latent.

    .. math:: W_{ij} \sim Laplace(0, scale)

    Site: the parameter's own name, with its shape.

    Parameters
    ----------
    scale
        Mean absolute weight, above 0.

    Raises
    ------
    ModelError
        If scale is no finite number above 0.

    Examples
    --------
    >>> sparse = {"decoder.heads.log_mean.weight": ps.weights.LaplaceWeights(0.5)}
    >>> model = ps.SCVI(20, 2, decoder=ps.networks.LinearDecoder(), weight_priors=sparse)
    >>> model.sites()[0]
    Site(name='decoder.heads.log_mean.weight', law='Laplace', shape='20 x 2')
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample site ``name`` with the shape, device and dtype of ``like``."""
        law = dist.Laplace(torch.zeros_like(like), torch.full_like(like, self.scale))
        return pyro.sample(name, law.to_event(like.dim()))


class ARDWeights(Component):
    r"""A scale for each input j, so that whole latents or hidden units can switch off.

    This is automatic relevance determination (Neal 1996).

    .. math:: s_j \sim HalfCauchy(scale), \qquad W_{ij} \sim Normal(0, s_j^2)

    Sites: ``name.scale`` (inputs,) and ``name`` (outputs, inputs).

    Parameters
    ----------
    scale
        Scale of the half-Cauchy distribution of s, above 0.

    Raises
    ------
    ModelError
        If scale is no finite number above 0.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, weight_priors={"decoder.heads.log_mean.weight": ps.weights.ARDWeights()})
    >>> [(site.law, site.shape) for site in model.sites()[:2]]
    [('HalfCauchy', '128'), ('Normal', '20 x 128')]
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample sites ``name.scale`` and ``name``."""
        ones = torch.ones_like(like[0] if like.dim() > 1 else like)
        s = pyro.sample(f"{name}.scale", dist.HalfCauchy(self.scale * ones).to_event(ones.dim()))
        return pyro.sample(name, _centred(like, s.expand(like.shape)))


class HorseshoeWeights(Component):
    r"""The horseshoe: most weights near zero, a few large.

    It is not centred. See Carvalho, Polson and Scott (2010).

    .. math:: W_{ij} = t\, l_{ij}\, e_{ij}, \quad t \sim HalfCauchy(scale), \quad l_{ij} \sim HalfCauchy(1), \quad
        e_{ij} \sim Normal(0, 1)

    Sites: ``name.global``, a number, ``name.local`` and ``name.raw``, each with the parameter's shape.

    Parameters
    ----------
    scale
        Scale of the half-Cauchy distribution of t, which all weights share, above 0.

    Raises
    ------
    ModelError
        If scale is no finite number above 0.

    Examples
    --------
    >>> model = ps.SCVI(20, 2, weight_priors={"decoder.heads.log_mean.weight": ps.weights.HorseshoeWeights()})
    >>> [(site.law, site.shape) for site in model.sites()[:3]]
    [('HalfCauchy', '1'), ('HalfCauchy', '20 x 128'), ('Normal', '20 x 128')]
    """

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__()
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample sites ``name.global``, ``name.local`` and ``name.raw``."""
        t = pyro.sample(f"{name}.global", dist.HalfCauchy(self.scale * like.new_ones(())))
        local = pyro.sample(f"{name}.local", dist.HalfCauchy(torch.ones_like(like)).to_event(like.dim()))
        raw = pyro.sample(f"{name}.raw", _centred(like, torch.ones_like(like)))
        return t * local * raw


class HierarchicalWeights(Component):
    r"""Normals with a common mean and scale: genes borrow strength from each other.

    .. math:: m \sim Normal(0, scale^2), \quad s \sim HalfNormal(scale), \quad W_i \sim Normal(m, s^2)

    Sites: ``name.mean`` and ``name.sd``, numbers, and ``name``, with the parameter's shape.

    Parameters
    ----------
    scale
        Scale of the distributions of m and s, above 0.

    Raises
    ------
    ModelError
        If scale is no finite number above 0.

    Examples
    --------
    >>> likelihood = ps.likelihoods.NB(ps.likelihoods.PerGene(20))
    >>> borrowing = {"likelihood.dispersion.*": ps.weights.HierarchicalWeights()}
    >>> model = ps.SCVI(20, 2, likelihood=likelihood, weight_priors=borrowing)
    >>> [(site.law, site.shape) for site in model.sites()[:3]]
    [('Normal', '1'), ('HalfNormal', '1'), ('Normal', '20')]
    """

    def __init__(self, scale: float = 2.0) -> None:
        super().__init__()
        require_positive(scale, "scale")
        self.scale = scale

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample sites ``name.mean``, ``name.sd`` and ``name``."""
        m = pyro.sample(f"{name}.mean", dist.Normal(like.new_zeros(()), like.new_full((), self.scale)))
        s = pyro.sample(f"{name}.sd", dist.HalfNormal(self.scale * like.new_ones(())))
        return pyro.sample(name, dist.Normal(m.expand(like.shape), s).to_event(like.dim()))


class RandomWalkWeights(Component):
    r"""A random walk over rows, such as the means of time points: neighbours differ little.

    .. math:: W_{1j} \sim Normal(0, first^2), \qquad W_{tj} \sim Normal(W_{t-1, j}, scale^2)

    Site: the parameter's own name, with its shape. The rows of ``prior.loc`` of ``ps.priors.Conditional`` are the
    categories of a column of ``obs`` in the order of its pandas Categorical. ``ps.fit`` refuses words without an order.
    All steps count the same, whatever the names: of days 1, 2, 3 and 10 the last step is as small as the others.
    Levels without cells are left out, with a warning.

    Parameters
    ----------
    scale
        Standard deviation of a step from one row to the next, above 0.
    first
        Standard deviation of the first row, above 0.

    Raises
    ------
    ModelError
        If scale or first is no finite number above 0.

    Examples
    --------
    >>> times = ps.priors.Conditional(2, columns=slice(0, 5))  # as cells.columns["day"] may be
    >>> model = ps.SCVI(20, 2, 5, prior=times, weight_priors={"prior.loc": ps.weights.RandomWalkWeights(0.3)})
    >>> model.sites()[0].shape
    '5 x 2'
    """

    ordered = True

    def __init__(self, scale: float = 0.5, first: float = 1.0) -> None:
        super().__init__()
        require_positive(scale, "scale")
        require_positive(first, "first")
        self.scale, self.first = scale, first

    def forward(self, name: str, like: Tensor) -> Tensor:
        """Sample site ``name`` with the shape, device and dtype of ``like``."""
        sds = torch.full_like(like, self.scale)
        sds[:1] = self.first
        steps = dist.Normal(torch.zeros_like(like), sds).to_event(like.dim())
        return pyro.sample(name, dist.TransformedDistribution(steps, [_CumulativeSum(like.dim())]))


class _CumulativeSum(Transform):
    """Sums of the rows up to each row; its Jacobian is 1."""

    bijective = True

    def __init__(self, event_dim: int) -> None:
        super().__init__()
        self.domain = self.codomain = constraints.independent(constraints.real, event_dim)
        self.rows = -event_dim

    def _call(self, x: Tensor) -> Tensor:
        return x.cumsum(self.rows)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.diff(y, dim=self.rows, prepend=torch.zeros_like(y.narrow(self.rows, 0, 1)))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[: x.dim() + self.rows])


WeightPrior = Callable[[str, Tensor], Tensor]
"""Samples a parameter from its name and a tensor like it."""

SHARED = "prior.encoder."
"""Parameters that the guide shares, which computes with them outside the program."""

TAKEN, HELD = "latent_parameters", "in_a_model"
"""Attributes of a module: which of its parameters became latent variables, and that it is a part of some model."""


class RandomWeights(nn.Module):
    """Replaces parameters of ``model``, chosen by name pattern, by latent variables with a prior.

    Parameters
    ----------
    model
        The module that owns the parameters.
    priors
        Name pattern (as in ``fnmatch``) -> prior; the first that matches counts. For example,
        ``{"decoder.heads.log_mean.weight": NormalWeights()}``.
    """

    def __init__(self, model: nn.Module, priors: dict[str, WeightPrior]) -> None:
        super().__init__()
        require_kind(priors, dict, "weight_priors", '{"decoder.heads.*": ps.weights.NormalWeights()}')
        for pattern, prior in priors.items():
            if isinstance(prior, type | TorchDistributionMixin) or not callable(prior):
                raise ModelError(
                    f"the prior of {pattern!r} must be an object such as ps.weights.NormalWeights(), or a function of "
                    f"a name and a tensor like the parameter, got {brief(prior)}"
                )
        _require_whole(model)
        self.makers = list(priors.values())
        self.priors = nn.ModuleList(prior for prior in self.makers if isinstance(prior, nn.Module))
        self.prior_of: dict[str, int] = {}
        for index, pattern in enumerate(priors):
            self.prior_of |= dict.fromkeys(_matching(model, pattern, self.prior_of), index)
        # Only now, so that parts stay whole where a pattern is refused.
        for name in self.prior_of:
            self.register_buffer(_slot(name), _taken_out(model, name), persistent=False)
        for module in model.modules():
            vars(module)[HELD] = True
        for pattern, prior in priors.items():
            require_owned(prior, f"prior of {pattern!r}", model, self)

    @contextmanager
    def drawn_into(self, model: nn.Module) -> Iterator[None]:
        """Sample every global latent once and let ``model`` compute with it inside the block."""
        places = []
        try:
            for name, index in self.prior_of.items():
                owner, leaf = _owner(model, name)
                # In __dict__, because a value may be a parameter of the guide, which setattr would register here.
                owner.__dict__[leaf] = self._drawn(name, self.makers[index])
                places.append((owner, leaf))
            yield
        finally:
            for owner, leaf in places:
                del owner.__dict__[leaf]

    def _drawn(self, name: str, prior: WeightPrior) -> Tensor:
        like: Tensor = getattr(self, _slot(name))
        value = prior(name, like)
        if not isinstance(value, Tensor) or value.shape != like.shape:
            raise ModelError(
                f"the prior of {name!r} must return a tensor of shape {tuple(like.shape)}, as the parameter has, got "
                f"{brief(value)}"
            )
        return value

    def require_sampled(self) -> None:
        """Refuse priors that sample nothing.

        Raises
        ------
        ModelError
            If there is one; names its parameter.
        """
        for name, index in self.prior_of.items():
            with pyro.poutine.block(), pyro.poutine.trace() as run:
                self._drawn(name, self.makers[index])
            if not any(node["type"] == "sample" for node in run.trace.nodes.values()):
                raise ModelError(
                    f"the prior of {name!r} samples nothing, so that the parameter would be a constant: sample it, as "
                    f"pyro.sample(name, ...), or leave the prior out and freeze the parameter by requires_grad_(False)"
                )

    def ordered_columns(self, model: nn.Module) -> list[slice]:
        """The columns of gamma whose categories are rows of parameters that have a prior over ordered rows."""
        owners = (_owner(model, name)[0] for name, index in self.prior_of.items() if _is_ordered(self.makers[index]))
        return [columns for owner in owners if isinstance(columns := getattr(owner, "columns", None), slice)]

    def start_of(self, site: str) -> Tensor | None:
        """Initial value of the parameter that a site is, or that the horseshoe's ``raw`` makes up; None for others."""
        name = site.removesuffix(".raw")  # of the horseshoe, whose scales start at 1
        return getattr(self, _slot(name)).clone() if name in self.prior_of else None


def _centred(like: Tensor, scale: Tensor) -> Distribution:
    """Independent normals with mean 0, one event of the shape of ``like``."""
    return dist.Normal(torch.zeros_like(like), scale).to_event(like.dim())


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _require_whole(model: nn.Module) -> None:
    """Refuse a part whose parameters another model has taken out of it."""
    for path, module in model.named_modules():
        if names := vars(module).get(TAKEN):
            raise ModelError(
                f"{path} {brief(module)} has been given to a model before, whose weight_priors made its {list(names)} "
                "latent: make a new object for each model"
            )


def _taken_out(model: nn.Module, name: str) -> Tensor:
    """The value of a parameter, which its module does not have any more."""
    owner, leaf = _owner(model, name)
    start: Tensor = getattr(owner, leaf).detach()
    delattr(owner, leaf)
    vars(owner)[TAKEN] = (*vars(owner).get(TAKEN, ()), leaf)
    return start


def _matching(model: nn.Module, pattern: str, taken: Container[str]) -> list[str]:
    """Names of the parameters that match a pattern, without those taken by another pattern."""
    every = [name for name, _ in model.named_parameters()]
    known = [name for name in every if name not in taken]
    names = [name for name in known if fnmatchcase(name, pattern)]
    if shared := [name for name in names if name.startswith(SHARED)]:
        raise ModelError(
            f"{shared} cannot have a prior, because the guide uses them too: let {pattern!r} not match them"
        )
    if not names and (before := [name for name in every if fnmatchcase(name, pattern)]):
        raise ModelError(
            f"{before} have a prior by an earlier pattern of weight_priors, so {pattern!r} has none left: put "
            f"{pattern!r} before that pattern"
        )
    if not names:
        raise ModelError(f"no parameter that may have a prior is called {pattern!r}; the model has {known}")
    if held := [name for name in names if HELD in vars(_owner(model, name)[0])]:
        raise ModelError(
            f"{held} belong to an object that is also part of another model, which would lose them: make a new "
            "object for each model"
        )
    return names


def is_taken_out(owner: Any, name: str | None) -> bool:
    """Whether a parameter of a module became a latent variable, which the module has only while it is drawn."""
    return isinstance(owner, nn.Module) and name in vars(owner).get(TAKEN, ())


def _is_ordered(prior: WeightPrior) -> bool:
    return bool(getattr(prior, "ordered", False))


def _slot(name: str) -> str:
    return name.replace(".", "__")
