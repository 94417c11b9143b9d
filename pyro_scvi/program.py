"""What model and guide share: the plate over cells, checked arguments, and the list of a program's sites."""

import inspect
from typing import Any, ClassVar

import pyro
import torch
from torch import Tensor, nn

from pyro_scvi.discovery import Site, TracedSite, discovered, like, require_distinct, sites_of
from pyro_scvi.errors import ModelError
from pyro_scvi.nn.component import Component, constructor_parameters
from pyro_scvi.utils.execution import execution
from pyro_scvi.utils.html_repr import grid

SIGNATURE = "def forward(self, x, gamma=None, *, marginal=True, mask=True, index=None, n_cells=None)"
"""What a program of one's own begins with."""


class Program(Component):
    """A model of cells that lists its own sites.

    ``kinds`` are those of what a program has under a name, which one of your own must not give another meaning.
    """

    kinds: ClassVar[dict[str, Any]]
    n_genes: int
    n_covariates: int
    likelihood: Any
    trained_on: Any

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a value, unless it takes a name that the program uses for something else.

        Raises
        ------
        ModelError
            Naming it.
        """
        whole = self.kinds.keys() <= self.__dict__.keys() | self.__dict__.get("_modules", {}).keys()
        if whole and self._is_taken(name, value):
            raise ModelError(
                f"{type(self).__name__} gives {name!r} another meaning, and the model uses this name itself: take "
                f"another one, such as self.own_{name}"
            )
        super().__setattr__(name, value)

    def _is_taken(self, name: str, value: Any) -> bool:
        """Whether ``value`` is not what a program has under this name: a part of it, its schema, or a method."""
        if name in self.kinds:
            return not isinstance(value, self.kinds[name])
        if name == "trained_on":
            return value is not None and not hasattr(value, "gene_names")
        own = next((vars(kind)[name] for kind in type(self).__mro__ if name in vars(kind)), None)
        return name not in dir(nn.Module) and (callable(own) or isinstance(own, property))

    def require_genes(self) -> None:
        """Refuse parts that were made for another number of genes.

        Raises
        ------
        ModelError
            If there is one; names the part and both numbers.
        """
        for part in self.modules():
            expected = part.expected_genes if isinstance(part, Component) else None
            if expected not in (None, self.n_genes):
                raise ModelError(f"{part!r} is for {expected} genes, the model has n_genes={self.n_genes}")

    def sites(self, *, marginal: bool = False) -> list[Site]:
        """List the random variables of the explicit program, or of the one with w, y and h integrated out."""
        self.require_arguments("marginal")
        return sites_of(self, None, like(self).new_zeros(2, self.n_covariates), marginal=marginal)

    def varied_gamma(self, n_cells: int) -> Tensor:
        """Covariates (cells, covariates) of 0 and 1, others in each cell than in the next."""
        places = torch.arange(n_cells)[:, None] + torch.arange(self.n_covariates)
        return (1 - places % 2).to(like(self))

    def discovered(
        self,
        *,
        marginal: bool = True,
        count: float = 1.0,
        seed: int = 0,
        at: float = 0.0,
        n_cells: int | None = None,
        few: int = 2,
        varied: bool = False,
    ) -> list[TracedSite]:
        """The sites that the program samples for a ``few`` cells whose counts are all ``count``, and gamma is zero.

        ``n_cells`` makes them a minibatch of so many; ``varied`` gives them the gamma of :meth:`varied_gamma`.

        Raises
        ------
        ModelError
            If two sites have one name, parameters are in different precisions, or ``forward`` lacks an argument.
        """
        self._require_one_precision()
        self.require_arguments("marginal")
        x = like(self).new_full((few, self.n_genes), count)
        gamma = self.varied_gamma(few) if varied else x.new_zeros(few, self.n_covariates)
        batch = {} if n_cells is None else {"index": torch.arange(few, device=x.device), "n_cells": n_cells}
        found = discovered(self, x, gamma, marginal=marginal, seed=seed, at=at, **batch)
        require_distinct(found)
        return found

    def require_arguments(self, *names: str) -> None:
        """Refuse a ``forward`` that does not take these arguments, by which programs are run.

        Raises
        ------
        ModelError
            Naming one that it lacks.
        """
        for name in names:
            if not self.takes(name):
                raise ModelError(f"{type(self).__name__}.forward does not take {name}=: begin it with {SIGNATURE}")

    def takes(self, name: str) -> bool:
        """Whether ``forward`` takes this argument."""
        taken = inspect.signature(self.forward).parameters.values()
        return any(one.kind is one.VAR_KEYWORD or one.name == name for one in taken)

    def _require_one_precision(self) -> None:
        """Refuse parts in different precisions, whose products torch does not take."""
        floats = [(name, one) for name, one in self.named_parameters() if one.is_floating_point()]
        kinds = {str(one.dtype).removeprefix("torch."): name for name, one in floats}
        if len(kinds) > 1:
            named = ", ".join(f"{name} is {kind}" for kind, name in sorted(kinds.items()))
            raise ModelError(f"parameters of the model are in different precisions ({named}): call model.float()")

    def shown(self) -> dict[str, Any]:
        """All arguments, also defaults, so that a printed model shows the sizes of its networks."""
        defaults = {name: one.default for name, one in constructor_parameters(type(self)).items()}
        return defaults | self.config()

    def _repr_html_(self) -> str:
        return super()._repr_html_() + grid(Site._fields, self.sites(marginal=not self.likelihood.explicit))


def register(program: Component) -> None:
    """Register a program's parameters with Pyro, so that Pyro's own SVI can train them."""
    if execution().register_parameters:
        pyro.module(program.pyro_name, program)


def cells_plate(gamma: Tensor, index: Tensor | None, n_cells: int | None) -> pyro.plate:
    """The plate over cells, dimension -2 (genes are -1), for rows ``index`` of ``n_cells`` or for all of them."""
    rows = torch.arange(len(gamma), device=gamma.device) if index is None else index
    return pyro.plate("cells", n_cells or len(gamma), subsample=rows, dim=-2)


def check_inputs(model: "Program", x: Tensor | None, gamma: Tensor | None) -> Tensor:
    """Check x and gamma against the model; return gamma (cells, covariates), with 0 columns if the model has none.

    Raises
    ------
    ModelError
        If genes, covariates or rows do not agree.
    """
    if gamma is None:
        if x is None or model.n_covariates:
            raise ModelError(f"the model needs gamma of shape (cells, {model.n_covariates}) beside x")
        gamma = x.new_zeros(len(x), 0)
    if gamma.shape[-1] != model.n_covariates:
        raise ModelError(f"gamma must have {model.n_covariates} columns, got {gamma.shape[-1]}")
    if x is not None and x.shape[-1] != model.n_genes:
        raise ModelError(f"x must have {model.n_genes} genes, got {x.shape[-1]}")
    if x is not None and len(x) != len(gamma):
        raise ModelError(f"x and gamma must have the same rows, one per cell; got {len(x)} and {len(gamma)}")
    return gamma
