"""Unconstrained coordinates of a cell's latents, one number line for each, as the program samples them."""

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions.transforms import ExpTransform, ReshapeTransform

from pyro_scvi.discovery import Kind, TracedSite
from pyro_scvi.distributions.supports import (
    bijection_to,
    constant_support,
    require_coordinates,
    same_coordinates,
    same_set,
    support_of,
    varying_entries,
)
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.enumeration import n_values
from pyro_scvi.guides.packaged import is_packaged
from pyro_scvi.guides.supported import Latent
from pyro_scvi.model import SCVI
from pyro_scvi.types import Distribution
from pyro_scvi.utils.execution import tracing

FIRST = ("z", "l")
"""Sites whose coordinates come first, in every save; those of others follow in the program's order."""


@dataclass(frozen=True)
class LocalSite:
    """A latent of every cell: its support, event shape, bijection from R^n, and its place among the coordinates."""

    name: str
    support: Any
    event_shape: torch.Size
    bijection: Any
    place: slice

    @cached_property
    def real(self) -> bool:
        """Whether the coordinates are the values themselves."""
        return is_real(self.support)

    @cached_property
    def inverse_shape(self) -> torch.Size:
        """Shape of an event in unconstrained coordinates."""
        return torch.Size(self.bijection.inverse_shape(self.event_shape))

    @cached_property
    def varying(self) -> Tensor:
        """Which numbers of an event, flattened, differ between its values."""
        return varying_entries(self.support, self.event_shape).reshape(-1)

    @property
    def size(self) -> int:
        """Number of coordinates."""
        return int(self.place.stop - self.place.start)

    def shaped(self, part: Tensor) -> Tensor:
        """Coordinates (..., cells, size) of this site as (..., cells, 1) and the shape of an unconstrained event."""
        return part.reshape(*part.shape[:-1], 1, *self.inverse_shape)

    def flat(self, unconstrained: Tensor) -> Tensor:
        """The inverse of :meth:`shaped`."""
        lead = unconstrained.shape[: unconstrained.dim() - 1 - len(self.inverse_shape)]
        return unconstrained.reshape(*lead, self.size)

    def value(self, part: Tensor) -> Tensor:
        """The site (..., cells, 1) and its event, at its coordinates (..., cells, size)."""
        value: Tensor = self.shaped(part) if self.real else self.bijection(self.shaped(part))
        return value

    def coordinates(self, value: Tensor) -> Tensor:
        """Coordinates (..., cells, size) of values: the inverse of :meth:`value`."""
        return self.flat(self.bijection.inv(value))

    def normal(self, loc: Tensor, scale: Tensor) -> Distribution:
        """Independent normals of the coordinates (..., cells, size), as a distribution of the site."""
        base = dist.Normal(self.shaped(loc), self.shaped(scale)).to_event(len(self.inverse_shape))
        return transform_distribution(base, self.support)

    def from_flat(self, base: Distribution, *steps: Any) -> Distribution:
        """The distribution of the site if its coordinates are ``base``, event (size,), transformed by ``steps``."""
        flat = torch.Size([self.size])
        shaped = [] if self.inverse_shape == flat else [ReshapeTransform(flat, self.inverse_shape)]
        return transform_distribution(base, self.support, *steps, *shaped)

    def log_abs_det(self, part: Tensor) -> Tensor:
        """Log of |d site / d coordinates|, (..., cells)."""
        if self.real:
            return part.new_zeros(part.shape[:-1])
        inner = self.shaped(part)
        change: Tensor = self.bijection.log_abs_det_jacobian(inner, self.bijection(inner))
        return change.reshape(*part.shape[:-1], -1).sum(-1)


class Coordinates:
    """Unconstrained coordinates u of a cell's latents: z, l, and others in the order in which the program samples them.

    Attributes
    ----------
    local
        The latents of every cell by name, in the order of u.
    order
        Their names in the order of the program.
    enumerated
        Names of the discrete latents of every cell, which are summed out and have no coordinates.
    size
        Number of coordinates.
    """

    def __init__(self, model: SCVI) -> None:
        found = model.discovered()
        latents = [site for site in found if site.kind is Kind.LOCAL]
        self.order = tuple(site.name for site in latents)
        discrete = [site for site in found if site.kind is Kind.ENUMERATED]
        self.enumerated = {site.name: tuple(site.law.event_shape) for site in discrete}
        self._n_values = {site.name: n_values(site.law, site.name) for site in discrete}
        self._packaged = is_packaged(model)
        known = [site for name in FIRST for site in latents if site.name == name]
        self.local = _placed([*known, *(site for site in latents if site.name not in FIRST)])
        self.size = sum(site.size for site in self.local.values())
        self.library = self._library(model)

    def _library(self, model: SCVI) -> LocalSite | None:
        """The site of the library size, whose posterior lies near the cell's total."""
        site = self.local.get("l") if model.library.latent else None
        positive = site is not None and isinstance(site.bijection, ExpTransform) and not site.event_shape
        return site if positive else None

    def of_z(self) -> LocalSite:
        """The site z.

        Raises
        ------
        ModelError
            If the program has no latent of this name.
        """
        if "z" not in self.local:
            raise ModelError(f"the program samples no latent called 'z'; its latents are {list(self.local)}")
        return self.local["z"]

    def latents(self) -> dict[str, Latent]:
        """What the program's sites must be for these to be their coordinates."""
        local = {s.name: Latent(Kind.LOCAL, s.support, tuple(s.event_shape)) for s in self.local.values()}
        return local | {name: Latent(Kind.ENUMERATED, None, shape) for name, shape in self.enumerated.items()}

    def require_same(self, trace: pyro.poutine.Trace) -> None:
        """Refuse a run of the program in which latents have other values than they had when it was looked at.

        Raises
        ------
        ModelError
            Naming the latent.
        """
        if self._packaged:
            return
        nodes: Any = trace.nodes
        moved = [n for n, site in self.local.items() if not _is_on(nodes[n]["fn"], site)]
        moved += [n for n, size in self._n_values.items() if len(nodes[n]["value"]) != size]
        if moved:
            raise ModelError(
                f"the program's site {moved[0]!r} has other values for these cells or draws than for others: take "
                "a distribution whose support is constant, and scale its value instead"
            )

    def sites(self, u: Tensor) -> dict[str, Tensor]:
        """Sites (..., cells, 1) and their events, such as z (..., cells, 1, latents), at u (..., cells, size)."""
        return {site.name: site.value(u[..., site.place]) for site in self.local.values()}

    def of(self, sites: dict[str, Tensor]) -> Tensor:
        """Coordinates u (..., cells, size) of sites: the inverse of :meth:`sites`."""
        parts = [site.coordinates(sites[site.name]) for site in self.local.values()]
        return torch.cat(parts, -1) if len(parts) > 1 else parts[0]

    def joined(self, parts: dict[str, Tensor]) -> Tensor:
        """Coordinates (..., cells, size) from those of every site."""
        return torch.cat([parts[name] for name in self.local], -1)

    def log_abs_det(self, u: Tensor) -> Tensor:
        """Log of |d sites / du|, (..., cells)."""
        changes = [site.log_abs_det(u[..., site.place]) for site in self.local.values() if not site.real]
        return torch.stack(changes).sum(0) if changes else u.new_zeros(u.shape[:-1])


def require_continuous(coordinates: Coordinates) -> None:
    """Refuse a program without a continuous latent of the cells, of which guides and samplers are.

    Raises
    ------
    ModelError
        Naming the latents that it has.
    """
    if not coordinates.local:
        names = list(coordinates.enumerated)
        has = f"no latent of the cells but {names}, which it sums out" if names else "no latent of the cells"
        raise ModelError(
            f"the program has {has}, and guides and draws need a continuous one: sample one on which nothing "
            "depends, as pyro.sample('unused', dist.Normal(0.0, 1.0)) in the plate 'cells'; log p(x) and all "
            "posteriors stay what they are"
        )


def _is_on(law: Any, site: LocalSite) -> bool:
    """Whether the values of a law are those of a site; bounds have no numbers while torch traces."""
    if torch.Size(law.event_shape) != site.event_shape:
        return False
    if tracing() or same_set(support_of(law), site.support):
        return True
    support = constant_support(law, f"the law of the site {site.name!r}")
    return same_coordinates(support, site.support, site.event_shape)


def _placed(found: list[TracedSite]) -> dict[str, LocalSite]:
    """The sites by name, each with its place after those before it."""
    for site in found:
        require_coordinates(site.law, f"the law of the site {site.name!r}")
    supports = [constant_support(site.law, f"the law of the site {site.name!r}") for site in found]
    events = [torch.Size(site.law.event_shape) for site in found]
    sizes = [
        torch.Size(bijection_to(support).inverse_shape(event)).numel()
        for support, event in zip(supports, events, strict=True)
    ]
    ends = list(accumulate(sizes))
    return {
        site.name: LocalSite(site.name, support, event, bijection_to(support), slice(end - size, end))
        for site, support, event, size, end in zip(found, supports, events, sizes, ends, strict=True)
    }


def is_real(support: Any) -> bool:
    """Whether a support is all of the real line or space, where coordinates need no transform."""
    return isinstance(
        getattr(support, "base_constraint", support), type(constraints.real)
    )  # by type: a copied model has a copy of it


def transform_distribution(base: Distribution, support: Any, *steps: Any) -> Distribution:
    """``base`` transformed by ``steps`` and mapped onto ``support``; ``base`` itself if neither changes it."""
    steps = steps if is_real(support) else (*steps, bijection_to(support))
    if isinstance(base, dist.Normal) and len(steps) == 1 and isinstance(steps[0], ExpTransform):
        return dist.LogNormal(base.loc, base.scale)  # the same law, with a mean
    return dist.TransformedDistribution(base, list(steps)) if steps else base
