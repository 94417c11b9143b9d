"""Discrete latents of the cells that take all their values at once, to be summed out."""

from typing import Any

import pyro
from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pyro_scvi.errors import ModelError

LEFT_OF_CELLS = -3
"""First dimension for the values of discrete latents: left of (cells, genes)."""

LEFT_OF_DRAWS = -4
"""First dimension for the values of discrete latents: left of (samples, cells, genes)."""


class Enumerating(EnumMessenger):
    """Lets discrete latents that ask for it, by ``infer={"enumerate": "parallel"}``, take all their values.

    Pyro's own notes down the dimensions of every site. ``pyro.markov`` alone needs them, which is refused beside such
    latents, and in a program without any they cost 3 % of a density.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if _asks(msg):
            try:
                super()._pyro_sample(msg)
            except NotImplementedError as error:
                raise _unlisted(msg["name"], error) from error

    def _pyro_post_sample(self, msg: Any) -> None:
        if _asks(msg):
            super()._pyro_post_sample(msg)


def n_values(law: Any, name: str) -> int:
    """How many values a discrete latent has.

    Raises
    ------
    ModelError
        If the law does not list them.
    """
    try:
        return len(law.enumerate_support(expand=False))
    except NotImplementedError as error:
        raise _unlisted(name, error) from error


def _unlisted(name: str, error: Exception) -> ModelError:
    return ModelError(
        f"the program's site {name!r} cannot be summed out, because its distribution does not list its values "
        f"({error}): take one dist.Categorical whose logits have an entry for each value or combination of "
        "values, the same number of them for every cell and draw, and look up by it what each stands for"
    )


def _asks(msg: Any) -> bool:
    return "enumerate" in (msg["infer"] or {})


def is_enumerated(node: Any) -> bool:
    """Whether a traced site took all its values at once, to be summed out."""
    return (node["infer"] or {}).get("_enumerate_dim") is not None


def enumerated_sites(trace: pyro.poutine.Trace) -> list[str]:
    """Names of the discrete latents that take all their values in this trace."""
    return [name for name, node in trace.nodes.items() if node["type"] == "sample" and is_enumerated(node)]


def log_sum_over_values(terms: Tensor, kept: int = 2) -> Tensor:
    """Log of the sum over the values of discrete latents: all dimensions but the last ``kept``, (samples, cells)."""
    return terms.flatten(0, -kept - 1).logsumexp(0) if terms.dim() > kept else terms
