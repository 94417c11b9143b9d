"""Global latents at draws of one's own, in the place of a guide of them."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_scvi.distributions.supports import bijection_to
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.base import Guide
from pyro_scvi.guides.global_latents import GlobalLatents, found_globals
from pyro_scvi.model import SCVI
from pyro_scvi.nn.component import named_anew
from pyro_scvi.utils.checks import brief

SAMPLED = ("chain", "draw"), ("draw",), ("sample",)
"""Dimensions of a Dataset along which draws lie."""

OfGuide = TypeVar("OfGuide", bound=Guide)


class GlobalDraws(GlobalLatents):
    """Given draws of all global latents; there is no density of them.

    Parameters
    ----------
    model
        The model.
    draws
        Of every global latent, (samples, ...).

    Raises
    ------
    ModelError
        Naming a latent that is missing, unknown, of another shape or outside its support.
    """

    def __init__(self, model: SCVI, draws: Mapping[str, Tensor]) -> None:
        found = found_globals(model)
        super().__init__(found)
        if not found:
            raise ModelError("the model has no global latents, so it cannot take draws of them")
        if draws.keys() != found.keys():
            raise ModelError(f"the model's global latents are {list(found)}, got draws of {list(draws)}")
        self.n_draws = len(next(iter(draws.values())))
        for place, (name, site) in enumerate(found.items()):
            require_finite(name, draws[name])
            value = draws[name].to(site.value)
            if value.shape != (self.n_draws, *site.value.shape) or not self.n_draws:
                raise ModelError(
                    f"draws of {name!r} must have shape (samples, {', '.join(map(str, site.value.shape))}), as many "
                    f"samples as the others, got {tuple(value.shape)}"
                )
            if not bool(self.supports[name].check(value).all()):
                raise ModelError(f"draws of {name!r} lie outside its support {self.supports[name]}")
            self.register_buffer(f"draws_{place}", value)

    def _given(self) -> dict[str, Tensor]:
        return {name: getattr(self, f"draws_{place}") for place, name in enumerate(self.supports)}

    def forward(self) -> dict[str, Tensor]:
        """Sample every global latent: one of the draws, the same for all of them."""
        chosen = int(torch.randint(self.n_draws, ()))
        return {
            name: pyro.sample(name, dist.Delta(value[chosen], event_dim=value.dim() - 1))
            for name, value in self._given().items()
        }

    def weighed_draws(self, samples: int) -> tuple[dict[str, Tensor], Tensor]:
        """``samples`` of the draws, at random where there are fewer or more; their density is not known."""
        given = self._given()
        order = torch.arange(samples) if samples == self.n_draws else torch.randperm(self.n_draws)[:samples]
        if samples > self.n_draws:
            order = torch.randint(self.n_draws, (samples,))
        drawn = {name: value[order.to(value.device)] for name, value in given.items()}
        return drawn, torch.full((samples,), torch.nan)

    def medians(self) -> dict[str, Tensor]:
        """The median of every number on R^n; the draw itself if there is only one."""
        medians = {}
        for name, value in self._given().items():
            bijection = bijection_to(self.supports[name])
            medians[name] = value[0] if self.n_draws == 1 else bijection(bijection.inv(value).median(0).values)
        return medians

    def each(self) -> list[dict[str, Tensor]]:
        """The draws one by one."""
        return [{name: value[i] for name, value in self._given().items()} for i in range(self.n_draws)]


def at_globals(guide: OfGuide, draws: Mapping[str, Tensor]) -> OfGuide:
    """A guide that shares all but its global latents with the given one; these are at ``draws``."""
    made = copy.copy(guide)
    made._modules = dict(guide._modules)  # the copy would share this, too
    made.weights = GlobalDraws(guide.model, draws)
    made.weights.to(next(guide.parameters(), torch.zeros(())).device)
    named_anew(made)
    return made


def parsed_draws(draws: Any, what: str) -> tuple[dict[str, Tensor], int, Any]:
    """Draws (samples, ...) by name, the number of chains, and the names of cells, if they are told.

    ``draws`` is a mapping of names to arrays, or an xarray Dataset with dimensions (chain, draw), draw or sample first.
    With several chains, sample = draw * chains + chain, as everywhere.

    Raises
    ------
    ModelError
        If it is neither, or a site has one number in place of draws; ``what`` names it.
    """
    if hasattr(draws, "data_vars"):
        return _of_dataset(draws, what)
    if not isinstance(draws, Mapping) or not draws:
        raise ModelError(f"{what} must be a dict of sites, or an xarray Dataset, got {brief(draws)}")
    try:
        tensors = {str(name): torch.as_tensor(np.asarray(value)) for name, value in _on_cpu(draws).items()}
    except (TypeError, ValueError) as error:
        raise ModelError(f"{what} must be arrays of numbers by site: {error}") from error
    for name, value in tensors.items():
        if not value.dim():
            raise ModelError(
                f"{what} of {name!r} must be an array whose first dimension is that of the draws, got the number "
                f"{value.item()}: write [{value.item()}] for one draw"
            )
    return tensors, 1, None


def require_finite(name: str, draws: Tensor) -> None:
    """Refuse draws of a site that are complex, infinite or NaN."""
    if draws.is_complex():
        raise ModelError(f"draws of {name!r} must be real numbers, got {draws.dtype}: pass their real part")
    if not bool(draws.isfinite().all()):
        wrong = int((~draws.isfinite()).sum())
        raise ModelError(
            f"draws of {name!r} must be finite, got {wrong} values that are infinite or NaN: leave such draws out"
        )


def _on_cpu(draws: Mapping[Any, Any]) -> dict[Any, Any]:
    return {name: value.detach().cpu() if isinstance(value, Tensor) else value for name, value in draws.items()}


def _of_dataset(draws: Any, what: str) -> tuple[dict[str, Tensor], int, Any]:
    lead = next((dims for dims in SAMPLED if set(dims) <= set(draws.dims)), None)
    if lead is None:
        raise ModelError(f"{what} must have dimensions (chain, draw) or sample, got {dict(draws.sizes)}")
    ahead = (*reversed(lead), "cell") if "cell" in draws.dims else tuple(reversed(lead))
    tensors = {}
    for name, value in draws.data_vars.items():
        if not set(lead) <= set(value.dims):
            continue  # a diagnosis of each cell
        first = [dim for dim in ahead if dim in value.dims]
        array = value.transpose(*first, ...).values
        tensors[str(name)] = torch.as_tensor(array.reshape(-1, *array.shape[len(lead) :]).copy())
    names = list(draws["cell"].values) if "cell" in draws.coords else None
    return tensors, draws.sizes["chain"] if "chain" in lead else 1, names
