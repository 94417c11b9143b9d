"""What identifies a training run: a checkpoint is resumed with its own cells and options only."""

import hashlib
from typing import Any

import numpy as np
from torch import nn

from pyro_scvi.data.cells import Cells
from pyro_scvi.data.counts import Source
from pyro_scvi.model import SCVI
from pyro_scvi.persistence.contents import content_of, content_of_parts
from pyro_scvi.persistence.digests import digest_of, digest_of_counts
from pyro_scvi.persistence.serialization import describe

_DIGEST = "digest of counts and covariates"


def identity(model: SCVI, cells: Cells, options: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run, as JSON takes it: its cells and its options."""
    elbo, validation = options["elbo"], options["validation"]
    own = content_of_parts(model)
    facts = {name: value for name, value in vars(elbo).items() if not isinstance(value, nn.Module)}
    plain = {
        name: value if isinstance(value, bool | int | float | str) else content_of(value)
        for name, value in facts.items()
        if value is not None
    }
    told = {
        "elbo": {"class": type(elbo).__name__, **plain},
        "cells": _of_cells(cells),
        "validation": _of_cells(validation) if isinstance(validation, Cells) else describe(validation, model),
    }
    told |= {"arguments of components of your own": digest_of([own.encode()])} if own else {}
    return {name: describe(value, model) for name, value in options.items() if name not in told} | told


def with_digest(recorded: Any, cells: Cells) -> Any:
    """Cells as a checkpoint recorded them, with today's digest if it has an earlier one of these cells.

    Earlier versions took the arrays in memory as they lay there. Of counts on disk they took sums, which do not tell
    one count from another; those are not known again.
    """
    known = isinstance(recorded, dict) and not isinstance(cells.counts, Source)
    return _of_cells(cells) if known and recorded.get(_DIGEST) == _of_arrays(cells) else recorded


def _of_cells(cells: Cells) -> dict[str, Any]:
    """Number of cells, and a digest of counts and covariates that does not depend on how they are stored."""
    digest = digest_of([digest_of_counts(cells.counts).encode(), *cells.gamma.blocks()])
    return {"n_cells": cells.n_cells, _DIGEST: digest}


def _of_arrays(cells: Cells) -> str:
    counts: Any = cells.counts
    arrays = (counts,) if isinstance(counts, np.ndarray) else (counts.data, counts.indices, counts.indptr)
    digest = hashlib.sha256()
    for part in arrays:
        digest.update(np.ascontiguousarray(part).view(np.uint8).data)
    for block in cells.gamma.blocks():
        digest.update(block)
    return digest.hexdigest()[:16]
