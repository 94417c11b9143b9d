"""Priors on weights and dispersions: a model's parameters, chosen by name, become global latent variables."""

from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import require_kind, require_positive

__all__ = ["ARDWeights", "HierarchicalWeights", "HorseshoeWeights", "NormalWeights"]


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


class ARDWeights(Component):
    r"""A scale per input j, so that whole latents or hidden units can switch off (automatic relevance, Neal 1996).

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
    r"""The horseshoe, not centred: most weights near zero, a few large (Carvalho, Polson and Scott 2010).

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
    r"""Normals with a common mean and scale, so that log dispersions borrow strength across genes.

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


class RandomWeights(nn.Module):
    """Replaces parameters of ``model``, chosen by name pattern, by latent variables with a prior.

    Parameters
    ----------
    model
        The module that owns the parameters.
    priors
        Name pattern (as in ``fnmatch``) -> prior, for example ``{"decoder.heads.log_mean.weight": NormalWeights()}``.
    """

    def __init__(self, model: nn.Module, priors: dict[str, nn.Module]) -> None:
        super().__init__()
        require_kind(priors, dict, "weight_priors", '{"decoder.heads.*": ps.weights.NormalWeights()}')
        for pattern, prior in priors.items():
            require_kind(prior, nn.Module, f"the prior of {pattern!r}", "ps.weights.NormalWeights()")
        self.priors = nn.ModuleList(priors.values())
        self.prior_of: dict[str, int] = {}
        for index, pattern in enumerate(priors):
            # Not those of the prior p(z): it is also called outside the program, where no weight is sampled for it.
            free = [name for name, _ in model.named_parameters() if not name.startswith("prior.")]
            names = [name for name in free if fnmatchcase(name, pattern)]
            if not names:
                raise ModelError(f"no parameter that may have a prior is called {pattern!r}; the model has {free}")
            for name in names:
                owner, leaf = _owner(model, name)
                start = getattr(owner, leaf).detach()
                delattr(owner, leaf)
                self.register_buffer(_slot(name), start, persistent=False)
                self.prior_of[name] = index

    @contextmanager
    def drawn_into(self, model: nn.Module) -> Iterator[None]:
        """Sample every global latent once and let ``model`` compute with it inside the block."""
        places = []
        try:
            for name, index in self.prior_of.items():
                owner, leaf = _owner(model, name)
                # In __dict__, because a value may be a parameter of the guide, which setattr would register here.
                owner.__dict__[leaf] = self.priors[index](name, getattr(self, _slot(name)))
                places.append((owner, leaf))
            yield
        finally:
            for owner, leaf in places:
                del owner.__dict__[leaf]

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


def _slot(name: str) -> str:
    return name.replace(".", "__")
