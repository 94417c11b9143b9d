"""Guides of global latents: independent normals, or one of Pyro's autoguides."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide import (
    AutoContinuous,
    AutoDelta,
    AutoGuide,
    AutoLaplaceApproximation,
    AutoNormal,
    AutoNormalizingFlow,
)
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_scvi.discovery import Kind, TracedSite
from pyro_scvi.distributions.supports import bijection_to, require_coordinates, support_of
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.coordinates import transform_distribution
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import Latent
from pyro_scvi.model import SCVI
from pyro_scvi.types import Distribution
from pyro_scvi.utils.checks import brief
from pyro_scvi.utils.random_state import seeded

GlobalGuide = Callable[..., AutoGuide]
Plates = dict[tuple[str, int], Any]

SUITED = (AutoNormal, AutoDelta, AutoContinuous)
"""Autoguides that need only each latent's support, shape, plates and start, and that know their medians."""

UNSUITED = (AutoLaplaceApproximation, AutoNormalizingFlow)
"""Kinds of these that need the density of the data, or know no medians."""


class GlobalLatents(nn.Module):
    """Q of the model's global latents (weights, dispersions), as the model samples them.

    Attributes
    ----------
    supports
        Support of every global latent by name, in the order of the program.
    auxiliary
        Whether the latents are functions of a draw of an auxiliary site, which the guide alone has.
    """

    auxiliary = False

    def __init__(self, found: dict[str, TracedSite]) -> None:
        super().__init__()
        self.supports = {name: support_of(site.law) for name, site in found.items()}
        self.events = {name: tuple(site.law.event_shape) for name, site in found.items()}
        self.plates = {
            name: {dim: (plate, site.batch_shape[dim]) for dim, plate in site.plates.items()}
            for name, site in found.items()
        }

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent, in the plates in which the program does."""
        raise NotImplementedError

    def draws(self, samples: int) -> dict[str, Tensor]:
        """Draws (samples, ...) of every global latent."""
        return self.weighed_draws(samples)[0]

    def weighed_draws(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws (samples, ...) of every global latent, and log q (samples,) of all of them together, nats."""
        raise NotImplementedError

    def medians(self) -> dict[str, Tensor]:
        """The median of every global latent under q; no parameters, which a program that keeps one would own."""
        raise NotImplementedError

    def start_at(self, name: str, value: Tensor) -> bool:
        """Start the median of a global latent at a value; whether that was possible."""
        return False

    def latents(self) -> dict[str, Latent]:
        """What the model must sample them as."""
        return {name: Latent(Kind.GLOBAL, support, self.events[name]) for name, support in self.supports.items()}


class GlobalNormal(GlobalLatents):
    """Independent normals in unconstrained coordinates.

    Pyro's AutoNormal would give its parameters the same names for every model of a session.
    """

    def __init__(self, model: SCVI) -> None:
        found = found_globals(model)
        super().__init__(found)
        starts = [_start(model, site) for site in found.values()]
        self.loc = nn.ParameterList(starts)
        # A sd of 0.05: draws start close to the initial weights.
        self.log_scale = nn.ParameterList(torch.full_like(start, -3.0) for start in starts)

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent, in the plates in which the program does."""
        drawn, made = {}, Plates()
        for name, loc, log_scale in zip(self.supports, self.loc, self.log_scale, strict=True):
            with _inside(self.plates[name], made):
                drawn[name] = pyro.sample(name, self._law(name, loc, log_scale))
        return drawn

    @torch.no_grad()
    def weighed_draws(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws (samples, ...) of every global latent, and log q (samples,) of all of them together, nats."""
        drawn, log_q = dict[str, Tensor](), torch.zeros(samples)
        for name, loc, log_scale in zip(self.supports, self.loc, self.log_scale, strict=True):
            law = self._law(name, loc, log_scale)
            drawn[name] = law.sample((samples,))
            log_q = log_q.to(loc) + law.log_prob(drawn[name]).reshape(samples, -1).sum(-1)
        return drawn, log_q

    @torch.no_grad()
    def start_at(self, name: str, value: Tensor) -> bool:
        """Start the median of a global latent at a value; whether that was possible."""
        if name not in self.supports:
            return False
        start: Tensor = bijection_to(self.supports[name]).inv(value)
        loc = self.loc[list(self.supports).index(name)]
        if not bool(start.isfinite().all()):
            return False
        loc.copy_(start)
        return True

    def _law(self, name: str, loc: Tensor, log_scale: Tensor) -> Distribution:
        """Normals of the coordinates of one latent, with the events that it has in the program."""
        support = self.supports[name]
        n_event = len(bijection_to(support).inverse_shape(torch.Size(self.events[name])))
        return transform_distribution(dist.Normal(loc, log_scale.exp()).to_event(n_event), support)

    def medians(self) -> dict[str, Tensor]:
        """The median of every global latent under q."""
        pairs = zip(self.supports.items(), self.loc, strict=True)
        # Clones, for a program may keep what it samples as an attribute, and copies of a fit are made with it.
        return {name: bijection_to(support)(loc.detach().clone()) for (name, support), loc in pairs}


class GlobalAutoguide(GlobalLatents):
    """One of Pyro's autoguides, for the global latents alone.

    Its parameters are parameters of this module. The autoguide is never called as a PyroModule, which would register
    them with Pyro once more, under names that are the same for every model of a session.

    Parameters
    ----------
    model
        The model.
    make
        What makes the autoguide of a program, such as its class. If it takes ``init_loc_fn``, it is given one that
        starts parameters of the model where they started, and other latents in the middle of their support.
    points
        Whether point masses will do.
    seed
        Of the autoguide's initial parameters.

    Raises
    ------
    ModelError
        If there are no global latents, or ``make`` does not make an autoguide that will do.
    """

    auxiliary = True

    def __init__(self, model: SCVI, make: GlobalGuide, *, points: bool, seed: int) -> None:
        _require_maker(make)
        found = found_globals(model)
        super().__init__(found)
        if not found:
            raise ModelError("global_guide= is for models with global latents, and this one has none: leave it out")
        own = _own_names(list(found))
        self.called = {alias: name for name, alias in own.items()}
        program = _GlobalProgram({own[name]: site for name, site in found.items()}, self.plates)
        starts = {own[name]: bijection_to(support_of(one.law))(_start(model, one)) for name, one in found.items()}
        with seeded(seed), _apart():
            self.autoguide = _with_starts(make, starts)(program)
            _require_suited(self.autoguide, points)
            self._require_same({name: site.value.shape for name, site in found.items()})

    def _require_same(self, shapes: dict[str, torch.Size]) -> None:
        """Run the autoguide, which makes its parameters then, and refuse it if it samples anything else."""
        for what, values in {"draws": self(), "medians": self.medians()}.items():
            found = {name: value.shape for name, value in values.items()}
            if found != shapes:
                kind = type(self.autoguide).__name__
                raise ModelError(f"global_guide= {kind} {what} {found}, and the program samples {shapes}")

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent, in the plates in which the program does."""
        with _Renamed(self.called):
            drawn = self.autoguide.forward()
        return {name: drawn[alias] for alias, name in self.called.items() if alias in drawn}

    @torch.no_grad()
    def weighed_draws(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """Draws (samples, ...) of every global latent, and log q (samples,) of all of them together, nats."""
        with _apart():
            each = [pyro.poutine.trace(self).get_trace() for _ in range(samples)]
        drawn = {
            name: torch.stack([torch.as_tensor(trace.nodes[name]["value"]) for trace in each]) for name in self.supports
        }
        return drawn, torch.stack([torch.as_tensor(trace.log_prob_sum()) for trace in each])

    def medians(self) -> dict[str, Tensor]:
        """The median of every global latent under q."""
        with _apart():  # AutoDelta runs itself
            found = self.autoguide.median()
        return {name: found[alias].detach() for alias, name in self.called.items() if alias in found}


def global_latents(model: SCVI, make: GlobalGuide | None, *, points: bool, seed: int) -> GlobalLatents:
    """Q of the global latents: independent normals, or the autoguide that ``make`` makes."""
    return GlobalNormal(model) if make is None else GlobalAutoguide(model, make, points=points, seed=seed)


class _GlobalProgram:
    """The program's global latents alone, in their plates: all that an autoguide over them may see."""

    def __init__(self, sites: dict[str, TracedSite], plates: dict[str, dict[int, tuple[str, int]]]) -> None:
        self.sites, self.plates = sites, plates

    def __call__(self) -> None:
        made = Plates()
        for name, site in self.sites.items():
            with _inside(self.plates[site.name], made):
                pyro.sample(name, site.law)


class _Starts:
    """Starting values by name, as an autoguide's ``init_loc_fn``."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values

    def __call__(self, site: Any) -> Tensor:
        return self.values[site["name"]]


class _Renamed(Messenger):
    """Gives sites the names that they have in the model."""

    def __init__(self, names: dict[str, str]) -> None:
        super().__init__()
        self.names = names

    def _pyro_sample(self, msg: Any) -> None:
        msg["name"] = self.names.get(msg["name"], msg["name"])


@contextmanager
def _apart() -> Iterator[None]:
    """Hide the block from the caller's handlers and from Pyro's parameter store."""
    with pyro.poutine.block(), pyro.get_param_store().scope():
        yield


@contextmanager
def _inside(plates: dict[int, tuple[str, int]], made: Plates) -> Iterator[None]:
    """The plates of a latent, by their dimension; ``made`` are those of latents before it, which may be in the same."""
    with ExitStack() as entered:
        for dim, (plate, size) in plates.items():
            if (plate, dim) not in made:
                made[plate, dim] = pyro.plate(plate, size, dim=dim)
            entered.enter_context(made[plate, dim])
        yield


def found_globals(model: SCVI) -> dict[str, TracedSite]:
    """The global latents by name; refuses laws without coordinates."""
    found = {site.name: site for site in model.discovered() if site.kind is Kind.GLOBAL}
    for name, site in found.items():
        require_coordinates(site.law, f"the law of the global latent {name!r}")
    if found and not is_packaged(model):
        _require_one_size(found, model.discovered(few=3))
    return found


def _require_one_size(found: dict[str, TracedSite], others: list[TracedSite]) -> None:
    """Refuse a latent of the cells that is sampled outside their plate, which shows in its shape."""
    for site in others:
        if site.name in found and site.value.shape != found[site.name].value.shape:
            raise ModelError(
                f"the program's site {site.name!r} has a value for each cell and is outside of the plate 'cells': "
                "sample it inside of cells_plate(gamma, index, n_cells) from pyro_scvi.program"
            )


def _start(model: SCVI, site: TracedSite) -> Tensor:
    """Unconstrained start of a global latent: where its parameter started, if it is one; else the middle of R^n."""
    bijection = bijection_to(support_of(site.law))
    shape = torch.Size(bijection.inverse_shape(site.value.shape))
    middle = site.value.new_zeros(shape)
    given = model.weights.start_of(site.name)
    if given is None:
        return middle
    start: Tensor = bijection.inv(given)
    return torch.where(start.isfinite(), start, middle)  # a parameter may start outside the prior's support


def _own_names(names: list[str]) -> dict[str, str]:
    """Names for an autoguide, which keeps ``a.b`` as attribute b of a, and so cannot have both a and a.b."""
    own = dict[str, str]()
    for name in names:
        owners = [other for other in names if name.startswith(f"{other}.")]
        owner = max(owners, key=len, default="")
        alias = owner + name.removeprefix(owner).replace(".", "_") if owner else name
        while owner and (alias in names or alias in own.values()):
            alias += "_"
        own[name] = alias
    return own


def _with_starts(make: GlobalGuide, starts: dict[str, Tensor]) -> GlobalGuide:
    """``make``, told where to start if it can be, and is not yet."""
    given = isinstance(make, partial) and "init_loc_fn" in make.keywords
    takes = "init_loc_fn" in inspect.signature(make).parameters
    return partial(make, init_loc_fn=_Starts(starts)) if takes and not given else make


def _require_maker(make: Any) -> None:
    if not callable(make) or isinstance(make, nn.Module):
        raise ModelError(
            f"global_guide must be what makes an autoguide, as pyro.infer.autoguide.AutoMultivariateNormal or a "
            f"functools.partial of it, got {brief(make)}"
        )


def _require_suited(autoguide: Any, points: bool) -> None:
    kind = type(autoguide).__name__
    if not isinstance(autoguide, SUITED) or isinstance(autoguide, UNSUITED):
        raise ModelError(
            f"global_guide made a {kind}, which is not supported: take AutoNormal, AutoDiagonalNormal, "
            "AutoMultivariateNormal, AutoLowRankMultivariateNormal, or AutoDelta in the guide Point"
        )
    if isinstance(autoguide, AutoDelta) and not points:
        raise ModelError(
            "AutoDelta has no density, and this guide needs one: take AutoNormal, AutoMultivariateNormal, or the guide "
            "Point"
        )
