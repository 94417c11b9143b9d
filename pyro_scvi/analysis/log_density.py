"""log_density: the program's log joint density of all latents, for samplers of one's own."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pyro_scvi.analysis.inputs import minibatches, require_inputs
from pyro_scvi.data.cells import Cells
from pyro_scvi.distributions.supports import bijection_to
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.log_joint import cell_terms, log_terms_at, scored
from pyro_scvi.inference.evaluation import draws_at_once, evaluating, undisturbed
from pyro_scvi.priors.base import require_proper
from pyro_scvi.utils.checks import brief, switches_checked

if TYPE_CHECKING:
    from pyro_scvi.training.fitted import Fit

Array = TypeVar("Array", Tensor, np.ndarray)


class LogDensity:
    """Log density of all latents of some cells in unconstrained coordinates u, as :func:`log_density` returns it.

    Calling it gives log p(x, latents) with the logarithm of the change of volume, so that exp of it integrates over u
    to p(x). Discrete latents are summed out. Tensors give tensors, through which gradients flow; arrays give arrays.

    Attributes
    ----------
    names
        The latents, in the order of their coordinates.
    size
        Number of coordinates, of each cell or, with free globals, of all cells and global latents together.
    dtype
        Precision of the values.

    Examples
    --------
    >>> density = ps.log_density(fit, test.take(range(3)))
    >>> density.names, density.size
    (('z', 'l'), 3)
    >>> u = torch.zeros(5, 3, 3)
    >>> density(u).shape, density.grad(u).shape, density.constrain(u)["z"].shape
    (torch.Size([5, 3]), torch.Size([5, 3, 3]), torch.Size([5, 3, 1, 2]))
    """

    def __init__(self, fit: Fit, cells: Cells, free_globals: bool) -> None:
        self._model, self._guide = fit.model, fit.guide
        with evaluating(fit.model, fit.guide, 0):
            self._x, self._gamma = next(iter(minibatches(fit, cells).in_order(cells.n_cells)))
            self._total = fit.model.library.log_prob_of_total(self._x, self._gamma)
            self._medians = {name: value.detach() for name, value in fit.guide.weights.medians().items()}
        self._globals = self._medians if free_globals else {}
        self.free_globals = free_globals
        self.names = (*self._globals, *fit.guide.coordinates.local)
        self.dtype = fit.dtype
        n_local = fit.guide.coordinates.size
        self.size = sum(self._sizes()) + cells.n_cells * n_local if free_globals else n_local

    def __repr__(self) -> str:
        return f"LogDensity(names={self.names}, size={self.size}, dtype={self.dtype}, cells={len(self._x)})"

    def __call__(self, u: Array) -> Array:
        """Log density, nats: (samples, cells) of u (samples, cells, size); with free globals (samples,)."""
        value = self._value(self._tensor(u))
        return value.detach().cpu().numpy() if isinstance(u, np.ndarray) else value

    def grad(self, u: Array) -> Array:
        """Gradient of the log density, of the shape of u."""
        at = self._tensor(u).detach().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(self._value(at).sum(), at)
        return gradient.cpu().numpy() if isinstance(u, np.ndarray) else gradient

    def constrain(self, u: Array) -> dict[str, Array]:
        """Latents of the program at u: (samples, cells, 1) and an event, global ones (samples, ...)."""
        drawn, local = self._parts(self._tensor(u))
        sites = drawn | self._guide.coordinates.sites(local)
        made: Any = {k: v.detach().cpu().numpy() for k, v in sites.items()} if isinstance(u, np.ndarray) else sites
        return made

    def unconstrain(self, sites: dict[str, Array]) -> Array:
        """Coordinates u of latents: the inverse of :meth:`constrain`.

        Raises
        ------
        ModelError
            If a latent is missing.
        """
        if missing := [name for name in self.names if name not in sites]:
            raise ModelError(f"unconstrain needs all of {list(self.names)}; {missing} are missing")
        tensors = {name: torch.as_tensor(sites[name], dtype=self.dtype).to(self._x.device) for name in self.names}
        u = self._guide.coordinates.of(tensors)
        if self.free_globals:
            flat: list[Tensor] = [self._bijection(name).inv(tensors[name]) for name in self._globals]
            u = torch.cat([part.reshape(len(u), -1) for part in (*flat, u)], -1)
        made: Any = u.cpu().numpy() if isinstance(next(iter(sites.values())), np.ndarray) else u
        return made

    def _tensor(self, u: Any) -> Tensor:
        """U in the model's precision and place; refuses other shapes."""
        tensor = torch.as_tensor(u, dtype=self.dtype, device=self._x.device)
        shape = (self.size,) if self.free_globals else (len(self._x), self.size)
        if tuple(tensor.shape[1:]) != shape or tensor.dim() != 1 + len(shape):
            raise ModelError(f"u must have shape (samples, {', '.join(map(str, shape))}), got {tuple(tensor.shape)}")
        return tensor

    def _value(self, u: Tensor) -> Tensor:
        wanted = torch.is_grad_enabled()
        with undisturbed(0, self._model, self._guide), torch.set_grad_enabled(wanted):
            if self.free_globals:
                return torch.stack([self._joint(one[None]) for one in u])
            return torch.cat([self._conditional(part) for part in u.split(draws_at_once(self._x))])

    def _conditional(self, u: Tensor) -> Tensor:
        """(samples, cells), global latents at their medians."""
        terms = log_terms_at(u, self._guide.coordinates, self._model, self._x, self._gamma, self._medians)
        return torch.stack(terms).sum(0) + self._total

    def _joint(self, u: Tensor) -> Tensor:
        """The joint density of all latents at one u (1, size), a scalar."""
        drawn, local = self._parts(u)
        coordinates = self._guide.coordinates
        values = {name: value[0] for name, value in drawn.items()}
        trace = scored(self._model, self._x, self._gamma, values | coordinates.sites(local), coordinates)
        total = torch.stack(cell_terms(trace, *coordinates.local)).sum() + coordinates.log_abs_det(local).sum()
        nodes: Any = trace.nodes
        for name, part in self._flat(u).items():
            bijection = self._bijection(name)
            change = bijection.log_abs_det_jacobian(part, bijection(part))
            total = total + nodes[name]["log_prob_sum"] + change.sum()
        return total + self._total.sum()

    def _parts(self, u: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Global latents (samples, ...), and coordinates (samples, cells, size) of those of the cells."""
        if not self.free_globals:
            return {}, u
        drawn = {name: self._bijection(name)(part) for name, part in self._flat(u).items()}
        return drawn, u[:, sum(self._sizes()) :].reshape(len(u), len(self._x), -1)

    def _flat(self, u: Tensor) -> dict[str, Tensor]:
        """Unconstrained values (samples, ...) of the global latents."""
        ends = list(accumulate(self._sizes()))
        parts = {}
        for name, end, size in zip(self._globals, ends, self._sizes(), strict=True):
            shape = self._bijection(name).inverse_shape(self._globals[name].shape)
            parts[name] = u[:, end - size : end].reshape(len(u), *shape)
        return parts

    def _sizes(self) -> list[int]:
        return [
            torch.Size(self._bijection(name).inverse_shape(value.shape)).numel()
            for name, value in self._globals.items()
        ]

    def _bijection(self, name: str) -> Any:
        return bijection_to(self._guide.weights.supports[name])


@switches_checked
def log_density(fit: Fit, cells: Cells, free_globals: bool = False) -> LogDensity:
    r"""The log density of all latents of some cells, for a sampler of your own.

    .. math:: \log p(x_n, z_n(u), l_n(u), \ldots) + \log |\det \partial (z_n, l_n, \ldots) / \partial u|

    Draws of u go back in by ``ps.Given(density.constrain(u))``.

    Parameters
    ----------
    fit, cells
        The fit and cells of its schema, which are held in memory.
    free_globals
        False: global latents are at the guide's medians, and cells are independent: u is (samples, cells, size). True:
        they are coordinates, too: u is (samples, size), first all global latents, then cell after cell, and the value
        is that of the joint density. Draws of it go back in by ``fit.with_globals``, too.

    Returns
    -------
    LogDensity
        A callable.

    Raises
    ------
    ModelError
        For the prior Flat, for a model without global latents that are to be free, and for arguments of the wrong type.
    SchemaError
        If the cells' genes or covariates are not those of the fit.

    Examples
    --------
    >>> density = ps.log_density(fit, test.take(range(2)))
    >>> u = density.unconstrain(density.constrain(torch.ones(1, 2, 3)))
    >>> bool(torch.allclose(u, torch.ones(1, 2, 3)))
    True
    """
    require_inputs(fit, cells)
    require_proper(fit.model, "there is no density")
    if not isinstance(free_globals, bool):
        raise ModelError(f"free_globals must be True or False, got {brief(free_globals)}")
    if free_globals and not fit.guide.weights.supports:
        raise ModelError("free_globals=True needs global latents, and this model has none: leave it out")
    return LogDensity(fit, cells, free_globals)
