"""What a program observes at given latents, and draws of its latents from the prior: by running it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_scvi.distributions.supports import WRAPPERS
from pyro_scvi.errors import ModelError
from pyro_scvi.guides.supported import require_expected, require_met, require_same_sites, theta_of
from pyro_scvi.model import SCVI
from pyro_scvi.types import Distribution, Theta
from pyro_scvi.utils.execution import executing


class Observed(NamedTuple):
    """What a program observed x from, and what it told of that, theta among it if by ``observe``.

    ``mask`` is False at the entries of x that it left out of its density; None or True if it left out none.
    """

    law: Distribution
    told: Mapping[str, Any]
    mask: Tensor | bool | None

    @property
    def kept(self) -> Tensor:
        """Whether each entry of x is in the density, of a shape that broadcasts to that of x."""
        return entries_kept(self.law, self.mask)


def entries_kept(law: Any, mask: Tensor | bool | None) -> Tensor:
    """Whether entries of x are in a density that is masked from outside, and by its distribution itself."""
    kept = torch.as_tensor(True if mask is None else mask)
    while isinstance(law, WRAPPERS):
        kept = kept & torch.as_tensor(law._mask) if isinstance(law, dist.MaskedDistribution) else kept
        law = law.base_dist
    return kept


def masked_entries(model: SCVI) -> ModelError:
    """The error for what would take counts for observed that the program leaves out of its density."""
    return ModelError(
        f"{type(model).__name__} leaves entries of x out of its density, by observe(mask=) or a masked distribution, "
        "and this would take their counts for observed, as do w, y and h given x, impute, differential_expression, "
        "leave_one_out, check_predictions and log likelihoods by entry. Latents, evidence, normalized_expression and "
        "predictive draws work as it is"
    )


def observed_at(model: SCVI, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor]) -> Observed:
    """Distribution of x, and theta (..., cells, genes) if it is told, at the local and global latents in ``sites``.

    ``x`` is what an observed library size is taken from; None: the program draws what it needs.

    Raises
    ------
    ModelError
        Naming a latent that is not in ``sites`` or that the program does not come to, or if it cannot be run without
        counts.
    """
    reached = _Reached(sites)
    with pyro.poutine.block(), reached, pyro.poutine.condition(data=sites):
        _run(model, x, gamma)
    return Observed(reached.law, reached.told, reached.mask)


def theta_at(model: SCVI, x: Tensor | None, gamma: Tensor, sites: dict[str, Tensor]) -> Theta:
    """The likelihood's parameters (..., cells, genes) at the local and global latents in ``sites``.

    Raises
    ------
    ModelError
        As :func:`observed_at`, and if the program does not observe x by ``observe``.
    """
    return theta_of(model, observed_at(model, x, gamma, sites).told)


def prior_draws(
    model: SCVI, gamma: Tensor, global_latents: dict[str, Tensor], n: int, names: Sequence[str]
) -> dict[str, Tensor]:
    """Draws of the latents ``names`` (n, cells, 1) and their events from the prior of each cell.

    The program runs for n copies of the cells and ends when the last of the latents is drawn. ``names`` are all that it
    has in the plate of the cells, ``global_latents`` all others. Raises NotImplementedError if one has no density to
    draw from.

    Raises
    ------
    ModelError
        Naming a latent that is neither, or that it does not come to, or if it cannot be run without counts.
    """
    drawn = _Drawn(names, global_latents, gamma)
    with pyro.poutine.block(), drawn, pyro.poutine.condition(data=global_latents):
        _run(model, None, gamma.repeat(n, 1))
    return {name: drawn.values[name].reshape(n, len(gamma), *drawn.values[name].shape[1:]) for name in names}


def drawn_counts(model: SCVI, gamma: Tensor) -> tuple[Tensor, pyro.poutine.Trace]:
    """What the program returns if it draws everything, and the trace of this run.

    Raises
    ------
    ModelError
        Naming a site that it does not have with counts, or not without them.
    """
    with _InPrecision(gamma), pyro.poutine.trace() as run:
        x = model(None, gamma)
    require_same_sites(run.trace, {site.name for site in model.discovered() if site.kind.sampled}, ())
    drawn: Any = run.trace.nodes["x"]["value"]
    if not isinstance(x, Tensor) or not torch.equal(x, drawn):
        raise ModelError(
            f"{type(model).__name__}.forward returns something else than the counts that it draws as 'x': end it with "
            "return self.observe(x, theta, marginal=marginal, mask=mask)"
        )
    return x, run.trace


def _run(model: SCVI, x: Tensor | None, gamma: Tensor) -> None:
    """Run a program until a handler has what it wants.

    Pyro's store of parameters stays as it is: a guide calls this in a training step, and the store would make its
    parameters anew.
    """
    with executing(register_parameters=False):
        try:
            model(x, gamma)
        except _Enough:
            return
        except (AttributeError, TypeError) as error:
            if x is not None:
                raise
            raise needs_counts(model, error) from error


def needs_counts(model: SCVI, error: Exception) -> ModelError:
    """The error for a program that takes x=None for a tensor; ``error`` is what Python made of it."""
    return ModelError(
        f"{type(model).__name__}.forward cannot be run without counts, as prior draws need it: x=None must draw them "
        f"({error})"
    )


class _Enough(Exception):
    """Ends a run."""


class _Reached(Messenger):
    """Keeps what x is sampled from, and ends the run there; refuses other latents on the way than those ``given``."""

    law: Any
    told: Mapping[str, Any]
    mask: Tensor | bool | None

    def __init__(self, given: Collection[str]) -> None:
        super().__init__()
        self.given, self.left = given, set(given)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == "x":
            require_met(self.left)
            self.law, self.told, self.mask = msg["fn"], msg["infer"] or {}, msg["mask"]
            raise _Enough
        require_expected(msg, self.given)
        self.left.discard(msg["name"])


class _InPrecision(Messenger):
    """Gives draws the precision of ``like``: a prior may be made of constants in another one."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.like = like

    def _pyro_post_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample) and msg["value"].is_floating_point():
            msg["value"] = msg["value"].to(self.like.dtype)


class _Drawn(_InPrecision):
    """Keeps the values of the latents ``names``, in the precision of ``like``, and ends the run when it has all.

    It refuses latents on the way that are neither these nor ``given``.
    """

    def __init__(self, names: Sequence[str], given: Collection[str], like: Tensor) -> None:
        super().__init__(like)
        self.wanted, self.given, self.values = set(names), given, dict[str, Tensor]()

    def _pyro_post_sample(self, msg: Any) -> None:
        super()._pyro_post_sample(msg)
        if msg["name"] in self.wanted:
            self.values[msg["name"]] = msg["value"]
            if self.values.keys() == self.wanted:
                raise _Enough
        elif msg["name"] == "x":
            require_met(self.wanted - self.values.keys())
        else:
            require_expected(msg, self.given)
