"""What identifies a run that writes block by block: a file of another run is not continued."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import Tensor

from pyro_scvi.data.cells import Cells
from pyro_scvi.errors import ModelError
from pyro_scvi.export.block_columns import Column
from pyro_scvi.persistence.contents import content_of, content_of_parts
from pyro_scvi.persistence.digests import digest_of, digest_of_counts, digest_of_names, digests_of_columns
from pyro_scvi.persistence.serialization import describe, states_of
from pyro_scvi.training.fitted import Fit
from pyro_scvi.version import __version__

if TYPE_CHECKING:
    from pyro_scvi.export.block_columns import Verb

VERSION = "package version"


def identity_of(
    fit: Fit, cells: Cells, obs: pd.DataFrame, told: Mapping[str, str], columns: dict[str, list[Column]]
) -> dict[str, Any]:
    """What results depend on, and what is written beside them, as JSON takes it; ``told`` are the verbs in words.

    The order of verbs and of columns is no matter.
    """
    return (
        {VERSION: __version__, "fit": _of_fit(fit)}
        | _of_cells(cells)
        | {
            "obs": digests_of_columns(obs),
            "arrays": sorted(column.shape for some in columns.values() for column in some),
            **{f"verb {name!r}": words for name, words in told.items()},
        }
    )


def in_words(verbs: Mapping[str, Verb]) -> dict[str, str]:
    """Verbs with what is bound to them.

    Raises
    ------
    ModelError
        If something that is bound cannot be told; names the verb.
    """
    return {name: _in_words(name, verb) for name, verb in verbs.items()}


def _in_words(name: str, verb: Verb) -> str:
    try:
        return content_of(verb, _known)
    except ModelError as error:
        raise ModelError(f"the verb {name!r} cannot be compared with a later call: {error}") from error


def differences(recorded: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    """In words, where a run is not the one that was recorded."""
    for name, value in run.items():
        then = recorded.get(name)
        if isinstance(value, dict) and isinstance(then, dict):
            yield from (f"{name} column {key!r}" for key in then | value if then.get(key) != value.get(key))
        elif then != value:
            yield name


def _of_cells(cells: Cells) -> dict[str, Any]:
    return {
        "cell names": digest_of_names(cells.cell_names),
        "gene names": digest_of_names(cells.gene_names),
        "counts": digest_of_counts(cells.counts),
        "covariates": digest_of(cells.gamma.blocks()),
    }


def _of_fit(fit: Fit) -> str:
    parts = [describe(part, fit.model) for part in (fit.model, fit.guide)]
    return digest_of(
        [
            json.dumps(parts, sort_keys=True).encode(),
            content_of_parts(fit.model, fit.guide).encode(),
            _of_tensors(states_of(fit.model, fit.guide)).encode(),
        ]
    )


def _of_tensors(tensors: Mapping[str, Tensor]) -> str:
    return digest_of(name.encode() + value.detach().cpu().numpy().tobytes() for name, value in tensors.items())


def _known(value: Any) -> str | None:
    """Fits and cells in words, None for anything else."""
    if isinstance(value, Fit):
        return f"Fit {_of_fit(value)}"
    return f"Cells {_of_cells(value)}" if isinstance(value, Cells) else None
