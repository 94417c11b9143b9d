"""Supports of laws, found behind wrappers and mixtures, and the refusal of laws that no coordinates in R^n reach."""

from collections.abc import Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch.distributions import biject_to
from torch.distributions.transforms import ExpTransform

from pyro_scvi.errors import ModelError
from pyro_scvi.utils.precision import in_float64

WRAPPERS = (dist.Independent, dist.MaskedDistribution, dist.ExpandedDistribution)
"""Laws that reshape or mask another, and leave its support alone."""

CIRCULAR = (dist.VonMises, torch.distributions.VonMises, dist.VonMises3D, dist.SineBivariateVonMises, dist.SineSkewed)
"""Laws on circles and spheres. torch calls the support of some of them real."""

PARTS = ("base_dist", "component_distribution", "base", "component0", "component1")
"""Attributes under which a law holds the laws that it is made of."""

TRANSFORMED = (dist.TransformedDistribution, torch.distributions.TransformedDistribution)

ABOVE = (type(constraints.positive), type(constraints.nonnegative))

BOUNDS = ("lower_bound", "upper_bound")


def unwrapped(law: Any) -> Any:
    """The law without the wrappers that only reshape or mask it."""
    while isinstance(law, WRAPPERS):
        law = law.base_dist
    return law


def is_masked(law: Any) -> bool:
    """Whether the law, or what it wraps, counts as if it were none in places."""
    while isinstance(law, WRAPPERS):
        if isinstance(law, dist.MaskedDistribution):
            return law._mask is not True
        law = law.base_dist
    return False


def made_of(law: Any) -> Iterator[Any]:
    """The law itself and every law inside it: what it wraps, transforms or mixes."""
    yield law
    for part in PARTS:
        inner = getattr(law, part, None)
        if hasattr(inner, "log_prob"):
            yield from made_of(inner)


def is_discrete(law: Any) -> bool:
    """Whether the law's values are isolated points."""
    bare = unwrapped(law)
    if getattr(bare, "has_enumerate_support", False):
        return True
    try:
        return bool(bare.support.is_discrete)
    except (NotImplementedError, ValueError, AttributeError):  # laws that do not say where they live
        return False


def is_point(law: Any) -> bool:
    """Whether the law, or a part of the mixture that it is, is one point without a density."""
    return any(isinstance(part, dist.Delta) for part in made_of(law))


def support_of(law: Any) -> Any:
    """The support; of a mixture that of its components, which :func:`require_coordinates` found to be one."""
    if isinstance(law, dist.Independent) and _holds_mixture(law):
        return constraints.independent(support_of(law.base_dist), law.reinterpreted_batch_ndims)
    if isinstance(law, WRAPPERS) and _holds_mixture(law):
        return support_of(law.base_dist)
    if isinstance(law, dist.MixtureSameFamily):
        component = law.component_distribution
        return _of_first(support_of(component), -1 - len(component.event_shape))
    return law.support


def constant_support(law: Any, what: str) -> Any:
    """The support of a latent of every cell, one for all cells, also where the law has a bound for each.

    Raises
    ------
    ModelError
        Naming the law by ``what``, if its support differs between cells.
    """
    support = support_of(law)
    try:
        while (deepest := _deepest_bound(support)) > len(law.event_shape):
            support = _of_first(support, -deepest)
    except ValueError as error:
        raise ModelError(
            f"{what} has a support that differs between cells or draws: take a distribution with a constant "
            "support, and scale its value instead"
        ) from error
    return support


def is_learned(support: Any) -> bool:
    """Whether a bound of a support has a gradient."""
    bounds = _bounds(getattr(support, "base_constraint", support))
    return any(isinstance(bound, torch.Tensor) and bound.requires_grad for bound in bounds)


def _deepest_bound(support: Any) -> int:
    """Dimensions of the bound that has most."""
    bounds = _bounds(getattr(support, "base_constraint", support))
    return max((bound.dim() for bound in bounds if isinstance(bound, torch.Tensor)), default=0)


def bijection_to(support: Any) -> Any:
    """The bijection from R^n to a support; to the numbers above 0 the exponential, without torch's shift by 0."""
    above_zero = isinstance(support, ABOVE) and isinstance(support.lower_bound, int | float) and not support.lower_bound
    return ExpTransform() if above_zero else biject_to(support)


def require_coordinates(law: Any, what: str) -> None:
    """Refuse a law whose values no bijection from R^n reaches; ``what`` names it in the message.

    Raises
    ------
    ModelError
        For discrete laws and point masses, for laws on circles and spheres, and where no bijection is known.
    """
    name = type(unwrapped(law)).__name__
    if is_point(law):
        raise ModelError(f"{what} is a point mass (Delta), which has no density: take a narrow continuous distribution")
    if circular := [type(part).__name__ for part in made_of(law) if isinstance(part, CIRCULAR)]:
        raise ModelError(
            f"{what} has values on a circle or sphere ({circular[0]}), which has no bijection from R^n: take two "
            "normal latents, whose angle is the phase, or a distribution on an interval. If phases repeat on the "
            "circle, as in cos(2 * angle), let the angle be of one period"
        )
    if is_discrete(law):
        raise ModelError(f"{what} is discrete ({name}): sum it out, as a dist.MixtureSameFamily does")
    try:
        _require_filled(law)
        biject_to(support_of(law))
    except (NotImplementedError, ValueError) as error:
        raise ModelError(
            f"{what} ({name}) has a support that no bijection from R^n is known for: {error}; take a distribution "
            "on the real line, above a bound, on an interval or on the simplex"
        ) from error


def spread_of_scales(law: Any) -> float:
    """Standard deviation of the logarithms of a law's scales over cells (cells, 1); 0 where they take few values.

    Few values are those of a discrete latent, and each of them is a component of its own where that is summed out.
    """
    try:
        scale = law.scale if hasattr(law, "scale") else law.stddev
    except (NotImplementedError, AttributeError):
        return 0.0
    scale = torch.as_tensor(scale, dtype=torch.float64)
    if scale.unique().numel() <= scale.numel() // 2 or not (scale > 0).all() or not scale.isfinite().all():
        return 0.0
    return float(scale.log().flatten(1).std(0).max() if scale.dim() > 1 else scale.log().std())


def share_at_bounds(law: Any, draws: int) -> float:
    """The share of a law's draws so near to a bound that numbers of their precision do not tell them from it.

    Next to 0 there are numbers as small as 1e-38; next to 1 float32 has none between 1 - 6e-8 and 1.
    """
    support, value = support_of(law), law.sample((draws,))
    support, precision = getattr(support, "base_constraint", support), torch.finfo(value.dtype)
    if isinstance(support, type(constraints.simplex)):
        return float((value.amax(-1) >= 1 - 2 * precision.eps).double().mean())
    near = torch.zeros_like(value, dtype=torch.bool)
    for bound in map(torch.as_tensor, _bounds(support)):
        near |= (value - bound).abs() <= (2 * precision.eps * bound.abs()).clamp(min=precision.tiny)
    return float(near.double().mean())


def same_coordinates(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether the bijections to two supports take the same R^n to the same values of an event's shape."""
    first, second = biject_to(one), biject_to(other)
    try:
        size = first.inverse_shape(torch.Size(shape))
        if size != second.inverse_shape(torch.Size(shape)):
            return False
        return _same_values(one, other, torch.linspace(-1.5, 1.5, size.numel()).reshape(size))
    except (RuntimeError, ValueError):  # bounds of other shapes
        return False


def same_set(one: Any, other: Any) -> bool:
    """Whether two supports are of one kind and have no bounds, or the same numbers for bounds: the cheap question."""
    first, second = (getattr(support, "base_constraint", support) for support in (one, other))
    if type(first) is not type(second):
        return False
    pairs = list(zip(_bounds(first), _bounds(second), strict=True))
    return all(isinstance(a, int | float) and isinstance(b, int | float) and a == b for a, b in pairs)


def varying_entries(support: Any, shape: tuple[int, ...]) -> torch.Tensor:
    """Which numbers of values of a shape differ between values: not the upper triangle of a Cholesky factor."""
    bijection, of = bijection_to(support), torch.Generator().manual_seed(0)
    size = bijection.inverse_shape(torch.Size(shape))
    one, other = (bijection(_placed(torch.randn(size, generator=of), support)) for _ in range(2))
    return ~torch.isclose(one, other).cpu()


def _same_values(one: Any, other: Any, u: torch.Tensor) -> bool:
    first, second = (in_float64(biject_to(support)(_placed(u, support))).cpu() for support in (one, other))
    return torch.allclose(first, second)


def _placed(u: torch.Tensor, support: Any) -> torch.Tensor:
    """Points where the bounds of a support are, in float64 unless it is MPS, which has none."""
    place = _place(support)
    return u.to(place) if place.type == "mps" else u.double().to(place)


def _place(support: Any) -> torch.device:
    bounds = _bounds(getattr(support, "base_constraint", support))
    return next((bound.device for bound in bounds if isinstance(bound, torch.Tensor)), torch.device("cpu"))


def _holds_mixture(law: Any) -> bool:
    return isinstance(unwrapped(law), dist.MixtureSameFamily)


def _of_first(support: Any, dim: int) -> Any:
    """The support of the first component of a mixture, whose components lie along ``dim`` of the support's bounds."""
    if isinstance(support, constraints.independent):
        return constraints.independent(_of_first(support.base_constraint, dim), support.reinterpreted_batch_ndims)
    bounds = _bounds(support)
    return type(support)(*(_first(bound, dim) for bound in bounds)) if bounds else support


def _first(bound: Any, dim: int) -> Any:
    if not isinstance(bound, torch.Tensor) or bound.dim() < -dim:
        return bound
    first = bound.select(dim, 0)
    if not bool((bound == first.unsqueeze(dim)).all()):
        raise ValueError("its parts have different supports")
    return first


def _bounds(support: Any) -> list[Any]:
    return [getattr(support, name) for name in BOUNDS if hasattr(support, name)]


def _require_filled(law: Any) -> None:
    """Refuse transforms of a law that lives on a part of what they take: their codomain is then not its support."""
    for part in made_of(law):
        if type(part) not in TRANSFORMED:  # named ones, such as LogNormal, know their support
            continue
        reached = support_of(part.base_dist)
        for transform in part.transforms:
            if not _equivalent(reached, transform.domain):
                raise ValueError(f"the distribution reaches only a part of the codomain of {type(transform).__name__}")
            reached = transform.codomain


def _equivalent(one: Any, other: Any) -> bool:
    """Whether two supports are one set, whatever of their dimensions they call events."""
    first, second = (getattr(support, "base_constraint", support) for support in (one, other))
    if type(first) is type(second) and not _bounds(first):
        return True
    return first.event_dim == second.event_dim == 0 and _same_values(first, second, torch.tensor([-0.7]))
