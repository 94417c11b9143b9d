"""What a program did wrong if its run ended in an error of Python, torch or Pyro that does not say so."""

import re
from collections.abc import Iterator, Sequence
from inspect import unwrap
from traceback import walk_tb
from typing import Any

from pyro.poutine.broadcast_messenger import BroadcastMessenger
from torch import nn

from pyro_scvi.distributions.supports import unwrapped
from pyro_scvi.errors import ModelError
from pyro_scvi.priors.weights import is_taken_out

CELLS_DIM = -2
"""The dimension of the plate of the cells, that of the genes being the last."""

SIZES = re.compile("size of tensor|Shape mismatch inside plate")
"""What torch and Pyro say of arrays that do not broadcast."""


def explained(program: nn.Module, error: Exception, met: Sequence[dict[str, Any]]) -> ModelError | None:
    """The error that names the site or the part; None where Python's own says as much.

    ``met`` are the messages of the sites that the run came to.
    """
    if isinstance(error, AttributeError):
        return _undrawn(program, error)
    if isinstance(error, NotImplementedError):
        return next((_unexpanded(msg) for msg in _broadcast(error)), None)
    if SIZES.search(str(error)):
        return next((_along_cells(msg, error) for msg in met if _is_along_cells(msg)), None)
    return None


def _undrawn(program: nn.Module, error: AttributeError) -> ModelError | None:
    """A parameter that is latent, and is computed with where it is not drawn."""
    if not is_taken_out(error.obj, error.name):
        return None
    return ModelError(
        f"{type(program).__name__}.forward computes with {error.name!r} of {type(error.obj).__name__}, which "
        "weight_priors= made a latent, where it is not drawn: enter 'with self.weights.drawn_into(self):' before the "
        "plate of the cells, and decode and observe inside of it"
    )


def _broadcast(error: Exception) -> Iterator[dict[str, Any]]:
    """Messages of the sites whose distribution a plate was giving its size when the error came."""
    for frame, _ in walk_tb(error.__traceback__):
        if frame.f_code is unwrap(BroadcastMessenger._pyro_sample).__code__:
            yield frame.f_locals["msg"]


def _unexpanded(msg: dict[str, Any]) -> ModelError:
    return ModelError(
        f"the distribution of the program's site {msg['name']!r} ({type(unwrapped(msg['fn'])).__name__}) cannot be "
        "given a plate's size, for it has no method expand: give it one, or take another; instead of dist.LKJ take "
        "dist.LKJCholesky, whose value L gives the correlations L @ L.mT"
    )


def _is_along_cells(msg: dict[str, Any]) -> bool:
    shape = getattr(msg["fn"], "batch_shape", ())
    in_cells = any(frame.name == "cells" for frame in msg["cond_indep_stack"])
    return len(shape) >= -CELLS_DIM and shape[CELLS_DIM] > 1 and not in_cells


def _along_cells(msg: dict[str, Any], error: Exception) -> ModelError:
    return ModelError(
        f"the program cannot be run for any number of cells ({error}): its site {msg['name']!r} is outside of the "
        f"plate 'cells' and has {msg['fn'].batch_shape[CELLS_DIM]} values along the dimension {CELLS_DIM}, which is "
        "that of the cells. Make its plate at dim=-1, and give each cell its own by gamma @ value or value[codes]"
    )
